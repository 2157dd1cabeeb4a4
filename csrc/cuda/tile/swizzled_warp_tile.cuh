// Products of one warp (mma.sync) on swizzled tiles, the same tiles that wgmma reads.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda {

// acc[n / 8][4] = A[16 x kDim] . B[kN x kDim]^T. a: the first of the 16 rows in a tile of kRowsA rows; b: a
// tile of kN rows. The swizzle flips address bits 4 .. 6 by row % 8, so a step of 16 columns flips bits as
// well.
template <typename T, int kDim, int kN, int kRowsA>
__device__ __forceinline__ void multiply_swizzled_transposed(float (&acc)[kN / 8][4], uint32_t a, uint32_t b,
                                                             int lane) {
  const uint32_t a_lane = a + swizzled_offset(kRowsA, lane & 15, lane >> 4);
  const uint32_t b_lane = b + swizzled_offset(kN, (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0;
  }
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    const uint32_t flip = k % kPanel * 2;
    uint32_t ra[4];
    ptx::load_matrices(ra, (a_lane ^ flip) + k / kPanel * kRowsA * kPanelPitch);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t rb[4];
      ptx::load_matrices(rb, (b_lane ^ flip) + (k / kPanel * kN + n) * kPanelPitch);
      ptx::mma<T>(acc[n / 8], ra, rb[0], rb[1]);
      ptx::mma<T>(acc[n / 8 + 1], ra, rb[2], rb[3]);
    }
  }
}

// out[d / 8][4] += P[16 x kN] . V[kN x kDim], P in fragments.
template <typename T, int kDim, int kN>
__device__ __forceinline__ void multiply_swizzled(float (&out)[kDim / 8][4], const uint32_t (&p)[kN / 16][4],
                                                  uint32_t v, int lane) {
  const uint32_t v_lane = v + swizzled_offset(kN, lane & 15, lane >> 4);
#pragma unroll
  for (int k = 0; k < kN; k += 16) {
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t rv[4];
      ptx::load_matrices_transposed(rv, (v_lane ^ (d % kPanel * 2)) + (d / kPanel * kN + k) * kPanelPitch);
      ptx::mma<T>(out[d / 8], p[k / 16], rv[0], rv[1]);
      ptx::mma<T>(out[d / 8 + 1], p[k / 16], rv[2], rv[3]);
    }
  }
}

}  // namespace nsa::cuda
