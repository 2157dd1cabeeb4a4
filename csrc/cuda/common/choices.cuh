// What a row of block_indices may name.
#pragma once

#include "cuda/tile/sequence_tile.cuh"

namespace nsa::cuda {

// Blocks are numbered over the batch: sequence b owns the numbers from here on (as sequence_tile.cuh numbers
// query tiles).
__device__ inline int64_t first_block(const Sequence& seq, int64_t b, int64_t block_size) {
  return seq.k_begin / block_size + b;
}

// A row of q may name the blocks 0 .. legal - 1 of its sequence, which are first .. first + legal - 1 of the
// batch. A row of no sequence may name none.
struct Choosable {
  int first, legal;
  int key_begin;  // row of its sequence's first key
  int seen;       // keys of its sequence that it sees
};

__device__ inline Choosable find_choosable(const SequenceBatch& seqs, int64_t row, int64_t block_size,
                                           int64_t num_blocks) {
  if (row >= seqs.total_q) return {};
  int64_t low = 0, high = seqs.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (seqs.cu_seqlens_q[middle] <= row ? low : high) = middle;
  }
  const Sequence seq = clamped_sequence(seqs, low);
  const int64_t i = row - seq.q_begin, t = seq.position(i);
  if (i < 0 || i >= seq.q_len || t < 0) return {};
  const int64_t seen = min64(t + 1, count_keys(seqs, seq, KeyBlocks{}));
  const int64_t first = min64(first_block(seq, low, block_size), num_blocks);
  return {static_cast<int>(first), static_cast<int>(min64(ceil_div(seen, block_size), num_blocks - first)),
          static_cast<int>(seq.k_begin), static_cast<int>(seen)};
}

}  // namespace nsa::cuda
