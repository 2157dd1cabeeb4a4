// How decode_attention is split on Hopper, and where everything lies.
#pragma once

#include <cuda_runtime.h>

#include "nsa/params.h"

namespace nsa::cuda::sm90 {

constexpr int kMaxDecodeCluster = 16;
constexpr int kMaxDecodeWarps = 8;
constexpr int kMaxDecodeStages = 2;
constexpr int kMaxDecodeGroup = 64;
constexpr int kMaxDecodeSelected = 64;
constexpr int kMaxDecodeTaps = 64;     // compressed blocks that touch a selection block
constexpr int kMaxDecodeSpill = 3;     // selection blocks behind a tile that its last keys reach into
constexpr int kDecodeScorePitch = 17;  // of the probabilities of a tile

struct DecodePlan {
  // A cluster has one token and KV head. Thread block r of it has slab r % slabs of 16 heads (slabs is a
  // power of two), and part r / slabs of the keys.
  int cluster, slabs;
  int real_slabs;     // those that have heads
  int first_units;    // clusters that begin at once
  int warps, stages;  // of a thread block, and of the ring of each warp
  int max_tiles;      // of compressed keys, of a sequence
  int num_blocks;     // selection blocks of a sequence
  int per_block;      // compressed keys that begin in a selection block
  int before;         // and those in front that reach into it
  int tile_shift;     // log2 of the selection blocks that begin in a tile
  int spill;
  // What a tile leaves of each head for the block scores: the weighted sums of the probabilities over the
  // selection blocks that it reaches into, and the logit (base 2) that they are relative to. In the usual
  // case sums of the blocks that begin in it alone (carries_spill).
  int entries;
  int sums_pitch;  // floats of a tile: as many more as let threads of adjacent tiles read different banks
  // Offsets in shared memory.
  int ring, sums, scores, slices, shared_bytes;
  float* global_sums;  // [T, Hkv, slabs, max_tiles, sums_pitch]; null: in shared memory

  __host__ __device__ int parts() const { return cluster / slabs; }
};

}  // namespace nsa::cuda::sm90
