// How decode_attention is split on Hopper, and where everything lies.
#pragma once

#include <cuda_runtime.h>

#include "cuda/tile/divisor.cuh"
#include "nsa/params.h"

namespace nsa::cuda::sm90 {

constexpr int kDecodeRows = 16;      // query rows of a thread block
constexpr int kPortableCluster = 8;  // that every device with clusters has
constexpr int kMaxDecodeCluster = 16;
constexpr int kMaxDecodeWarps = 8;
constexpr int kMaxDecodeStages = 2;
constexpr int kMaxDecodeGroup = 64;
constexpr int kMaxDecodeSelected = 64;
constexpr int kMaxDecodeTaps = 64;     // compressed blocks that touch a selection block
constexpr int kMaxDecodeSpill = 3;     // selection blocks behind a tile that its last keys reach into
constexpr int kDecodeScorePitch = 17;  // of the probabilities of a tile

// Keys and values of a branch, which lie in the same pages and rows. Distances are in units of 16 bytes, so
// that 32 bits are enough for an offset.
struct alignas(16) DecodeStream {
  const char *k, *v;
  const int32_t* pages;  // [B, table_width]; null: page b is sequence b's
  unsigned table_width, num_pages;
  unsigned k_page, k_row, v_page, v_row;
  Divisor page_rows;
  unsigned k_head, v_head;
};

struct DecodePlan {
  // A cluster has one token and KV head. Thread block r of it has slab r % slabs of 16 heads, and part
  // r / slabs of the keys.
  int cluster, slabs;
  int first_units;    // clusters that begin at once
  int warps, stages;  // of a thread block, and of the ring of each warp
  int max_tiles;      // of compressed keys, of a sequence
  int num_blocks;     // selection blocks of a sequence
  int per_block;      // compressed keys that begin in a selection block
  int before;         // and those in front that reach into it
  int tile_shift;     // log2 of the selection blocks that begin in a tile
  int spill;
  DecodeStream streams[kNumBranches];  // compressed, window, chosen: in the order of a warp's tiles
  // What a tile leaves of each head for the block scores: the weighted sums of the probabilities over the
  // selection blocks that it reaches into, and the logit (base 2) that they are relative to. In the usual
  // case sums of the blocks that begin in it alone (carries_spill).
  int entries;
  int sums_pitch;  // floats of a tile: as many more as let threads of adjacent tiles read different banks
  // Offsets in shared memory.
  int ring, sums, scores, slices, shared_bytes;
  float* global_sums;  // [T, Hkv, slabs, max_tiles, sums_pitch]; null: in shared memory

  __host__ __device__ int parts() const { return cluster / slabs; }
  // Rows of the output that a part sums and stores; the last parts may have fewer, or none.
  __host__ __device__ int part_rows() const { return (kDecodeRows + parts() - 1) / parts(); }
  __device__ int rows_of_part(int part) const {
    return max(0, min(part_rows(), kDecodeRows - part * part_rows()));
  }
};

}  // namespace nsa::cuda::sm90
