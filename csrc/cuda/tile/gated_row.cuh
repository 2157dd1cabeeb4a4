// The gate in the epilogue of selected attention: its output as it is stored, and the weighted sum of all
// branches.
#pragma once

#include "cuda/tile/warp_tile.cuh"
#include "nsa/params.h"

namespace nsa::cuda {

// The arithmetic of gated_combine, bit by bit: the selected output is rounded before it is weighed. Nothing
// that goes by here is wanted in the L2 cache again, unlike the keys.
template <typename T, int kOut>
struct GatedRows {
  static constexpr int kGroups = kOut / 4;  // of 32 columns, of which a thread holds 8
  const GatedCombineFwdParams& gate;
  T* o_slc;  // null: not wanted
  int64_t row[2];
  bool valid[2];
  int lane;

  // Of the first column of this thread in row h.
  __device__ __forceinline__ int64_t begin(int h) const { return row[h] * (kOut * 8) + 8 * (lane & 3); }

  __device__ __forceinline__ uint4 load(int branch, int h, int group) const {
    if (!valid[h]) return make_uint4(0, 0, 0, 0);
    return __ldcs(
        reinterpret_cast<const uint4*>(static_cast<const T*>(gate.o_branch[branch]) + begin(h) + 32 * group));
  }

  __device__ __forceinline__ void load_weights(float (&weight)[kNumBranches], int h) const {
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      float logit = 0.f;
      const int64_t i = row[h] * kNumBranches + b;
      if (valid[h]) {
        logit = gate.gate_dtype == DType::kF32
                    ? static_cast<const float*>(gate.gate_logits)[i]
                    : static_cast<float>(static_cast<const T*>(gate.gate_logits)[i]);
      }
      weight[b] = 1.f / (1.f + __expf(-logit));
    }
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
  // output.
  __device__ __forceinline__ void store(const float (&out)[kOut][4], const float (&factor)[2]) const {
    constexpr int kSteps = 2 * kGroups;
    // What the other branches gave, half of it under way while the other half is at work.
    uint4 cmp[kGroups], swa[kGroups];
    float weight[2][kNumBranches];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) cmp[i] = load(0, 0, i), swa[i] = load(2, 0, i);
    load_weights(weight[0], 0);
    load_weights(weight[1], 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int h = step / kGroups, i = step % kGroups;
      const uint4 slc = gather_columns<T>(out, i, h, factor[h], lane);
      float2 sum[4] = {};
      add(sum, weight[h][0], cmp[i]);
      add(sum, weight[h][1], slc);
      add(sum, weight[h][2], swa[i]);
      if (h == 0) cmp[i] = load(0, 1, i), swa[i] = load(2, 1, i);
      if (!valid[h]) continue;
      const int64_t at = begin(h) + 32 * i;
      if (o_slc != nullptr) __stcs(reinterpret_cast<uint4*>(o_slc + at), slc);
      __stcs(reinterpret_cast<uint4*>(static_cast<T*>(gate.o) + at),
             make_uint4(ptx::pack2<T>(sum[0].x, sum[0].y), ptx::pack2<T>(sum[1].x, sum[1].y),
                        ptx::pack2<T>(sum[2].x, sum[2].y), ptx::pack2<T>(sum[3].x, sum[3].y)));
    }
  }
};

}  // namespace nsa::cuda
