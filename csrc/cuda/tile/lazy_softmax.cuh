// The running softmax of 16 rows of a warp that rescales its output only when it must.
#pragma once

#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda {

// As SlabSoftmax, but the maximum that is subtracted may lag behind the true one by a factor of 2^8 in the
// exponentials. fp32 sums and 16-bit probabilities lose nothing by that, and rescaling becomes rare.
struct LazySoftmax {
  float max[2] = {kNegInf, kNegInf};  // what is subtracted, in raw scores
  float sum[2] = {0.f, 0.f};          // of this thread's columns

  // acc: raw scores, -inf where masked; becomes 2^(scale * (score - max)). scale > 0, times log2(e).
  template <int kTiles, int kOut>
  __device__ __forceinline__ void update(float (&acc)[kTiles][4], float (&out)[kOut][4], float scale) {
    constexpr float kSlack = 8.f;
    float high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = acc[0][2 * h], odd = acc[0][2 * h + 1];
#pragma unroll
      for (int n = 1; n < kTiles; ++n) {
        even = fmaxf(even, acc[n][2 * h]);
        odd = fmaxf(odd, acc[n][2 * h + 1]);
      }
      high[h] = quad_max(fmaxf(even, odd));
    }
    // -inf * scale stays -inf, so the first visible key always raises.
    const bool raise = high[0] * scale > max[0] * scale + kSlack || high[1] * scale > max[1] * scale + kSlack;
    if (__any_sync(~0u, raise)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float next = fmaxf(max[h], high[h]);
        const float shrink = next == kNegInf ? 1.f : ptx::exp2_approx((max[h] - next) * scale);
        max[h] = next;
        sum[h] *= shrink;
#pragma unroll
        for (int d = 0; d < kOut; ++d) {
          out[d][2 * h] *= shrink;
          out[d][2 * h + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = max[h] == kNegInf ? 0.f : max[h] * scale;  // all masked so far: exponents stay -inf
      float even = 0.f, odd = 0.f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        acc[n][2 * h] = ptx::exp2_approx(fmaf(acc[n][2 * h], scale, -base));
        acc[n][2 * h + 1] = ptx::exp2_approx(fmaf(acc[n][2 * h + 1], scale, -base));
        even += acc[n][2 * h];
        odd += acc[n][2 * h + 1];
      }
      sum[h] += even + odd;
    }
  }
};

// Accumulators rounded to T as the A fragments of the next product, 16 columns each.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_fragments(uint32_t (&p)[kTiles / 2][4], const float (&acc)[kTiles][4]) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    p[k][0] = ptx::pack2<T>(acc[2 * k][0], acc[2 * k][1]);
    p[k][1] = ptx::pack2<T>(acc[2 * k][2], acc[2 * k][3]);
    p[k][2] = ptx::pack2<T>(acc[2 * k + 1][0], acc[2 * k + 1][1]);
    p[k][3] = ptx::pack2<T>(acc[2 * k + 1][2], acc[2 * k + 1][3]);
  }
}

}  // namespace nsa::cuda
