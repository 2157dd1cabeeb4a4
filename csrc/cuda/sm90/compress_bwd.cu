// The two large products of phi's backward, on Hopper: tiles of 128 x 256 by two consumer warpgroups, slices
// of 64 of the summed dimension through the ring of compress_ring.cuh.
#include "cuda/host/launch_kernel.h"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/compress_bwd.h"
#include "cuda/sm90/compress_ring.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/compress_rows.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kRows = 128, kColumns = 256;  // of the result
constexpr int kSlice = 64;                  // of the summed dimension
constexpr int kABytes = kRows * kSlice * 2, kBBytes = kColumns * kSlice * 2;
constexpr int kStageBytes = kABytes + kBBytes;
constexpr int kAlignment = 1024;
constexpr int kSharedBytes = kAlignment + kRingStages * kStageBytes;

__device__ __forceinline__ uint32_t aligned(const void* shared) {
  return (ptx::shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
}

// Eight threads copy 128 bytes of a row; a thread has every 16th row.
constexpr int kRowStep = kRingProducers / 8;

// dW1: the result's rows are 128 of the l * D unfolded columns, its columns are hidden units. A slice is 64
// rows of blocks of one head.
struct WeightTask {
  int first_m, first_n, h;
  int begin, end;  // slices
  int per_head;    // slices of a head
};

template <typename T>
__device__ __forceinline__ void produce_weight(const CompressBwdParams& bwd, const CompressBwdPlan& plan,
                                               const CUtensorMap& dz_map, const WeightTask& task,
                                               uint32_t stages, const SliceRing& ring) {
  constexpr int kCopies = kSlice / kRowStep, kPanels = kRows / kPanel;
  const CompressFwdParams& p = bwd.fwd;
  const int thread = threadIdx.x - kRingConsumers, row = thread / 8, chunk = thread % 8;
  int64_t shift[kPanels];  // a panel of 64 unfolded columns lies within one token
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int m = task.first_m + panel * kPanel;
    shift[panel] = m / p.head_dim * p.x.stride_row + m % p.head_dim + chunk * 8;
  }
  const uint32_t target = swizzled_offset(kSlice, row, chunk);
  const auto token_of = [&](int slice, int copy) -> int64_t {
    const int64_t r = static_cast<int64_t>(slice % task.per_head) * kSlice + row + copy * kRowStep;
    return slice < task.end && r < p.num_rows ? plan.tokens[r] : -1;
  };
  int64_t tokens[kCopies];  // of the next slice
#pragma unroll
  for (int c = 0; c < kCopies; ++c) tokens[c] = token_of(task.begin, c);
#pragma unroll 1
  for (int slice = task.begin; slice < task.end; ++slice) {
    const int head = p.per_head ? task.h : slice / task.per_head;
    const int first_row = slice % task.per_head * kSlice;
    ring.produce(
        slice - task.begin, kBBytes,
        [&](int stage) {
          const uint32_t b = stages + stage * kStageBytes + kABytes;
#pragma unroll
          for (int n = 0; n < kColumns / kPanel; ++n) {
            ptx::bulk_load_3d(b + n * kSlice * kPanelPitch, &dz_map, ring.full(stage),
                              task.first_n + n * kPanel, head, first_row);
          }
        },
        [&](int stage) {
          const uint32_t a = stages + stage * kStageBytes + target;
          const T* x = static_cast<const T*>(p.x.data) + head * p.x.stride_head;
#pragma unroll
          for (int c = 0; c < kCopies; ++c) {
            const T* source = x + max64(tokens[c], 0) * p.x.stride_row;
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
              ptx::async_copy_16(a + panel * kSlice * kPanelPitch + c * kRowStep * kPanelPitch,
                                 source + shift[panel], tokens[c] >= 0);
            }
          }
        });
#pragma unroll
    for (int c = 0; c < kCopies; ++c) tokens[c] = token_of(slice + 1, c);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRingThreads, 1)
    compress_bwd_weight_sm90(const CompressBwdParams bwd, const CompressBwdPlan plan,
                             const __grid_constant__ CUtensorMap dz_map) {
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage[2 * kRingStages];
  const CompressFwdParams& p = bwd.fwd;
  const uint32_t stages = aligned(shared);
  const SliceRing ring{ptx::shared_address(barrier_storage)};

  WeightTask task;
  const int tiles_n = (p.hidden_size + kColumns - 1) / kColumns, parts = gridDim.y;
  task.first_m = blockIdx.x / tiles_n * kRows;
  task.first_n = blockIdx.x % tiles_n * kColumns;
  task.h = blockIdx.z;
  task.per_head = static_cast<int>(ceil_div(p.num_rows, kSlice));
  const int64_t slices = static_cast<int64_t>(task.per_head) * (p.per_head ? 1 : p.num_heads);
  task.begin = static_cast<int>(slices * blockIdx.y / parts);
  task.end = static_cast<int>(slices * (blockIdx.y + 1) / parts);

  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (threadIdx.x >= kRingConsumers) {
    produce_weight<T>(bwd, plan, dz_map, task, stages, ring);
    return;
  }
  float acc[kColumns / 2];
  const int warpgroup = threadIdx.x / 128;
  ring.consume(acc, 0, task.end - task.begin, [&](int stage, bool accumulate) {
    const uint32_t a = stages + stage * kStageBytes + warpgroup * kSlice * kPanelPitch,
                   b = stages + stage * kStageBytes + kABytes;
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      ptx::wgmma_shared_transposed<T, kColumns>(acc, mn_major_descriptor(a, kSlice, k),
                                                mn_major_descriptor(b, kSlice, k), accumulate || k > 0);
    }
  });

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t depth = p.blocks.block * p.head_dim, m = task.first_m + warp * 16 + lane / 4;
  float* out = plan.d_w1 + ((static_cast<int64_t>(task.h) * parts + blockIdx.y) * depth + m) * p.hidden_size;
#pragma unroll
  for (int q = 0; q < kColumns / 8; ++q) {
    const int n = task.first_n + q * 8 + (lane & 3) * 2;
    if (n >= p.hidden_size) continue;
    *reinterpret_cast<float2*>(out + n) = make_float2(acc[4 * q], acc[4 * q + 1]);
    *reinterpret_cast<float2*>(out + 8 * static_cast<int64_t>(p.hidden_size) + n) =
        make_float2(acc[4 * q + 2], acc[4 * q + 3]);
  }
}

// dX, as in portable/compress_bwd_products.cu: the result's rows are runs of `stride` tokens, its columns
// (token, channel). A thread block takes several column tiles, so that the producer fills the ring for the
// next one while this one is stored.
struct InputTask {
  SequenceTile tile;
  int head, first_run;
  int64_t first_row, num_blocks;
  int begin, end;  // column tiles
  int panels;      // slices of the hidden layer
  int overlap;     // blocks that share a token

  __device__ int slices() const { return overlap * panels; }  // of a column tile
};

template <typename T>
__device__ __forceinline__ void produce_input(const CompressBwdParams& bwd, const CompressBwdPlan& plan,
                                              const CUtensorMap& w1_map, const InputTask& task,
                                              uint32_t stages, const SliceRing& ring) {
  constexpr int kCopies = kRows / kRowStep;
  const CompressFwdParams& p = bwd.fwd;
  const int thread = threadIdx.x - kRingConsumers, row = thread / 8, chunk = thread % 8;
  const int64_t block_stride = static_cast<int64_t>(p.num_heads) * p.hidden_size;
  const int64_t first_block = task.first_run + row;
  const T* source = static_cast<const T*>(plan.dz) + (task.first_row + first_block) * block_stride +
                    static_cast<int64_t>(task.head) * p.hidden_size + chunk * 8;
  const uint32_t target = swizzled_offset(kRows, row, chunk);
  const int columns = static_cast<int>(p.blocks.stride) * p.head_dim;
  const int w1_row = (p.per_head ? task.head : 0) * static_cast<int>(p.blocks.block) * p.head_dim;
  int i = 0;
  for (int tile = task.begin; tile < task.end; ++tile) {
#pragma unroll 1
    for (int slice = 0; slice < task.slices(); ++slice, ++i) {
      const int back = slice / task.panels, f = slice % task.panels * kSlice;
      ring.produce(
          i, kBBytes,
          [&](int stage) {
            ptx::bulk_load_3d(stages + stage * kStageBytes + kABytes, &w1_map, ring.full(stage), f, 0,
                              w1_row + back * columns + tile * kColumns);
          },
          [&](int stage) {
            const uint32_t a = stages + stage * kStageBytes + target;
            const bool inside = f + chunk * 8 < p.hidden_size;
#pragma unroll
            for (int c = 0; c < kCopies; ++c) {
              const int64_t block = first_block + c * kRowStep - back;
              const bool exists = inside && block >= 0 && block < task.num_blocks;
              const T* from = source + (c * kRowStep - back) * block_stride + f;
              ptx::async_copy_16(a + c * kRowStep * kPanelPitch,
                                 exists ? from : static_cast<const T*>(plan.dz), exists);
            }
          });
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_input(const CompressBwdParams& bwd, const InputTask& task,
                                            const float (&acc)[kColumns / 2], int first_column) {
  const CompressFwdParams& p = bwd.fwd;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int odd = lane & 1;
#pragma unroll
  for (int q = 0; q < kColumns / 8; q += 2) {  // 16 columns lie within one token
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Neighbouring lanes exchange, so that each has four columns: the even lane of tile q, the odd of q
      // + 1.
      const float* x = acc + 4 * q + 2 * half;
      const uint32_t first = ptx::pack2<T>(x[0], x[1]), second = ptx::pack2<T>(x[4], x[5]);
      const uint32_t received = __shfl_xor_sync(~0u, odd ? first : second, 1);
      const int column = first_column + (q + odd) * 8 + (lane & 2) * 2;
      const int64_t run = task.first_run + warp * 16 + lane / 4 + 8 * half;
      const int64_t token = run * p.blocks.stride + column / p.head_dim;
      if (token >= task.tile.seq.q_len) continue;
      T* dst = static_cast<T*>(bwd.dx) +
               ((task.tile.seq.q_begin + token) * p.num_heads + task.head) * p.head_dim + column % p.head_dim;
      *reinterpret_cast<uint2*>(dst) = odd ? make_uint2(received, second) : make_uint2(first, received);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kRingThreads, 1)
    compress_bwd_input_sm90(const CompressBwdParams bwd, const CompressBwdPlan plan,
                            const __grid_constant__ CUtensorMap w1_map) {
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage[2 * kRingStages];
  const CompressFwdParams& p = bwd.fwd;
  const uint32_t stages = aligned(shared);
  const SliceRing ring{ptx::shared_address(barrier_storage)};

  InputTask task;
  const int stride = static_cast<int>(p.blocks.stride);
  task.tile = find_sequence_tile(p.seqs, blockIdx.x, kRows * stride);
  if (task.tile.count == 0) return;
  task.head = blockIdx.z;
  task.first_run = task.tile.begin / stride;
  task.first_row = p.blocks.first_row(task.tile.seq.k_begin);
  task.num_blocks = count_blocks(p.seqs, p.blocks, task.tile.seq);
  const int tiles = stride * p.head_dim / kColumns, groups = gridDim.y;
  task.begin = tiles * blockIdx.y / groups;
  task.end = tiles * (blockIdx.y + 1) / groups;
  task.panels = (p.hidden_size + kSlice - 1) / kSlice;
  task.overlap = static_cast<int>(p.blocks.block) / stride;

  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (threadIdx.x >= kRingConsumers) {
    produce_input<T>(bwd, plan, w1_map, task, stages, ring);
    return;
  }
  const uint32_t rows = threadIdx.x / 128 * 64 * kPanelPitch;  // of this warpgroup
  int i = 0;
  for (int tile = task.begin; tile < task.end; ++tile, i += task.slices()) {
    float acc[kColumns / 2];
    ring.consume(acc, i, task.slices(), [&](int stage, bool accumulate) {
      const uint32_t a = stages + stage * kStageBytes + rows, b = stages + stage * kStageBytes + kABytes;
#pragma unroll
      for (int k = 0; k < kSlice; k += 16) {
        ptx::wgmma_shared<T, kColumns>(acc, k_major_descriptor(a, kRows, k),
                                       k_major_descriptor(b, kColumns, k), accumulate || k > 0);
      }
    });
    store_input<T>(bwd, task, acc, tile * kColumns);
  }
}

bool has_kernel(const CompressFwdParams& p) { return p.head_dim % kPanel == 0 && p.hidden_size % 8 == 0; }

}  // namespace

bool compress_bwd_first_weight(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream,
                               Status* status) {
  const CompressFwdParams& f = p.fwd;
  CUtensorMap dz_map;
  const RowsView dz{plan.dz, static_cast<int64_t>(f.num_heads) * f.hidden_size, f.hidden_size};
  if (!has_kernel(f) ||
      !make_tensor_map(&dz_map, f.dtype, dz, f.num_rows, f.num_heads, f.hidden_size, kSlice, 1))
    return false;
  const dim3 grid(
      static_cast<unsigned>(f.blocks.block * f.head_dim / kRows * ceil_div(f.hidden_size, kColumns)),
      static_cast<unsigned>(plan.parts_w1), static_cast<unsigned>(f.per_head ? f.num_heads : 1));
  *status = dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_weight_sm90", compress_bwd_weight_sm90<T>, grid, kRingThreads, kSharedBytes,
                  stream, p, plan, dz_map);
  });
  return true;
}

bool compress_bwd_input(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream,
                        Status* status) {
  const CompressFwdParams& f = p.fwd;
  CUtensorMap w1_map;
  const RowsView w1{f.w1, f.hidden_size, f.hidden_size};
  const int64_t depth = (f.per_head ? f.num_heads : 1) * f.blocks.block * f.head_dim;
  if (!has_kernel(f) || !make_tensor_map(&w1_map, f.dtype, w1, depth, 1, f.hidden_size, kColumns, 1))
    return false;
  // As few groups of column tiles as fill the GPU.
  const int64_t tiles = num_sequence_tiles(f.seqs, kRows * f.blocks.stride) * f.num_heads;
  const int64_t columns = f.blocks.stride * f.head_dim / kColumns;
  const int64_t num_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t groups = max64(1, min64(columns, num_sms / max64(tiles, 1)));
  const dim3 grid(static_cast<unsigned>(tiles / f.num_heads), static_cast<unsigned>(groups),
                  static_cast<unsigned>(f.num_heads));
  *status = dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_input_sm90", compress_bwd_input_sm90<T>, grid, kRingThreads, kSharedBytes,
                  stream, p, plan, w1_map);
  });
  return true;
}

}  // namespace nsa::cuda::sm90
