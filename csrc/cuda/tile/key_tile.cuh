// Tiles of keys over packed sequences, and who sees them: what a backward that walks queries needs.
#pragma once

#include "cuda/tile/sequence_tile.cuh"

namespace nsa::cuda {

// Sequence b owns the tile numbers from first_row(begin) / width + b on, as query tiles do
// (sequence_tile.cuh), and the rows of the key tensors up to those of the next sequence: rows of no key too,
// so that every row is some tile's.
inline int64_t num_key_tiles(const SequenceBatch& seqs, int64_t width) {
  return seqs.cu_seqlens_k == nullptr ? ceil_div(seqs.key_rows, width) : seqs.key_rows / width + seqs.batch;
}

// Visibility by one comparison: a query at position t sees the key that ends at e iff 0 <= t - e < span.
// Positions of no query and ends of no key are such that nothing is seen.
constexpr int kNoPosition = -1;
constexpr int kNoKey = 0x7fffffff;

struct Visibility {
  int block, stride;
  unsigned span;

  __host__ __device__ Visibility(KeyBlocks keys, int64_t window)
      : block(static_cast<int>(keys.block)),
        stride(static_cast<int>(keys.stride)),
        span(window <= 0 ? 0x80000000u : static_cast<unsigned>(min64(window, 0x80000000))) {}
  __device__ __forceinline__ int end_of(int key) const { return key * stride + block - 1; }
  __device__ __forceinline__ bool operator()(int position, int end) const {
    return static_cast<unsigned>(position - end) < span;
  }
};

// The position of query i of a sequence; offsets on the device may be such that it has none.
__device__ __forceinline__ int position_of(const Sequence& seq, int64_t i) {
  return static_cast<int>(max64(seq.position(i), kNoPosition));
}

// The keys of a sequence that some query sees: [lo, hi). Memory of the others is never read.
struct SeenKeys {
  int lo, hi;
};

__device__ inline SeenKeys seen_keys(const SequenceBatch& seqs, const Sequence& seq, KeyBlocks keys,
                                     int64_t window) {
  const int64_t hi = seq.q_len == 0 ? 0 : count_keys(seqs, seq, keys);
  return {static_cast<int>(min64(keys.begin_visible(seq.position(0), window), hi)), static_cast<int>(hi)};
}

struct KeyTile {
  Sequence seq;
  int64_t first_row;  // of the sequence's first key
  int begin;          // first key of the tile
  int rows;           // that the tile owns, from row first_row + begin on
  SeenKeys seen;      // of the tile's keys: [seen.lo, seen.hi); none: a number that belongs to nobody
  int64_t query_lo, query_hi;  // the queries that see a key of the tile lie in [query_lo, query_hi)
};

__device__ inline KeyTile find_key_tile(const SequenceBatch& seqs, KeyBlocks keys, int64_t window, int tile,
                                        int width) {
  int b = 0, local = tile;
  if (seqs.cu_seqlens_k != nullptr) {
    const auto first_tile = [&](int sequence) {
      return max(seqs.cu_seqlens_k[sequence], 0) / static_cast<int>(keys.stride) / width + sequence;
    };
    int high = static_cast<int>(seqs.batch);
    while (high - b > 1) {
      const int middle = (b + high) / 2;
      (first_tile(middle) <= tile ? b : high) = middle;
    }
    local = tile - first_tile(b);
  }
  KeyTile result;
  result.seq = clamped_sequence(seqs, b);
  result.first_row = keys.first_row(result.seq.k_begin);
  const SeenKeys seen = seen_keys(seqs, result.seq, keys, window);
  const int64_t begin = int64_t{local} * width;
  const int64_t lo = max64(begin, seen.lo), hi = min64(begin + width, seen.hi);
  const bool owned = local >= 0 && lo < hi;
  const bool is_last = seqs.cu_seqlens_k == nullptr || b + 1 >= seqs.batch;
  const int64_t end_row =
      is_last ? seqs.key_rows : min64(seqs.key_rows, keys.first_row(max64(seqs.cu_seqlens_k[b + 1], 0)));
  const int64_t rows = local < 0 ? 0 : max64(0, min64(width, end_row - result.first_row - begin));
  result.rows = static_cast<int>(owned ? max64(rows, hi - begin) : rows);
  result.begin = result.rows > 0 ? static_cast<int>(begin) : 0;
  result.seen = owned ? SeenKeys{static_cast<int>(lo), static_cast<int>(hi)} : SeenKeys{0, 0};
  // The query at position t is number t - offset.
  const int64_t offset = result.seq.position(0);
  result.query_lo = max64(0, lo * keys.stride + keys.block - 1 - offset);
  result.query_hi = window <= 0
                        ? result.seq.q_len
                        : min64(result.seq.q_len, (hi - 1) * keys.stride + keys.block - 1 + window - offset);
  if (!owned || result.query_hi < result.query_lo) result.query_hi = result.query_lo;
  return result;
}

// The rows (token, head of a group) of adjacent queries, one behind the other: row r is token r / G, head r %
// G. Division without dividing, for rows below 1,024 and G up to 64.
struct GroupRows {
  int group;
  unsigned reciprocal;

  __host__ __device__ explicit GroupRows(int group)
      : group(group), reciprocal((65536u + group - 1) / group) {}
  __device__ __forceinline__ int token(int row) const {
    return static_cast<int>(static_cast<unsigned>(row) * reciprocal >> 16);
  }
};

}  // namespace nsa::cuda
