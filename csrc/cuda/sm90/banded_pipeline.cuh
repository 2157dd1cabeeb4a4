// Banded attention forward on Hopper: shared memory, the plan of a launch, and the two threads that bring
// work to the consumers.
#pragma once

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/block_sums.cuh"
#include "cuda/sm90/config.h"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "nsa/params.h"

namespace nsa::cuda::sm90 {

constexpr int kWarpgroupRows = 64;

// What the producer tells a consumer warpgroup about its part of an item. It stays in shared memory, since
// the consumers have no registers for it.
struct BandedItem {
  int64_t row;            // of q: the first token
  int tokens;             // that exist, at most 64 / G; none where 0 or less
  int position;           // of the first token
  int head;               // KV head
  int first_row;          // of K and V: the first key of the sequence
  int num_keys;           // of the sequence
  int bottom, num_tiles;  // key tile i covers [bottom + i * kKeys, bottom + (i + 1) * kKeys)
  int safe_lo, safe_hi;   // keys that every row sees
  int seen_lo, seen_hi;   // keys that any query of the sequence sees: values of all others may be garbage
  bool stop;              // there is no further item, nor this one
};

// kChooses: compressed attention that chooses blocks.
template <int kDimQK, int kDimV, int kTileKeys, bool kChooses>
struct BandedLayout : BandedConfig<kDimQK, kDimV, kTileKeys> {
  using Config = BandedConfig<kDimQK, kDimV, kTileKeys>;
  static constexpr int kKeys = kTileKeys;
  static constexpr bool kChoosing = kChooses;
  static constexpr int kThreads = (Config::kConsumers + 1) * 128;
  static constexpr int kItemSlots = 8;
  // The Q of an item is loaded when the item kStagesQ before it is past its last scores (or its choice), so
  // that the one before that is past its epilogue.
  static constexpr int kItemsInUse = Config::kStagesQ + 1;
  static constexpr int kFullK = 0;
  static constexpr int kEmptyK = kFullK + 8 * Config::kStages;
  static constexpr int kFullV = kEmptyK + 8 * Config::kStages;
  static constexpr int kEmptyV = kFullV + 8 * Config::kStages;
  static constexpr int kFullQ = kEmptyV + 8 * Config::kStages;
  static constexpr int kEmptyQ = kFullQ + 8 * Config::kStagesQ * Config::kConsumers;
  static constexpr int kFullItem = kEmptyQ + 8 * Config::kStagesQ * Config::kConsumers;
  static constexpr int kEmptyItem = kFullItem + 8 * kItemSlots;
  static constexpr int kItems = kEmptyItem + 8 * kItemSlots;
  static constexpr int kQ = 2048;
  static constexpr int kBytesQ = swizzled_tile_bytes<kDimQK>(kWarpgroupRows);  // of a warpgroup
  static constexpr int kBytesK = swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kBytesV = swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kPanelBytes = kKeys * kPanelPitch;
  static constexpr int kK = kQ + Config::kStagesQ * Config::kConsumers * kBytesQ;
  static constexpr int kV = kK + Config::kStages * kBytesK;
  static constexpr int kWeights = kV + Config::kStages * kBytesV;
  static constexpr int kCandidates = kWeights + (kChoosing ? kPanelBytes : 0);
  static constexpr int kWarps = kChoosing ? Config::kConsumers * 4 : 0;  // that choose
  static constexpr int kEpochs = kCandidates + kWarps * static_cast<int>(sizeof(Candidates));
  static constexpr int kBytes = kEpochs + kWarps * static_cast<int>(sizeof(SumsEpochs));
  static_assert(kItems + kItemSlots * Config::kConsumers * sizeof(BandedItem) <= kQ);
  static_assert(kKeys % 8 == 0 && kBytes <= 232448);

  // Where the tile of a stage begins, and how far its panels lie apart.
  struct Panels {
    uint32_t begin, pitch;
  };
  // The weights of a choice are the third panel of every V. So that there is one of them for all stages,
  // panels of V lie the farther apart the farther they are from it, and those of K lie between.
  __device__ static Panels k_panels(uint32_t slot) {
    if (!kChoosing) return {kK + slot * kBytesK, kPanelBytes};
    return {kK + digit(0x025, slot) * kPanelBytes, digit(0x112, slot) * kPanelBytes};
  }
  __device__ static Panels v_panels(uint32_t slot) {
    if (!kChoosing) return {kV + slot * kBytesV, kPanelBytes};
    return {kK + digit(0x46a, slot) * kPanelBytes, digit(0x431, slot) * kPanelBytes};
  }

 private:
  static_assert(!kChoosing || (Config::kStages == 3 && kDimQK == 128 && kDimV == 128));
  __device__ static uint32_t digit(uint32_t digits, uint32_t slot) { return digits >> (4 * slot) & 15; }
};

// KeyBlocks in 32 bits: positions of a sequence fit, and 64-bit divisions are slow.
struct VisibleKeys {
  int block, stride, window;

  __device__ int end(int t) const {
    const int beyond = t + 1 - block;
    return beyond < 0 ? 0 : (stride == 1 ? beyond : beyond / stride) + 1;
  }
  __device__ int begin(int t) const { return window <= 0 || t < window ? 0 : end(t - window); }
};

// What the host works out once, so that the kernel finds it in constant memory.
struct BandedPlan {
  CUtensorMap q, k, v;
  VisibleKeys visible;
  int num_tiles;             // of tokens
  int first_item, end_item;  // of the launch, among those of all tiles and KV heads, longest first
  int group;                 // G
  int part;                  // tokens of a warpgroup: 64 / G
  float scale;               // with log2(e) in it
  bool early;                // Begin::kEarly, for the window alone
  int* zeroed;               // or null: set to 0
  SumsPlan sums;
};

// Where the tile with this number lies in the ring, and the parity of its pass over it.
template <int kStages>
struct TileInRing {
  uint32_t slot, parity;
  __device__ __forceinline__ explicit TileInRing(uint32_t tile)
      : slot(tile % kStages), parity(tile / kStages % 2) {}
};

// The parts of all consumers of a tile.
template <typename Layout>
__device__ __forceinline__ void describe_items(const BandedAttentionFwdParams& p, const BandedPlan& plan,
                                               const SequenceTile& tile, int head, BandedItem* item) {
  constexpr int kKeys = Layout::kKeys;
  const VisibleKeys& visible = plan.visible;
  const int first_row = static_cast<int>(tile.seq.k_begin) / visible.stride;
  const int num_keys = max(0, min(visible.end(static_cast<int>(tile.seq.k_len) - 1),
                                  static_cast<int>(p.seqs.key_rows) - first_row));
  const int position = static_cast<int>(tile.seq.position(tile.begin));
  const int lo = min(visible.begin(position), num_keys);
  const int hi = min(visible.end(position + tile.count - 1), num_keys);
  const int num_tiles = max(1, (hi - lo + kKeys - 1) / kKeys);  // who sees nothing goes through a masked tile
  // Compressed blocks are tiled from the first on, so that values behind the last one that anybody sees are
  // met by the last items alone; a window ends at its newest key, so that it takes as few tiles as possible.
  const int bottom = visible.window > 0 ? hi - num_tiles * kKeys : 0;
  const int seen_lo = visible.begin(static_cast<int>(tile.seq.position(0)));
  const int seen_hi = min(visible.end(static_cast<int>(tile.seq.position(tile.seq.q_len - 1))), num_keys);
#pragma unroll 1
  for (int w = 0; w < Layout::kConsumers; ++w) {
    const int skipped = w * plan.part;
    const int tokens = min(plan.part, tile.count - skipped), first = position + skipped;
    item[w] = {tile.seq.q_begin + tile.begin + skipped,
               tokens,
               first,
               head,
               first_row,
               num_keys,
               bottom,
               num_tiles,
               visible.begin(first + max(tokens, 1) - 1),
               min(visible.end(first), num_keys),
               seen_lo,
               seen_hi,
               false};
  }
}

template <typename Layout>
__device__ __forceinline__ BandedItem* item_slot(unsigned char* shared, uint32_t slot) {
  return reinterpret_cast<BandedItem*>(shared + Layout::kItems) + slot * Layout::kConsumers;
}

// One thread: describes the items of this block, some ahead of those who work on them.
template <typename Layout>
__device__ __forceinline__ void schedule(const BandedAttentionFwdParams& p, const BandedPlan& plan,
                                         const uint32_t base, unsigned char* shared) {
  const int block = blockIdx.x, blocks = gridDim.x;
  const int heads = p.shape.num_heads_kv;
  uint32_t count = 0;
  const auto publish = [&](auto describe) {
    const TileInRing<Layout::kItemSlots> ring(count++);
    ptx::barrier_wait(base + Layout::kEmptyItem + 8 * ring.slot, ring.parity ^ 1);
    describe(item_slot<Layout>(shared, ring.slot));
    ptx::barrier_arrive(base + Layout::kFullItem + 8 * ring.slot);
  };
  // Where records of choices lie in the L2 cache, one half begins with the shortest items, so that these
  // never are long in all blocks at once.
  const int rounds = (plan.end_item - plan.first_item + blocks - 1) / blocks;
#pragma unroll 1
  for (int turn = 0; turn < rounds; ++turn) {
    const int round = Layout::kChoosing && (block & 1) ? rounds - 1 - turn : turn;
    // Back and forth over the blocks, so that none gets the longest of every round.
    const int k = plan.first_item + round * blocks + (round & 1 ? blocks - 1 - block : block);
    if (k >= plan.end_item) continue;
    const int number = k / heads;
    const SequenceTile tile =
        find_sequence_tile(p.seqs, plan.num_tiles - 1 - number, plan.part * Layout::kConsumers);
    if (tile.count == 0) continue;
    publish([&](BandedItem* item) { describe_items<Layout>(p, plan, tile, k - number * heads, item); });
  }
  publish([](BandedItem* item) {
#pragma unroll 1
    for (int w = 0; w < Layout::kConsumers; ++w) item[w].stop = true;
  });
}

// One thread: loads Q, K and V of the items.
template <int kDimQK, int kDimV, typename Layout>
__device__ __forceinline__ void load(const BandedPlan& plan, const uint32_t base, unsigned char* shared) {
  constexpr int kKeys = Layout::kKeys, kStages = Layout::kStages, kConsumers = Layout::kConsumers;
  const auto load_keys = [&](typename Layout::Panels target, const CUtensorMap& map, uint32_t barrier,
                             int dim, int head, int row) {
#pragma unroll 1
    for (int panel = 0; panel < dim / kPanel; ++panel) {
      ptx::bulk_load_3d(base + target.begin + panel * target.pitch, &map, barrier, panel * kPanel, head, row);
    }
  };
  // Behind the last item there is nothing to load: the consumers are woken.
  const auto load_queries = [&](uint32_t count, const BandedItem* item) {
    const TileInRing<Layout::kStagesQ> ring(count);
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) {
      const uint32_t which = ring.slot * kConsumers + w, full_q = base + Layout::kFullQ + 8 * which;
      ptx::barrier_wait(base + Layout::kEmptyQ + 8 * which, ring.parity ^ 1);
      if (item[w].stop) {
        ptx::barrier_arrive(full_q);
        continue;
      }
      ptx::barrier_arrive_expect(full_q, plan.part * plan.group * kDimQK * 2);
#pragma unroll 1
      for (int panel = 0; panel < kDimQK / kPanel; ++panel) {
        const uint32_t target =
            base + Layout::kQ + which * Layout::kBytesQ + panel * kWarpgroupRows * kPanelPitch;
        const int x = panel * kPanel, y = item[w].head * plan.group, z = static_cast<int>(item[w].row);
        if constexpr (Layout::kChoosing) {  // leaves the L2 cache to records
          ptx::bulk_load_3d(target, &plan.q, full_q, x, y, z, ptx::kEvictFirst);
        } else {
          ptx::bulk_load_3d(target, &plan.q, full_q, x, y, z);
        }
      }
    }
    if (count >= Layout::kItemsInUse) {
      const TileInRing<Layout::kItemSlots> done(count - Layout::kItemsInUse);
      ptx::barrier_arrive(base + Layout::kEmptyItem + 8 * done.slot);
    }
  };

  uint32_t tiles = 0;  // key tiles so far
#pragma unroll 1
  for (uint32_t count = 0;; ++count) {
    const TileInRing<Layout::kItemSlots> place(count);
    ptx::barrier_wait(base + Layout::kFullItem + 8 * place.slot, place.parity);
    const BandedItem* const item = item_slot<Layout>(shared, place.slot);
    if (item->stop) {
      load_queries(count, item);
      return;
    }
    const int head = item->head, num_tiles = item->num_tiles;
    int row = item->first_row + item->bottom + (num_tiles - 1) * kKeys;  // of K and V
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, row -= kKeys, ++tiles) {
      const TileInRing<kStages> ring(tiles);
      const uint32_t full_k = base + Layout::kFullK + 8 * ring.slot,
                     full_v = base + Layout::kFullV + 8 * ring.slot;
      ptx::barrier_wait(base + Layout::kEmptyK + 8 * ring.slot, ring.parity ^ 1);
      ptx::barrier_arrive_expect(full_k, Layout::kBytesK);
      load_keys(Layout::k_panels(ring.slot), plan.k, full_k, kDimQK, head, row);
      if (i == 0) load_queries(count, item);
      ptx::barrier_wait(base + Layout::kEmptyV + 8 * ring.slot, ring.parity ^ 1);
      ptx::barrier_arrive_expect(full_v, Layout::kBytesV);
      load_keys(Layout::v_panels(ring.slot), plan.v, full_v, kDimV, head, row);
    }
  }
}

}  // namespace nsa::cuda::sm90
