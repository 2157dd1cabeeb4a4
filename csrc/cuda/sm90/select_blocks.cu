// The choice of the best selection blocks from their scores: one warp per query and KV head.
//
// The k-th largest of the maxima over disjoint parts of a row is a lower bound of its k-th largest score. Few
// candidates reach it; they are compacted in order and ranked by counting who is ahead, equal scores by their
// place. Where many reach it, a binary search over the bits of the scores finds the k-th largest.
#include "cuda/host/launch_kernel.h"
#include "cuda/sm90/block_scores.h"
#include "cuda/tile/sequence_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxCandidates = 256;
constexpr int kMaxRanked = 64;
constexpr int kChunk = 128;  // scores that a warp reads at a time, four a lane

struct Candidates {
  int key[kMaxCandidates], index[kMaxCandidates];
};

// Scores are sums of exponentials, never negative: their bits compare like themselves. A NaN with a sign
// counts as zero.
__device__ __forceinline__ int score_key(float score) { return max(__float_as_int(score), 0); }

// The candidates of a row: scores [begin, end) of it. A key of -1 is none.
struct Row {
  const float* scores;
  int begin, end;

  __device__ __forceinline__ int key(int i) const {
    return i >= begin && i < end ? score_key(scores[i]) : -1;
  }
  // Four of the chunk at `chunk`, those of this lane.
  __device__ __forceinline__ void keys(int chunk, int lane, int (&out)[4]) const {
    const int i = chunk + 4 * lane;
    const float4 four = i < end ? *reinterpret_cast<const float4*>(scores + i) : make_float4(0, 0, 0, 0);
    out[0] = i >= begin && i < end ? score_key(four.x) : -1;
    out[1] = i + 1 >= begin && i + 1 < end ? score_key(four.y) : -1;
    out[2] = i + 2 >= begin && i + 2 < end ? score_key(four.z) : -1;
    out[3] = i + 3 >= begin && i + 3 < end ? score_key(four.w) : -1;
  }
  __device__ __forceinline__ int first_chunk() const { return begin & ~(kChunk - 1); }
};

// The largest v for which at least k of the values (count_reaching(v) counts those >= v) reach it.
template <typename Count>
__device__ __forceinline__ int kth_largest(int k, const Count& count_reaching) {
  int v = 0;
#pragma unroll 1
  for (int bit = 30; bit >= 0; --bit) {
    const int trial = v | 1 << bit;
    if (count_reaching(trial) >= k) v = trial;
  }
  return v;
}

// The k-th largest of one value per lane, k <= 32.
__device__ __forceinline__ int kth_lane(int value, int k, int lane) {
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int other = __shfl_xor_sync(~0u, value, stride);
      value = ((lane & stride) == 0) == ((lane & size) == 0) ? max(value, other) : min(value, other);
    }
  }
  return __shfl_sync(~0u, value, k - 1);
}

// A lower bound of the k-th largest score, k <= 64.
__device__ __forceinline__ int lower_bound_of_kth(const Row& row, int k, int lane) {
  int high0 = -1, high1 = -1;
#pragma unroll 4
  for (int chunk = row.first_chunk(); chunk < row.end; chunk += kChunk) {
    int key[4];
    row.keys(chunk, lane, key);
    high0 = max(high0, max(key[0], key[1]));
    high1 = max(high1, max(key[2], key[3]));
  }
  if (k <= 24) return max(kth_lane(max(high0, high1), k, lane), 0);
  return kth_largest(k, [&](int v) {
    return __popc(__ballot_sync(~0u, high0 >= v)) + __popc(__ballot_sync(~0u, high1 >= v));
  });
}

// Keeps the candidates that reach the bound, in order, as far as there is room; returns how many there are.
__device__ __forceinline__ int compact(const Row& row, int bound, Candidates& kept, int lane) {
  const unsigned lower_lanes = (1u << lane) - 1;
  int held = 0;
#pragma unroll 4
  for (int chunk = row.first_chunk(); chunk < row.end; chunk += kChunk) {
    int key[4];
    row.keys(chunk, lane, key);
    int before = 0, all = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned reach = __ballot_sync(~0u, key[e] >= bound);
      before += __popc(reach & lower_lanes);
      all += __popc(reach);
    }
    int at = held + before;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (key[e] < bound) continue;
      if (at < kMaxCandidates) {
        kept.key[at] = key[e];
        kept.index[at] = chunk + 4 * lane + e;
      }
      ++at;
    }
    held += all;
  }
  __syncwarp();
  return held;
}

// Writes the k best of at most kMaxRanked candidates, in order.
__device__ __forceinline__ void write_ranked(int32_t* out, int k, int held, const Candidates& kept,
                                             int lane) {
  const int key0 = lane < held ? kept.key[lane] : -1, key1 = lane + 32 < held ? kept.key[lane + 32] : -1;
  int rank0 = 0, rank1 = 0;
#pragma unroll 4
  for (int i = 0; i < held; ++i) rank0 += kept.key[i] > key0 - (i < lane);
  if (held > 32) {
#pragma unroll 4
    for (int i = 0; i < held; ++i) rank1 += kept.key[i] > key1 - (i < lane + 32);
  }
  const bool chosen0 = lane < held && rank0 < k, chosen1 = lane + 32 < held && rank1 < k;
  const unsigned mask0 = __ballot_sync(~0u, chosen0), mask1 = __ballot_sync(~0u, chosen1),
                 lower_lanes = (1u << lane) - 1;
  if (chosen0) out[__popc(mask0 & lower_lanes)] = kept.index[lane];
  if (chosen1) out[__popc(mask0) + __popc(mask1 & lower_lanes)] = kept.index[lane + 32];
}

// Writes the k best of the values begin .. end - 1, in order: those above the threshold, and as many equal to
// it as there is room, from the front.
template <typename Key, typename Index>
__device__ __forceinline__ void write_above(int32_t* out, int k, int begin, int end, int bound,
                                            const Key& key, const Index& index, int lane) {
  const auto count_reaching = [&](int v) {
    int n = 0;
    for (int i = begin + lane; i < end; i += 32) n += key(i) >= v;
    return __reduce_add_sync(~0u, n);
  };
  const auto count_above = [&](int v) { return v == 0x7fffffff ? 0 : count_reaching(v + 1); };
  // Equal scores in large numbers are the usual reason to be here: then the bound is the threshold.
  const int threshold = count_above(bound) < k ? bound : kth_largest(k, count_reaching);
  int ties = k - count_above(threshold), written = 0;
  const unsigned lower_lanes = (1u << lane) - 1;
  for (int first = begin; first < end; first += 32) {
    const int i = first + lane, value = i < end ? key(i) : -1;
    const unsigned equal = __ballot_sync(~0u, value == threshold);
    const bool chosen = value > threshold || (value == threshold && __popc(equal & lower_lanes) < ties);
    const unsigned mask = __ballot_sync(~0u, chosen);
    if (chosen) out[written + __popc(mask & lower_lanes)] = index(i);
    written += __popc(mask);
    ties -= min(ties, __popc(equal));
  }
}

__global__ void __launch_bounds__(kWarps * 32) select_blocks_sm90(const __grid_constant__ ChoiceTask task) {
  __shared__ Candidates candidates[kWarps];
  const SelectBlocksParams& p = task.params;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int token = blockIdx.z * kWarps + warp;
  const SequenceTile tile = find_sequence_tile(p.scoring.seqs, task.first_tile + blockIdx.x, task.tokens);
  if (token >= tile.count) return;
  const int heads = p.scoring.shape.num_heads_kv, n = p.num_selected_blocks;
  const int64_t t = tile.seq.position(tile.begin + token);
  int32_t* out = p.block_indices + ((tile.seq.q_begin + tile.begin + token) * heads + head) * n;
  const int own = t < 0 ? -1 : static_cast<int>(min64(t / p.scoring.block_size, p.scoring.num_blocks - 1));
  const int initial = min(p.num_initial_blocks, own + 1), local = max(initial, own + 1 - p.num_local_blocks);
  const int count = local - initial, k = min(n - initial - (own + 1 - local), count);
  for (int i = lane; i < initial; i += 32) out[i] = i;
  for (int i = lane; i < n - initial - k; i += 32) out[initial + k + i] = local + i <= own ? local + i : -1;
  if (k == count) {
    for (int i = lane; i < k; i += 32) out[initial + i] = initial + i;
    return;
  }
  if (k <= 0) return;
  const Row row{
      task.scores + ((static_cast<int64_t>(blockIdx.x) * task.tokens + token) * heads + head) * task.pitch,
      initial, local};
  const int bound = lower_bound_of_kth(row, k, lane);
  Candidates& kept = candidates[warp];
  const int held = compact(row, bound, kept, lane);
  if (held <= kMaxRanked) {
    write_ranked(out + initial, k, held, kept, lane);
  } else if (held <= kMaxCandidates) {
    write_above(
        out + initial, k, 0, held, bound, [&](int i) { return kept.key[i]; },
        [&](int i) { return kept.index[i]; }, lane);
  } else {
    write_above(
        out + initial, k, initial, local, bound, [&](int i) { return row.key(i); }, [&](int i) { return i; },
        lane);
  }
}

}  // namespace

Status launch_choice(const ChoiceTask& task, const Stream& stream) {
  const dim3 grid(static_cast<unsigned>(task.num_tiles),
                  static_cast<unsigned>(task.params.scoring.shape.num_heads_kv),
                  static_cast<unsigned>(ceil_div(task.tokens, kWarps)));
  return launch("select_blocks_sm90", select_blocks_sm90, grid, kWarps * 32, 0, stream, task);
}

}  // namespace nsa::cuda::sm90
