// Slices of matrix products by one warp, from tiles with rows of kPitch elements (tile/warp_tile.cuh): a
// block of threads accumulates them over the summed dimension.
#pragma once

#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda {

// acc += A[16 * kSlabs x kDepth] . B[kDepth x 16 * kPairs]; a, b: shared addresses of the corners, A in rows
// of the pitch of kADim with the summed dimension contiguous, B in rows of the pitch of kBDim with its
// columns contiguous.
template <typename T, int kADim, int kBDim, int kDepth, int kSlabs, int kPairs>
__device__ __forceinline__ void multiply_slice(float (&acc)[kSlabs][2 * kPairs][4], uint32_t a, uint32_t b,
                                               int lane) {
  const uint32_t a_lane = a + ((lane & 15) * kPitch<kADim> + (lane >> 4) * 8) * 2;
  const uint32_t b_lane = b + (((lane & 7) + ((lane >> 3) & 1) * 8) * kPitch<kBDim> + (lane >> 4) * 8) * 2;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t ra[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(ra[s], a_lane + (s * 16 * kPitch<kADim> + k) * 2);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t rb[4];
      ptx::load_matrices_transposed(rb, b_lane + (k * kPitch<kBDim> + n * 16) * 2);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma<T>(acc[s][2 * n], ra[s], rb[0], rb[1]);
        ptx::mma<T>(acc[s][2 * n + 1], ra[s], rb[2], rb[3]);
      }
    }
  }
}

// acc += A[kDepth x 16 * kSlabs]^T . B[kDepth x 16 * kPairs]: both have the other dimension contiguous.
template <typename T, int kADim, int kBDim, int kDepth, int kSlabs, int kPairs>
__device__ __forceinline__ void multiply_slice_tn(float (&acc)[kSlabs][2 * kPairs][4], uint32_t a, uint32_t b,
                                                  int lane) {
  const uint32_t a_lane = a + (((lane & 7) + (lane >> 4) * 8) * kPitch<kADim> + ((lane >> 3) & 1) * 8) * 2;
  const uint32_t b_lane = b + (((lane & 7) + ((lane >> 3) & 1) * 8) * kPitch<kBDim> + (lane >> 4) * 8) * 2;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t ra[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s)
      ptx::load_matrices_transposed(ra[s], a_lane + (k * kPitch<kADim> + s * 16) * 2);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t rb[4];
      ptx::load_matrices_transposed(rb, b_lane + (k * kPitch<kBDim> + n * 16) * 2);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma<T>(acc[s][2 * n], ra[s], rb[0], rb[1]);
        ptx::mma<T>(acc[s][2 * n + 1], ra[s], rb[2], rb[3]);
      }
    }
  }
}

// acc += A[16 * kSlabs x kDepth] . B[16 * kPairs x kDepth]^T: both have the summed dimension contiguous.
template <typename T, int kADim, int kBDim, int kDepth, int kSlabs, int kPairs>
__device__ __forceinline__ void multiply_slice_nt(float (&acc)[kSlabs][2 * kPairs][4], uint32_t a, uint32_t b,
                                                  int lane) {
  const uint32_t a_lane = a + ((lane & 15) * kPitch<kADim> + (lane >> 4) * 8) * 2;
  const uint32_t b_lane = b + (((lane & 7) + ((lane >> 4) << 3)) * kPitch<kBDim> + ((lane >> 3) & 1) * 8) * 2;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t ra[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(ra[s], a_lane + (s * 16 * kPitch<kADim> + k) * 2);
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      uint32_t rb[4];
      ptx::load_matrices(rb, b_lane + (n * 16 * kPitch<kBDim> + k) * 2);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma<T>(acc[s][2 * n], ra[s], rb[0], rb[1]);
        ptx::mma<T>(acc[s][2 * n + 1], ra[s], rb[2], rb[3]);
      }
    }
  }
}

}  // namespace nsa::cuda
