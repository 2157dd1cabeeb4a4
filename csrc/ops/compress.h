// phi as every operator takes it: its checks, and what a kernel is told of it.
#pragma once

#include "ops/checks.h"
#include "ops/ops.h"

namespace nsa::ops {

constexpr size_t kNumPhiParameters = 5;
using PhiParameters = std::array<Tensor, kNumPhiParameters>;  // pe, w1, b1, w2, b2; undefined where None

// What the checks establish.
struct Phi {
  CompressKind kind;
  KeyBlocks blocks;
  int num_heads, head_dim, hidden_size;
  bool per_head;
};

Phi check_phi(const Checks& checks, const Tensor& x, const PhiParameters& parameters,
              const OptTensor& cu_seqlens, const SymInt& max_seqlen, int64_t block_size, int64_t stride,
              std::string_view kind);

// Sets kind, sizes and weights of params; keep what it returns, the tensors behind the pointers.
PhiParameters set_phi(const Phi& phi, const PhiParameters& given, DType dtype, CompressFwdParams* params);

}  // namespace nsa::ops
