// The gate at the end of the last branch: its output as it is stored, and the weighted sum of all three.
#pragma once

#include "cuda/tile/warp_tile.cuh"
#include "nsa/params.h"

namespace nsa::cuda {

// sigmoid of the three logits of a row.
template <typename T>
__device__ __forceinline__ void load_gates(float (&gates)[kNumBranches], const FusedGate& gate, int64_t row) {
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) {
    const int64_t i = row * kNumBranches + b;
    const float logit = gate.gate_dtype == DType::kF32
                            ? static_cast<const float*>(gate.gate_logits)[i]
                            : static_cast<float>(static_cast<const T*>(gate.gate_logits)[i]);
    gates[b] = 1.f / (1.f + __expf(-logit));
  }
}

// The sum of gate b times branch b over the branches in order, 8 elements of T each.
template <typename T>
__device__ __forceinline__ uint4 gated_sum(const float (&gates)[kNumBranches],
                                           const uint4 (&branch)[kNumBranches]) {
  float sum[8] = {};
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) {
    const uint32_t words[4] = {branch[b].x, branch[b].y, branch[b].z, branch[b].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::unpack2<T>(words[i]);
      sum[2 * i] = fmaf(gates[b], pair.x, sum[2 * i]);
      sum[2 * i + 1] = fmaf(gates[b], pair.y, sum[2 * i + 1]);
    }
  }
  return make_uint4(ptx::pack2<T>(sum[0], sum[1]), ptx::pack2<T>(sum[2], sum[3]),
                    ptx::pack2<T>(sum[4], sum[5]), ptx::pack2<T>(sum[6], sum[7]));
}

// Row `row` of [T * Hq, kOut * 8] of o, and of the gate's o where there is a gate. All lanes take part;
// nothing is read or stored for a row that is not valid. The other branches are read kAhead * 32 columns at a
// time.
template <typename T, int kAhead, int kOut>
__device__ __forceinline__ void store_gated_row(void* o, const FusedGate& gate, int64_t row, bool valid,
                                                const float (&out)[kOut][4], int half, float factor,
                                                int lane) {
  static_assert(kOut / 4 % kAhead == 0);
  const int64_t begin = row * (kOut * 8) + 8 * (lane & 3);
  if (gate.o == nullptr) {
    store_row<T>(valid ? static_cast<T*>(o) + row * (kOut * 8) : nullptr, out, half, factor, lane);
    return;
  }
  float gates[kNumBranches] = {};
  if (valid) load_gates<T>(gates, gate, row);
#pragma unroll
  for (int first = 0; first < kOut / 4; first += kAhead) {
    uint4 branch[kAhead][kNumBranches] = {};
    if (valid) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int b = 0; b < 2; ++b)
          branch[i][b] = *reinterpret_cast<const uint4*>(static_cast<const T*>(gate.o_before[b]) + begin +
                                                         32 * (first + i));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      branch[i][2] = gather_columns<T>(out, first + i, half, factor, lane);
      if (!valid) continue;
      *reinterpret_cast<uint4*>(static_cast<T*>(o) + begin + 32 * (first + i)) = branch[i][2];
      *reinterpret_cast<uint4*>(static_cast<T*>(gate.o) + begin + 32 * (first + i)) =
          gated_sum<T>(gates, branch[i]);
    }
  }
}

}  // namespace nsa::cuda
