// Sequences and rows of an inference cache on the device, where lengths and page numbers are not trusted:
// whatever they say, nothing outside the tensors is touched.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

__device__ inline Sequence clamped_sequence(const CachedBatch& seqs, Sequence seq, int64_t cached) {
  cached = min64(max64(cached, 0), seqs.capacity);
  seq.q_begin = min64(max64(seq.q_begin, 0), seqs.total_q);
  seq.q_len = min64(max64(seq.q_len, 0), min64(seqs.total_q - seq.q_begin, seqs.capacity - cached));
  seq.k_len = cached + seq.q_len;
  return seq;
}

__device__ inline Sequence clamped_sequence(const CachedBatch& seqs, int64_t b) {
  return clamped_sequence(seqs, seqs.sequence(b), seqs.cache_seqlens[b]);
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

// The same by one warp, with the token's position: what it loads for up to 32 sequences is on its way at the
// same time. Nothing of it stays in the L1 cache, so that a kernel may look before the one in front has
// ended, and again.
struct TokenPlace {
  int64_t b;     // -1 for padding
  int position;  // in the sequence
};

__device__ inline TokenPlace find_token_by_warp(const CachedBatch& seqs, int64_t row, int lane) {
  const int batch = static_cast<int>(seqs.batch);
  const bool even = seqs.cu_seqlens_q == nullptr;
  const unsigned each = even ? static_cast<unsigned>(seqs.total_q) / static_cast<unsigned>(batch) : 0;
  int low = even ? static_cast<int>(static_cast<unsigned>(row) / each) : 0;
  int step = even ? 1 : batch;
  while (step > 32) {
    step = (step + 31) / 32;
    const int probe = low + lane * step;
    const bool reached = probe < batch && __ldcg(seqs.cu_seqlens_q + probe) <= row;
    low += (max(1, __popc(__ballot_sync(~0u, reached))) - 1) * step;
  }
  const int own = low + (lane < step ? lane : 0), b = min(own, batch - 1);
  Sequence seq{b * static_cast<int64_t>(each), each, 0, 0};
  if (!even) {
    seq.q_begin = __ldcg(seqs.cu_seqlens_q + b);
    seq.q_len = __ldcg(seqs.cu_seqlens_q + b + 1) - seq.q_begin;
  }
  seq = clamped_sequence(seqs, seq, __ldcg(seqs.cache_seqlens + b));
  const bool found = row >= seq.q_begin && row < seq.q_begin + seq.q_len;
  const unsigned who = __ballot_sync(~0u, found);
  if (who == 0) return {-1, -1};
  const int first = __ffs(who) - 1;
  return {__shfl_sync(~0u, b, first),
          __shfl_sync(~0u, static_cast<int>(seq.position(row - seq.q_begin)), first)};
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
