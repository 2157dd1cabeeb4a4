// Attention over a cache: what the kernels of both paths share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/tile/warp_tile.cuh"
#include "nsa/launch.h"

namespace nsa::cuda {

// SlabSoftmax that rescales only when a maximum grows, which after the first tiles is seldom, and then only
// when it grows by more than 2^kSlack in the exponentials.
struct DecodeSoftmax {
  float max[2] = {kNegInf, kNegInf};  // what is subtracted, in raw scores
  float sum[2] = {0.f, 0.f};          // of this thread's columns

  template <int kTiles, int kOut>
  __device__ __forceinline__ void update(float (&acc)[kTiles][4], float (&out)[kOut][4], float scale) {
    update<0>(acc, out, scale, [](const float(&)[2]) {});
  }

  // rescaled(shrink) has to shrink what else is relative to max.
  template <int kSlack, int kTiles, int kOut, typename Rescaled>
  __device__ __forceinline__ void update(float (&acc)[kTiles][4], float (&out)[kOut][4], float scale,
                                         const Rescaled& rescaled) {
    float high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      high[h] = max[h];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) high[h] = fmaxf(high[h], fmaxf(acc[n][2 * h], acc[n][2 * h + 1]));
      high[h] = quad_max(high[h]);
    }
    const auto grows = [&](int h) {
      return kSlack == 0 ? high[h] > max[h] : (high[h] - max[h]) * scale > kSlack;
    };
    if (__any_sync(~0u, grows(0) || grows(1))) {
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shrink[h] = high[h] == kNegInf ? 1.f : ptx::exp2_approx((max[h] - high[h]) * scale);
        max[h] = high[h];
        sum[h] *= shrink[h];
#pragma unroll
        for (int d = 0; d < kOut; ++d) {
          out[d][2 * h] *= shrink[h];
          out[d][2 * h + 1] *= shrink[h];
        }
      }
      rescaled(shrink);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = max[h] == kNegInf ? 0.f : max[h] * scale;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          acc[n][c] = ptx::exp2_approx(fmaf(acc[n][c], scale, -base));
          sum[h] += acc[n][c];
        }
      }
    }
  }
};

// The weight of a branch in a row of the output, [T, Hq].
__device__ __forceinline__ float gate(const DecodeAttentionParams& p, int64_t row, int branch) {
  const int64_t at = row * kNumBranches + branch;
  float logit;
  if (p.gate_dtype == DType::kF32) {
    logit = static_cast<const float*>(p.gate_logits)[at];
  } else if (p.gate_dtype == DType::kBF16) {
    logit = __bfloat162float(static_cast<const __nv_bfloat16*>(p.gate_logits)[at]);
  } else {
    logit = __half2float(static_cast<const __half*>(p.gate_logits)[at]);
  }
  return 1.f / (1.f + __expf(-logit));
}

}  // namespace nsa::cuda
