// The choice of the best selection blocks of a query from their scores, by one warp, for several queries at a
// time, so that it waits less.
//
// The k-th largest of the maxima over disjoint parts of a row is a lower bound of its k-th largest score. Few
// candidates reach it; they are compacted in order and ranked by counting who is ahead, equal scores by their
// place. Where many reach it, a binary search over the bits of the scores finds the k-th largest.
//
// Who has kept the five best of each of 16 parts can mostly do without the row: four of each, sorted, are the
// best of all, unless the fifth of a part, and with it others unseen, reaches the k-th.
#pragma once

#include <cstdint>

namespace nsa::cuda::sm90 {

constexpr int kChoiceRows = 2;      // queries that a warp works on at a time
constexpr int kMaxRanked = 64;      // candidates of one of them
constexpr int kMaxLaneChoice = 24;  // blocks to choose for which 32 maxima are a good bound
constexpr int kChunk = 128;         // scores that a warp reads at a time, four a lane

struct Candidates {
  int key[kChoiceRows * kMaxRanked], index[kChoiceRows * kMaxRanked];
};

// Scores are sums of exponentials, never negative: their bits compare like themselves. A NaN with a sign
// counts as zero.
__device__ __forceinline__ int score_key(float score) { return max(__float_as_int(score), 0); }

// The candidates of kRows queries: scores [begin, end) of each. A key of -1 is none.
template <int kRows>
struct ScoreRows {
  const float* scores;
  int64_t pitch;
  int begin, end;

  __device__ __forceinline__ int first_chunk() const { return begin & ~(kChunk - 1); }
  __device__ __forceinline__ int key(int i) const {
    return i >= begin && i < end ? score_key(scores[i]) : -1;
  }
  // This lane's four of a chunk, of each row.
  __device__ __forceinline__ void keys(int chunk, int lane, int (&out)[kRows][4]) const {
    const int i = chunk + 4 * lane;
    float4 four[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      four[r] = i < end ? *reinterpret_cast<const float4*>(scores + r * pitch + i) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      out[r][0] = i >= begin && i < end ? score_key(four[r].x) : -1;
      out[r][1] = i + 1 >= begin && i + 1 < end ? score_key(four[r].y) : -1;
      out[r][2] = i + 2 >= begin && i + 2 < end ? score_key(four[r].z) : -1;
      out[r][3] = i + 3 >= begin && i + 3 < end ? score_key(four[r].w) : -1;
    }
  }
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

// Sorts one value per lane in descending order, for each row.
template <int kRows>
__device__ __forceinline__ void sort_lanes(int (&value)[kRows], int lane) {
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const bool larger = ((lane & stride) == 0) == ((lane & size) == 0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int other = __shfl_xor_sync(~0u, value[r], stride);
        value[r] = larger ? max(value[r], other) : min(value[r], other);
      }
    }
  }
}

// Keeps the candidates that reach the bounds, in order, as far as there is room; held: how many there are.
template <int kRows, int kRoom>
__device__ __forceinline__ void compact(const ScoreRows<kRows>& rows, const int (&bound)[kRows],
                                        Candidates& kept, int (&held)[kRows], int lane) {
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) held[r] = 0;
#pragma unroll 1
  for (int chunk = rows.first_chunk(); chunk < rows.end; chunk += kChunk) {
    int key[kRows][4];
    rows.keys(chunk, lane, key);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      int at = held[r];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned reach = __ballot_sync(~0u, key[r][e] >= bound[r]);
        at += __popc(reach & lower_lanes);
        held[r] += __popc(reach);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool reaches = key[r][e] >= bound[r];
        if (reaches && at < kRoom) {
          kept.key[r * kRoom + at] = key[r][e];
          kept.index[r * kRoom + at] = chunk + 4 * lane + e;
        }
        at += reaches;
      }
    }
  }
  __syncwarp();
}

// Writes the k best of each row's candidates, in order; nothing where there are more than kMaxRanked.
template <int kRows>
__device__ __forceinline__ void write_ranked(int32_t* out, int64_t out_pitch, int k, const int (&held)[kRows],
                                             const Candidates& kept, int lane) {
  int key0[kRows], key1[kRows], rank0[kRows], rank1[kRows], most = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    key0[r] = lane < held[r] ? kept.key[r * kMaxRanked + lane] : -1;
    key1[r] = lane + 32 < held[r] ? kept.key[r * kMaxRanked + lane + 32] : -1;
    rank0[r] = rank1[r] = 0;
    most = max(most, held[r] > kMaxRanked ? 0 : held[r]);
  }
#pragma unroll 4
  for (int i = 0; i < min(most, 32); ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) rank0[r] += __shfl_sync(~0u, key0[r], i) > key0[r] - (i < lane);
  }
  if (most > 32) {
#pragma unroll 2
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int other = __shfl_sync(~0u, key1[r], i);
        rank0[r] += other > key0[r];
        rank1[r] += (__shfl_sync(~0u, key0[r], i) >= key1[r]) + (other > key1[r] - (i < lane));
      }
    }
  }
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (held[r] > kMaxRanked) continue;
    const bool chosen0 = lane < held[r] && rank0[r] < k, chosen1 = lane + 32 < held[r] && rank1[r] < k;
    const unsigned mask0 = __ballot_sync(~0u, chosen0), mask1 = __ballot_sync(~0u, chosen1);
    int32_t* row = out + r * out_pitch;
    const int* index = kept.index + r * kMaxRanked;
    if (chosen0) row[__popc(mask0 & lower_lanes)] = index[lane];
    if (chosen1) row[__popc(mask0) + __popc(mask1 & lower_lanes)] = index[lane + 32];
  }
}

// Writes the k best of the values begin .. end - 1, in order: those above the threshold, and as many equal to
// it as there is room, from the front. The bound is at most the k-th largest.
template <typename Key, typename Index>
__device__ __forceinline__ void write_above(int32_t* out, int k, int begin, int end, int bound,
                                            const Key& key, const Index& index, int lane) {
  const auto count_reaching = [&](int v) {
    int n = 0;
#pragma unroll 1
    for (int i = begin + lane; i < end; i += 32) n += key(i) >= v;
    return __reduce_add_sync(~0u, n);
  };
  const auto count_above = [&](int v) { return v == 0x7fffffff ? 0 : count_reaching(v + 1); };
  // Equal scores in large numbers are the usual reason to be here: then the bound is the threshold.
  const int threshold = count_above(bound) < k ? bound : kth_largest(k, count_reaching);
  int ties = k - count_above(threshold), written = 0;
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll 1
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

// The k best of one row, for any k up to 64 and any number of equal scores.
__device__ __forceinline__ void choose_with_care(const float* scores, int begin, int end, int k, int32_t* out,
                                                 Candidates& kept, int lane) {
  const ScoreRows<1> row{scores, 0, begin, end};
  int high0 = -1, high1 = -1;
#pragma unroll 1
  for (int chunk = row.first_chunk(); chunk < end; chunk += kChunk) {
    int key[1][4];
    row.keys(chunk, lane, key);
    high0 = max(high0, max(key[0][0], key[0][1]));
    high1 = max(high1, max(key[0][2], key[0][3]));
  }
  const int bound[1] = {kth_largest(k, [&](int v) {
    return __popc(__ballot_sync(~0u, high0 >= v)) + __popc(__ballot_sync(~0u, high1 >= v));
  })};
  int held[1];
  constexpr int kRoom = kChoiceRows * kMaxRanked;
  compact<1, kRoom>(row, bound, kept, held, lane);
  if (held[0] <= kRoom) {
    write_above(
        out, k, 0, held[0], bound[0], [&](int i) { return kept.key[i]; },
        [&](int i) { return kept.index[i]; }, lane);
  } else {
    write_above(
        out, k, begin, end, bound[0], [&](int i) { return row.key(i); }, [&](int i) { return i; }, lane);
  }
  __syncwarp();
}

// The bound from 32 values of each row, one a lane: maxima of disjoint parts, or the two best of 16.
template <int kRows>
__device__ __forceinline__ void find_bounds(int (&high)[kRows], int k, int lane) {
  sort_lanes(high, lane);
#pragma unroll
  for (int r = 0; r < kRows; ++r) high[r] = max(__shfl_sync(~0u, high[r], k - 1), 0);
}

// The k best of each row, from its candidates where there are not too many.
template <int kRows>
__device__ __forceinline__ void write_best(const ScoreRows<kRows>& rows, int k, int32_t* out,
                                           int64_t out_pitch, const int (&held)[kRows], Candidates& kept,
                                           int lane) {
  write_ranked(out, out_pitch, k, held, kept, lane);
  unsigned too_many = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) too_many |= held[r] > kMaxRanked ? 1u << r : 0;
  __syncwarp();
#pragma unroll 1
  for (; too_many; too_many &= too_many - 1) {
    const int r = __ffs(too_many) - 1;
    choose_with_care(rows.scores + r * rows.pitch, rows.begin, rows.end, k, out + r * out_pitch, kept, lane);
  }
}

// The k best of kRows rows, k <= kMaxLaneChoice.
template <int kRows>
__device__ __forceinline__ void choose_best(const ScoreRows<kRows>& rows, int k, int32_t* out,
                                            int64_t out_pitch, Candidates& kept, int lane) {
  int bound[kRows], held[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) bound[r] = -1;
#pragma unroll 2
  for (int chunk = rows.first_chunk(); chunk < rows.end; chunk += kChunk) {
    int key[kRows][4];
    rows.keys(chunk, lane, key);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      bound[r] = max(max(bound[r], key[r][0]), max(max(key[r][1], key[r][2]), key[r][3]));
  }
  find_bounds(bound, k, lane);
  compact<kRows, kMaxRanked>(rows, bound, kept, held, lane);
  write_best(rows, k, out, out_pitch, held, kept, lane);
}

// Of rows that hold keys, those with fewer than k above zero: these, whose indices are in kept, and the first
// of the zeros, in order. Softmax that is all but one-hot makes such rows. held: 0 of what is written.
template <int kRows>
__device__ __forceinline__ void write_above_zero(const ScoreRows<kRows>& rows, int k, int32_t* out,
                                                 int64_t out_pitch, int (&held)[kRows], Candidates& kept,
                                                 int lane) {
  unsigned few = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) few |= held[r] < k ? 1u << r : 0;
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll 1
  for (; few; few &= few - 1) {
    const int r = __ffs(few) - 1;
    const int* const keys = reinterpret_cast<const int*>(rows.scores + r * rows.pitch);
    int* const indices = kept.index + r * kMaxRanked;
    int num = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i == r) num = held[i], held[i] = 0;
    }
#pragma unroll 1
    for (int first = rows.begin; num < k && first < rows.end; first += 32) {
      const int i = first + lane;
      const bool zero = i < rows.end && keys[i] == 0;
      const unsigned zeros = __ballot_sync(~0u, zero);
      const int at = num + __popc(zeros & lower_lanes);
      if (zero && at < k) indices[at] = i;
      num += __popc(zeros);
    }
    __syncwarp();
    const int mine = lane < k ? indices[lane] : 0x7fffffff;
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < k; ++i) before += __shfl_sync(~0u, mine, i) < mine;
    if (lane < k) out[r * out_pitch + before] = mine;
  }
  __syncwarp();
}

constexpr int kNoRow = 0x7fffffff;  // no bound is as large, but the key of a NaN

// Keeps those of four keys a lane, of a chunk, that reach the bound, in order, as far as there is room.
__device__ __forceinline__ void keep_reaching(int4 four, int chunk, int bound, int* keys, int* indices,
                                              int& held, unsigned lower_lanes, int lane) {
  const int key[4] = {four.x, four.y, four.z, four.w};
  bool reaches[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) reaches[e] = key[e] >= bound;
  const bool left = reaches[0] || reaches[1], right = reaches[2] || reaches[3];
  const unsigned lanes = __ballot_sync(~0u, left || right);
  if (lanes == 0) return;
  int at = held;
  // Usually no lane has more than one.
  if (!__any_sync(~0u, (reaches[0] && reaches[1]) || (reaches[2] && reaches[3]) || (left && right))) {
    at += __popc(lanes & lower_lanes);
    held += __popc(lanes);
    if ((left || right) && at < kMaxRanked) {
      keys[at] = left ? (reaches[0] ? key[0] : key[1]) : (reaches[2] ? key[2] : key[3]);
      indices[at] = chunk + 4 * lane + (left ? (reaches[0] ? 0 : 1) : (reaches[2] ? 2 : 3));
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const unsigned reach = __ballot_sync(~0u, reaches[e]);
    at += __popc(reach & lower_lanes);
    held += __popc(reach);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (reaches[e] && at < kMaxRanked) keys[at] = key[e], indices[at] = chunk + 4 * lane + e;
    at += reaches[e];
  }
}

// compact for rows that hold keys, up to padded_end, a multiple of 4, where no candidate is -1.
template <int kRows>
__device__ __forceinline__ void compact_keys(const ScoreRows<kRows>& rows, int padded_end,
                                             const int (&bound)[kRows], Candidates& kept, int (&held)[kRows],
                                             int lane) {
  constexpr int kAhead = 2;  // chunks on their way
  int4 chunks[kAhead][kRows];
  const auto load = [&](int slot, int chunk) {
    const int i = chunk + 4 * lane;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      chunks[slot][r] = i < padded_end ? *reinterpret_cast<const int4*>(rows.scores + r * rows.pitch + i)
                                       : make_int4(-1, -1, -1, -1);
    }
  };
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) load(slot, slot * kChunk);
  const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
  for (int r = 0; r < kRows; ++r) held[r] = 0;
#pragma unroll 1
  for (int begin = 0; begin < padded_end; begin += kAhead * kChunk) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int chunk = begin + slot * kChunk;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        int n = held[r];
        keep_reaching(chunks[slot][r], chunk, bound[r], kept.key + r * kMaxRanked,
                      kept.index + r * kMaxRanked, n, lower_lanes, lane);
        held[r] = n;
      }
      load(slot, chunk + kAhead * kChunk);
    }
  }
  __syncwarp();
}

// The k best of rows that hold keys (compact_keys), of whose k-th largest lower bounds are known. kNoRow:
// nothing of that row is written. kAboveZero: the bounds are above zero, and a row may have fewer than k keys
// that reach them, all others zero.
template <int kRows, bool kAboveZero>
__device__ __forceinline__ void choose_best_of_keys(const ScoreRows<kRows>& rows, int padded_end,
                                                    const int (&bound)[kRows], int k, int32_t* out,
                                                    int64_t out_pitch, Candidates& kept, int lane) {
  int held[kRows];
  compact_keys(rows, padded_end, bound, kept, held, lane);
  if constexpr (kAboveZero) {
    write_above_zero(rows, k, out, out_pitch, held, kept, lane);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) held[r] = bound[r] == kNoRow ? 0 : held[r];
  }
  write_best(rows, k, out, out_pitch, held, kept, lane);
}

constexpr int kRowParts = 16;  // lanes that hold the parts of a row, one each

// A key and its block, of a row of up to mask + 1 of them, in one number that compares like the key first:
// keys of 2^-25 to 2^7 with as many of their bits as there is room for. Of equal keys the lower block is the
// larger.
struct PackedKey {
  static constexpr int kNone = -1;
  static constexpr int kLowest = (127 - 25) << 23, kRange = (32 << 23) - 1, kShift = 3;
  __device__ __forceinline__ static int pack(int key, int mask, int name) {
    return (__viaddmin_s32_relu(key, -kLowest, kRange) << kShift & ~mask) | name;
  }
  // At most the key.
  __device__ __forceinline__ static int key(int packed, int mask) {
    const int above = (packed & ~mask) >> kShift;
    return packed < 0 || above == 0 ? 0 : above + kLowest;
  }
  // The bits that name a block, one of `blocks`.
  __device__ __forceinline__ static int mask(int blocks) {
    return static_cast<int>((1u << (32 - __clz(blocks - 1))) - 1);
  }
};

// The largest keys of a part of a row in descending order, packed where there are more than two.
template <int kKept>
struct BestOfPart {
  int best[kKept];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kKept; ++i) best[i] = PackedKey::kNone;
  }
  // name: of the block, as in PackedKey.
  __device__ __forceinline__ void add(int key, bool candidate, int mask, int name) {
    int value = !candidate ? PackedKey::kNone : kKept > 2 ? PackedKey::pack(key, mask, name) : key;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int lower = min(best[i], value);
      best[i] = max(best[i], value);
      value = lower;
    }
  }
};

// A bitonic sequence of each half of a warp, in descending (ascending) order.
template <int kLists>
__device__ __forceinline__ void merge_halves(int (&value)[kLists], const bool (&ascending)[kLists], int size,
                                             int lane) {
#pragma unroll
  for (int stride = size / 2; stride > 0; stride /= 2) {
    const bool larger = ((lane & stride) == 0) == (size == kRowParts || (lane & size) == 0);
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int other = __shfl_xor_sync(~0u, value[i], stride);
      value[i] = larger != ascending[i] ? max(value[i], other) : min(value[i], other);
    }
  }
}

// The kRowParts largest of all values but the last of the parts of each half of a warp, in descending order.
template <int kKept>
__device__ __forceinline__ int sort_best(const BestOfPart<kKept>& part, int lane) {
  static_assert(kKept == 5);
  int value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) value[i] = part.best[i];
#pragma unroll
  for (int size = 2; size <= kRowParts; size *= 2)
    merge_halves<4>(value, {false, true, false, true}, size, lane);
  // The larger ones of a descending sequence and an ascending one are bitonic, and the largest of both.
  int two[2] = {max(value[0], value[1]), max(value[2], value[3])};
  merge_halves<2>(two, {false, true}, kRowParts, lane);
  int one[1] = {max(two[0], two[1])};
  merge_halves<1>(one, {false}, kRowParts, lane);
  return one[0];
}

// Writes the k best, k < kRowParts, of two rows, of which half a warp each holds the parts, in order. Where a
// part may have more of the best than are looked at, or where what is left of the keys does not tell, nothing
// of that row is written, it returns false, and bound is a lower bound of that row's k-th largest key; then
// the bound of a row that is written is kNoRow.
template <int kKept>
__device__ __forceinline__ bool write_best_of_parts(const BestOfPart<kKept>& part, int mask, int k,
                                                    int32_t* out, int64_t out_pitch, int (&bound)[2],
                                                    int lane) {
  const int row = lane / kRowParts, place = lane % kRowParts;
  const int sorted = sort_best(part, lane);
  const int last = __shfl_sync(~0u, sorted, k - 1, kRowParts), next = __shfl_sync(~0u, sorted, k, kRowParts);
  const bool unsure = (part.best[kKept - 1] | mask) >= last || last < 0 || ((last ^ next) & ~mask) == 0;
  const unsigned unsure_lanes = __ballot_sync(~0u, unsure);
  const bool row_unsure = (unsure_lanes >> (row * kRowParts) & ((1u << kRowParts) - 1)) != 0;
  const int block = mask - (sorted & mask), order = place < k ? block : 0x7fffffff;
  int before = 0;
#pragma unroll
  for (int i = 0; i < kRowParts - 1; ++i) before += __shfl_sync(~0u, order, i, kRowParts) < order;
  if (place < k && !row_unsure) out[row * out_pitch + before] = block;
  if (unsure_lanes == 0) return true;
  const int row_bound = row_unsure ? PackedKey::key(last, mask) : kNoRow;
#pragma unroll
  for (int r = 0; r < 2; ++r) bound[r] = __shfl_sync(~0u, row_bound, r * kRowParts);
  return false;
}

// The k best of two rows, of which half a warp each holds the parts.
template <int kKept>
__device__ __forceinline__ void choose_best_of_parts(const ScoreRows<2>& rows, int padded_end,
                                                     const BestOfPart<kKept>& part, int mask, int k,
                                                     int32_t* out, int64_t out_pitch, Candidates& kept,
                                                     int lane) {
  int bound[2];
  bool bounded = false;
  if constexpr (kKept > 2) {
    if (k < kRowParts) {
      if (write_best_of_parts(part, mask, k, out, out_pitch, bound, lane)) return;
      bounded = true;
    }
  }
  if (!bounded) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int one = __shfl_sync(~0u, part.best[0], r * kRowParts + lane % kRowParts),
                other = __shfl_sync(~0u, part.best[1], r * kRowParts + lane % kRowParts);
      const int best = lane < kRowParts ? one : other;
      bound[r] = kKept > 2 ? PackedKey::key(best, mask) : best;
    }
    find_bounds(bound, k, lane);
  }
  // Where the parts leave no doubt of most rows, none of this is worth registers.
  constexpr bool kAboveZero = kKept == 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) bound[r] = kAboveZero ? max(bound[r], 1) : bound[r];
  choose_best_of_keys<2, kAboveZero>(rows, padded_end, bound, k, out, out_pitch, kept, lane);
}

// What a choice is told.
struct ChoiceCounts {
  int num_selected, num_initial, num_local;
};

// Writes the rows of block_indices of kRows queries whose last block is `own` (-1: they have none). scores:
// of their blocks, rows 16-byte aligned. best(rows, k, out) finds the k best of them, k <= kMaxLaneChoice.
template <int kRows, typename Best>
__device__ __forceinline__ void choose_blocks(const float* scores, int64_t pitch, int own,
                                              const ChoiceCounts& counts, int32_t* out, int64_t out_pitch,
                                              Candidates& kept, int lane, const Best& best) {
  const int initial = min(counts.num_initial, own + 1), local = max(initial, own + 1 - counts.num_local);
  const int n = counts.num_selected, count = local - initial, k = min(n - initial - (own + 1 - local), count);
  // A slot of the row holds a forced block, one of the k best, or nothing.
#pragma unroll 1
  for (int i = lane; i < n; i += 32) {
    const int block = i < initial ? i : local + i - initial - k;
    if (i >= initial && i < initial + k && k < count) continue;
    const int value = k == count && i <= own ? i : block <= own ? block : -1;
#pragma unroll
    for (int r = 0; r < kRows; ++r) out[r * out_pitch + i] = value;
  }
  if (k == count || k <= 0) return;
  if (k <= kMaxLaneChoice) {
    best(ScoreRows<kRows>{scores, pitch, initial, local}, k, out + initial);
  } else {
#pragma unroll 1
    for (int r = 0; r < kRows; ++r)
      choose_with_care(scores + r * pitch, initial, local, k, out + r * out_pitch + initial, kept, lane);
  }
}

template <int kRows>
__device__ __forceinline__ void choose_blocks(const float* scores, int64_t pitch, int own,
                                              const ChoiceCounts& counts, int32_t* out, int64_t out_pitch,
                                              Candidates& kept, int lane) {
  choose_blocks<kRows>(scores, pitch, own, counts, out, out_pitch, kept, lane,
                       [&](const ScoreRows<kRows>& rows, int k, int32_t* chosen) {
                         choose_best(rows, k, chosen, out_pitch, kept, lane);
                       });
}

}  // namespace nsa::cuda::sm90
