// Tiles of query tokens over packed sequences, without a list made on the host.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

// Sequence b owns the tile numbers from begin(b) / tokens + b on. They never overlap, because
// ceil(length / m) <= floor((begin + length) / m) - floor(begin / m) + 1; a few numbers belong to nobody.
inline int64_t num_sequence_tiles(const SequenceBatch& seqs, int64_t tokens) {
  return seqs.cu_seqlens_q == nullptr ? ceil_div(seqs.total_q, tokens) : seqs.total_q / tokens + seqs.batch;
}

struct SequenceTile {
  Sequence seq;
  int begin;  // first query of the tile within its sequence
  int count;  // 0: a number that belongs to nobody
};

// Offsets on the device are not trusted: whatever they say, query rows stay within [0, total_q).
__device__ inline Sequence clamped_sequence(const SequenceBatch& seqs, int64_t b) {
  Sequence seq = seqs.sequence(b);
  seq.q_begin = min64(max64(seq.q_begin, 0), seqs.total_q);
  seq.q_len = min64(max64(seq.q_len, 0), seqs.total_q - seq.q_begin);
  seq.k_begin = max64(seq.k_begin, 0);
  seq.k_len = max64(seq.k_len, 0);
  return seq;
}

// Keys of a sequence that exist both by its length and by the size of the tensor.
__device__ inline int64_t count_keys(const SequenceBatch& seqs, const Sequence& seq, KeyBlocks keys) {
  return max64(0, min64(keys.count(seq.k_len), seqs.key_rows - keys.first_row(seq.k_begin)));
}

__device__ inline SequenceTile find_sequence_tile(const SequenceBatch& seqs, int64_t tile, int tokens) {
  int64_t b = 0;
  int64_t local = tile;
  if (seqs.cu_seqlens_q != nullptr) {
    int64_t low = 0, high = seqs.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (seqs.cu_seqlens_q[middle] / tokens + middle <= tile ? low : high) = middle;
    }
    b = low;
    local = tile - (seqs.cu_seqlens_q[b] / tokens + b);
  }
  SequenceTile result;
  result.seq = clamped_sequence(seqs, b);
  const int64_t begin = local * tokens;
  const bool owned = local >= 0 && begin < result.seq.q_len;
  result.begin = owned ? static_cast<int>(begin) : 0;
  result.count = owned ? static_cast<int>(min64(tokens, result.seq.q_len - begin)) : 0;
  return result;
}

}  // namespace nsa::cuda
