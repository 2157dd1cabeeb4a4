// Tiles of adjacent tokens that walk the union of their chosen blocks: what the Hopper kernels of selected
// attention share.
#pragma once

#include "cuda/tile/sequence_tile.cuh"

namespace nsa::cuda::sm90 {

// How the heads of a group lie in rows: padded to a power of two, so that 64 rows hold whole tokens.
struct RowPlan {
  int shift;   // a token has 1 << shift rows, at most 64
  int tokens;  // of a tile; at most 32, the bits of a mask

  __host__ __device__ RowPlan(int group, int rows) {
    shift = 0;
    while (1 << shift < group) ++shift;
    tokens = rows >> shift < 32 ? rows >> shift : 32;
  }
  // The tokens, as bits, of the 16 rows of a warp.
  __device__ __forceinline__ uint32_t tokens_of_warp(int warp) const {
    const int first = warp * 16 >> shift;
    if (first >= tokens) return 0;
    return (shift >= 4 ? 1u : (1u << (16 >> shift)) - 1) << first;
  }
};

// A part of the union: kKeys keys (a chosen block, or one of its parts), who chose it among the tile's
// tokens, and which warps have rows of these.
struct ChosenPart {
  static constexpr int kPartBits = 20;
  uint32_t part_and_warps;
  uint32_t tokens;

  __device__ __forceinline__ int part() const { return part_and_warps & ((1 << kPartBits) - 1); }
  __device__ __forceinline__ uint32_t warps() const { return part_and_warps >> kPartBits; }
};

// A tile as its kernel's warps see it, in shared memory.
struct ChosenTile {
  int num_parts;  // of the union; kNoMoreTiles behind the last tile
  int num_tokens;
  int head;       // of the keys
  int query_row;  // of the first token
  int position;   // of the first token
  int key_row;    // of the sequence's first key
  int num_keys;   // of the sequence, as far as the bitmap of blocks reaches

  // Keys of a part from here on are seen by no token, or do not exist.
  __device__ __forceinline__ int end(uint32_t tokens) const {
    return min(position + 32 - __clz(tokens), num_keys);
  }
};
constexpr int kNoMoreTiles = -1;

// What unions are built by: as kernel arguments these cost the warp that builds them no registers.
struct UnionPlan {
  int slot_bits;    // the chosen blocks of a token, rounded up to 1 << slot_bits
  int block_shift;  // keys of a block, as a shift
  int parts;        // of a block
  int words;        // of the bitmap of blocks
  int max_keys;     // that it covers
};

// Memory of the warp that builds unions.
struct UnionScratch {
  uint32_t* bitmap;  // [words]: the blocks that somebody chose
  int* rank;         // [words]: blocks in front of this word
};

// Calls visit(token, block) for every legal choice of the tile's tokens; numbers outside 0 .. own are
// ignored.
template <typename Visit>
__device__ __forceinline__ void for_each_choice(const SelectedAttentionFwdParams& p, const ChosenTile& tile,
                                                const UnionPlan& plan, int lane, const Visit& visit) {
  const int n = p.num_selected_blocks, heads = p.shape.num_heads_kv;
  const int32_t* indices = p.block_indices + (static_cast<int64_t>(tile.query_row) * heads + tile.head) * n;
#pragma unroll 1
  for (int i = lane; i < tile.num_tokens << plan.slot_bits; i += 32) {
    const int token = i >> plan.slot_bits, slot = i & ((1 << plan.slot_bits) - 1);
    if (slot >= n) continue;
    const int block = __ldg(indices + token * heads * n + slot);
    const int position = min(tile.position + token, tile.num_keys - 1);
    if (block >= 0 && block <= position >> plan.block_shift) visit(token, block);
  }
}

// By one warp: the sorted union of the blocks that the tile's tokens chose, one entry each, at the end of the
// memory that their parts take. Returns their number. A bitmap makes every row a set.
__device__ inline int build_union(const SelectedAttentionFwdParams& p, const ChosenTile& tile,
                                  const UnionPlan& plan, const RowPlan& rows, int num_warps,
                                  const UnionScratch& scratch, ChosenPart* parts, int lane) {
  const int words = (((tile.num_keys - 1) >> plan.block_shift) + 32) >> 5;
#pragma unroll 1
  for (int i = lane; i < words; i += 32) scratch.bitmap[i] = 0;
  __syncwarp();
  for_each_choice(p, tile, plan, lane,
                  [&](int, int block) { atomicOr(&scratch.bitmap[block >> 5], 1u << (block & 31)); });
  __syncwarp();
  int count = 0;
#pragma unroll 1
  for (int begin = 0; begin < words; begin += 32) {
    const int own = begin + lane < words ? __popc(scratch.bitmap[begin + lane]) : 0;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (begin + lane < words) scratch.rank[begin + lane] = count + sum - own;
    count += __shfl_sync(~0u, sum, 31);
  }
  ChosenPart* blocks = parts + count * (plan.parts - 1);
#pragma unroll 1
  for (int i = lane; i < count; i += 32) blocks[i].tokens = 0;
  __syncwarp();
  for_each_choice(p, tile, plan, lane, [&](int token, int block) {
    const int at = scratch.rank[block >> 5] + __popc(scratch.bitmap[block >> 5] & ((1u << (block & 31)) - 1));
    blocks[at].part_and_warps = block;
    atomicOr(&blocks[at].tokens, 1u << token);
  });
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < count; i += 32) {
    const uint32_t tokens = blocks[i].tokens;
    uint32_t warps = 0;
#pragma unroll 1
    for (int w = 0; w < num_warps; ++w) warps |= (tokens & rows.tokens_of_warp(w)) != 0 ? 1u << w : 0;
    blocks[i].part_and_warps |= warps << ChosenPart::kPartBits;
  }
  __syncwarp();
  return count;
}

// By one warp: the blocks of a union in an order that spreads the work over the warps that chose them, then
// the parts of a few blocks in turn. `parts` has room for all; the blocks are at its end.
//
// With ascending blocks few warps have work at a time: a ring frees its slots in turn, and its next few parts
// may all belong to the same warps. So the next block is one that only warps with the fewest blocks so far
// must take, and of these the one of most warps. Every lane holds a candidate: a window of 32 blocks.
__device__ inline void balance_parts(ChosenPart* parts, int count, int parts_of_block, int lane) {
  constexpr int kTurns = 8;  // blocks whose parts come in turn
  const ChosenPart* blocks = parts + count * (parts_of_block - 1);
  const auto read = [&](int i) { return i < count ? blocks[i] : ChosenPart{}; };
  ChosenPart candidate = read(lane), next = read(32);
  int ahead = -1;     // blocks of this lane's warp, less the most that a warp may have at present
  uint32_t full = 0;  // warps that have so many
#pragma unroll 1
  for (int i = 0; i < count;) {
    const uint32_t warps = candidate.warps();
    const bool fits = candidate.tokens != 0 && (warps & full) == 0;
    const uint32_t rank = fits ? (__popc(warps) + 1 << ChosenPart::kPartBits) - 1 - candidate.part() : 0;
    const uint32_t best = __reduce_max_sync(~0u, rank);
    if (best == 0) {
      --ahead;
      full = 0;
      continue;
    }
    const bool mine = rank == best;
    ahead += __shfl_sync(~0u, warps, __ffs(__ballot_sync(~0u, mine)) - 1) >> lane & 1;
    full = __ballot_sync(~0u, ahead == 0);
    if (mine) {
      // What is written lies in front of what is still to be read.
      const int first = i & -kTurns, turns = min(kTurns, count - first);
      ChosenPart* part = parts + first * parts_of_block + (i - first);
      const int number = candidate.part() * parts_of_block;
#pragma unroll 1
      for (int k = 0; k < parts_of_block; ++k)
        part[k * turns] = {warps << ChosenPart::kPartBits | number + k, candidate.tokens};
      candidate = next;
    }
    ++i;
    next = read(i + 32);
  }
  __syncwarp();
}

}  // namespace nsa::cuda::sm90
