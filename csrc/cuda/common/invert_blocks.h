// Who chose which block: block_indices turned around on the device, exactly and in a fixed order.
//
// The lists are a counting sort. Rows of q are worked on in chunks, so that what a backward keeps per choice
// is bounded; a list within a chunk is the work of one or a few WorkItems.
#pragma once

#include "nsa/launch.h"

namespace nsa::cuda {

// Rows of q whose choices the backward of selected attention works on at a time. The sums of dK and dV make a
// round trip through memory per chunk, and what is kept per choice grows with it.
constexpr int kBackwardChunkTokens = 8192;

// Who takes items at the same time: two on each of 132 multiprocessors.
constexpr int kBackwardWorkers = 264;

// An entry of a list: a token, counted from the first row of its chunk, and the slot of its row of
// block_indices (the first one, if the row repeats the block).
constexpr int kEntrySlotShift = 16;
constexpr uint32_t kEntryTokenMask = (1u << kEntrySlotShift) - 1;

// A run of the queries that chose one block, against key_tile keys of it.
struct WorkItem {
  int16_t head;   // KV head
  int16_t part;   // which tile of the block's keys
  int first;      // of the head's entries
  int count;      // of entries: at most kMaxItemTokens
  int key_row;    // of the first key in the packed tensor
  int num_keys;   // that exist, at most key_tile
  int shift;      // the token in row r of q sees the keys k < r + shift of the tile
  int partial;    // where the sums of a split list go; -1: the only item of its keys
  int followers;  // the first item of a split list: how many others follow it, at partial + 1 and on
};
constexpr int kMinItemTokens = 32, kMaxItemTokens = 704;
constexpr int kItemAlign = 4;  // a list is cut where a tile of keys passes with 16 heads begins
constexpr int kMaxPasses = 2;  // over the items of a chunk

struct InvertPlan {
  int key_tile, parts;         // keys of an item; tiles of a block
  int count_tokens;            // rows that one thread block sorts
  int chunk_tokens;            // rows of a chunk
  int stretch_tokens;          // rows of a stretch: items hold rows of one, and go through a head's one after
                               // another, so that what is at work together finds its rows in the cache
  int stretches;               // of a chunk
  int min_tokens, max_tokens;  // an item's entries at most: at the end of a chunk, and before
  float share;                 // see most_tokens
  int64_t num_blocks;          // of the batch, unused numbers included
  int64_t num_counts, num_chunks;
  int64_t max_items, max_partials, max_splits;  // of a chunk

  InvertPlan(const SelectedAttentionBwdParams& p, int key_tile, int most_chunk_tokens = kBackwardChunkTokens);

  // Entries of an item at most, if as many lists of a stretch as `left`, its own counted, have not been
  // begun: about a worker's share of what they hold. Long items mean few partial sums; short ones at last
  // mean that all workers end at about the same time.
  __host__ __device__ int most_tokens(int64_t left) const {
    const int tokens = static_cast<int>(share * static_cast<float>(left)) / kItemAlign * kItemAlign;
    return tokens < min_tokens ? min_tokens : tokens > max_tokens ? max_tokens : tokens;
  }
};

// All in the workspace.
struct BlockLists {
  uint32_t* entries;    // [Hkv, T * n]: by block, then by token
  int* starts;          // [Hkv, num_counts + 1, num_blocks]: entries of a block before these rows
  int* bases;           // [Hkv, num_blocks]: where a block begins
  WorkItem* items;      // [num_chunks, max_items]
  int* splits;          // [num_chunks, max_splits]: the first items of lists that are split
  int* first_partials;  // [num_chunks, Hkv, stretches, num_blocks * parts]: of a list, those of earlier
                        // stretches passed over, twice, plus 1 if there are none; -1: the list is one item
  int* num_items;       // [num_chunks]
  int* num_splits;      // [num_chunks]
  int* tickets;         // [kMaxPasses, num_chunks]: zeroed, for those who take items

  // Where the lists lie in a workspace; *bytes is advanced past them.
  BlockLists(const SelectedAttentionBwdParams& p, const InvertPlan& plan, int64_t* bytes);
};

Status invert_blocks(const SelectedAttentionBwdParams& p, const InvertPlan& plan, const BlockLists& lists,
                     const Stream& stream);

// Adds the sums of split lists to dk and dv, in the order of the list. partials: [max_partials, key_tile, Dk
// + Dv]. early: they are there when the kernel in front lets this one begin.
Status add_partials(const SelectedAttentionBwdParams& p, const InvertPlan& plan, const BlockLists& lists,
                    int64_t chunk, const float* partials, bool early, const Stream& stream);

// The next part of a workspace, from a multiple of 256 bytes on.
template <typename T>
T* carve(void* workspace, int64_t count, int64_t* bytes) {
  T* pointer = reinterpret_cast<T*>(static_cast<char*>(workspace) + *bytes);
  *bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
  return pointer;
}

}  // namespace nsa::cuda
