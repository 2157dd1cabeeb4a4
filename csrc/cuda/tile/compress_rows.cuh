// What the kernels of phi share on every architecture: which tokens a compressed row stands for, and the bias
// of the first layer.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

// The first token of a compressed row's block, or -1 for a row of no block. Offsets on the device are not
// trusted: whatever they say, the block lies within [0, seqs.key_rows).
__device__ inline int64_t first_token(const SequenceBatch& seqs, KeyBlocks blocks, int64_t num_rows,
                                      int64_t row) {
  if (row >= num_rows) return -1;
  int64_t begin = 0, length = seqs.max_seqlen_k, first = 0;
  if (seqs.cu_seqlens_k != nullptr) {
    int64_t low = 0, high = seqs.batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (blocks.first_row(seqs.cu_seqlens_k[middle]) <= row ? low : high) = middle;
    }
    begin = max64(seqs.cu_seqlens_k[low], 0);
    length = seqs.cu_seqlens_k[low + 1] - begin;
    first = blocks.first_row(begin);
  }
  const int64_t block = row - first, token = begin + block * blocks.stride;
  const bool exists = block >= 0 && block < blocks.count(length) && token + blocks.block <= seqs.key_rows;
  return exists ? token : -1;
}

// Blocks of a sequence that exist by the rule of first_token.
__device__ inline int64_t count_blocks(const SequenceBatch& seqs, KeyBlocks blocks, const Sequence& seq) {
  return blocks.count(min64(seq.k_len, seqs.key_rows - seq.k_begin));
}

// b1 + W1 . vec(PE) of hidden unit f, from the partial sums of compress_bias; a fixed order.
template <typename T>
__device__ __forceinline__ float first_layer_bias(const CompressFwdParams& p, int64_t h, int f) {
  float sum = p.b1 != nullptr ? static_cast<float>(static_cast<const T*>(p.b1)[h * p.hidden_size + f]) : 0.f;
  if (p.pe == nullptr) return sum;
  const float* partial = static_cast<const float*>(p.workspace) + h * kCompressBiasParts * p.hidden_size + f;
#pragma unroll
  for (int i = 0; i < kCompressBiasParts; ++i) sum += partial[static_cast<int64_t>(i) * p.hidden_size];
  return sum;
}

}  // namespace nsa::cuda
