// The launchers of every device, one per operation and direction. ops/ calls nothing else.
#pragma once

#include "nsa/params.h"
#include "nsa/status.h"

// Operation and its parameters, listed once: declarations and run-time dispatch are generated from it.
#define NSA_FOR_EACH_FORWARD_OP(X)                          \
  X(compress_forward, CompressFwdParams)                    \
  X(banded_attention_forward, BandedAttentionFwdParams)     \
  X(block_scores, BlockScoresParams)                        \
  X(select_blocks, SelectBlocksParams)                      \
  X(selected_attention_forward, SelectedAttentionFwdParams) \
  X(gated_combine_forward, GatedCombineFwdParams)           \
  X(attention_forward, AttentionFwdParams)                  \
  X(fill_padding, FillPaddingParams)                        \
  X(append_kv, AppendKvParams)                              \
  X(decode_attention, DecodeAttentionParams)
#define NSA_FOR_EACH_BACKWARD_OP(X)                          \
  X(compress_backward, CompressBwdParams)                    \
  X(banded_attention_backward, BandedAttentionBwdParams)     \
  X(banded_branches_backward, BandedBranchesBwdParams)       \
  X(selected_attention_backward, SelectedAttentionBwdParams) \
  X(gated_combine_backward, GatedCombineBwdParams)           \
  X(selected_branch_backward, SelectedBranchBwdParams)       \
  X(attention_delta, DeltaParams)
#define NSA_FOR_EACH_OP(X)   \
  NSA_FOR_EACH_FORWARD_OP(X) \
  NSA_FOR_EACH_BACKWARD_OP(X)

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

namespace nsa::cuda {

struct Stream {
  void* handle = nullptr;  // cudaStream_t
  // A second one for what may run beside the first: launchers order both, so that whoever waits for the first
  // waits for all. Null: there is none.
  void* side = nullptr;
};

#define NSA_DECLARE_CUDA(name, Params) Status name(const Params& p, const Stream& stream);
NSA_FOR_EACH_OP(NSA_DECLARE_CUDA)
#undef NSA_DECLARE_CUDA

// Whether AttentionGrads::key_results may be set. Neither dk nor dv, key_results and the workspace are looked
// at.
bool writes_key_results(const BandedAttentionBwdParams& p);

// Bytes of device memory behind Params::workspace: a function of shapes alone, 0 for none.
int64_t workspace_bytes(const SelectBlocksParams& p);
int64_t workspace_bytes(const AttentionFwdParams& p);  // beside those of its steps
int64_t workspace_bytes(const BandedAttentionBwdParams& p);
int64_t workspace_bytes(const BandedBranchesBwdParams& p);
int64_t workspace_bytes(const SelectedAttentionBwdParams& p);
int64_t workspace_bytes(const CompressBwdParams& p);
int64_t workspace_bytes(const AppendKvParams& p);
int64_t workspace_bytes(const DecodeAttentionParams& p);

}  // namespace nsa::cuda
