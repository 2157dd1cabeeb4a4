// The choice of the best of many scores, by one warp or by the threads of a block.
#pragma once

#include <cstdint>

namespace nsa::cuda {

constexpr int kMaxCandidates = 256;

// Scores are sums of exponentials, never negative: their bits compare like themselves. A NaN with a sign
// counts as zero.
__device__ __forceinline__ int score_key(float score) { return max(__float_as_int(score), 0); }

// The largest v for which at least k of the values (count(v) counts those >= v) reach it.
template <typename Count>
__device__ __forceinline__ int kth_largest(int k, const Count& count_reaching) {
  int v = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const int trial = v | 1 << bit;
    if (count_reaching(trial) >= k) v = trial;
  }
  return v;
}

// Writes the k best of `count` values, in order: those above the k-th, and as many equal to it as there is
// room, from the front.
template <typename Key, typename Index>
__device__ __forceinline__ void write_best(int32_t* out, int k, int count, const Key& key, const Index& index,
                                           int lane) {
  const auto count_reaching = [&](int v) {
    int n = 0;
    for (int i = lane; i < count; i += 32) n += key(i) >= v;
    return __reduce_add_sync(~0u, n);
  };
  const int threshold = kth_largest(k, count_reaching);
  int ties = k - (threshold == 0x7fffffff ? 0 : count_reaching(threshold + 1));
  const unsigned lower_lanes = (1u << lane) - 1;
  int written = 0;
  for (int begin = 0; begin < count; begin += 32) {
    const int i = begin + lane, value = i < count ? key(i) : -1;
    const unsigned equal = __ballot_sync(~0u, value == threshold);
    const bool chosen = value > threshold || (value == threshold && __popc(equal & lower_lanes) < ties);
    const unsigned mask = __ballot_sync(~0u, chosen);
    if (chosen) out[written + __popc(mask & lower_lanes)] = index(i);
    written += __popc(mask);
    ties -= min(ties, __popc(equal));
  }
}

// The selection of a query whose own block is `own` (-1: none) from scores[0 .. own]: out[n] ascending, -1 at
// the end. candidate_key and candidate_index [kMaxCandidates] are scratch in shared memory; n <= 64.
__device__ __forceinline__ void choose_blocks(int32_t* out, const float* scores, int own, int n,
                                              int num_initial, int num_local, int* candidate_key,
                                              int* candidate_index, int lane) {
  const int initial = min(num_initial, own + 1), local = max(initial, own + 1 - num_local);
  const int count = local - initial, k = min(n - initial - (own + 1 - local), count);
  for (int i = lane; i < initial; i += 32) out[i] = i;
  for (int i = lane; i < n - initial - k; i += 32) out[initial + k + i] = local + i <= own ? local + i : -1;
  if (k == count) {
    for (int i = lane; i < k; i += 32) out[initial + i] = initial + i;
    return;
  }
  if (k <= 0) return;
  const float* candidates = scores + initial;
  // 64 maxima over disjoint parts: the k-th largest of them (k <= n <= 64) is a lower bound of the k-th
  // largest score.
  int high0 = -1, high1 = -1;
  for (int i = lane; i < count; i += 64) {
    high0 = max(high0, score_key(candidates[i]));
    if (i + 32 < count) high1 = max(high1, score_key(candidates[i + 32]));
  }
  const int bound = kth_largest(k, [&](int v) {
    return __popc(__ballot_sync(~0u, high0 >= v)) + __popc(__ballot_sync(~0u, high1 >= v));
  });
  int held = 0;
  for (int begin = 0; begin < count && held <= kMaxCandidates; begin += 32) {
    const int i = begin + lane, key = i < count ? score_key(candidates[i]) : -1;
    const unsigned mask = __ballot_sync(~0u, key >= bound);
    const int at = held + __popc(mask & ((1u << lane) - 1));
    if (key >= bound && at < kMaxCandidates) {
      candidate_key[at] = key;
      candidate_index[at] = initial + i;
    }
    held += __popc(mask);
  }
  __syncwarp();
  if (held <= kMaxCandidates) {
    write_best(
        out + initial, k, held, [&](int i) { return candidate_key[i]; },
        [&](int i) { return candidate_index[i]; }, lane);
  } else {
    write_best(
        out + initial, k, count, [&](int i) { return score_key(candidates[i]); },
        [&](int i) { return initial + i; }, lane);
  }
}

// Scratch of choose_blocks_by_block.
template <int kThreads>
struct BestOfBlock {
  alignas(16) int maxima[kThreads];
  int candidate[kThreads];  // index of a score
  int chosen[kThreads];
  int bound, held;
  int counts[2];
  uint64_t few[kThreads / 32][32];  // of each warp: ranked scores, in order
  int num_few[kThreads / 32];
};

// A score and its index as one number: the larger score, then the lower index, is larger.
__device__ __forceinline__ uint64_t ranked_score(float score, int index) {
  return static_cast<uint64_t>(score_key(score)) << 24 | (0xffffff - index);
}

struct SyncBlock {
  __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// choose_blocks by all threads of a block, or by as many as `sync` brings together, from thread 0 on: few
// candidates are left above the k-th largest of partial maxima, and each finds its rank by comparison with
// all others. Small code matters: a decoding step runs it cold.
template <int kThreads, typename Sync = SyncBlock>
__device__ __forceinline__ void choose_blocks_by_block(int32_t* out, const float* scores, int own, int n,
                                                       int num_initial, int num_local,
                                                       BestOfBlock<kThreads>& best, const Sync& sync = {}) {
  constexpr int kMaxima = kThreads / 2;  // not fewer than k
  static_assert(kMaxima >= 64);
  const int thread = threadIdx.x;
  const int initial = min(num_initial, own + 1), local = max(initial, own + 1 - num_local);
  const int count = local - initial, k = min(n - initial - (own + 1 - local), count);
  const float* candidates = scores + initial;
#pragma unroll 1
  for (int i = thread; i < initial; i += kThreads) out[i] = i;
#pragma unroll 1
  for (int i = thread; i < n - initial - k; i += kThreads)
    out[initial + k + i] = local + i <= own ? local + i : -1;
  if (k == count) {
#pragma unroll 1
    for (int i = thread; i < k; i += kThreads) out[initial + i] = initial + i;
    return;
  }
  if (k <= 0) return;
  if (thread == 0) best.held = 0;
  int high = -1;
#pragma unroll 4
  for (int i = thread; i < count; i += kThreads) high = max(high, score_key(candidates[i]));
  high = max(high, __shfl_xor_sync(~0u, high, 1));
  if ((thread & 1) == 0) best.maxima[thread / 2] = high;
  sync();
  // The two that have the same one share the work.
  int above = 0, reaching = 0;
#pragma unroll 4
  for (int i = 0; i < kMaxima / 2; i += 4) {
    const int4 other = *reinterpret_cast<const int4*>(&best.maxima[i + (thread & 1) * (kMaxima / 2)]);
    above += (other.x > high) + (other.y > high) + (other.z > high) + (other.w > high);
    reaching += (other.x >= high) + (other.y >= high) + (other.z >= high) + (other.w >= high);
  }
  above += __shfl_xor_sync(~0u, above, 1), reaching += __shfl_xor_sync(~0u, reaching, 1);
  if (above < k && reaching >= k) best.bound = high;  // all that write write the same
  sync();
  const int bound = best.bound;
  // Mostly few reach it: then the first warp ranks them.
  constexpr int kWarps = kThreads / 32;
  const int warp = thread / 32, lane = thread % 32;
  const unsigned lower_lanes = (1u << lane) - 1;
  const int each = (count + kThreads - 1) / kThreads * 32, end = min(count, (warp + 1) * each);
  int few = 0;
#pragma unroll 2
  for (int begin = warp * each; begin < end; begin += 32) {
    const int i = begin + lane;
    const bool reaches = i < end && score_key(candidates[i]) >= bound;
    const unsigned mask = __ballot_sync(~0u, reaches);
    const int at = few + __popc(mask & lower_lanes);
    if (reaches && at < 32) best.few[warp][at] = ranked_score(candidates[i], i);
    few += __popc(mask);
  }
  if (lane == 0) best.num_few[warp] = few;
  sync();
  int all = 0, from = 0, place = lane;  // the warp, and which of its candidates the lane has
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int own = best.num_few[w];
    all += own;
    if (w == from && w < kWarps - 1 && place >= own) place -= own, ++from;
  }
  if (all <= 32) {
    if (warp != 0) return;
    const uint64_t own = lane < all ? best.few[from][place] : 0;
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < all; ++i) rank += __shfl_sync(~0u, own, i) > own;
    const bool chosen = lane < all && rank < k;
    const unsigned mask = __ballot_sync(~0u, chosen);
    if (chosen)
      out[initial + __popc(mask & lower_lanes)] = initial + 0xffffff - static_cast<int>(own & 0xffffff);
    return;
  }
#pragma unroll 1
  for (int i = thread; i < count; i += kThreads) {
    if (score_key(candidates[i]) < bound) continue;
    const int at = atomicAdd(&best.held, 1);
    if (at < kThreads) best.candidate[at] = i;
  }
  sync();
  int held = best.held;
  if (held > kThreads) {
    // Many equal scores: the k-th largest number of all, bit by bit.
    uint64_t kth = 0;
#pragma unroll 1
    for (int bit = 54; bit >= 0; --bit) {
      const uint64_t trial = kth | uint64_t{1} << bit;
      int reach = 0;
#pragma unroll 1
      for (int i = thread; i < count; i += kThreads) reach += ranked_score(candidates[i], i) >= trial;
      if (thread == 0) best.counts[bit & 1] = 0;
      sync();
      reach = __reduce_add_sync(~0u, reach);
      if ((thread & 31) == 0) atomicAdd(&best.counts[bit & 1], reach);
      sync();
      if (best.counts[bit & 1] >= k) kth = trial;
    }
    if (thread == 0) best.held = 0;
    sync();
#pragma unroll 1
    for (int i = thread; i < count; i += kThreads) {
      if (ranked_score(candidates[i], i) >= kth) best.candidate[atomicAdd(&best.held, 1)] = i;
    }
    sync();
    held = best.held;
  }
  // Neither the order of the candidates nor that of the sums below matters.
  const int index = thread < held ? best.candidate[thread] : 0x7fffffff;
  const int key = thread < held ? score_key(candidates[index]) : -1;
  best.maxima[thread] = key;
  sync();
  int rank = 0;
#pragma unroll 4
  for (int i = 0; i < held; ++i)
    rank += best.maxima[i] > key || (best.maxima[i] == key && best.candidate[i] < index);
  const bool chosen = thread < held && rank < k;
  best.chosen[thread] = chosen ? index : 0x7fffffff;
  sync();
  if (!chosen) return;
  int at = 0;
#pragma unroll 4
  for (int i = 0; i < held; ++i) at += best.chosen[i] < index;
  out[initial + at] = initial + index;
}

}  // namespace nsa::cuda
