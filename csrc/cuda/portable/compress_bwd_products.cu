// The matrix products of phi's backward, by mma.sync (sm_80 and newer): tiles of 128 x 128 by 8 warps, two
// thread blocks on an SM.
#include "cuda/portable/compress_bwd.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/compress_rows.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/vector.cuh"
#include "cuda/tile/warp_gemm.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kTile = 128;  // rows and columns of the result
constexpr int kSlice = 32;  // of the summed dimension
constexpr int kStages = 3;
constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kSlabs = 4, kPairs = 2;  // a warp's 64 x 32: warps lie 2 x 4

__device__ __forceinline__ int warp_row(int warp) { return warp / 4 * 64; }
__device__ __forceinline__ int warp_column(int warp) { return warp % 4 * 32; }

// Every slice passes through a ring of kStages: load(slice, stage) issues its copies, multiply(stage) uses
// it.
template <typename Load, typename Multiply>
__device__ __forceinline__ void pipeline(int num_slices, const Load& load, const Multiply& multiply) {
#pragma unroll
  for (int slice = 0; slice < kStages - 1; ++slice) {
    if (slice < num_slices) load(slice, slice);
    ptx::async_commit();
  }
  for (int slice = 0; slice < num_slices; ++slice) {
    ptx::async_wait<kStages - 2>();
    __syncthreads();
    const int next = slice + kStages - 1;
    if (next < num_slices) load(next, next % kStages);
    ptx::async_commit();
    multiply(slice % kStages);
  }
}

// Products with the summed dimension contiguous in both operands.
constexpr int kNtBytes = 2 * tile_bytes<kSlice>(kTile);
constexpr int kNtShared = kStages * kNtBytes;

// acc = A . B^T; a_row(m, slice) and b_row(n, slice) point to kSlice elements, of which `valid` many exist (a
// multiple of 8), or are null.
template <typename T, typename RowA, typename RowB, typename Valid>
__device__ __forceinline__ void multiply_nt(float (&acc)[kSlabs][2 * kPairs][4], uint32_t shared,
                                            int num_slices, const RowA& a_row, const RowB& b_row,
                                            const Valid& valid) {
  constexpr int kChunks = kSlice / 8, kStep = kThreads / kChunks;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const auto load = [&](int slice, int stage) {
    const uint32_t a = shared + stage * kNtBytes, b = a + tile_bytes<kSlice>(kTile);
    const bool inside = chunk * 8 < valid(slice);
#pragma unroll
    for (int row = first; row < kTile; row += kStep) {
      const uint32_t at = (row * kPitch<kSlice> + chunk * 8) * 2;
      const T *source_a = a_row(row, slice), *source_b = b_row(row, slice);
      const bool a_exists = source_a != nullptr && inside, b_exists = source_b != nullptr && inside;
      ptx::async_copy_16(a + at, a_exists ? source_a + chunk * 8 : source_a, a_exists);
      ptx::async_copy_16(b + at, b_exists ? source_b + chunk * 8 : source_b, b_exists);
    }
  };
  pipeline(num_slices, load, [&](int stage) {
    const uint32_t a = shared + stage * kNtBytes, b = a + tile_bytes<kSlice>(kTile);
    multiply_slice_nt<T, kSlice, kSlice, kSlice, kSlabs, kPairs>(
        acc, a + warp_row(warp) * kPitch<kSlice> * 2, b + warp_column(warp) * kPitch<kSlice> * 2, lane);
  });
}

// dZ = dH * silu'(Z) with dH = dOut . W2^T, in place of Z, and silu(Z).
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    compress_bwd_hidden_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
  const CompressFwdParams& p = bwd.fwd;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile, h = p.per_head ? head : 0;
  const int first_column = blockIdx.y * kTile;
  const auto exists = [&](int64_t row) { return row < p.num_rows && plan.tokens[row] >= 0; };

  float acc[kSlabs][2 * kPairs][4] = {};
  multiply_nt<T>(
      acc, ptx::shared_address(shared), p.head_dim / kSlice,
      [&](int m, int slice) -> const T* {
        const int64_t row = first_row + m;
        if (!exists(row)) return nullptr;
        return static_cast<const T*>(bwd.d_out.data) + row * bwd.d_out.stride_row +
               head * bwd.d_out.stride_head + slice * kSlice;
      },
      [&](int n, int slice) -> const T* {
        const int f = first_column + n;
        if (f >= p.hidden_size) return nullptr;
        return static_cast<const T*>(p.w2) + (h * p.hidden_size + f) * p.head_dim + slice * kSlice;
      },
      [](int) { return kSlice; });

  const int64_t stride_row = static_cast<int64_t>(p.num_heads) * p.hidden_size;
  const int column = first_column + warp_column(warp) + (lane & 3) * 2;
  const int64_t row0 = first_row + warp_row(warp) + lane / 4;
  const int64_t corner = row0 * stride_row + static_cast<int64_t>(head) * p.hidden_size + column;
  T *dz = static_cast<T*>(plan.dz) + corner, *act = static_cast<T*>(plan.act) + corner;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    uint32_t z[2][2 * kPairs];  // a slab's first, because its loads would wait for the stores in between
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_block = exists(row0 + s * 16 + half * 8);
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        z[half][n] = 0;  // of rows of no block, which have dH = 0 too
        if (is_block && column + n * 8 < p.hidden_size)
          z[half][n] = *reinterpret_cast<const uint32_t*>(dz + (s * 16 + half * 8) * stride_row + n * 8);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row0 + s * 16 + half * 8 >= p.num_rows) continue;
#pragma unroll
      for (int n = 0; n < 2 * kPairs; ++n) {
        if (column + n * 8 >= p.hidden_size) continue;
        float d[2], a[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float x = to_float(reinterpret_cast<const T*>(&z[half][n])[c]);
          const float sigmoid = __fdividef(1.f, 1.f + __expf(-x));
          a[c] = x * sigmoid;
          d[c] = acc[s][n][2 * half + c] * sigmoid * (1.f + x * (1.f - sigmoid));
        }
        const int64_t at = (s * 16 + half * 8) * stride_row + n * 8;
        *reinterpret_cast<uint32_t*>(dz + at) = ptx::pack2<T>(d[0], d[1]);
        *reinterpret_cast<uint32_t*>(act + at) = ptx::pack2<T>(a[0], a[1]);
      }
    }
  }
}

// dX of one head: row i of the result is the run of `stride` tokens from i * stride on, its columns are
// (token, channel); dX[i] = sum over j of dZ[i - j] . W1[j * stride .. + stride]^T, so the blocks that share
// a token add up in registers.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    compress_bwd_input_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
  const CompressFwdParams& p = bwd.fwd;
  const int stride = static_cast<int>(p.blocks.stride);
  const SequenceTile tile = find_sequence_tile(p.seqs, blockIdx.x, kTile * stride);
  if (tile.count == 0) return;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.z;
  const int first_run = tile.begin / stride, first_column = blockIdx.y * kTile, columns = stride * p.head_dim;
  const int64_t num_blocks = count_blocks(p.seqs, p.blocks, tile.seq);
  const int64_t first_row = p.blocks.first_row(tile.seq.k_begin);
  const int64_t h = p.per_head ? head : 0, depth = p.blocks.block * p.head_dim;
  const int panels = static_cast<int>(ceil_div(p.hidden_size, kSlice));

  float acc[kSlabs][2 * kPairs][4] = {};
  multiply_nt<T>(
      acc, ptx::shared_address(shared), static_cast<int>(p.blocks.block / stride) * panels,
      [&](int m, int slice) -> const T* {
        const int64_t block = first_run + m - slice / panels;
        if (block < 0 || block >= num_blocks) return nullptr;
        return static_cast<const T*>(plan.dz) + ((first_row + block) * p.num_heads + head) * p.hidden_size +
               slice % panels * kSlice;
      },
      [&](int n, int slice) -> const T* {
        const int64_t row = h * depth + static_cast<int64_t>(slice / panels) * columns + first_column + n;
        return static_cast<const T*>(p.w1) + row * p.hidden_size + slice % panels * kSlice;
      },
      [&](int slice) { return p.hidden_size - slice % panels * kSlice; });

  // A warp's 32 columns lie within one token.
  const int column = first_column + warp_column(warp);
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token =
          static_cast<int64_t>(first_run + warp_row(warp) + s * 16 + lane / 4 + 8 * half) * stride +
          column / p.head_dim;
      T* dst = nullptr;
      if (token < tile.seq.q_len) {
        dst = static_cast<T*>(bwd.dx) + ((tile.seq.q_begin + token) * p.num_heads + head) * p.head_dim +
              column % p.head_dim;
      }
      store_row(dst, acc[s], half, 1.f, lane);
    }
  }
}

// Sums over rows, for one part of the rows and a tile of 128 x 128: dW1 (kFirst) = U^T . dZ with U the
// unfolded tokens, dW2 = silu(Z)^T . dOut.
constexpr int kTnBytes = 2 * tile_bytes<kTile>(kSlice);
constexpr int kTnShared = kStages * kTnBytes;

template <typename T, bool kFirst>
__global__ void __launch_bounds__(kThreads, 2)
    compress_bwd_weight_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
  const CompressFwdParams& p = bwd.fwd;
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int num_m = kFirst ? static_cast<int>(p.blocks.block) * p.head_dim : p.hidden_size;
  const int num_n = kFirst ? p.hidden_size : p.head_dim;
  const int tiles_n = (num_n + kTile - 1) / kTile;
  const int first_m = blockIdx.x / tiles_n * kTile, first_n = blockIdx.x % tiles_n * kTile;
  const int part = blockIdx.y, parts = gridDim.y, h = blockIdx.z;
  const int per_head = static_cast<int>(ceil_div(p.num_rows, kSlice));  // slices of a head
  const int64_t slices = static_cast<int64_t>(per_head) * (p.per_head ? 1 : p.num_heads);
  const int begin = static_cast<int>(slices * part / parts),
            end = static_cast<int>(slices * (part + 1) / parts);

  // A thread copies 16 bytes of both operands in two rows of a slice.
  constexpr int kChunks = kTile / 8, kStep = kThreads / kChunks, kCopies = kSlice / kStep;
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const int m = first_m + chunk * 8, n = first_n + chunk * 8;
  const auto token_of = [&](int slice, int copy) -> int64_t {
    const int64_t r = static_cast<int64_t>(slice % per_head) * kSlice + row + copy * kStep;
    return slice < end && r < p.num_rows ? plan.tokens[r] : -1;
  };
  int64_t tokens[kCopies];  // of the slice that is loaded next
#pragma unroll
  for (int c = 0; c < kCopies; ++c) tokens[c] = token_of(begin, c);
  const auto load = [&](int i, int stage) {
    const int slice = begin + i, head = p.per_head ? h : slice / per_head;
    const uint32_t a = base + stage * kTnBytes, b = a + tile_bytes<kTile>(kSlice);
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      const int64_t r = static_cast<int64_t>(slice % per_head) * kSlice + row + c * kStep;
      const int64_t hidden_row = (r * p.num_heads + head) * p.hidden_size;
      const T *source_a, *source_b;
      if constexpr (kFirst) {
        source_a = static_cast<const T*>(p.x.data) + (tokens[c] + m / p.head_dim) * p.x.stride_row +
                   head * p.x.stride_head + m % p.head_dim;
        source_b = static_cast<const T*>(plan.dz) + hidden_row + n;
      } else {
        source_a = static_cast<const T*>(plan.act) + hidden_row + m;
        source_b = static_cast<const T*>(bwd.d_out.data) + r * bwd.d_out.stride_row +
                   head * bwd.d_out.stride_head + n;
      }
      const bool a_exists = tokens[c] >= 0 && m < num_m, b_exists = tokens[c] >= 0 && n < num_n;
      const uint32_t at = ((row + c * kStep) * kPitch<kTile> + chunk * 8) * 2;
      ptx::async_copy_16(a + at, a_exists ? source_a : static_cast<const T*>(plan.dz), a_exists);
      ptx::async_copy_16(b + at, b_exists ? source_b : static_cast<const T*>(plan.dz), b_exists);
      tokens[c] = token_of(slice + 1, c);
    }
  };

  float acc[kSlabs][2 * kPairs][4] = {};
  pipeline(end - begin, load, [&](int stage) {
    const uint32_t a = base + stage * kTnBytes, b = a + tile_bytes<kTile>(kSlice);
    multiply_slice_tn<T, kTile, kTile, kSlice, kSlabs, kPairs>(acc, a + warp_row(warp) * 2,
                                                               b + warp_column(warp) * 2, lane);
  });

  float* out = (kFirst ? plan.d_w1 : plan.d_w2) + (static_cast<int64_t>(h) * parts + part) * num_m * num_n;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int out_m = first_m + warp_row(warp) + s * 16 + lane / 4 + 8 * half;
#pragma unroll
      for (int t = 0; t < 2 * kPairs; ++t) {
        const int out_n = first_n + warp_column(warp) + t * 8 + (lane & 3) * 2;
        if (out_m >= num_m || out_n >= num_n) continue;
        *reinterpret_cast<float2*>(out + static_cast<int64_t>(out_m) * num_n + out_n) =
            make_float2(acc[s][t][2 * half], acc[s][t][2 * half + 1]);
      }
    }
  }
}

template <bool kFirst>
Status launch_weight(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const CompressFwdParams& f = p.fwd;
  const int64_t m = kFirst ? f.blocks.block * f.head_dim : f.hidden_size,
                n = kFirst ? f.hidden_size : f.head_dim;
  const dim3 grid(static_cast<unsigned>(ceil_div(m, kTile) * ceil_div(n, kTile)),
                  static_cast<unsigned>(kFirst ? plan.parts_w1 : plan.parts_w2),
                  static_cast<unsigned>(f.per_head ? f.num_heads : 1));
  return dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_weight_portable", compress_bwd_weight_portable<T, kFirst>, grid, kThreads,
                  kTnShared, stream, p, plan);
  });
}

}  // namespace

Status compress_bwd_hidden(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.fwd.num_rows, kTile)),
                  static_cast<unsigned>(ceil_div(p.fwd.hidden_size, kTile)),
                  static_cast<unsigned>(p.fwd.num_heads));
  return dispatch_half(p.fwd.dtype, [&]<typename T>() {
    return launch("compress_bwd_hidden_portable", compress_bwd_hidden_portable<T>, grid, kThreads, kNtShared,
                  stream, p, plan);
  });
}

Status compress_bwd_first_weight(const CompressBwdParams& p, const CompressBwdPlan& plan,
                                 const Stream& stream) {
  return launch_weight<true>(p, plan, stream);
}

Status compress_bwd_second_weight(const CompressBwdParams& p, const CompressBwdPlan& plan,
                                  const Stream& stream) {
  return launch_weight<false>(p, plan, stream);
}

Status compress_bwd_input(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const CompressFwdParams& f = p.fwd;
  const dim3 grid(static_cast<unsigned>(num_sequence_tiles(f.seqs, kTile * f.blocks.stride)),
                  static_cast<unsigned>(f.blocks.stride * f.head_dim / kTile),
                  static_cast<unsigned>(f.num_heads));
  return dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_input_portable", compress_bwd_input_portable<T>, grid, kThreads, kNtShared,
                  stream, p, plan);
  });
}

}  // namespace nsa::cuda::portable
