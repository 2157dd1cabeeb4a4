// The launchers of every device, one per operation and direction. ops/ calls nothing else.
#pragma once

#include "nsa/params.h"
#include "nsa/status.h"

// Operation and its parameters, listed once: declarations here, and run-time dispatch in cpu/dispatch.cpp,
// are generated from it.
#define NSA_FOR_EACH_OP(X)                                   \
  X(banded_attention_forward, BandedAttentionFwdParams)      \
  X(banded_attention_backward, BandedAttentionBwdParams)     \
  X(block_scores, BlockScoresParams)                         \
  X(select_blocks, SelectBlocksParams)                       \
  X(selected_attention_forward, SelectedAttentionFwdParams)  \
  X(selected_attention_backward, SelectedAttentionBwdParams) \
  X(gated_combine_forward, GatedCombineFwdParams)            \
  X(gated_combine_backward, GatedCombineBwdParams)           \
  X(attention_delta, DeltaParams)                            \
  X(compress_forward, CompressFwdParams)                     \
  X(compress_backward, CompressBwdParams)

namespace nsa::cpu {

// How the host runs work on its threads: calls body(context, thread) once for every thread in 0 ..
// num_threads - 1, possibly at the same time, and returns when all are done.
struct Parallel {
  int num_threads = 1;
  void (*run)(int num_threads, void (*body)(void* context, int thread), void* context) = nullptr;
};

#define NSA_DECLARE_CPU(name, Params) Status name(const Params& p, const Parallel& parallel);
NSA_FOR_EACH_OP(NSA_DECLARE_CPU)
#undef NSA_DECLARE_CPU

// The instruction set that the launchers use: "avx512", "avx2" or "generic" (environment variable NSA_CPU_ISA
// picks a lower one).
const char* active_isa();

}  // namespace nsa::cpu
