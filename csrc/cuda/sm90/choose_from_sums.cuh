// The choice of a token's blocks by scores from the sums of its probabilities (block_sums.cuh), by one warp.
//
// These scores are of probabilities in 16 bits, so they only tell which blocks are certainly among the best,
// which certainly are not, and which may be. The few that may be get their scores in fp32, from Q in shared
// memory and keys in the L2 cache. Where they are not few (equal scores), the token is left to
// select_blocks_sm90.
//
// How many they are depends on the data, and with them whether all this is faster than to make all scores
// again. The first items of a call are a trial that tells.
#pragma once

#include <type_traits>

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/block_sums.cuh"
#include "cuda/sm90/choose_blocks.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {

// How far scores from sums may be from those in fp32: by a part of these, and by what is lost where numbers
// are too small for their type. Probabilities are rounded to nearest once to the type of the values (8 or 11
// bits), and what is kept once to fp16; the rest is what fp32 makes of exponents up to some 100.
template <typename T>
struct SumsError {
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr float kRelative = (kHalf ? 0x1p-11f : 0x1p-8f) + 0x1p-11f + 0x1p-16f;
  static constexpr float kSmallest = 0x1p-25f;  // half of the smallest number of fp16
  static constexpr float kOfWeight = 0x1p-4f;   // sums up to 2^11, of weights that are 2^15 times as large
  static constexpr float kAbsolute =
      kSumsGroup * kSmallest * ((kHalf ? 8.f : 0.f) + 2.f / (1 << kSumsShift) + kOfWeight);
};

// Of two blocks, that with the larger true score has no score below this, where the other one has this.
template <typename T>
__device__ __forceinline__ float may_beat(float score) {
  return fmaf(score, 1.f - 2.01f * SumsError<T>::kRelative, -2.01f * SumsError<T>::kAbsolute);
}
// And it certainly has the larger true score where its score is above this.
template <typename T>
__device__ __forceinline__ float surely_beats(float score) {
  return fmaf(score, 1.f + 2.02f * SumsError<T>::kRelative, 2.02f * SumsError<T>::kAbsolute);
}

// What exact scores of a token are made from.
struct TokenScores {
  uint32_t q;          // its rows in the swizzled tile of its warpgroup
  const char* keys;    // of the KV head, the first of the sequence
  uint32_t key_bytes;  // between two keys
  int visible;         // keys that the token sees
  float scale;         // of scores, for exponentials of base 2
};

// One warp: scores in fp32, as keys, of the blocks of the list. Four of them at a time: a product of m16n8k16
// has the five compressed blocks of one in its columns. Dimensions go in an order in which a lane's fragments
// lie side by side.
template <typename T>
__device__ __forceinline__ void score_exactly(const TokenScores& token, const float* lse, const int* blocks,
                                              int count, int* keys, int lane) {
  constexpr int kAtOnce = 4, kSlices = kSumsDim / 32;
  const int row = lane / 4, column = lane & 3;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    uint4 k[kAtOnce][kSlices];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      // Columns of nobody read a key that is there.
      const int key = 4 * blocks[min(first + b, count - 1)] - 1 + min(row, 4);
      const char* source = token.keys +
                           static_cast<uint64_t>(token.key_bytes) * max(min(key, token.visible - 1), 0) +
                           column * 16;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) k[b][s] = *reinterpret_cast<const uint4*>(source + s * 64);
    }
    float acc[kAtOnce][4] = {};
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t a[2][4];
      const uint32_t q = token.q + swizzled_offset(kSumsRows, row, s * 4 + column);
      ptx::load_shared_16(a[0][0], a[0][2], a[1][0], a[1][2], q);
      ptx::load_shared_16(a[0][1], a[0][3], a[1][1], a[1][3], q + 8 * kPanelPitch);
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b) {
        ptx::mma<T>(acc[b], a[0], k[b][s].x, k[b][s].y);
        ptx::mma<T>(acc[b], a[1], k[b][s].z, k[b][s].w);
      }
    }
    float sum[kAtOnce];
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      const int key = 4 * blocks[min(first + b, count - 1)] - 1 + 2 * column;
      const auto weighted = [&](int i, float weight) {
        const bool counts = weight != 0.f && key + (i & 1) >= 0 && key + (i & 1) < token.visible;
        return counts ? weight * ptx::exp2_approx(fmaf(acc[b][i], token.scale, -lse[row + i / 2 * 8])) : 0.f;
      };
      const float weight0 = column == 0 || column == 2 ? 1.f
                            : column == 1              ? 2.f
                                                       : 0.f,
                  weight1 = column < 2 ? 2.f : 0.f;
      sum[b] = (weighted(0, weight0) + weighted(2, weight0)) + (weighted(1, weight1) + weighted(3, weight1));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b) sum[b] += __shfl_xor_sync(~0u, sum[b], step);
    }
    if (lane == 0) {
#pragma unroll
      for (int b = 0; b < kAtOnce; ++b) {
        if (first + b < count) keys[first + b] = score_key(sum[b]);
      }
    }
  }
  __syncwarp();
}

// One warp: keys of a row on their way, before the bound is known.
struct KeysReader {
  static constexpr int kAhead = 8, kAtOnce = 2;  // chunks on their way, and dealt with at once: short code
  const float* row;
  int padded_end, lane;  // a multiple of 4
  int4 chunks[kAhead];

  __device__ __forceinline__ KeysReader(const float* row, int padded_end, int lane)
      : row(row), padded_end(padded_end), lane(lane) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) chunks[i] = load(i * kChunk);
  }
  __device__ __forceinline__ int4 load(int chunk) const {
    const int i = chunk + 4 * lane;
    return i < padded_end ? *reinterpret_cast<const int4*>(row + i) : make_int4(-1, -1, -1, -1);
  }
  // Keeps what reaches the bound, in order, as far as there is room. Returns how many do.
  __device__ __forceinline__ int compact(int bound, Candidates& kept) {
    const unsigned lower_lanes = (1u << lane) - 1;
    int held = 0;
#pragma unroll 1
    for (int begin = 0; begin < padded_end; begin += kAtOnce * kChunk) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        keep_reaching(chunks[i], begin + i * kChunk, bound, kept.key, kept.index, held, lower_lanes, lane);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        chunks[i] = i + kAtOnce < kAhead ? chunks[i + kAtOnce] : load(begin + (i + kAtOnce) * kChunk);
      }
    }
    __syncwarp();
    return held;
  }
};

// Of 64 keys, two a lane, in the order of their blocks: how many are ahead of each.
__device__ __forceinline__ void rank_keys(const int (&key)[2], int (&rank)[2], int lane) {
  rank[0] = rank[1] = 0;
#pragma unroll 1
  for (int i = 0; i < 32; ++i) {
    const int first = __shfl_sync(~0u, key[0], i), second = __shfl_sync(~0u, key[1], i);
    rank[0] += (first > key[0] - (i < lane)) + (second > key[0]);
    rank[1] += (first >= key[1]) + (second > key[1] - (i < lane));
  }
}

constexpr int kLeftOver = 1024;  // instead of a number of exact scores

// What it gains to choose the blocks of one of the last tokens here, in units of which an exact score costs
// eight: so that the sign changes where the times of both ways cross, as measured with logits of standard
// deviations 0.15 to 2 at 32,768 to 131,072 tokens. A token that is left over costs as much as 40 exact
// scores, and so do those that select_blocks_sm90 has in an item with it, up to 16.
__device__ __forceinline__ int gain_of_choice(int key_tiles, int exact_scores) {
  return 3 * key_tiles - 60 - 8 * min(exact_scores, 16 * 40);
}

// One warp: writes the k best of the scores [rows.begin, rows.end) in order, given this lane's maximum.
// Returns how many got exact scores, or kLeftOver where the choice is left to who makes them of all.
template <typename T, typename FindToken>
__device__ __forceinline__ int choose_best_of_sums(const ScoreRows<1>& rows, int padded_end, int high, int k,
                                                   int32_t* out, Candidates& kept, const float* lse,
                                                   const FindToken& find_token, int lane) {
  const auto as_key = [](float score) { return score_key(fmaxf(score, 0.f)); };
  KeysReader reader(rows.scores, padded_end, lane);
  int bound[1] = {high};
  find_bounds(bound, k, lane);
  const int held = reader.compact(as_key(may_beat<T>(__int_as_float(bound[0]))), kept);
  if (held > kMaxRanked) return kLeftOver;
  int key[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) key[i] = lane + 32 * i < held ? kept.key[lane + 32 * i] : -1;
  const int index[2] = {lane < held ? kept.index[lane] : -1, lane + 32 < held ? kept.index[lane + 32] : -1};
  __syncwarp();
  constexpr int kInfinity = 0x7f800000;  // or NaN: no bound holds for these
  if (__any_sync(~0u, key[0] >= kInfinity || key[1] >= kInfinity)) return kLeftOver;
  // The k-th best, and the next: -1 where there is none.
  int last, next;
  if (held <= 32) {
    int sorted[1] = {key[0]};
    sort_lanes(sorted, lane);
    last = __shfl_sync(~0u, sorted[0], k - 1), next = __shfl_sync(~0u, sorted[0], k);
  } else {
    int rank[2];
    rank_keys(key, rank, lane);
    const auto of_rank = [&](int wanted) {
      return __reduce_max_sync(~0u, max(rank[0] == wanted ? key[0] : -1, rank[1] == wanted ? key[1] : -1));
    };
    last = of_rank(k - 1), next = of_rank(k);
  }
  const float above = next < 0 ? -1.f : surely_beats<T>(__int_as_float(next)),
              low = may_beat<T>(__int_as_float(last));
  const unsigned lower_lanes = (1u << lane) - 1;
  bool chosen[2];
  int place[2], unsure = 0, left = k;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float score = __int_as_float(key[i]);
    chosen[i] = key[i] >= 0 && score > above;
    const bool maybe = key[i] >= 0 && score >= low && !chosen[i];
    const unsigned mask = __ballot_sync(~0u, maybe);
    place[i] = maybe ? unsure + __popc(mask & lower_lanes) : -1;
    unsure += __popc(mask);
    left -= __popc(__ballot_sync(~0u, chosen[i]));
  }
  if (left > 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (place[i] >= 0) kept.index[place[i]] = index[i];
    }
    __syncwarp();
    score_exactly<T>(find_token(), lse, kept.index, unsure, kept.key, lane);
    const int own[2] = {place[0] >= 0 ? kept.key[place[0]] : -1, place[1] >= 0 ? kept.key[place[1]] : -1};
    int before[2] = {0, 0};
#pragma unroll 1
    for (int j = 0; j < unsure; ++j) {
      const int other = kept.key[j];
      before[0] += other > own[0] - (j < place[0]);
      before[1] += other > own[1] - (j < place[1]);
    }
    chosen[0] = place[0] >= 0 ? before[0] < left : chosen[0];
    chosen[1] = place[1] >= 0 ? before[1] < left : chosen[1];
  }
  const int exact_scores = left > 0 ? unsure : 0;
  int written = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned mask = __ballot_sync(~0u, chosen[i]);
    if (chosen[i]) out[written + __popc(mask & lower_lanes)] = index[i];
    written += __popc(mask);
  }
  return exact_scores;
}

// The last selection block of a query.
__device__ __forceinline__ int own_block(const SumsPlan& plan, int position) {
  return min(position >> kSumsBlockLog2, plan.num_blocks - 1);
}

// One warp: the choice of the token at this position, whose records, up to its first local block, are on
// their way. warp: of the grid. row: of block_indices. find_token() -> TokenScores. Returns what
// choose_best_of_sums does.
template <typename T, typename FindToken>
__device__ __forceinline__ int choose_from_sums(const SumsPlan& plan, SumsReader& reader, SumsEpochs& epochs,
                                                Candidates& kept, int warp, int64_t row, int position,
                                                const FindToken& find_token) {
  const int own = own_block(plan, position), n = plan.counts.num_selected, lane = reader.lane;
  int* const keys = plan.keys + warp * plan.pitch;
  int exact_scores = 0;
  choose_blocks<1>(
      reinterpret_cast<const float*>(keys), plan.pitch, own, plan.counts, plan.block_indices + row * n, n,
      kept, lane, [&](const ScoreRows<1>& scores, int k, int32_t* chosen) {
        exact_scores = kLeftOver;
        if (epochs.count > kMaxEpochs) return;
        const int high = score_blocks(reader, epochs, keys, scores.begin, scores.end);
        discard_records(reader.records, epochs.first[0] + 1, lane);
        const int padded_end = (scores.end + kBlockSums - 1) / kBlockSums * kBlockSums;
        exact_scores =
            choose_best_of_sums<T>(scores, padded_end, high, k, chosen, kept, epochs.lse, find_token, lane);
      });
  __syncwarp();
  return exact_scores;
}

}  // namespace nsa::cuda::sm90
