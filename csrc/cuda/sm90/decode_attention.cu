// Attention of a few tokens per sequence over a cache, on Hopper, in two launches chained by programmatic
// dependent launch: the compressed keys (decode_compressed.cu), then here all that is left.
//
// A cluster of up to eight thread blocks has one token and up to 16 heads of a group: it sums the block
// scores, chooses, attends the window and the chosen blocks, merges the compressed branch, and puts the
// three through the gate. The window's first tiles are under way while the first launch ends, the first
// chosen ones while the window is attended. Without a cluster (a batch that fills the device) the same code
// runs in one block. All sums are in fixed order.
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/decode_attention.h"
#include "cuda/sm90/decode_tile.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/tile/top_k.cuh"
#include "cuda/tile/vector.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kThreads = kDecodeThreads;
constexpr int kRowStates = 2 * kDecodeRows;  // slc, swa

template <int kDimQK, int kDimV>
struct RestLayout : DecodeLayout<kDimQK, kDimV> {
  using Base = DecodeLayout<kDimQK, kDimV>;
  static constexpr int kQ = 0;
  static constexpr int kCompressed = kQ + Base::kQBytes;                 // [own rows][kDimV] floats, gated
  static constexpr int kSlices = kCompressed + kDecodeRows * kDimV * 4;  // [blocks][own rows][kDimV] floats
  static constexpr int kRing = kSlices + kDecodeRows * kDimV * 4;
  __host__ __device__ static constexpr int scores(int stages) { return kRing + Base::ring_bytes(stages); }
  __host__ __device__ static constexpr int bytes(int stages, int num_blocks) {
    return scores(stages) + static_cast<int>(round_up(num_blocks + 1, 4)) * 4;
  }
};

// What is in shared memory beside the tiles.
struct RestShared {
  float lse_log2[kMaxDecodeGroup];              // of the compressed branch
  float2 warp_state[kDecodeWarps][kRowStates];  // of each warp
  float2 state[kMaxDecodeCluster][kRowStates];  // of each block of the cluster
  float factor[kDecodeWarps][kRowStates];       // of each warp's outputs
  int chosen[kMaxDecodeSelected];
  BestOfBlock<kThreads> best;
  alignas(8) uint64_t barriers[kDecodeWarps * kMaxDecodeStages + 1];
};

// One token and its slab of heads.
struct Slab {
  int64_t b, row;                               // sequence (-1: padding), row of q
  int position, head_kv, first_head, num_rows;  // first_head: query head of row 0
};

__device__ Slab find_slab(const DecodeAttentionParams& p, const DecodePlan& plan) {
  const int group = p.shape.group(), slab = blockIdx.y % plan.slabs;
  Slab result;
  result.row = blockIdx.z;
  result.head_kv = blockIdx.y / plan.slabs;
  result.first_head = result.head_kv * group + slab * kDecodeRows;
  result.num_rows = min(kDecodeRows, group - slab * kDecodeRows);
  result.b = find_sequence(p.seqs, result.row);
  result.position = -1;
  if (result.b >= 0) {
    const Sequence seq = clamped_sequence(p.seqs, result.b);
    result.position = static_cast<int>(seq.position(result.row - seq.q_begin));
  }
  return result;
}

// Rows of no sequence: o = 0, lse = -inf, block_indices = -1.
template <typename T>
__device__ void write_padding(const DecodeAttentionParams& p, const Slab& slab) {
  const int dim_v = p.shape.head_dim_v, n = p.num_selected_blocks;
  const int64_t first = slab.row * p.shape.num_heads_q + slab.first_head;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += kThreads)
    p.block_indices[(slab.row * p.shape.num_heads_kv + slab.head_kv) * n + i] = -1;
#pragma unroll 1
  for (int i = threadIdx.x; i < slab.num_rows * dim_v; i += kThreads)
    static_cast<T*>(p.o)[first * dim_v + i] = static_cast<T>(0.f);
#pragma unroll 1
  for (int i = threadIdx.x; i < slab.num_rows * kNumBranches; i += kThreads)
    static_cast<float*>(
        p.lse)[i / slab.num_rows * p.seqs.total_q * p.shape.num_heads_q + first + i % slab.num_rows] =
        kNegInf;
}

// lse of the compressed branch in base 2, by eight lanes for each head of the group.
__device__ void merge_lse(const DecodeAttentionParams& p, const DecodePlan& plan, const Slab& slab,
                          float* lse_log2) {
  constexpr int kLanes = 8, kEach = kMaxDecodeSplits / kLanes;
  const int group = p.shape.group(), lane = threadIdx.x % kLanes;
  const float2* states =
      plan.part_state + (slab.row * p.shape.num_heads_q + int64_t{slab.head_kv} * group) * plan.splits;
#pragma unroll 1
  for (int g0 = 0; g0 < group; g0 += kThreads / kLanes) {
    const int g = g0 + threadIdx.x / kLanes;
    const float2* state = states + min(g, group - 1) * plan.splits;
    float2 own[kEach];
    float max = kNegInf, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int split = lane + i * kLanes;
      own[i] = split < plan.splits ? state[split] : make_float2(kNegInf, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) max = fmaxf(max, own[i].x);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      sum += own[i].y == 0.f ? 0.f : own[i].y * ptx::exp2_approx(own[i].x - max);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0 && g < group) lse_log2[g] = sum == 0.f ? kNegInf : max + log2f(sum);
  }
}

// Where a value goes in every block of the cluster.
template <typename Value>
__device__ __forceinline__ void store_everywhere(Value* own, Value value, int cluster) {
  if (cluster == 1) {
    *own = value;
    return;
  }
  const uint32_t address = ptx::shared_address(own);
#pragma unroll 1
  for (int rank = 0; rank < cluster; ++rank) ptx::store_cluster(ptx::cluster_address(address, rank), value);
}

__device__ __forceinline__ void sync_cluster(int cluster) {
  if (cluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
}

// Adds to scores[first .. last - 1] of a token, which are zero, what its tiles have left. Sixteen lanes share
// four entries of a tile and have a head each. A score has at most two terms, so their order does not matter.
__device__ void score_tiles(const DecodeAttentionParams& p, const DecodePlan& plan, const Slab& slab,
                            int num_tiles, int first, int last, const float* lse_log2, float* scores) {
  constexpr int kAtOnce = 4, kHalfWarps = kThreads / 16;
  const int group = p.shape.group(), own_lane = threadIdx.x & 15, half_warp = threadIdx.x >> 4;
  const int blocks = plan.blocks_per_tile, used = blocks + plan.spill, vectors = (used + 3) / 4;
  const float* sums = plan.sums + (slab.row * p.shape.num_heads_kv + slab.head_kv) * plan.max_tiles *
                                      (int64_t{group} * plan.entries);
  const int begin = max(0, first - plan.spill) / blocks;
  const int end = min(num_tiles, (last + blocks - 1) / blocks), count = (end - begin) * vectors;
#pragma unroll 1
  for (int i0 = half_warp & ~1; i0 < count; i0 += kAtOnce * kHalfWarps) {
    float total[kAtOnce][4] = {};
    const auto item = [&](int i) { return i0 + i * kHalfWarps + (half_warp & 1); };
    const auto tile_of = [&](int item) { return begin + item / vectors; };
#pragma unroll 1
    for (int g = own_lane; g < group; g += 16) {
      float4 value[kAtOnce];
      float max[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int tile = tile_of(item(i)), vector = item(i) % vectors;
        const float* source = sums + (int64_t{tile} * group + g) * plan.entries;
        const bool exists = item(i) < count;
        value[i] = exists ? reinterpret_cast<const float4*>(source)[vector] : make_float4(0.f, 0.f, 0.f, 0.f);
        max[i] = exists ? source[plan.entries - 1] : kNegInf;
      }
      const float lse = lse_log2[g];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float factor = max[i] == kNegInf ? 0.f : ptx::exp2_approx(max[i] - lse);
        total[i][0] = fmaf(value[i].x, factor, total[i][0]);
        total[i][1] = fmaf(value[i].y, factor, total[i][1]);
        total[i][2] = fmaf(value[i].z, factor, total[i][2]);
        total[i][3] = fmaf(value[i].w, factor, total[i][3]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      // Half of the entries go to the other half of the lanes, twice: lane 4 * e ends with entry e.
      const bool high = own_lane & 8, odd = own_lane & 4;
      float a = high ? total[i][2] : total[i][0], b = high ? total[i][3] : total[i][1];
      a += __shfl_xor_sync(~0u, high ? total[i][0] : total[i][2], 8);
      b += __shfl_xor_sync(~0u, high ? total[i][1] : total[i][3], 8);
      float sum = odd ? b : a;
      sum += __shfl_xor_sync(~0u, odd ? a : b, 4);
      sum += __shfl_xor_sync(~0u, sum, 2);
      sum += __shfl_xor_sync(~0u, sum, 1);
      const int entry = item(i) % vectors * 4 + own_lane / 4, block = tile_of(item(i)) * blocks + entry;
      if ((own_lane & 3) == 0 && item(i) < count && entry < used && block >= first && block < last)
        atomicAdd(&scores[block], sum);
    }
  }
  __syncthreads();
}

// Keys of a block's warps: tile i of a walk that all warps of a cluster share.
struct Walk {
  int first, stride, count;  // tiles first, first + stride, .. below count

  __device__ int tiles() const { return first < count ? (count - first + stride - 1) / stride : 0; }
  __device__ int tile(int i) const { return first + i * stride; }
};

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

// The gated output of the compressed branch for the block's own rows, in as many shares as there are threads
// for; share s of row r at merged[(s * rows + r) * kVectors]. Returns the number of shares.
template <int kDimV>
__device__ int merge_compressed(const DecodeAttentionParams& p, const DecodePlan& plan, const Slab& slab,
                                int first_row, int rows, const float* lse_log2, float4* merged) {
  constexpr int kVectors = kDimV / 4;
  const int items = rows * kVectors, shares = max(1, kThreads / items);
#pragma unroll 1
  for (int i = threadIdx.x; i < items * shares; i += kThreads) {
    const int vector = i % kVectors, share = i / items, r = first_row + i % items / kVectors;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (r < slab.num_rows) {
      const int64_t row = slab.row * p.shape.num_heads_q + slab.first_head + r;
      const float lse = lse_log2[slab.first_head - slab.head_kv * p.shape.group() + r];
      const float2* state = plan.part_state + row * plan.splits;
      const float4* part = reinterpret_cast<const float4*>(plan.part_o + row * plan.splits * kDimV) + vector;
#pragma unroll 8
      for (int split = share; split < plan.splits; split += shares) {
        // A part without keys has unwritten memory; it is read all the same, so that no load waits.
        const float2 own = state[split];
        float4 x = part[split * kVectors];
        const float weight = own.y == 0.f ? 0.f : ptx::exp2_approx(own.x - lse);
        if (weight == 0.f) x = make_float4(0.f, 0.f, 0.f, 0.f);
        sum = make_float4(fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z),
                          fmaf(weight, x.w, sum.w));
      }
      const float g = gate(p, row, 0);
      sum = make_float4(sum.x * g, sum.y * g, sum.z * g, sum.w * g);
    }
    merged[i] = sum;
  }
  return shares;
}

__device__ __forceinline__ float2 merge_states(const float2* state, int count, int stride) {
  float2 all = make_float2(kNegInf, 0.f);
#pragma unroll 1
  for (int i = 0; i < count; ++i) all.x = fmaxf(all.x, state[i * stride].x);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const float2 own = state[i * stride];
    if (own.y != 0.f) all.y += own.y * ptx::exp2_approx(own.x - all.x);
  }
  return all;
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(kThreads) decode_rest_sm90(const __grid_constant__ DecodeAttentionParams p,
                                                             const __grid_constant__ DecodePlan plan) {
  using Layout = RestLayout<kDimQK, kDimV>;
  constexpr int kVectors = kDimV / 4;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RestShared s;
  const uint32_t base = ptx::shared_address(shared), barrier = ptx::shared_address(s.barriers);
  const uint32_t q_barrier = barrier + kDecodeWarps * kMaxDecodeStages * 8;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int cluster = plan.cluster, rank = blockIdx.x;
  init_decode_barriers(barrier, kDecodeWarps * kMaxDecodeStages + 1);
  sync_cluster(cluster);

  // The first launch lets this one begin when what was in front of it has ended: the step's tokens are there.
  const Slab slab = find_slab(p, plan);
  if (slab.b < 0) {
    ptx::wait_for_dependency();
    ptx::launch_dependents();
    if (rank == 0) write_padding<T>(p, slab);
    return;
  }
  const int end = slab.position + 1, n = p.num_selected_blocks;
  const int begin_window =
      CachedKeyBlocks(KeyBlocks{}).begin_visible(slab.position, static_cast<int>(p.window));
  Walk window{warp * cluster + rank, kDecodeWarps * cluster,
              (end - begin_window + kDecodeKeys - 1) / kDecodeKeys};
  const int window_tiles = window.tiles();
  const LaneRows window_keys(p.k_swa, p.v_swa, slab.b, slab.head_kv, 0, lane);
  DecodeRing<T, kDimQK, kDimV> ring(base + Layout::kRing, barrier, plan.rest_stages, warp);
  if (warp == 0) {
    load_decode_queries<T, kDimQK>(
        base + Layout::kQ, q_barrier,
        [&](int row) -> const T* {
          if (row >= slab.num_rows) return nullptr;
          return static_cast<const T*>(p.q.data) + slab.row * p.q.stride_row +
                 (slab.first_head + row) * p.q.stride_head;
        },
        lane);
  }
#pragma unroll 1
  while (ring.loaded < min(window_tiles, plan.rest_stages)) {
    ring.load(window_keys, begin_window + window.tile(ring.loaded) * kDecodeKeys, end, lane);
  }

  // The choice.
  float* scores = reinterpret_cast<float*>(shared + Layout::scores(plan.rest_stages));
  const int own = slab.position / static_cast<int>(p.block_size);
  const int each = (own + cluster) / cluster, first_block = rank * each,
            last_block = min(own + 1, first_block + each);
#pragma unroll 1
  for (int j = first_block + threadIdx.x; j < last_block; j += kThreads) scores[j] = 0.f;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  merge_lse(p, plan, slab, s.lse_log2);
  __syncthreads();
  const int num_tiles =
      (CachedKeyBlocks(p.compressed).end_visible(slab.position) + kDecodeKeys - 1) / kDecodeKeys;
  score_tiles(p, plan, slab, num_tiles, first_block, last_block, s.lse_log2, scores);
  if (cluster > 1) {
#pragma unroll 1
    for (int j = first_block + threadIdx.x; j < last_block; j += kThreads) {
      const float score = scores[j];
#pragma unroll 1
      for (int other = 1; other < cluster; ++other) {
        ptx::store_cluster(
            ptx::cluster_address(ptx::shared_address(&scores[j]), (rank + other) & (cluster - 1)), score);
      }
    }
    ptx::cluster_sync();
  }
  choose_blocks_by_block(s.chosen, scores, own, n, p.num_initial_blocks, p.num_local_blocks, s.best);
  const int entries = __syncthreads_count(threadIdx.x < n && s.chosen[threadIdx.x] >= 0);
  if (rank == 0 && slab.first_head == slab.head_kv * p.shape.group() && threadIdx.x < n) {
    p.block_indices[(slab.row * p.shape.num_heads_kv + slab.head_kv) * n + threadIdx.x] =
        s.chosen[threadIdx.x];
  }

  const int size = static_cast<int>(p.block_size), tiles_of_block = size / kDecodeKeys;
  const Walk chosen{window.first, window.stride, entries * tiles_of_block};
  const int all_tiles = window_tiles + chosen.tiles();
  const LaneRows chosen_keys(p.k_slc, p.v_slc, slab.b, slab.head_kv, 0, lane);
  struct ChosenTile {
    int first, end;
  };
  const auto chosen_tile = [&](int i) -> ChosenTile {
    const int tile = chosen.tile(i), block = s.chosen[tile / tiles_of_block];
    return {block * size + tile % tiles_of_block * kDecodeKeys, min(end, (block + 1) * size)};
  };
  const auto load_next = [&] {
    const bool is_chosen = ring.loaded >= window_tiles;
    ChosenTile tile{begin_window + window.tile(ring.loaded) * kDecodeKeys, end};
    if (is_chosen) tile = chosen_tile(ring.loaded - window_tiles);
    LaneRows keys = window_keys;
    if (is_chosen) keys = chosen_keys;
    ring.load(keys, tile.first, tile.end, lane);
  };
#pragma unroll 1
  while (ring.loaded < min(all_tiles, plan.rest_stages)) load_next();

  const int own_rows = kDecodeRows / cluster, first_own = rank * own_rows;
  float4* compressed = reinterpret_cast<float4*>(shared + Layout::kCompressed);
  const int shares = merge_compressed<kDimV>(p, plan, slab, first_own, own_rows, s.lse_log2, compressed);

  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const auto no_use = [](const float(&)[kDecodeKeys / 8][4]) {};
  DecodeWarp<T, kDimQK, kDimV> swa, slc;
  ptx::barrier_wait(q_barrier, 0);
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < all_tiles; ++i) {
    const bool is_chosen = i >= window_tiles;
    if (i == window_tiles) swa = slc, slc = {};
    ChosenTile tile{begin_window + window.tile(i) * kDecodeKeys, end};
    if (is_chosen) tile = chosen_tile(i - window_tiles);
    const int low = is_chosen ? 0 : begin_window;
    slc.attend(base + Layout::kQ, ring.front(), tile.first, tile.end, {{low, low}, {end, end}, low, end},
               scale, lane, no_use);
    ring.pop();
    if (ring.loaded < all_tiles) load_next();
  }
  if (all_tiles == window_tiles) swa = slc, slc = {};

    // (largest logit, sum) of every warp, block, and of all.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float2 of_slc = slc.state(half, scale), of_swa = swa.state(half, scale);
    if ((lane & 3) == 0) {
      s.warp_state[warp][row] = of_slc;
      s.warp_state[warp][kDecodeRows + row] = of_swa;
    }
  }
  __syncthreads();
  if (threadIdx.x < kRowStates) {
    const float2 state = merge_states(&s.warp_state[0][threadIdx.x], kDecodeWarps, kRowStates);
    store_everywhere(&s.state[rank][threadIdx.x], state, cluster);
  }
  sync_cluster(cluster);
  static_assert(kThreads == kDecodeWarps * kRowStates);
  {
    const int i = lane, branch = i < kDecodeRows ? 1 : 2, r = i & (kDecodeRows - 1);
    const float2 all = merge_states(&s.state[0][i], cluster, kRowStates);
    float factor = 0.f;
    if (r < slab.num_rows) {
      const int64_t row = slab.row * p.shape.num_heads_q + slab.first_head + r;
      if (all.y != 0.f) {
        factor = ptx::exp2_approx(s.warp_state[warp][i].x - all.x) * gate(p, row, branch) / all.y;
      }
      if (warp == 0 && r / own_rows == rank) {
        float* lse = static_cast<float*>(p.lse) + row;
        const int64_t of_branch = p.seqs.total_q * p.shape.num_heads_q;
        lse[branch * of_branch] = all.y == 0.f ? kNegInf : (all.x + log2f(all.y)) * kLn2;
        if (branch == 1) *lse = s.lse_log2[slab.first_head - slab.head_kv * p.shape.group() + r] * kLn2;
      }
    }
    s.factor[warp][i] = factor;
  }
  __syncwarp();
  float* outputs = reinterpret_cast<float*>(shared + Layout::kRing);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float f_slc = s.factor[warp][row], f_swa = s.factor[warp][kDecodeRows + row];
#pragma unroll
    for (int d = 0; d < kDimV / 8; ++d) {
      const auto both = [&](int c) { return slc.out[0][d][c] * f_slc + swa.out[0][d][c] * f_swa; };
      *reinterpret_cast<float2*>(outputs + (warp * kDecodeRows + row) * Layout::kOutputPitch + d * 8 +
                                 (lane & 3) * 2) = make_float2(both(2 * half), both(2 * half + 1));
    }
  }
  __syncthreads();
  float4* slices = reinterpret_cast<float4*>(shared + Layout::kSlices);
#pragma unroll 2
  for (int i = threadIdx.x; i < kDecodeRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(
          outputs + (w * kDecodeRows + row) * Layout::kOutputPitch + vector * 4);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    float4* to = slices + (rank * own_rows + row % own_rows) * kVectors + vector;
    if (cluster == 1) {
      *to = sum;
    } else {
      ptx::store_cluster(ptx::cluster_address(ptx::shared_address(to), row / own_rows), sum);
    }
  }
  sync_cluster(cluster);
#pragma unroll 1
  for (int i = threadIdx.x; i < own_rows * kVectors; i += kThreads) {
    const int row = first_own + i / kVectors;
    if (row >= slab.num_rows) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const auto add = [&](const float4& x) {
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    };
#pragma unroll 1
    for (int share = 0; share < shares; ++share) add(compressed[share * own_rows * kVectors + i]);
#pragma unroll 1
    for (int other = 0; other < cluster; ++other) add(slices[other * own_rows * kVectors + i]);
    T* o = static_cast<T*>(p.o) + (slab.row * p.shape.num_heads_q + slab.first_head + row) * kDimV +
           i % kVectors * 4;
    *reinterpret_cast<uint2*>(o) = make_uint2(ptx::pack2<T>(sum.x, sum.y), ptx::pack2<T>(sum.z, sum.w));
  }
}

// Shapes alone decide, and the number of SMs.
DecodePlan make_plan(const DecodeAttentionParams& p) {
  DecodePlan plan{};
  const int64_t group = p.shape.group(), heads = p.shape.num_heads_kv;
  const int64_t places = 2 * device_attribute(cudaDevAttrMultiProcessorCount);  // two thread blocks on an SM
  plan.row_tiles = static_cast<int>(max64(1, ceil_div(p.seqs.max_seqlen_q * group, kDecodeRows)));
  plan.slabs = static_cast<int>(ceil_div(group, kDecodeRows));
  plan.max_tiles = static_cast<int>(max64(1, ceil_div(p.compressed.count(p.seqs.capacity), kDecodeKeys)));
  plan.num_blocks = static_cast<int>(max64(1, ceil_div(p.seqs.capacity, p.block_size)));
  plan.per_block = static_cast<int>(p.block_size / p.compressed.stride);
  plan.before = static_cast<int>(p.compressed.block / p.compressed.stride) - 1;
  plan.blocks_per_tile = kDecodeKeys / plan.per_block;
  plan.spill = static_cast<int>(ceil_div(plan.before, plan.per_block));
  plan.entries = static_cast<int>(round_up(plan.blocks_per_tile + 4, 4));
  // At least two tiles for a warp, one where even so there is an SM for every thread block; beyond, four
  // waves of thread blocks, so that the last one does not leave most SMs idle.
  const int64_t units = max64(1, p.seqs.batch) * heads * plan.row_tiles;
  const int64_t most = ceil_div(plan.max_tiles, kDecodeWarps);
  const int64_t each = units * most <= places / 2 ? 1 : 2;
  plan.splits =
      static_cast<int>(min64(min64(kMaxDecodeSplits, ceil_div(most, each)), ceil_div(4 * places, units)));
  // With two stages, a thread block of the second launch fits beside one of the first.
  plan.stages = int64_t{plan.splits} * 2 * kDecodeWarps >= plan.max_tiles ? 2 : 3;
  const int64_t slabs = max64(1, p.seqs.total_q) * heads * plan.slabs;
  plan.cluster = 1;
  while (plan.cluster < kMaxDecodeCluster && 2 * plan.cluster * slabs <= places) plan.cluster *= 2;
  // A block that has an SM to itself, or shares it with one of the first launch, has room for three.
  plan.rest_stages = plan.cluster == kMaxDecodeCluster ? 3 : 2;
  return plan;
}

bool supports(const DecodeAttentionParams& p) {
  if (p.dtype != DType::kBF16) return false;
  const int64_t stride = p.compressed.stride, per_block = p.block_size / stride;
  const int64_t before = p.compressed.block / stride - 1;
  if (p.shape.group() > kMaxDecodeGroup || p.num_selected_blocks > kMaxDecodeSelected) return false;
  if (p.block_size % kDecodeKeys != 0 || per_block > kDecodeKeys || kDecodeKeys % per_block != 0)
    return false;
  const int64_t blocks = kDecodeKeys / per_block, spill = ceil_div(before, per_block);
  if (spill > min64(blocks, 3)) return false;
  if (ceil_div(p.seqs.capacity, p.block_size) > kMaxScoreBlocks) return false;
  // Where few (sequence, KV head) pairs need larger clusters to fill the device, the portable kernels are as
  // fast (4 pairs) or faster (32: 94 us against 125): not all clusters of 8 fit at once.
  return make_plan(p).cluster <= kMaxUsedCluster;
}

// Lays the workspace out behind `base`; returns its size.
int64_t place(const DecodeAttentionParams& p, DecodePlan* plan, char* base) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += round_up(bytes, 256);
    return at;
  };
  const int64_t rows = p.seqs.total_q * p.shape.num_heads_q;
  plan->part_o = reinterpret_cast<float*>(take(rows * plan->splits * p.shape.head_dim_v * 4));
  plan->part_state = reinterpret_cast<float2*>(take(rows * plan->splits * 8));
  plan->sums = reinterpret_cast<float*>(take(rows * plan->max_tiles * plan->entries * 4));
  return used;
}

}  // namespace

int64_t workspace_bytes(const DecodeAttentionParams& p) {
  if (!supports(p)) return 0;
  DecodePlan plan = make_plan(p);
  return place(p, &plan, nullptr);
}

bool decode_attention(const DecodeAttentionParams& p, const Stream& stream, Status* status) {
  if (!supports(p)) return false;
  DecodePlan plan = make_plan(p);
  place(p, &plan, static_cast<char*>(p.workspace));
  if (!decode_compressed(p, plan, stream, status)) return false;
  if (!status->ok()) return true;
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        const dim3 grid(static_cast<unsigned>(plan.cluster),
                        static_cast<unsigned>(p.shape.num_heads_kv * plan.slabs),
                        static_cast<unsigned>(p.seqs.total_q));
        *status = launch_dependent(
            "decode_rest_sm90", decode_rest_sm90<T, kDimQK, kDimV>, grid, static_cast<unsigned>(plan.cluster),
            kThreads, RestLayout<kDimQK, kDimV>::bytes(plan.rest_stages, plan.num_blocks), stream, p, plan);
        return true;
      });
}

}  // namespace nsa::cuda::sm90
