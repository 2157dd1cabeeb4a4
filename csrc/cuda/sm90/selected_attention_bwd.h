// The two passes of the backward of selected attention on Hopper, over one chunk of rows of q (see
// common/invert_blocks.h), and what the first leaves for the second.
#pragma once

#include <cuda.h>

#include "cuda/common/invert_blocks.h"

namespace nsa::cuda::sm90 {

constexpr int kKeyTile = 64;
constexpr int kSlabRows = 16;  // a token's heads fill whole slabs of rows

// dS as the left operand of dQ = dS K, in the type of q: per (token of the chunk, KV head, slot of its row of
// block_indices, key tile of the block, slab) 16 rows x 64 keys, as fragments of mma.sync.m16n8k16:
// [4 x 16 keys][32 lanes][8 elements].
struct ScoreGrads {
  uint4* data;
  int heads_kv, n, parts, slabs;

  static constexpr int kVectors = kSlabRows * kKeyTile / 8;  // uint4 of a slab

  __host__ __device__ int64_t tokens_to_slabs(int64_t tokens) const {
    return tokens * heads_kv * n * parts * slabs;
  }
  // The first slab.
  __device__ int index(int token, int head, int slot, int part) const {
    return (((token * heads_kv + head) * n + slot) * parts + part) * slabs;
  }
};

// Per row of q, in the order of the heads of a group padded to whole slabs, [T + 1, Hkv, rows of a token]:
// {lse * log2(e) - log2(g), delta / g}. Padding and the token behind the last one have probabilities of zero.
struct RowStats {
  float2* data;
  int heads_kv, token_rows;

  __host__ __device__ int64_t index(int64_t token, int head) const {
    return (token * heads_kv + head) * token_rows;
  }
};

struct SelectedBwdChunk {
  const uint32_t* entries;
  const WorkItem* items;
  const int* num_items;
  int* ticket;
  int64_t first_row, num_rows;
  int64_t num_blocks;  // of the batch
  float* partials;
  RowStats stats;
  ScoreGrads ds;  // data is null if nobody wants dQ
};

// False where a tensor does not suit TMA.
bool selected_attention_bwd_keys(const SelectedAttentionBwdParams& p, const SelectedBwdChunk& chunk,
                                 const Stream& stream, Status* status);
bool selected_attention_bwd_queries(const SelectedAttentionBwdParams& p, const SelectedBwdChunk& chunk,
                                    const Stream& stream, Status* status);

}  // namespace nsa::cuda::sm90
