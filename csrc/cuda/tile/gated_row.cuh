// The gate in the epilogue of selected attention: its output as it is stored, and the weighted sum of all
// branches.
#pragma once

#include "cuda/ptx/streaming_store.cuh"
#include "cuda/tile/warp_tile.cuh"
#include "nsa/params.h"

namespace nsa::cuda {

// The arithmetic of gated_combine, bit by bit: the selected output is rounded before it is weighed. Nothing
// that goes by here is wanted in the L2 cache again, unlike the keys.
template <typename T, int kOut>
struct GatedRows {
  static constexpr int kGroups = kOut / 4;  // of 32 columns, of which a thread holds 8
  const GatedCombineFwdParams& gate;
  T* o_slc;        // null: not wanted
  int64_t row[2];  // of which a thread reads; what it may write is valid
  bool valid[2];
  int lane;

  // Of the first column of this thread in row h, in bytes: so an address costs one addition.
  __device__ __forceinline__ int64_t offset(int h) const { return row[h] * (kOut * 16) + 16 * (lane & 3); }

  __device__ __forceinline__ uint4 load(int branch, const int64_t (&at)[2], int h, int group) const {
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const char*>(gate.o_branch[branch]) + at[h]) +
                  4 * group);
  }

  // The lanes of a quad share a row: lane b of it brings the logit of branch b, as it is stored.
  __device__ __forceinline__ void load_logits(uint32_t (&logit)[2]) const {
    int64_t at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      at[h] = row[h] * kNumBranches + min(lane & 3, kNumBranches - 1);
    }
    if (gate.gate_dtype == DType::kF32) {
#pragma unroll
      for (int h = 0; h < 2; ++h) logit[h] = __ldcs(static_cast<const uint32_t*>(gate.gate_logits) + at[h]);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) logit[h] = __ldcs(static_cast<const uint16_t*>(gate.gate_logits) + at[h]);
    }
  }

  __device__ __forceinline__ float weight(uint32_t logit) const {
    const float x = gate.gate_dtype == DType::kF32 ? __uint_as_float(logit) : ptx::unpack2<T>(logit).x;
    return 1.f / (1.f + __expf(-x));
  }

  static __device__ __forceinline__ void add(float2 (&sum)[4], float weight, const uint4& branch) {
    const uint32_t words[4] = {branch.x, branch.y, branch.z, branch.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::unpack2<T>(words[i]);
      sum[i].x = fmaf(weight, pair.x, sum[i].x);
      sum[i].y = fmaf(weight, pair.y, sum[i].y);
    }
  }

  // Both rows of a quad of lanes; all lanes of the warp take part. out times factor[h] is the selected
  // output. Without branches, so that the steps may overlap.
  __device__ __forceinline__ void store(const float (&out)[kOut][4], const float (&factor)[2]) const {
    uint32_t logit[2];
    load_logits(logit);
    const int64_t at[2] = {offset(0), offset(1)};
    // What the other branches gave, half of it under way while the other half is at work.
    uint4 cmp[kGroups], swa[kGroups];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) cmp[i] = load(0, at, 0, i), swa[i] = load(2, at, 0, i);
    const float own[2] = {weight(logit[0]), weight(logit[1])};
    float weights[kNumBranches];  // of a row
#pragma unroll
    for (int step = 0; step < 2 * kGroups; ++step) {
      const int h = step / kGroups, i = step % kGroups;
      if (i == 0) {
#pragma unroll
        for (int b = 0; b < kNumBranches; ++b) weights[b] = __shfl_sync(~0u, own[h], lane & ~3 | b);
      }
      const uint4 slc = gather_columns<T>(out, i, h, factor[h], lane);
      float2 sum[4] = {};
      add(sum, weights[0], cmp[i]);
      add(sum, weights[1], slc);
      add(sum, weights[2], swa[i]);
      if (h == 0) cmp[i] = load(0, at, 1, i), swa[i] = load(2, at, 1, i);
      if (o_slc != nullptr)
        ptx::store_streaming_if(reinterpret_cast<char*>(o_slc) + at[h] + 64 * i, slc, valid[h]);
      ptx::store_streaming_if(
          static_cast<char*>(gate.o) + at[h] + 64 * i,
          make_uint4(ptx::pack2<T>(sum[0].x, sum[0].y), ptx::pack2<T>(sum[1].x, sum[1].y),
                     ptx::pack2<T>(sum[2].x, sum[2].y), ptx::pack2<T>(sum[3].x, sum[3].y)),
          valid[h]);
    }
  }
};

}  // namespace nsa::cuda
