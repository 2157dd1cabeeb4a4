// The gate on checked arguments: what nsa::gated_combine and nsa::attention share.
#pragma once

#include <array>

#include "nsa/params.h"
#include "ops/tensors.h"

namespace nsa::ops {

using BranchTensors = std::array<at::Tensor, kNumBranches>;  // cmp, slc, swa

// The Params of the gate, with the tensors behind their pointers. Arguments as in combine_forward.
struct CombineForward {
  BranchTensors o_branch;
  at::Tensor gate_logits;
  GatedCombineFwdParams params;

  CombineForward(const BranchTensors& o_branch, const at::Tensor& gate_logits, int64_t num_rows,
                 const at::Tensor& o, const int32_t* end_token);
};

// o of the first num_rows tokens; branches and gate_logits may hold anything behind them. Where the offsets
// are on a device, end_token points to the last of them, and o = 0 is written behind it.
void combine_forward(const char* op, const BranchTensors& o_branch, const at::Tensor& gate_logits,
                     int64_t num_rows, const at::Tensor& o, const int32_t* end_token = nullptr);

// Every output is contiguous, or undefined where it is not wanted.
struct CombineGrads {
  BranchTensors d_o_branch;  // [T, Hq, Dv]
  at::Tensor d_gate_logits;  // [T, Hq, 3]
  BranchTensors gates;       // [T, Hq], acc
  BranchTensors delta;       // [T, Hq], acc
};

// The Params of the gate's backward, with the tensors behind their pointers. Arguments as in
// combine_backward.
struct CombineBackward {
  at::Tensor d_o, gate_logits;
  BranchTensors o_branch;
  GatedCombineBwdParams params;

  CombineBackward(const at::Tensor& d_o, const BranchTensors& o_branch, const at::Tensor& gate_logits,
                  int64_t num_rows, const CombineGrads& grads, const int32_t* end_token);
};

// end_token as in combine_forward: gate gradients are 0 behind it.
void combine_backward(const char* op, const at::Tensor& d_o, const BranchTensors& o_branch,
                      const at::Tensor& gate_logits, int64_t num_rows, const CombineGrads& grads,
                      const int32_t* end_token = nullptr);

}  // namespace nsa::ops
