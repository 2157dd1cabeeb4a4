// Products of one warp on tiles in shared memory, for mma.sync kernels.
//
// A tile of 16-bit elements has rows of kDim elements at a pitch of kDim + 8: the pitch is an odd number of
// 16-byte chunks, so the eight rows that ldmatrix reads together lie in different banks.
#pragma once

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace nsa::cuda {

template <int kDim>
constexpr int kPitch = kDim + 8;

template <int kDim>
__host__ __device__ constexpr int tile_bytes(int rows) {
  return rows * kPitch<kDim> * 2;
}

// acc[n / 8][4] += A[16 x kDim] . B[kN x kDim]^T for one slab of 16 rows. a, b: shared addresses of the
// tiles.
template <typename T, int kDim, int kN, int kSlabs>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kSlabs][kN / 8][4], uint32_t a, uint32_t b,
                                                    int lane) {
  const uint32_t a_lane = a + ((lane & 15) * kPitch<kDim> + (lane >> 4) * 8) * 2;
  const uint32_t b_lane = b + (((lane & 7) + ((lane >> 4) << 3)) * kPitch<kDim> + ((lane >> 3) & 1) * 8) * 2;
#pragma unroll
  for (int k = 0; k < kDim; k += 16) {
    uint32_t ra[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(ra[s], a_lane + (s * 16 * kPitch<kDim> + k) * 2);
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      uint32_t rb[4];
      ptx::load_matrices(rb, b_lane + (n * kPitch<kDim> + k) * 2);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma<T>(acc[s][n / 8], ra[s], rb[0], rb[1]);
        ptx::mma<T>(acc[s][n / 8 + 1], ra[s], rb[2], rb[3]);
      }
    }
  }
}

// out[d / 8][4] += P . V[kN x kDim], P being accumulators of multiply_transposed rounded to T.
template <typename T, int kDim, int kN, int kSlabs>
__device__ __forceinline__ void multiply_probabilities(float (&out)[kSlabs][kDim / 8][4],
                                                       const float (&p)[kSlabs][kN / 8][4], uint32_t v,
                                                       int lane) {
  const uint32_t v_lane = v + (((lane & 7) + ((lane >> 3) & 1) * 8) * kPitch<kDim> + (lane >> 4) * 8) * 2;
#pragma unroll
  for (int k = 0; k < kN; k += 16) {
    uint32_t rp[kSlabs][4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      rp[s][0] = ptx::pack2<T>(p[s][k / 8][0], p[s][k / 8][1]);
      rp[s][1] = ptx::pack2<T>(p[s][k / 8][2], p[s][k / 8][3]);
      rp[s][2] = ptx::pack2<T>(p[s][k / 8 + 1][0], p[s][k / 8 + 1][1]);
      rp[s][3] = ptx::pack2<T>(p[s][k / 8 + 1][2], p[s][k / 8 + 1][3]);
    }
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t rv[4];
      ptx::load_matrices_transposed(rv, v_lane + (k * kPitch<kDim> + d) * 2);
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
        ptx::mma<T>(out[s][d / 8], rp[s], rv[0], rv[1]);
        ptx::mma<T>(out[s][d / 8 + 1], rp[s], rv[2], rv[3]);
      }
    }
  }
}

// Rows [0, kRows) of a tile from global memory by all threads: row r is at rows(r), or zeros where it returns
// null.
template <int kDim, int kRows, int kThreads, typename RowPointer>
__device__ __forceinline__ void load_tile(uint32_t tile, const RowPointer& rows, int thread) {
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % kThreads == 0 || true);
#pragma unroll
  for (int i = thread; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const void* source = rows(row);
    ptx::async_copy_16(tile + (row * kPitch<kDim> + chunk * 8) * 2, static_cast<const uint4*>(source) + chunk,
                       source != nullptr);
  }
}

// Rows [0, kRows) of a tile from a strided matrix: row r is at first + r * stride (in elements), zeros from
// `valid` rows on. Every thread copies one chunk of rows that lie a constant number apart, so that an address
// costs one addition.
template <int kDim, int kRows, int kThreads, typename T>
__device__ __forceinline__ void load_strided_tile(uint32_t tile, const T* first, int64_t stride, int valid,
                                                  int thread) {
  constexpr int kChunks = kDim / 8;
  constexpr int kThreadsUsed = kThreads / kChunks * kChunks, kStep = kThreadsUsed / kChunks;
  if (kThreadsUsed < kThreads && thread >= kThreadsUsed) return;
  const int chunk = thread % kChunks;
  int row = thread / kChunks;
  const char* source = reinterpret_cast<const char*>(first + row * stride) + chunk * 16;
  uint32_t target = tile + (row * kPitch<kDim> + chunk * 8) * 2;
  const int64_t source_step = kStep * stride * 2;
#pragma unroll
  for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
    if (kRows % kStep == 0 || row < kRows)
      ptx::async_copy_16(target, row < valid ? source : reinterpret_cast<const char*>(first), row < valid);
    source += source_step;
    target += kStep * kPitch<kDim> * 2;
    row += kStep;
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

constexpr float kNegInf = -__builtin_huge_valf();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The running softmax of one slab of 16 rows: a thread holds rows lane / 4 and lane / 4 + 8 of it.
struct SlabSoftmax {
  float max[2] = {kNegInf, kNegInf};  // of the raw scores
  float sum[2] = {0.f, 0.f};          // of this thread's columns

  // acc: raw scores, -inf where masked; becomes 2^(scale * (score - max)). out is rescaled. scale > 0, times
  // log2(e).
  template <int kTiles, int kOut>
  __device__ __forceinline__ void update(float (&acc)[kTiles][4], float (&out)[kOut][4], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = max[h];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) high = fmaxf(high, fmaxf(acc[n][2 * h], acc[n][2 * h + 1]));
      high = quad_max(high);
      const float base = high == kNegInf ? 0.f : high * scale;  // all masked so far: exponents stay -inf
      const float shrink = ptx::exp2_approx(max[h] * scale - base);
      max[h] = high;
      float s = sum[h] * shrink;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          acc[n][c] = ptx::exp2_approx(fmaf(acc[n][c], scale, -base));
          s += acc[n][c];
        }
      }
      sum[h] = s;
#pragma unroll
      for (int d = 0; d < kOut; ++d) {
        out[d][2 * h] *= shrink;
        out[d][2 * h + 1] *= shrink;
      }
    }
  }
};

// Columns 32 * group .. + 31 of one row of a slab's output as storage: the four threads of a quad exchange
// values, so that each holds 8 adjacent columns, from 32 * group + 8 * (lane % 4) on. `half` is 0 for row
// lane / 4, 1 for row lane / 4 + 8.
template <typename T, int kOut>
__device__ __forceinline__ uint4 gather_columns(const float (&out)[kOut][4], int group, int half,
                                                float factor, int lane) {
  uint32_t item[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    item[i] = ptx::pack2<T>(out[4 * group + i][2 * half] * factor, out[4 * group + i][2 * half + 1] * factor);
    // A 4 x 4 transpose: thread i of the quad ends with item i of all four. First between neighbours, then
    // between pairs.
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? item[i] : item[i + step], step);
      (upper ? item[i] : item[i + step]) = got;
    }
  }
  return make_uint4(item[0], item[1], item[2], item[3]);
}

// The whole row; row may be null (nothing is stored). kStreaming: it is not wanted in the caches.
template <typename T, bool kStreaming = false, int kOut>
__device__ __forceinline__ void store_row(T* row, const float (&out)[kOut][4], int half, float factor,
                                          int lane) {
#pragma unroll
  for (int group = 0; group < kOut / 4; ++group) {
    const uint4 value = gather_columns<T>(out, group, half, factor, lane);
    if (row == nullptr) continue;
    uint4* const target = reinterpret_cast<uint4*>(row + 32 * group + 8 * (lane & 3));
    if constexpr (kStreaming) {
      __stcs(target, value);
    } else {
      *target = value;
    }
  }
}

}  // namespace nsa::cuda
