// The running softmax on accumulators of a warpgroup's products: a thread holds rows lane / 4 and lane / 4 +
// 8 of its warp's 16, element i of an accumulator lies in row i / 2 % 2 of them and column 8 * (i / 4) + 2 *
// (lane % 4) + i % 2.
#pragma once

#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda {

// Of a thread's two rows.
struct RowPair {
  float max[2];     // scaled, in base 2; may lag behind the true maximum by kSlack
  float sum[2];     // of this thread's columns
  float shrink[2];  // of the last update: 2^(old maximum - new maximum)

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = kNegInf;
    sum[0] = sum[1] = 0.f;
  }
};

constexpr float kSlack =
    8.f;  // probabilities up to 2^8 lose nothing in 16 bits, and most rescalings are saved

// s: raw scores, -inf where masked; becomes 2^(scale * s - max). True (for the whole warp alike) where the
// output has to be multiplied by `shrink` before more is added.
template <int kCount>
__device__ __forceinline__ bool softmax_update(float (&s)[kCount], RowPair& rows, float scale) {
  float high[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float a = s[2 * h], b = s[2 * h + 1];
#pragma unroll
    for (int i = 1; i < kCount / 4; ++i) {
      a = fmaxf(a, s[4 * i + 2 * h]);
      b = fmaxf(b, s[4 * i + 2 * h + 1]);
    }
    high[h] = quad_max(fmaxf(a, b)) * scale;
  }
  const bool rescale = __any_sync(~0u, high[0] > rows.max[0] + kSlack || high[1] > rows.max[1] + kSlack);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float next = rescale ? fmaxf(rows.max[h], high[h]) : rows.max[h];
    const float base = next == kNegInf ? 0.f : next;  // all masked so far: exponents stay -inf
    rows.shrink[h] = ptx::exp2_approx(rows.max[h] - base);
    rows.max[h] = next;
    float sum0 = rows.sum[h] * rows.shrink[h], sum1 = 0.f;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      float& p0 = s[4 * i + 2 * h];
      float& p1 = s[4 * i + 2 * h + 1];
      p0 = ptx::exp2_approx(fmaf(p0, scale, -base));
      p1 = ptx::exp2_approx(fmaf(p1, scale, -base));
      sum0 += p0;
      sum1 += p1;
    }
    rows.sum[h] = sum0 + sum1;
  }
  return rescale;
}

// Accumulators rounded to T, as the A fragments of the next product.
template <typename T, int kCount>
__device__ __forceinline__ void pack_fragments(uint32_t (&a)[kCount / 8][4], const float (&s)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i / 4][i % 4] = ptx::pack2<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace nsa::cuda
