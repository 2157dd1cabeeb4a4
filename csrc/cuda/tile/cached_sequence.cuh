// Sequences and rows of an inference cache on the device, where lengths and page numbers are not trusted:
// whatever they say, nothing outside the tensors is touched.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

__device__ inline Sequence clamped_sequence(const CachedBatch& seqs, int64_t b) {
  Sequence seq = seqs.sequence(b);
  const int64_t cached = min64(max64(seqs.cache_seqlens[b], 0), seqs.capacity);
  seq.q_begin = min64(max64(seq.q_begin, 0), seqs.total_q);
  seq.q_len = min64(max64(seq.q_len, 0), min64(seqs.total_q - seq.q_begin, seqs.capacity - cached));
  seq.k_len = cached + seq.q_len;
  return seq;
}

// KeyBlocks in 32 bits, for positions in a cache: a 64-bit division costs a hundred instructions.
struct CachedKeyBlocks {
  int block, stride;

  __device__ explicit CachedKeyBlocks(KeyBlocks keys)
      : block(static_cast<int>(keys.block)), stride(static_cast<int>(keys.stride)) {}
  __device__ int count(int seqlen) const { return seqlen < block ? 0 : (seqlen - block) / stride + 1; }
  __device__ int end_visible(int t) const { return count(t + 1); }
  __device__ int begin_visible(int t, int window) const {
    return window <= 0 || t < window ? 0 : count(t - window + 1);
  }
};

// The sequence that holds a row of q, or -1 for padding.
__device__ inline int64_t find_sequence(const CachedBatch& seqs, int64_t row) {
  if (seqs.cu_seqlens_q == nullptr)
    return static_cast<unsigned>(row) / static_cast<unsigned>(seqs.total_q / seqs.batch);
  int64_t low = 0, high = seqs.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (seqs.cu_seqlens_q[middle] <= row ? low : high) = middle;
  }
  const Sequence seq = clamped_sequence(seqs, low);
  return row >= seq.q_begin && row < seq.q_begin + seq.q_len ? low : -1;
}

// Where row s of sequence b lies. 32-bit division: a cache has fewer than 2^31 tokens per sequence.
struct PageAndRow {
  int64_t page;
  int row;

  // A ring keeps row s in its row s % page_rows.
  __device__ PageAndRow(const CachedRows& rows, int64_t b, int s) {
    const unsigned page_rows = static_cast<unsigned>(rows.page_rows),
                   index = static_cast<unsigned>(s) / page_rows;
    row = static_cast<int>(static_cast<unsigned>(s) - index * page_rows);
    page = rows.block_table == nullptr ? b : rows.block_table[b * rows.table_width + index];
  }
  // -1 if the block table names no page there is.
  __device__ int64_t offset(const CachedRows& rows, int head) const {
    if (page < 0 || page >= rows.num_pages) return -1;
    return page * rows.stride_page + row * rows.stride_row + head * rows.stride_head;
  }
};

__device__ inline int64_t cached_offset(const CachedRows& rows, int64_t b, int s, int head) {
  return PageAndRow(rows, b, s).offset(rows, head);
}

}  // namespace nsa::cuda
