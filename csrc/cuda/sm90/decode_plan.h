// How decode_attention is split on Hopper, and its workspace.
#pragma once

#include <cuda_runtime.h>

#include "nsa/params.h"

namespace nsa::cuda::sm90 {

constexpr int kDecodeKeys = 16;  // of a tile
constexpr int kMaxDecodeSplits = 64;
constexpr int kMaxDecodeCluster = 8;
constexpr int kMaxUsedCluster = 2;  // with more, the portable kernels run
constexpr int kMaxDecodeGroup = 64;
constexpr int kMaxDecodeSelected = 64;
constexpr int kMaxScoreBlocks = 8192;  // their scores stay in shared memory

struct DecodePlan {
  int splits;           // of the compressed keys
  int row_tiles;        // of 16 rows, per sequence and KV head
  int slabs;            // of 16 heads, per token and KV head
  int cluster;          // thread blocks that share a slab in the second launch
  int stages;           // of a warp's ring in the first launch
  int rest_stages;      // and in the second
  int max_tiles;        // of compressed keys, of a sequence
  int num_blocks;       // selection blocks of a sequence
  int per_block;        // compressed keys that begin in a selection block
  int before;           // and those in front that reach into it
  int blocks_per_tile;  // selection blocks that begin in a tile
  int spill;            // and those behind that its last keys reach into: at most blocks_per_tile
  // What a tile and head leave for the block scores: the weighted sums of the probabilities over
  // blocks_per_tile + spill selection blocks, and last the logit (base 2) that they are relative to.
  int entries;
  float* part_o;       // [T, Hq, splits, Dv], not divided by the sum
  float2* part_state;  // [T, Hq, splits]: (largest logit in base 2, sum of 2^(logit - largest))
  float* sums;         // [T, Hkv, max_tiles, G, entries]
};

}  // namespace nsa::cuda::sm90
