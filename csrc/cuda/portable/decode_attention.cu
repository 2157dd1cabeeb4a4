// Attention of a few tokens per sequence over a cache, by mma.sync (sm_80 and newer), in three launches whose
// grids depend on shapes alone:
//   1 compressed keys and the window, split over thread blocks; logits of the compressed keys to the
//   workspace; 2 the compressed branch merged, block scores from its lse, and the choice by the last block of
//   a token; 3 the chosen blocks, split; the last block of a token merges the branches through the gate.
// Which block is the last never changes a result: partial results are merged in the order of their numbers.
#include "cuda/portable/decode_tile.cuh"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/top_k.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kMaxGroup = 64;
constexpr int kMaxSplits = 64;  // of the compressed keys
constexpr int kMaxTaps = 64;    // compressed blocks that touch a selection block
constexpr int kMergeThreads = 128;
constexpr int kScoreBlocks = 64;  // selection blocks that are scored at a time
constexpr int kMaxScoreKeys = 16 * kScoreBlocks + kMaxTaps;

// How the work is split, and the workspace. Rows are those of q times heads.
struct DecodePlan {
  int cmp_splits, window_splits, chosen_splits, score_splits;
  int row_tiles;       // of 16 rows, per sequence and KV head (launch 1)
  int slabs;           // of 16 heads, per token and KV head (launch 3)
  int max_keys;        // compressed keys of a sequence
  int num_blocks;      // selection blocks of a sequence
  float* logits;       // [T, Hq, max_keys], base 2
  float* part_o;       // [T, Hq, parts, Dv]
  float2* part_state;  // [T, Hq, parts]
  float* o_cmp;        // [T, Hq, Dv]
  float* scores;       // [T, Hkv, num_blocks]
  int* finished;       // [T, Hkv, 1 + slabs]: thread blocks of launch 2 and 3 that are done

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

// True in every thread of the last of `count` thread blocks to come here; those before have been seen.
__device__ bool is_last_block(int* finished, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(finished, 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(DecodeLayout<kDimQK, kDimV>::kThreads)
    decode_banded_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  extern __shared__ __align__(16) unsigned char shared[];
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
    const int64_t row = seq.q_begin + token_of(threadIdx.x);
    for (int i = 0; i <= plan.slabs; ++i)
      plan.finished[(row * p.shape.num_heads_kv + head) * (1 + plan.slabs) + i] = 0;
  }

  const bool compressed = blockIdx.x < static_cast<unsigned>(plan.cmp_splits);
  const KeyBlocks blocks = compressed ? p.compressed : KeyBlocks{};
  const int64_t window = compressed ? 0 : p.window;
  const int split = compressed ? blockIdx.x : blockIdx.x - plan.cmp_splits;
  const int splits = compressed ? plan.cmp_splits : plan.window_splits;
  const int begin = static_cast<int>(blocks.begin_visible(seq.position(token_of(0)), window));
  const int end = static_cast<int>(blocks.end_visible(seq.position(token_of(num_rows - 1))));
  const int each = (end - begin + splits * kDecodeKeys - 1) / (splits * kDecodeKeys) * kDecodeKeys;
  const int first = begin + split * each, last = min(end, first + each);
  int low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const int64_t t = seq.position(token_of(min(row, num_rows - 1)));
    low[half] = static_cast<int>(blocks.begin_visible(t, window));
    high[half] = row < num_rows ? static_cast<int>(blocks.end_visible(t)) : 0;
  }
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const CachedKeys keys{compressed ? p.k_cmp : p.k_swa, compressed ? p.v_cmp : p.v_swa, b, head,
                        compressed ? static_cast<int>(p.compressed.cached_row(0)) : 0};
  float* logits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(lane / 4 + 8 * half, num_rows - 1);
    logits[half] =
        plan.logits + ((seq.q_begin + token_of(row)) * p.shape.num_heads_q + head_of(row)) * plan.max_keys;
  }
  attend_tiles<T, kDimQK, kDimV>(
      shared, base, keys, first < last ? (last - first + kDecodeKeys - 1) / kDecodeKeys : 0,
      [&](int tile) { return first + tile * kDecodeKeys; }, [&](int) { return last; }, low, high, scale,
      [&](int key, const float(&score)[kDecodeKeys / 8][4]) {
        if (!compressed) return;
#pragma unroll
        for (int i = 0; i < kDecodeKeys / 8; ++i) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int at = key + i * 8 + (lane & 3) * 2 + (c & 1);
            if (lane / 4 + 8 * (c >> 1) < num_rows && at < last) logits[c >> 1][at] = score[i][c] * scale;
          }
        }
      },
      [&](int row) -> PartialResult {
        if (row >= num_rows) return {nullptr, nullptr};
        const int64_t at = part_index(p, plan, seq.q_begin + token_of(row), head_of(row)) + blockIdx.x;
        return {plan.part_o + at * kDimV, plan.part_state + at};
      });
}

// What the parts [first, first + count) of a row weigh: weights[i] such that sum over i of weights[i] *
// part_o[i] is the output. By one warp; returns the row's lse in natural units.
__device__ float merge_weights(const float2* state, int count, float* weights, int lane) {
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
  for (int i = lane; i < count; i += 32) weights[i] = sum == 0.f ? 0.f : weights[i] / sum;
  __syncwarp();
  return sum == 0.f ? kNegInf : (max + log2f(sum)) * kLn2;
}

// Sum over the parts of a row, element d. A part without keys has weight zero and unwritten memory.
__device__ __forceinline__ float merge_parts(const float* part_o, const float* weights, int count, int dim,
                                             int d) {
  float sum = 0.f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    if (weights[i] != 0.f) sum = fmaf(weights[i], part_o[static_cast<int64_t>(i) * dim + d], sum);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    decode_select_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  __shared__ float weights[kMaxGroup][kMaxSplits];
  __shared__ float lse_log2[kMaxGroup];
  __shared__ float taps[kMaxTaps];
  __shared__ float sums[kMaxScoreKeys];
  __shared__ int candidate_key[kMaxCandidates], candidate_index[kMaxCandidates];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y, group = p.shape.group();
  const int dim_v = p.shape.head_dim_v, n = p.num_selected_blocks, heads_q = p.shape.num_heads_q;
  const TokenBlock token = find_token(p, blockIdx.z);
  int32_t* chosen = p.block_indices + (token.row * p.shape.num_heads_kv + head) * n;
  const int64_t total = p.seqs.total_q * heads_q;
  if (token.b < 0) {  // padding
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i < n; i += kMergeThreads) chosen[i] = -1;
    for (int i = threadIdx.x; i < group * dim_v; i += kMergeThreads)
      static_cast<T*>(p.o)[(token.row * heads_q + head * group) * dim_v + i] = static_cast<T>(0.f);
    for (int i = threadIdx.x; i < group * kNumBranches; i += kMergeThreads) {
      static_cast<float*>(p.lse)[i / group * total + token.row * heads_q + head * group + i % group] =
          kNegInf;
    }
    return;
  }

  const int per_block = static_cast<int>(p.block_size / p.compressed.stride);
  const int before = static_cast<int>(p.compressed.block / p.compressed.stride) - 1;
  const int num_keys = static_cast<int>(p.compressed.end_visible(token.position));
  if (threadIdx.x < per_block + before) {
    // Tap x of selection block j is compressed block j * per_block + x - before, whatever j.
    const int64_t j = before + 1;
    taps[threadIdx.x] =
        static_cast<float>(overlap(j * per_block + threadIdx.x - before, j, p.compressed, p.block_size)) /
        static_cast<float>(p.compressed.stride);
  }
  for (int g = warp; g < group; g += kMergeThreads / 32) {
    const float2* state = plan.part_state + part_index(p, plan, token.row, head * group + g);
    const float lse = merge_weights(state, plan.cmp_splits, weights[g], lane);
    if (lane == 0) {
      lse_log2[g] = lse * kLog2e;
      if (blockIdx.x == 0) static_cast<float*>(p.lse)[token.row * heads_q + head * group + g] = lse;
    }
  }
  __syncthreads();

  // The compressed branch's output, a few heads for each thread block.
  for (int g = blockIdx.x; g < group; g += gridDim.x) {
    const float* part = plan.part_o + part_index(p, plan, token.row, head * group + g) * dim_v;
    for (int d = threadIdx.x; d < dim_v; d += kMergeThreads) {
      plan.o_cmp[(token.row * heads_q + head * group + g) * dim_v + d] =
          merge_parts(part, weights[g], plan.cmp_splits, dim_v, d);
    }
  }

  const int own = static_cast<int>(min64(token.position / p.block_size, plan.num_blocks - 1));
  float* scores = plan.scores + (token.row * p.shape.num_heads_kv + head) * plan.num_blocks;
  const int each = (own + gridDim.x) / gridDim.x, first_block = blockIdx.x * each;
  const int end_block = min(own + 1, first_block + each);
  const float* logits = plan.logits + (token.row * heads_q + head * group) * plan.max_keys;
  for (int j0 = first_block; j0 < end_block; j0 += kScoreBlocks) {
    const int blocks = min(kScoreBlocks, end_block - j0), count = blocks * per_block + before;
    const int first_key = j0 * per_block - before;
    for (int i = threadIdx.x; i < count; i += kMergeThreads) {
      const int key = first_key + i;
      float sum = 0.f;
      if (key >= 0 && key < num_keys) {
#pragma unroll 8
        for (int g = 0; g < group; ++g)
          sum += ptx::exp2_approx(logits[static_cast<int64_t>(g) * plan.max_keys + key] - lse_log2[g]);
      }
      sums[i] = sum;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < blocks; j += kMergeThreads) {
      float score = 0.f;
      for (int x = 0; x < per_block + before; ++x) score += taps[x] * sums[j * per_block + x];
      scores[j0 + j] = score;
    }
    __syncthreads();
  }
  int* finished = plan.finished + (token.row * p.shape.num_heads_kv + head) * (1 + plan.slabs);
  if (!is_last_block(finished, gridDim.x) || warp != 0) return;
  choose_blocks(chosen, scores, own, n, p.num_initial_blocks, p.num_local_blocks, candidate_key,
                candidate_index, lane);
}

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

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(DecodeLayout<kDimQK, kDimV>::kThreads)
    decode_chosen_portable(const DecodeAttentionParams p, const DecodePlan plan) {
  using Layout = DecodeLayout<kDimQK, kDimV>;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int head = blockIdx.y, group = p.shape.group(), lane = threadIdx.x & 31, n = p.num_selected_blocks;
  const int slab = blockIdx.z % plan.slabs, heads_q = p.shape.num_heads_q;
  const TokenBlock token = find_token(p, blockIdx.z / plan.slabs);
  if (token.b < 0) return;
  const int first_head = head * group + slab * kDecodeRows,
            num_rows = min(kDecodeRows, group - slab * kDecodeRows);
  load_queries<kDimQK, kDimV>(base, [&](int row) -> const T* {
    if (row >= num_rows) return nullptr;
    return static_cast<const T*>(p.q.data) + token.row * p.q.stride_row +
           (first_head + row) * p.q.stride_head;
  });

  // Entries [first, last) of the selection, each block_size / 16 tiles.
  const int32_t* chosen = p.block_indices + (token.row * p.shape.num_heads_kv + head) * n;
  const int first = blockIdx.x * n / plan.chosen_splits, last = (blockIdx.x + 1) * n / plan.chosen_splits;
  const int size = static_cast<int>(p.block_size), tiles = (size + kDecodeKeys - 1) / kDecodeKeys;
  int entries = 0;
  while (first + entries < last && chosen[first + entries] >= 0) ++entries;
  const int low[2] = {0, 0};
  const int high[2] = {lane / 4 < num_rows ? token.position + 1 : 0,
                       lane / 4 + 8 < num_rows ? token.position + 1 : 0};
  attend_tiles<T, kDimQK, kDimV>(
      shared, base, {p.k_slc, p.v_slc, token.b, head, 0}, entries * tiles,
      [&](int tile) { return chosen[first + tile / tiles] * size + tile % tiles * kDecodeKeys; },
      [&](int tile) { return min(token.position + 1, (chosen[first + tile / tiles] + 1) * size); }, low, high,
      static_cast<float>(p.softmax_scale) * kLog2e, [](int, const float(&)[kDecodeKeys / 8][4]) {},
      [&](int row) -> PartialResult {
        if (row >= num_rows) return {nullptr, nullptr};
        const int64_t at = part_index(p, plan, token.row, first_head + row) + plan.cmp_splits +
                           plan.window_splits + blockIdx.x;
        return {plan.part_o + at * kDimV, plan.part_state + at};
      });

  int* finished = plan.finished + (token.row * p.shape.num_heads_kv + head) * (1 + plan.slabs) + 1 + slab;
  if (!is_last_block(finished, plan.chosen_splits)) return;
  float* weights = reinterpret_cast<float*>(shared);  // [16][parts]
  const int parts = plan.parts() - plan.cmp_splits;
  const int64_t total = p.seqs.total_q * heads_q;
  for (int r = threadIdx.x >> 5; r < num_rows; r += Layout::kWarps) {
    const int64_t row = token.row * heads_q + first_head + r;
    const float2* state = plan.part_state + row * plan.parts() + plan.cmp_splits;
    const float lse_swa = merge_weights(state, plan.window_splits, weights + r * parts, lane);
    const float lse_slc = merge_weights(state + plan.window_splits, plan.chosen_splits,
                                        weights + r * parts + plan.window_splits, lane);
    const float gate_slc = gate(p, row, 1), gate_swa = gate(p, row, 2);
    for (int i = lane; i < parts; i += 32)
      weights[r * parts + i] *= i < plan.window_splits ? gate_swa : gate_slc;
    if (lane == 0) {
      static_cast<float*>(p.lse)[total + row] = lse_slc;
      static_cast<float*>(p.lse)[2 * total + row] = lse_swa;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_rows * kDimV; i += Layout::kThreads) {
    const int r = i / kDimV, d = i % kDimV;
    const int64_t row = token.row * heads_q + first_head + r;
    const float* part = plan.part_o + (row * plan.parts() + plan.cmp_splits) * kDimV;
    const float o = gate(p, row, 0) * plan.o_cmp[row * kDimV + d] +
                    merge_parts(part, weights + r * parts, parts, kDimV, d);
    static_cast<T*>(p.o)[row * kDimV + d] = static_cast<T>(o);
  }
}

// Shapes alone decide, and the number of SMs.
DecodePlan make_plan(const DecodeAttentionParams& p) {
  DecodePlan plan{};
  const int64_t group = p.shape.group(), heads = p.shape.num_heads_kv, tokens = max64(1, p.seqs.total_q);
  const int64_t slots = 3 * device_attribute(cudaDevAttrMultiProcessorCount);
  plan.row_tiles = static_cast<int>(max64(1, ceil_div(p.seqs.max_seqlen_q * group, kDecodeRows)));
  plan.slabs = static_cast<int>(ceil_div(group, kDecodeRows));
  plan.max_keys = static_cast<int>(max64(1, p.compressed.count(p.seqs.capacity)));
  plan.num_blocks = static_cast<int>(max64(1, ceil_div(p.seqs.capacity, p.block_size)));
  // A thread block should have 4 tiles of keys for each of its warps, unless that leaves SMs idle.
  const int64_t units = max64(1, p.seqs.batch) * heads * plan.row_tiles;
  const int64_t window_keys = min64(p.window, p.seqs.capacity);
  const int64_t each = max64(64, ceil_div(units * (plan.max_keys + window_keys), slots));
  plan.cmp_splits = static_cast<int>(min64(kMaxSplits, ceil_div(plan.max_keys, each)));
  plan.window_splits = static_cast<int>(min64(16, ceil_div(window_keys, each)));
  plan.chosen_splits =
      static_cast<int>(max64(1, min64(p.num_selected_blocks, slots / max64(1, tokens * heads * plan.slabs))));
  plan.score_splits = static_cast<int>(max64(1, min64(32, slots / (tokens * heads))));
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
  plan->o_cmp = reinterpret_cast<float*>(take(rows * p.shape.head_dim_v * 4));
  plan->scores = reinterpret_cast<float*>(take(rows_kv * plan->num_blocks * 4));
  plan->finished = reinterpret_cast<int*>(take(rows_kv * (1 + plan->slabs) * 4));
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
  if (per_block > 16 || per_block + before > kMaxTaps) {
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
      Status status = launch("decode_banded_portable", decode_banded_portable<T, kDimQK, kDimV>,
                             dim3(plan.cmp_splits + plan.window_splits, heads,
                                  static_cast<unsigned>(p.seqs.batch * plan.row_tiles)),
                             Layout::kThreads, Layout::kBytes, stream, p, plan);
      if (!status.ok()) return status;
      status = launch("decode_select_portable", decode_select_portable<T>,
                      dim3(plan.score_splits, heads, tokens), kMergeThreads, 0, stream, p, plan);
      if (!status.ok()) return status;
      return launch("decode_chosen_portable", decode_chosen_portable<T, kDimQK, kDimV>,
                    dim3(plan.chosen_splits, heads, tokens * plan.slabs), Layout::kThreads, Layout::kBytes,
                    stream, p, plan);
    });
  });
}

}  // namespace nsa::cuda::portable
