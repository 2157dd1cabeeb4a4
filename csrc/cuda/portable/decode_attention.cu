// Attention of a few tokens per sequence over a cache, by mma.sync (sm_80 and newer), in four launches whose
// grids depend on shapes alone:
//   1 compressed keys and the window, split over thread blocks; logits of the compressed keys to the
//   workspace; 2 block scores from the lse of the compressed branch, and the choice by the last block of a
//   token; 3 the chosen blocks, split; 4 the parts of the three branches merged, through the gate.
// Which block is the last never changes a result: partial results are merged in the order of their numbers.
#include "cuda/portable/decode_tile.cuh"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/top_k.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kMaxGroup = 64;
constexpr int kMaxSplits = 64;  // of the compressed keys, and of the chosen blocks
constexpr int kMaxWindowSplits = 16;
constexpr int kMaxTaps = 64;      // compressed blocks that touch a selection block
constexpr int kThreads = 128;     // of launches 2 and 4
constexpr int kScoreBlocks = 64;  // selection blocks that are scored at a time
constexpr int kMaxStrides = 16;   // of a selection block
constexpr int kStagedScores = 8192;
constexpr int kTileRoom = 32;  // rows of logits end where a tile of any head dim does

// How the work is split, and the workspace.
struct DecodePlan {
  int cmp_splits, window_splits, chosen_splits, score_splits;
  int row_tiles;       // of 16 rows, per sequence and KV head (launch 1)
  int slabs;           // of 16 heads, per token and KV head (launch 3)
  int max_keys;        // compressed keys of a sequence
  int num_blocks;      // selection blocks of a sequence
  float* logits;       // [T, Hq, max_keys], base 2
  float* part_o;       // [T, Hq, parts, Dv]
  float2* part_state;  // [T, Hq, parts]
  float* scores;       // [T, Hkv, num_blocks]
  int* finished;       // [T, Hkv]: thread blocks of launch 2 that are done

  __host__ __device__ int parts() const { return cmp_splits + window_splits + chosen_splits; }
};

// The sequence and token of a thread block that has one token.
struct TokenBlock {
  int64_t b, row;  // sequence, row of q
  int position;
};

__device__ TokenBlock find_token(const DecodeAttentionParams& p, int64_t row) {
  const int64_t b = find_sequence(p.seqs, row);
  if (b < 0) return {-1, row, -1};
  const Sequence seq = clamped_sequence(p.seqs, b);
  return {b, row, static_cast<int>(seq.position(row - seq.q_begin))};
}

__device__ int64_t part_index(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t row,
                              int head_q) {
  return (row * p.shape.num_heads_q + head_q) * plan.parts();
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(DecodeLayout<kDimQK, kDimV>::kThreads)
    decode_banded_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  constexpr int kKeys = DecodeLayout<kDimQK, kDimV>::kKeys;
  extern __shared__ __align__(16) unsigned char shared[];
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const uint32_t base = ptx::shared_address(shared);
  const int head = blockIdx.y, group = p.shape.group(), lane = threadIdx.x & 31;
  const int64_t b = blockIdx.z / plan.row_tiles;
  const int first_row = blockIdx.z % plan.row_tiles * kDecodeRows;
  const Sequence seq = clamped_sequence(p.seqs, b);
  const int num_rows = static_cast<int>(min64(seq.q_len * group - first_row, kDecodeRows));
  if (num_rows <= 0) return;
  const auto token_of = [&](int row) { return (first_row + row) / group; };
  const auto head_of = [&](int row) { return head * group + (first_row + row) % group; };
  load_queries<kDimQK, kDimV>(base, [&](int row) -> const T* {
    if (row >= num_rows) return nullptr;
    return static_cast<const T*>(p.q.data) + (seq.q_begin + token_of(row)) * p.q.stride_row +
           head_of(row) * p.q.stride_head;
  });
  if (blockIdx.x == 0 && threadIdx.x < num_rows && (first_row + threadIdx.x) % group == 0) {
    plan.finished[(seq.q_begin + token_of(threadIdx.x)) * p.shape.num_heads_kv + head] = 0;
  }

  const bool compressed = blockIdx.x < static_cast<unsigned>(plan.cmp_splits);
  const CachedKeyBlocks blocks(compressed ? p.compressed : KeyBlocks{});
  const int window = compressed ? 0 : static_cast<int>(p.window);
  const auto position = [&](int row) { return static_cast<int>(seq.position(token_of(row))); };
  const int split = compressed ? blockIdx.x : blockIdx.x - plan.cmp_splits;
  const int splits = compressed ? plan.cmp_splits : plan.window_splits;
  const int begin = blocks.begin_visible(position(0), window);
  const int end = blocks.end_visible(position(num_rows - 1));
  const int each = (end - begin + splits * kKeys - 1) / (splits * kKeys) * kKeys;
  const int first = begin + split * each, last = min(end, first + each);
  VisibleKeys visible;
  float* logits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(lane / 4 + 8 * half, num_rows - 1), t = position(row);
    visible.low[half] = blocks.begin_visible(t, window);
    visible.high[half] = blocks.end_visible(t);
    logits[half] =
        plan.logits + ((seq.q_begin + token_of(row)) * p.shape.num_heads_q + head_of(row)) * plan.max_keys;
  }
  visible.full_low = blocks.begin_visible(position(num_rows - 1), window);
  visible.full_high = blocks.end_visible(position(0));
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const CachedKeys keys{compressed ? p.k_cmp : p.k_swa, compressed ? p.v_cmp : p.v_swa, b, head,
                        compressed ? static_cast<int>(p.compressed.cached_row(0)) : 0};
  attend_tiles<T, kDimQK, kDimV>(
      shared, base, keys, first < last ? (last - first + kKeys - 1) / kKeys : 0,
      [&](int tile) { return first + tile * kKeys; }, [&](int) { return last; }, visible, scale,
      [&](int key, const float(&score)[kKeys / 8][4]) {
        if (!compressed) return;
      // Up to the end of the tile: the rows of the workspace have room for it.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (lane / 4 + 8 * half >= num_rows) continue;
#pragma unroll
          for (int i = 0; i < kKeys / 8; ++i) {
            *reinterpret_cast<float2*>(logits[half] + key + i * 8 + (lane & 3) * 2) =
                make_float2(score[i][2 * half] * scale, score[i][2 * half + 1] * scale);
          }
        }
      },
      [&](int row) -> PartialResult {
        if (row >= num_rows) return {nullptr, nullptr};
        const int64_t at = part_index(p, plan, seq.q_begin + token_of(row), head_of(row)) + blockIdx.x;
        return {plan.part_o + at * kDimV, plan.part_state + at};
      });
}

// Rows of no sequence: o = 0, lse = -inf, block_indices = -1.
template <typename T>
__device__ void write_padding(const DecodeAttentionParams& p, int64_t row, int head) {
  const int group = p.shape.group(), dim_v = p.shape.head_dim_v, n = p.num_selected_blocks;
  const int64_t heads_q = p.shape.num_heads_q, first = row * heads_q + head * group;
  for (int i = threadIdx.x; i < n; i += kThreads)
    p.block_indices[(row * p.shape.num_heads_kv + head) * n + i] = -1;
  for (int i = threadIdx.x; i < group * dim_v; i += kThreads)
    static_cast<T*>(p.o)[first * dim_v + i] = static_cast<T>(0.f);
  for (int i = threadIdx.x; i < group * kNumBranches; i += kThreads)
    static_cast<float*>(p.lse)[i / group * p.seqs.total_q * heads_q + first + i % group] = kNegInf;
}

// lse of the compressed branch in base 2, by eight lanes for each head.
__device__ void merge_lse(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t row, int first_head,
                          float* lse_log2) {
  constexpr int kLanes = 8;
  const int group = p.shape.group(), lane = threadIdx.x % kLanes;
  for (int g0 = 0; g0 < group; g0 += kThreads / kLanes) {
    const int g = g0 + threadIdx.x / kLanes;
    const float2* state = plan.part_state + part_index(p, plan, row, first_head + min(g, group - 1));
    float2 own[kMaxSplits / kLanes];
    float max = kNegInf;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kLanes; ++i) {
      const int at = i * kLanes + lane;
      own[i] = at < plan.cmp_splits ? state[at] : make_float2(kNegInf, 0.f);
      max = fmaxf(max, own[i].x);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / kLanes; ++i)
      sum += own[i].y == 0.f ? 0.f : own[i].y * ptx::exp2_approx(own[i].x - max);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0 && g < group) lse_log2[g] = sum == 0.f ? kNegInf : max + log2f(sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_select_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  __shared__ float lse_log2[kMaxGroup];
  __shared__ float taps[kMaxTaps];
  __shared__ float sums[kMaxStrides * kScoreBlocks + kMaxTaps];
  __shared__ float staged[kStagedScores];
  __shared__ BestOfBlock<kThreads> best;
  __shared__ bool last;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const int head = blockIdx.y, group = p.shape.group(), n = p.num_selected_blocks;
  const TokenBlock token = find_token(p, blockIdx.z);
  if (token.b < 0) {
    if (blockIdx.x == 0) write_padding<T>(p, token.row, head);
    return;
  }
  const int stride = static_cast<int>(p.compressed.stride),
            per_block = static_cast<int>(p.block_size) / stride;
  const int before = static_cast<int>(p.compressed.block) / stride - 1;
  const int num_keys = CachedKeyBlocks(p.compressed).end_visible(token.position);
  if (threadIdx.x < per_block + before) {
    // Tap x of selection block j is compressed block j * per_block + x - before, whatever j.
    const int64_t j = before + 1;
    taps[threadIdx.x] =
        static_cast<float>(overlap(j * per_block + threadIdx.x - before, j, p.compressed, p.block_size)) /
        static_cast<float>(stride);
  }
  merge_lse(p, plan, token.row, head * group, lse_log2);
  __syncthreads();

  const int own = token.position / static_cast<int>(p.block_size);
  float* scores = plan.scores + (token.row * p.shape.num_heads_kv + head) * plan.num_blocks;
  const int each = (own + gridDim.x) / gridDim.x, first_block = blockIdx.x * each;
  const int end_block = min(own + 1, first_block + each);
  const float* logits = plan.logits + (token.row * p.shape.num_heads_q + head * group) * plan.max_keys;
  for (int j0 = first_block; j0 < end_block; j0 += kScoreBlocks) {
    const int blocks = min(kScoreBlocks, end_block - j0), count = blocks * per_block + before;
    const int first_key = j0 * per_block - before;
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const int key = first_key + i;
      float sum = 0.f;
      if (key >= 0 && key < num_keys) {
#pragma unroll 16
        for (int g = 0; g < group; ++g)
          sum += ptx::exp2_approx(logits[static_cast<int64_t>(g) * plan.max_keys + key] - lse_log2[g]);
      }
      sums[i] = sum;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < blocks; j += kThreads) {
      float score = 0.f;
      for (int x = 0; x < per_block + before; ++x) score += taps[x] * sums[j * per_block + x];
      scores[j0 + j] = score;
    }
    __syncthreads();
  }

  // The scores of all thread blocks before the last one have been seen by it.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* finished = plan.finished + token.row * p.shape.num_heads_kv + head;
    last = atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (own < kStagedScores) {
    for (int j = threadIdx.x; j <= own; j += kThreads) staged[j] = scores[j];
    __syncthreads();
    scores = staged;
  }
  choose_blocks_by_block(p.block_indices + (token.row * p.shape.num_heads_kv + head) * n, scores, own, n,
                         p.num_initial_blocks, p.num_local_blocks, best);
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(DecodeLayout<kDimQK, kDimV>::kThreads)
    decode_chosen_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  using Layout = DecodeLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys;
  static_assert(Layout::kThreads >= kMaxSplits);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int block[kMaxSplits];
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const uint32_t base = ptx::shared_address(shared);
  const int head = blockIdx.y, group = p.shape.group(), n = p.num_selected_blocks;
  const int slab = blockIdx.z % plan.slabs;
  const TokenBlock token = find_token(p, blockIdx.z / plan.slabs);
  if (token.b < 0) return;
  const int first_head = head * group + slab * kDecodeRows,
            num_rows = min(kDecodeRows, group - slab * kDecodeRows);
  load_queries<kDimQK, kDimV>(base, [&](int row) -> const T* {
    if (row >= num_rows) return nullptr;
    return static_cast<const T*>(p.q.data) + token.row * p.q.stride_row +
           (first_head + row) * p.q.stride_head;
  });

  // Entries [first, last) of the selection, -1 at their end, each `tiles` tiles.
  const int first = blockIdx.x * n / plan.chosen_splits, last = (blockIdx.x + 1) * n / plan.chosen_splits;
  if (threadIdx.x < kMaxSplits) {
    const int32_t* chosen = p.block_indices + (token.row * p.shape.num_heads_kv + head) * n + first;
    block[threadIdx.x] = static_cast<int>(threadIdx.x) < last - first ? chosen[threadIdx.x] : -1;
  }
  const int entries = __syncthreads_count(threadIdx.x < kMaxSplits && block[threadIdx.x] >= 0);
  const unsigned size = static_cast<unsigned>(p.block_size), tiles = (size + kKeys - 1) / kKeys;
  const int end = token.position + 1;
  attend_tiles<T, kDimQK, kDimV>(
      shared, base, {p.k_slc, p.v_slc, token.b, head, 0}, entries * static_cast<int>(tiles),
      [&](unsigned tile) { return static_cast<int>(block[tile / tiles] * size + tile % tiles * kKeys); },
      [&](unsigned tile) { return min(end, static_cast<int>((block[tile / tiles] + 1) * size)); },
      {{0, 0}, {end, end}, 0, end}, static_cast<float>(p.softmax_scale) * kLog2e,
      [](int, const float(&)[kKeys / 8][4]) {},
      [&](int row) -> PartialResult {
        if (row >= num_rows) return {nullptr, nullptr};
        const int64_t at = part_index(p, plan, token.row, first_head + row) + plan.cmp_splits +
                           plan.window_splits + blockIdx.x;
        return {plan.part_o + at * kDimV, plan.part_state + at};
      });
}

// What the parts of a branch weigh, so that the sum over i of weights[i] * part_o[i] is its gated output. By
// one warp; returns the branch's lse in natural units.
__device__ float merge_weights(const float2* state, int count, float gate, float* weights) {
  const int lane = threadIdx.x & 31;
  float max = kNegInf;
  for (int i = lane; i < count; i += 32) max = fmaxf(max, state[i].x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
  float sum = 0.f;
  for (int i = lane; i < count; i += 32) {
    const float2 s = state[i];
    weights[i] = s.y == 0.f ? 0.f : ptx::exp2_approx(s.x - max);
    sum += weights[i] * s.y;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  for (int i = lane; i < count; i += 32) weights[i] = sum == 0.f ? 0.f : weights[i] * gate / sum;
  return sum == 0.f ? kNegInf : (max + log2f(sum)) * kLn2;
}

// One query head of one token.
template <typename T, int kDimV>
__global__ void __launch_bounds__(kThreads)
    decode_merge_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  constexpr int kVectors = kDimV / 4, kParallel = kThreads / kVectors;
  __shared__ float weights[2 * kMaxSplits + kMaxWindowSplits];
  __shared__ float4 partial[kParallel][kVectors];
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const int64_t token = blockIdx.y, row = token * p.shape.num_heads_q + blockIdx.x;
  if (find_sequence(p.seqs, token) < 0) return;
  const int warp = threadIdx.x >> 5, parts = plan.parts();
  if (warp < kNumBranches) {  // the parts of cmp, then swa, then slc
    const int first = warp == 0 ? 0 : warp == 1 ? plan.cmp_splits : plan.cmp_splits + plan.window_splits;
    const int count = warp == 0 ? plan.cmp_splits : warp == 1 ? plan.window_splits : plan.chosen_splits;
    const int branch = warp == 0 ? 0 : 3 - warp;
    const float lse =
        merge_weights(plan.part_state + row * parts + first, count, gate(p, row, branch), weights + first);
    if ((threadIdx.x & 31) == 0)
      static_cast<float*>(p.lse)[branch * p.seqs.total_q * p.shape.num_heads_q + row] = lse;
  }
  __syncthreads();
  const int vector = threadIdx.x % kVectors, group = threadIdx.x / kVectors;
  if (group < kParallel) {
    const float4* part = reinterpret_cast<const float4*>(plan.part_o + row * parts * kDimV) + vector;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
    for (int i = group; i < parts; i += kParallel) {
      // A part without keys weighs nothing and has unwritten memory; it is read all the same, so that no load
      // waits for a branch.
      const float weight = weights[i];
      float4 x = part[i * kVectors];
      if (weight == 0.f) x = make_float4(0.f, 0.f, 0.f, 0.f);
      sum = make_float4(fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z),
                        fmaf(weight, x.w, sum.w));
    }
    partial[group][vector] = sum;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kDimV; d += kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kParallel; ++i) sum += reinterpret_cast<const float*>(partial[i])[d];
    static_cast<T*>(p.o)[row * kDimV + d] = static_cast<T>(sum);
  }
}

// Shapes alone decide, and the number of SMs.
DecodePlan make_plan(const DecodeAttentionParams& p) {
  DecodePlan plan{};
  const int64_t group = p.shape.group(), heads = p.shape.num_heads_kv, tokens = max64(1, p.seqs.total_q);
  const int64_t slots = 3 * device_attribute(cudaDevAttrMultiProcessorCount);
  plan.row_tiles = static_cast<int>(max64(1, ceil_div(p.seqs.max_seqlen_q * group, kDecodeRows)));
  plan.slabs = static_cast<int>(ceil_div(group, kDecodeRows));
  plan.max_keys = static_cast<int>(round_up(max64(1, p.compressed.count(p.seqs.capacity)), kTileRoom));
  plan.num_blocks = static_cast<int>(max64(1, ceil_div(p.seqs.capacity, p.block_size)));
  // At least a tile of keys for every warp; beyond, three waves of thread blocks, so that the last one does
  // not leave most SMs idle.
  const int64_t units = max64(1, p.seqs.batch) * heads * plan.row_tiles;
  const int64_t window_keys = min64(p.window, p.seqs.capacity);
  const int64_t each = max64(64, ceil_div(units * (plan.max_keys + window_keys), 3 * slots));
  plan.cmp_splits = static_cast<int>(min64(kMaxSplits, ceil_div(plan.max_keys, each)));
  plan.window_splits = static_cast<int>(min64(kMaxWindowSplits, ceil_div(window_keys, each)));
  plan.chosen_splits =
      static_cast<int>(max64(1, min64(p.num_selected_blocks, 2 * slots / (tokens * heads * plan.slabs))));
  plan.score_splits = static_cast<int>(max64(1, min64(32, 3 * slots / (tokens * heads))));
  return plan;
}

// Lays the workspace out behind `base`; returns its size.
int64_t place(const DecodeAttentionParams& p, DecodePlan* plan, char* base) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += round_up(bytes, 256);
    return at;
  };
  const int64_t rows = p.seqs.total_q * p.shape.num_heads_q, rows_kv = p.seqs.total_q * p.shape.num_heads_kv;
  plan->logits = reinterpret_cast<float*>(take(rows * plan->max_keys * 4));
  plan->part_o = reinterpret_cast<float*>(take(rows * plan->parts() * p.shape.head_dim_v * 4));
  plan->part_state = reinterpret_cast<float2*>(take(rows * plan->parts() * 8));
  plan->scores = reinterpret_cast<float*>(take(rows_kv * plan->num_blocks * 4));
  plan->finished = reinterpret_cast<int*>(take(rows_kv * 4));
  return used;
}

Status check(const DecodeAttentionParams& p) {
  if (p.shape.group() > kMaxGroup)
    return Status::error(StatusCode::kUnsupported, "G = num_heads_q / num_heads_kv = %d; at most 64 on CUDA",
                         p.shape.group());
  if (p.num_selected_blocks > 64)
    return Status::error(StatusCode::kUnsupported, "num_selected_blocks = %d; at most 64 on CUDA",
                         p.num_selected_blocks);
  const int64_t per_block = p.block_size / p.compressed.stride,
                before = p.compressed.block / p.compressed.stride - 1;
  if (per_block > kMaxStrides || per_block + before > kMaxTaps) {
    return Status::error(
        StatusCode::kUnsupported,
        "compress_block_size = %lld, compress_stride = %lld, block_size = %lld have no CUDA kernel: "
        "a selection block may have at most 16 strides, and touch at most 64 compressed blocks",
        static_cast<long long>(p.compressed.block), static_cast<long long>(p.compressed.stride),
        static_cast<long long>(p.block_size));
  }
  return {};
}

}  // namespace

int64_t workspace_bytes(const DecodeAttentionParams& p) {
  DecodePlan plan = make_plan(p);
  return place(p, &plan, nullptr);
}

Status decode_attention(const DecodeAttentionParams& p, const Stream& stream) {
  Status status = check(p);
  if (!status.ok()) return status;
  DecodePlan plan = make_plan(p);
  place(p, &plan, static_cast<char*>(p.workspace));
  const auto heads = static_cast<unsigned>(p.shape.num_heads_kv),
             tokens = static_cast<unsigned>(p.seqs.total_q);
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
      using Layout = DecodeLayout<kDimQK, kDimV>;
      Status status = launch_chained("decode_banded_portable", decode_banded_portable<T, kDimQK, kDimV>,
                                     dim3(plan.cmp_splits + plan.window_splits, heads,
                                          static_cast<unsigned>(p.seqs.batch * plan.row_tiles)),
                                     Layout::kThreads, Layout::kBytes, stream, p, plan);
      if (!status.ok()) return status;
      status = launch_chained("decode_select_portable", decode_select_portable<T>,
                              dim3(plan.score_splits, heads, tokens), kThreads, 0, stream, p, plan);
      if (!status.ok()) return status;
      status = launch_chained("decode_chosen_portable", decode_chosen_portable<T, kDimQK, kDimV>,
                              dim3(plan.chosen_splits, heads, tokens * plan.slabs), Layout::kThreads,
                              Layout::kBytes, stream, p, plan);
      if (!status.ok()) return status;
      return launch_chained("decode_merge_portable", decode_merge_portable<T, kDimV>,
                            dim3(static_cast<unsigned>(p.shape.num_heads_q), tokens), kThreads, 0, stream, p,
                            plan);
    });
  });
}

}  // namespace nsa::cuda::portable
