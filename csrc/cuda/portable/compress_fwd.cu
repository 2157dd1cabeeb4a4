// phi, forward, by mma.sync (sm_80 and newer): both layers in one kernel.
//
// A thread block owns 64 compressed blocks of one head. The left operand of the first product is read
// straight from the tokens (a slice of 32 columns lies within one token), so no unfolded copy exists. PE
// enters through the bias (compress_bias.cu). The hidden layer stays in shared memory, 256 columns at a time.
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/compress_rows.cuh"
#include "cuda/tile/warp_gemm.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kRows = 64;
constexpr int kColumns = 256;  // of the hidden layer at a time
constexpr int kSlice = 32;     // of the summed dimension; divides every head dim
constexpr int kStages = 3;     // with the hidden layer 99 KB, what sm_86 gives
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kSliceBytes = tile_bytes<kSlice>(kRows) + tile_bytes<kColumns>(kSlice);
constexpr int kHiddenBytes = tile_bytes<kColumns>(kRows);

template <int kDim>
constexpr int kSharedBytes = kStages* kSliceBytes + kHiddenBytes + kRows * 8 + kColumns * 4;

template <typename T>
__device__ __forceinline__ float load_float(const void* p, int64_t i) {
  return static_cast<float>(static_cast<const T*>(p)[i]);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) compress_fwd_portable(const CompressFwdParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared), hidden_tile = base + kStages * kSliceBytes;
  T* hidden = reinterpret_cast<T*>(shared + kStages * kSliceBytes);
  int64_t* tokens = reinterpret_cast<int64_t*>(shared + kStages * kSliceBytes + kHiddenBytes);  // of the rows
  float* bias = reinterpret_cast<float*>(tokens + kRows);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t h = p.per_head ? head : 0, depth = p.blocks.block * kDim;
  const bool mlp = p.kind == CompressKind::kMlp;
  int exists = 0;
  if (threadIdx.x < kRows) {
    tokens[threadIdx.x] = first_token(p.seqs, p.blocks, p.num_rows, first_row + threadIdx.x);
    exists = tokens[threadIdx.x] >= 0;
  }
  if (__syncthreads_or(exists) == 0) return;

  const auto load_first = [&](int slice, int column) {
    const uint32_t a = base + slice % kStages * kSliceBytes, b = a + tile_bytes<kSlice>(kRows);
    const int64_t offset = static_cast<int64_t>(slice) * kSlice / kDim, channel = slice * kSlice % kDim;
    load_tile<kSlice, kRows, kThreads>(
        a,
        [&](int row) -> const T* {
          if (tokens[row] < 0) return nullptr;
          return static_cast<const T*>(p.x.data) + (tokens[row] + offset) * p.x.stride_row +
                 head * p.x.stride_head + channel;
        },
        threadIdx.x);
    constexpr int kChunks = kColumns / 8;
    const T* w = static_cast<const T*>(p.w1) +
                 (h * depth + static_cast<int64_t>(slice) * kSlice) * p.hidden_size + column;
#pragma unroll
    for (int i = threadIdx.x; i < kSlice * kChunks; i += kThreads) {
      const int k = i / kChunks, chunk = i % kChunks;
      const bool valid = column + chunk * 8 < p.hidden_size;
      ptx::async_copy_16(b + (k * kPitch<kColumns> + chunk * 8) * 2,
                         valid ? w + static_cast<int64_t>(k) * p.hidden_size + chunk * 8 : w, valid);
    }
  };
  const auto load_second = [&](int slice, int column) {
    const int row = column + slice * kSlice;  // of W2
    load_tile<kDim, kSlice, kThreads>(
        base + slice % kStages * kSliceBytes,
        [&](int k) -> const T* {
          return row + k < p.hidden_size ? static_cast<const T*>(p.w2) + (h * p.hidden_size + row + k) * kDim
                                         : nullptr;
        },
        threadIdx.x);
  };

  // First product: warps 2 x 4 of 32 x 64. Second: warps 4 x 2 of 16 x kDim / 2.
  const int row1 = warp / 4 * 32, column1 = warp % 4 * 64;
  const int row2 = warp / 2 * 16, column2 = warp % 2 * (kDim / 2);
  constexpr int kPairs2 = kDim / 32;
  float out[1][2 * kPairs2][4] = {};
  const int num_slices = static_cast<int>(depth / kSlice);
  for (int column = 0; column < p.hidden_size; column += kColumns) {
    float acc[2][8][4] = {};
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) {
      if (slice < num_slices) load_first(slice, column);
      ptx::async_commit();
    }
    for (int f = threadIdx.x; f < kColumns; f += kThreads)
      bias[f] = column + f < p.hidden_size ? first_layer_bias<T>(p, h, column + f) : 0.f;
    for (int slice = 0; slice < num_slices; ++slice) {
      ptx::async_wait<kStages - 2>();
      __syncthreads();
      if (slice + kStages - 1 < num_slices) load_first(slice + kStages - 1, column);
      ptx::async_commit();
      const uint32_t a = base + slice % kStages * kSliceBytes, b = a + tile_bytes<kSlice>(kRows);
      multiply_slice<T, kSlice, kColumns, kSlice, 2, 4>(acc, a + tile_bytes<kSlice>(row1), b + column1 * 2,
                                                        lane);
    }
    ptx::async_wait<0>();
    __syncthreads();

    // bias and activation, to shared memory
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int f = column1 + n * 8 + (lane & 3) * 2;
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x = acc[s][n][2 * half] + bias[f], y = acc[s][n][2 * half + 1] + bias[f + 1];
          if (mlp) {
            x = __fdividef(x, 1.f + __expf(-x));
            y = __fdividef(y, 1.f + __expf(-y));
          }
          const int row = row1 + s * 16 + lane / 4 + 8 * half;
          *reinterpret_cast<uint32_t*>(hidden + row * kPitch<kColumns> + f) = ptx::pack2<T>(x, y);
        }
      }
    }
    __syncthreads();
    if (!mlp) {  // the first layer is the output, F wide
      for (int i = threadIdx.x; i < kRows * kColumns / 8; i += kThreads) {
        const int row = i / (kColumns / 8), f = i % (kColumns / 8) * 8;
        if (tokens[row] < 0 || column + f >= p.hidden_size) continue;
        T* dst =
            static_cast<T*>(p.out) + ((first_row + row) * p.num_heads + head) * p.hidden_size + column + f;
        *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(hidden + row * kPitch<kColumns> + f);
      }
      continue;
    }

    const int slices2 = kColumns / kSlice;
#pragma unroll
    for (int slice = 0; slice < kStages - 1; ++slice) {
      load_second(slice, column);
      ptx::async_commit();
    }
    for (int slice = 0; slice < slices2; ++slice) {
      ptx::async_wait<kStages - 2>();
      __syncthreads();
      if (slice + kStages - 1 < slices2) load_second(slice + kStages - 1, column);
      ptx::async_commit();
      multiply_slice<T, kColumns, kDim, kSlice, 1, kPairs2>(
          out, hidden_tile + (row2 * kPitch<kColumns> + slice * kSlice) * 2,
          base + slice % kStages * kSliceBytes + column2 * 2, lane);
    }
    ptx::async_wait<0>();
    __syncthreads();
  }

  if (!mlp) return;
#pragma unroll
  for (int n = 0; n < 2 * kPairs2; ++n) {
    const int channel = column2 + n * 8 + (lane & 3) * 2;
    const float bias0 = p.b2 ? load_float<T>(p.b2, h * kDim + channel) : 0.f;
    const float bias1 = p.b2 ? load_float<T>(p.b2, h * kDim + channel + 1) : 0.f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row2 + lane / 4 + 8 * half;
      if (tokens[row] < 0) continue;
      T* dst = static_cast<T*>(p.out) + ((first_row + row) * p.num_heads + head) * kDim + channel;
      *reinterpret_cast<uint32_t*>(dst) =
          ptx::pack2<T>(out[0][n][2 * half] + bias0, out[0][n][2 * half + 1] + bias1);
    }
  }
}

// Bound by memory: 16 bytes a thread and token.
template <typename T>
__global__ void __launch_bounds__(kThreads) compress_mean_fwd_portable(const CompressFwdParams p) {
  const int chunks = p.head_dim / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int chunk = static_cast<int>(i % chunks), head = static_cast<int>(i / chunks % p.num_heads);
  const int64_t row = i / chunks / p.num_heads, token = first_token(p.seqs, p.blocks, p.num_rows, row);
  if (token < 0) return;
  const T* src =
      static_cast<const T*>(p.x.data) + token * p.x.stride_row + head * p.x.stride_head + chunk * 8;
  float sum[8] = {};
#pragma unroll 8
  for (int64_t offset = 0; offset < p.blocks.block; ++offset) {
    const uint4 packed = *reinterpret_cast<const uint4*>(src + offset * p.x.stride_row);
    const T* x = reinterpret_cast<const T*>(&packed);
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += static_cast<float>(x[c]);
  }
  const float share = 1.f / static_cast<float>(p.blocks.block);
  uint4 packed;
  packed.x = ptx::pack2<T>(sum[0] * share, sum[1] * share);
  packed.y = ptx::pack2<T>(sum[2] * share, sum[3] * share);
  packed.z = ptx::pack2<T>(sum[4] * share, sum[5] * share);
  packed.w = ptx::pack2<T>(sum[6] * share, sum[7] * share);
  static_cast<uint4*>(p.out)[i] = packed;
}

}  // namespace

Status compress_forward(const CompressFwdParams& p, const Stream& stream) {
  if (p.hidden_size % 8 != 0) {
    return Status::error(StatusCode::kUnsupported,
                         "hidden size %d of w1 has no CUDA kernel; it must be a multiple of 8",
                         p.hidden_size);
  }
  return dispatch_half(p.dtype, [&]<typename T>() {
    if (p.kind == CompressKind::kMean) {
      const int64_t chunks = p.num_rows * p.num_heads * (p.head_dim / 8);
      return launch("compress_mean_fwd_portable", compress_mean_fwd_portable<T>,
                    dim3(static_cast<unsigned>(ceil_div(chunks, kThreads))), kThreads, 0, stream, p);
    }
    return dispatch<64, 96, 128, 192, 256>("head_dim", p.head_dim, [&]<int kDim>() {
      const dim3 grid(static_cast<unsigned>(ceil_div(p.num_rows, kRows)), static_cast<unsigned>(p.num_heads));
      return launch("compress_fwd_portable", compress_fwd_portable<T, kDim>, grid, kThreads,
                    kSharedBytes<kDim>, stream, p);
    });
  });
}

}  // namespace nsa::cuda::portable
