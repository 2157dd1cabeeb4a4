// The steps of phi's backward; csrc/cuda/compress_bwd.cu puts them in order.
#pragma once

#include "cuda/host/compress_bwd_plan.h"
#include "nsa/launch.h"

namespace nsa::cuda::portable {

#define NSA_DECLARE_STEP(name) \
  Status name(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream);
NSA_DECLARE_STEP(compress_bwd_tokens)         // plan.tokens
NSA_DECLARE_STEP(compress_bwd_linear)         // kLinear: dZ
NSA_DECLARE_STEP(compress_bwd_hidden)         // kMlp: Z in plan.dz -> dZ there, and silu(Z)
NSA_DECLARE_STEP(compress_bwd_biases)         // db1 and db2
NSA_DECLARE_STEP(compress_bwd_pe)             // dPE, from db1
NSA_DECLARE_STEP(compress_bwd_first_weight)   // the partial sums of dW1
NSA_DECLARE_STEP(compress_bwd_second_weight)  // the partial sums of dW2
NSA_DECLARE_STEP(compress_bwd_add_first)      // dW1 from them and db1
NSA_DECLARE_STEP(compress_bwd_add_second)     // dW2
NSA_DECLARE_STEP(compress_bwd_input)          // dX
#undef NSA_DECLARE_STEP

Status compress_bwd_mean(const CompressBwdParams& p, const Stream& stream);

}  // namespace nsa::cuda::portable
