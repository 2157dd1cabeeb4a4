// phi, forward, on Hopper: both layers in one kernel.
//
// A cluster owns 128 compressed blocks of one head and splits the summed dimension of the first layer among
// its thread blocks (one for long sequences, up to eight for short ones, so that every SM works). In a block,
// a producer warpgroup fills a ring: rows of tokens by cp.async, since packed sequences put them anywhere,
// and W1 by TMA; two consumer warpgroups multiply by wgmma, 64 rows each. The blocks of a cluster then add
// their sums in a fixed order, a share of the rows each, activate them into shared memory and run the second
// layer by mma.sync. PE enters through the bias (portable/compress_bias.cu).
#include "cuda/host/launch_kernel.h"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/compress_ring.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/compress_rows.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warp_gemm.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kRows = 128;
constexpr int kSlice = kPanel;  // of the summed dimension: 64 channels of one token
constexpr int kConsumerWarps = kRingConsumers / 32;
constexpr int kMaxDim = 256;  // of x
constexpr int kABytes = kRows * kPanelPitch;
constexpr int kAlignment = 1024;

// After the first layer the ring holds the sums that the cluster exchanges, then W2, then the hidden layer.
template <int kHidden>
struct Layout {
  static constexpr int kBBytes = kHidden * kPanelPitch;
  static constexpr int kStageBytes = kABytes + kBBytes;
  static constexpr int kHiddenOffset = tile_bytes<kMaxDim>(kHidden);
  static constexpr int kUsed = kHiddenOffset + tile_bytes<kHidden>(kRows);
  static constexpr int kRing = kRingStages * kStageBytes;
  static constexpr int kBytes = kAlignment + (kUsed > kRing ? kUsed : kRing);
  static_assert(kRows * kHidden * 4 <= kHiddenOffset);
};

// What one thread block does.
struct Task {
  int head;
  int64_t first_row;  // of the cluster
  int rank, split;    // in the cluster
  int begin, end;     // slices of the summed dimension
};

// Slices go phase by phase of the stride: blocks that share a token then read it at about the same time.
struct SliceOrder {
  int panels, overlap, stride;

  __device__ explicit SliceOrder(const CompressFwdParams& p)
      : panels(p.head_dim / kSlice),
        overlap(static_cast<int>(p.blocks.block / p.blocks.stride)),
        stride(static_cast<int>(p.blocks.stride)) {}
  __device__ int offset(int slice) const {  // token within the block
    const int step = slice / panels;
    return step / overlap + step % overlap * stride;
  }
  __device__ int channel(int slice) const { return slice % panels * kSlice; }
};

template <typename T, int kHidden>
__device__ __forceinline__ void produce(const CompressFwdParams& p, const CUtensorMap& w1_map,
                                        const Task& task, const int64_t* tokens, uint32_t stages,
                                        const SliceRing& ring) {
  using L = Layout<kHidden>;
  constexpr int kStep = 128 / 8, kCopies = kRows / kStep;  // 8 threads copy the 128 bytes of a row
  const int thread = threadIdx.x - kRingConsumers, row = thread / 8, chunk = thread % 8;
  const T* source[kCopies];
  bool exists[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const int64_t token = tokens[row + i * kStep];
    exists[i] = token >= 0;
    source[i] = static_cast<const T*>(p.x.data) + max64(token, 0) * p.x.stride_row +
                task.head * p.x.stride_head + chunk * 8;
  }
  const uint32_t target = swizzled_offset(kRows, row, chunk);
  const SliceOrder order(p);
  const int w1_row = static_cast<int>((p.per_head ? task.head : 0) * p.blocks.block * p.head_dim);
#pragma unroll 1
  for (int slice = task.begin; slice < task.end; ++slice) {
    const int offset = order.offset(slice), channel = order.channel(slice);
    const int64_t shift = offset * p.x.stride_row + channel;
    ring.produce(
        slice - task.begin, L::kBBytes,
        [&](int stage) {
          const uint32_t b = stages + stage * L::kStageBytes + kABytes;
#pragma unroll
          for (int n = 0; n < kHidden / kPanel; ++n) {
            ptx::bulk_load_3d(b + n * kSlice * kPanelPitch, &w1_map, ring.full(stage), n * kPanel, 0,
                              w1_row + offset * p.head_dim + channel);
          }
        },
        [&](int stage) {
          const uint32_t a = stages + stage * L::kStageBytes + target;
#pragma unroll
          for (int c = 0; c < kCopies; ++c)
            ptx::async_copy_16(a + c * kStep * kPanelPitch, source[c] + shift, exists[c]);
        });
  }
}

// Bias and activation of accumulators 4q .. 4q + 3 of a lane, into the hidden layer's slab of 16 rows.
template <typename T, int kHidden>
__device__ __forceinline__ void activate(float4 v, T* hidden, const float* bias, int slab, int q, int lane,
                                         bool mlp) {
  const int column = 8 * q + 2 * (lane & 3), row = slab * 16 + lane / 4;
  float x[4] = {v.x + bias[column], v.y + bias[column + 1], v.z + bias[column], v.w + bias[column + 1]};
  if (mlp) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = __fdividef(x[i], 1.f + __expf(-x[i]));
  }
  *reinterpret_cast<uint32_t*>(hidden + row * kPitch<kHidden> + column) = ptx::pack2<T>(x[0], x[1]);
  *reinterpret_cast<uint32_t*>(hidden + (row + 8) * kPitch<kHidden> + column) = ptx::pack2<T>(x[2], x[3]);
}

// The sums of the cluster for this block's share of the rows, activated. Sums lie in accumulator order: [warp
// of 16 rows][q][lane][4].
template <typename T, int kHidden>
__device__ __forceinline__ void reduce_cluster(uint32_t sums, const Task& task, T* hidden, const float* bias,
                                               bool mlp) {
  constexpr int kQuads = kHidden / 8, kBatch = 8;
  const int slabs = kConsumerWarps / task.split, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int first = warp; first < slabs * kQuads; first += kConsumerWarps * kBatch) {
    float4 sum[kBatch] = {};
#pragma unroll 2
    for (int rank = 0; rank < task.split; ++rank) {
      const uint32_t source = ptx::cluster_address(sums, rank) + lane * 16;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int item = min(first + j * kConsumerWarps, slabs * kQuads - 1) + task.rank * slabs * kQuads;
        const float4 part = ptx::load_cluster_16(source + item * 512);
        sum[j].x += part.x, sum[j].y += part.y, sum[j].z += part.z, sum[j].w += part.w;
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int item = first + j * kConsumerWarps;
      if (item < slabs * kQuads)
        activate<T, kHidden>(sum[j], hidden, bias, item / kQuads, item % kQuads, lane, mlp);
    }
  }
}

// W2 into shared memory by the producer warpgroup, rows of the pitch of kMaxDim.
template <typename T, int kHidden>
__device__ __forceinline__ void load_second(const CompressFwdParams& p, const Task& task, uint32_t tile) {
  const int chunks = p.head_dim / 8;
  const T* w2 = static_cast<const T*>(p.w2) +
                static_cast<int64_t>(p.per_head ? task.head : 0) * p.hidden_size * p.head_dim;
  for (int i = threadIdx.x - kRingConsumers; i < kHidden * chunks; i += 128) {
    const int row = i / chunks, chunk = i % chunks;
    const bool valid = row < p.hidden_size;
    ptx::async_copy_16(tile + (row * kPitch<kMaxDim> + chunk * 8) * 2,
                       w2 + (valid ? row : 0) * p.head_dim + chunk * 8, valid);
  }
}

// out = hidden . W2 + b2 for this block's share of the rows: a warp takes 16 rows and 32 columns at a time.
template <typename T, int kHidden>
__device__ __forceinline__ void multiply_second(const CompressFwdParams& p, const Task& task,
                                                const int64_t* tokens, uint32_t w2, uint32_t hidden) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slabs = kConsumerWarps / task.split;
  const int slab = warp % slabs, share = task.rank * slabs * 16;
  const int64_t h = p.per_head ? task.head : 0;
  for (int column = warp / slabs * 32; column < p.head_dim; column += task.split * 32) {
    float out[1][4][4] = {};
    multiply_slice<T, kHidden, kMaxDim, kHidden, 1, 2>(out, hidden + slab * 16 * kPitch<kHidden> * 2,
                                                       w2 + column * 2, lane);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int channel = column + n * 8 + (lane & 3) * 2;
      float bias[2] = {};
      if (p.b2 != nullptr) {
        bias[0] = static_cast<float>(static_cast<const T*>(p.b2)[h * p.head_dim + channel]);
        bias[1] = static_cast<float>(static_cast<const T*>(p.b2)[h * p.head_dim + channel + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = share + slab * 16 + lane / 4 + 8 * half;
        if (tokens[row] < 0) continue;
        T* dst = static_cast<T*>(p.out) + ((task.first_row + row) * p.num_heads + task.head) * p.head_dim +
                 channel;
        *reinterpret_cast<uint32_t*>(dst) =
            ptx::pack2<T>(out[0][n][2 * half] + bias[0], out[0][n][2 * half + 1] + bias[1]);
      }
    }
  }
}

// kLinear: the first layer is the output, F wide.
template <typename T, int kHidden>
__device__ __forceinline__ void store_first(const CompressFwdParams& p, const Task& task,
                                            const int64_t* tokens, const T* hidden) {
  const int rows = kRows / task.split;
  for (int i = threadIdx.x; i < rows * kHidden / 8; i += kRingThreads) {
    const int row = i / (kHidden / 8), f = i % (kHidden / 8) * 8, in_cluster = task.rank * rows + row;
    if (tokens[in_cluster] < 0 || f >= p.hidden_size) continue;
    T* dst = static_cast<T*>(p.out) +
             ((task.first_row + in_cluster) * p.num_heads + task.head) * p.hidden_size + f;
    *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(hidden + row * kPitch<kHidden> + f);
  }
}

template <typename T, int kHidden>
__global__ void __launch_bounds__(kRingThreads, 1)
    compress_fwd_sm90(const CompressFwdParams p, const __grid_constant__ CUtensorMap w1_map, int split) {
  using L = Layout<kHidden>;
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage[2 * kRingStages];
  __shared__ int64_t tokens[kRows];
  __shared__ float bias[kHidden];
  const uint32_t unaligned = ptx::shared_address(shared),
                 stages = (unaligned + kAlignment - 1) / kAlignment * kAlignment;
  T* hidden = reinterpret_cast<T*>(shared + (stages - unaligned) + L::kHiddenOffset);
  const SliceRing ring{ptx::shared_address(barrier_storage)};
  const bool mlp = p.kind == CompressKind::kMlp, consumes = threadIdx.x < kRingConsumers;

  Task task;
  task.head = blockIdx.y;
  task.first_row = static_cast<int64_t>(blockIdx.x / split) * kRows;
  task.rank = blockIdx.x % split;
  task.split = split;
  const int slices = static_cast<int>(p.blocks.block) * p.head_dim / kSlice;
  task.begin = slices * task.rank / split;
  task.end = slices * (task.rank + 1) / split;

  int exists = 0;
  if (threadIdx.x < kRows) {
    tokens[threadIdx.x] = first_token(p.seqs, p.blocks, p.num_rows, task.first_row + threadIdx.x);
    exists = tokens[threadIdx.x] >= 0;
  }
  if (threadIdx.x == 0) ring.init();
  if (__syncthreads_or(exists) == 0) {  // the same in the whole cluster
    ptx::wait_for_dependency();         // this kernel must not end before the one in front of it
    return;
  }

  float acc[kHidden / 2];
  if (consumes) {
    const uint32_t rows = threadIdx.x / 128 * 64 * kPanelPitch;  // of this warpgroup
    ring.consume(acc, 0, task.end - task.begin, [&](int stage, bool accumulate) {
      const uint32_t a = stages + stage * L::kStageBytes, b = a + kABytes;
#pragma unroll
      for (int k = 0; k < kSlice; k += 16) {
        ptx::wgmma_shared_natural<T, kHidden>(acc, k_major_descriptor(a + rows, kRows, k),
                                              mn_major_descriptor(b, kSlice, k), accumulate || k > 0);
      }
    });
  } else {
    produce<T, kHidden>(p, w1_map, task, tokens, stages, ring);
    ptx::wait_for_dependency();  // the sums of compress_bias
    for (int f = threadIdx.x - kRingConsumers; f < kHidden; f += kRingProducers)
      bias[f] = f < p.hidden_size ? first_layer_bias<T>(p, p.per_head ? task.head : 0, f) : 0.f;
  }
  __syncthreads();  // the stages are free

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (split == 1) {
    if (consumes) {
#pragma unroll
      for (int q = 0; q < kHidden / 8; ++q) {
        const float4 v = make_float4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
        activate<T, kHidden>(v, hidden, bias, warp, q, lane, mlp);
      }
    }
  } else {
    if (consumes) {
      float4* sums = reinterpret_cast<float4*>(shared + (stages - unaligned));
#pragma unroll
      for (int q = 0; q < kHidden / 8; ++q) {
        sums[(warp * (kHidden / 8) + q) * 32 + lane] =
            make_float4(acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
      }
    }
    ptx::cluster_sync();
    if (consumes) reduce_cluster<T, kHidden>(stages, task, hidden, bias, mlp);
    ptx::cluster_sync();  // nobody reads this block's sums any more
  }
  if (!consumes && mlp) {
    load_second<T, kHidden>(p, task, stages);
    ptx::async_commit();
    ptx::async_wait<0>();
  }
  __syncthreads();
  if (!mlp) {
    store_first<T, kHidden>(p, task, tokens, hidden);
  } else if (consumes) {
    multiply_second<T, kHidden>(p, task, tokens, stages, stages + L::kHiddenOffset);
  }
}

// Into how many thread blocks the summed dimension goes: the fewest slices in a row, where an SM runs one
// block and the rest of a block (exchange, second layer) takes about as long as kRest slices. Clusters of
// four and eight leave some SMs of every GPC idle.
int choose_split(int64_t tiles, int slices) {
  constexpr int kRest = 8;
  const int64_t num_sms = device_attribute(cudaDevAttrMultiProcessorCount);
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int split = 1; split <= 8; split *= 2) {
    const int64_t places = split <= 2 ? num_sms : num_sms * 10 / 11;
    const int64_t cost =
        ceil_div(tiles * split, places) * (ceil_div(slices, split) + (split == 1 ? kRest / 2 : kRest));
    if (cost < best_cost && split <= slices) best = split, best_cost = cost;
  }
  return best;
}

template <typename T, int kHidden>
Status launch_clusters(const CompressFwdParams& p, const CUtensorMap& w1_map, const Stream& stream) {
  const int64_t tiles = ceil_div(p.num_rows, kRows);
  const int split = choose_split(tiles * p.num_heads, static_cast<int>(p.blocks.block) * p.head_dim / kSlice);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles * split), static_cast<unsigned>(p.num_heads));
  config.blockDim = dim3(kRingThreads);
  config.dynamicSmemBytes = Layout<kHidden>::kBytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = p.pe != nullptr ? 2 : 1;  // with PE, the kernel in front is compress_bias
  cudaFuncSetAttribute(compress_fwd_sm90<T, kHidden>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       Layout<kHidden>::kBytes);
  cudaLaunchKernelEx(&config, compress_fwd_sm90<T, kHidden>, p, w1_map, split);
  return last_error("compress_fwd_sm90");
}

}  // namespace

bool compress_forward(const CompressFwdParams& p, const Stream& stream, Status* status) {
  if (p.kind == CompressKind::kMean || p.head_dim % kSlice != 0 || p.head_dim > kMaxDim) return false;
  if (p.hidden_size % 8 != 0 || p.hidden_size > 256 || p.num_rows == 0) return false;
  CUtensorMap w1_map;
  const RowsView w1{p.w1, p.hidden_size, p.hidden_size};
  const int64_t rows = (p.per_head ? p.num_heads : 1) * p.blocks.block * p.head_dim;
  if (!make_tensor_map(&w1_map, p.dtype, w1, rows, 1, p.hidden_size, kSlice, 1)) return false;
  *status = dispatch_half(p.dtype, [&]<typename T>() {
    return p.hidden_size <= 128 ? launch_clusters<T, 128>(p, w1_map, stream)
                                : launch_clusters<T, 256>(p, w1_map, stream);
  });
  return true;
}

}  // namespace nsa::cuda::sm90
