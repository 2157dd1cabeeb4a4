// Selected attention on Hopper: shared memory, and the four warps that bring work to the consumers.
#pragma once

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/selected_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kMaxStages = 8;
constexpr int kMaxWords = 1 << 10;  // of the bitmap of blocks

// Registers of a consumer thread; the producers get what is left.
template <int kGroups>
constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 224;
template <int kGroups>
constexpr int kProducerRegisters = kGroups == 3 ? 32 : 56;

template <int kDimQK, int kDimV, int kKeys, int kGroups>
struct SelectedLayout {
  static constexpr int kRows = 64;  // of a consumer warpgroup
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kQBytes = swizzled_tile_bytes<kDimQK>(kRows);
  static constexpr int kKBytes = swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kVBytes = swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kRing = kGroups * kQBytes;  // K slots, then V slots
};

// Barriers, and the tiles whose lists are ready.
struct SelectedControl {
  uint64_t k_full[kMaxStages], k_empty[kMaxStages];
  uint64_t v_full[kMaxStages], v_empty[kMaxStages];
  uint64_t v_landed[kMaxStages];  // V of a block that is not seen whole: to be zeroed behind what is seen
  uint64_t q_full[4], q_empty[4];
  uint64_t list_full[2], list_empty[2];
  uint32_t k_issued, v_issued;  // parts whose loads are under way or done, counted over all tiles
  ChosenTile tiles[2];
  int last_item;  // of the warp that lists tiles
};

// The number of slots, with what a division by it takes.
struct RingSize {
  int slots;
  uint32_t reciprocal;  // of 16 bits, rounded up: exact below 8,192

  explicit RingSize(int slots) : slots(slots), reciprocal(65536 / slots + 1) {}
};

// Slots are used in turn; the phase of a barrier flips with every round.
struct SlotPosition {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ SlotPosition after(int steps, const RingSize& ring) const {
    const uint32_t at = slot + steps, rounds = at * ring.reciprocal >> 16;
    return {static_cast<int>(at - rounds * ring.slots), phase ^ (rounds & 1)};
  }
};

// At how many of a warpgroup's warps that chose a part all four take it together, by wgmma (which has
// products of 64 keys).
constexpr int kTogether = 3;
template <int kKeys>
__device__ __forceinline__ bool is_together(uint32_t warps_of_group) {
  return kKeys == 64 && __popc(warps_of_group) >= kTogether;
}

template <int kDimQK, int kDimV, int kKeys, int kGroups>
struct SelectedShared : SelectedLayout<kDimQK, kDimV, kKeys, kGroups> {
  using Sizes = SelectedLayout<kDimQK, kDimV, kKeys, kGroups>;
  SelectedControl* control;
  ChosenPart* lists;  // two, and the scratch memory of their builder
  uint32_t tiles;
  int slots, list_size;

  __device__ SelectedShared(unsigned char* memory, int slots, int list_size, int words)
      : control(reinterpret_cast<SelectedControl*>(memory)),
        lists(reinterpret_cast<ChosenPart*>(memory + sizeof(SelectedControl))),
        tiles(ptx::shared_address(memory) + front_bytes(list_size, words)),
        slots(slots),
        list_size(list_size) {}

  __device__ __forceinline__ uint32_t q(int group) const { return tiles + group * Sizes::kQBytes; }
  __device__ __forceinline__ uint32_t k(int slot) const {
    return tiles + Sizes::kRing + slot * Sizes::kKBytes;
  }
  __device__ __forceinline__ uint32_t v(int slot) const {
    return tiles + Sizes::kRing + slots * Sizes::kKBytes + slot * Sizes::kVBytes;
  }
  __device__ __forceinline__ UnionScratch scratch(int words) const {
    uint32_t* bitmap = reinterpret_cast<uint32_t*>(lists + 2 * list_size);
    return {bitmap, reinterpret_cast<int*>(bitmap + words)};
  }
  // What lies in front of the tiles; these begin at multiples of 1,024 bytes.
  __host__ __device__ static int front_bytes(int list_size, int words) {
    return (static_cast<int>(sizeof(SelectedControl) + 2 * list_size * sizeof(ChosenPart)) + 8 * words +
            1023) /
           1024 * 1024;
  }
};

__device__ __forceinline__ uint32_t at(const uint64_t& barrier) { return ptx::shared_address(&barrier); }

// Calls visit(tile, parts, index) for every tile of this thread block; all lanes of a warp together.
template <typename S, typename Visit>
__device__ __forceinline__ void for_each_tile(const S& shared, int lane, const Visit& visit) {
#pragma unroll 1
  for (uint32_t index = 0;; ++index) {
    const int list = index & 1;
    ptx::barrier_wait(at(shared.control->list_full[list]), index >> 1 & 1);
    const ChosenTile& tile = shared.control->tiles[list];
    if (tile.num_parts == kNoMoreTiles) return;
    visit(tile, shared.lists + list * shared.list_size, index);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(at(shared.control->list_empty[list]));
  }
}

// In which order thread blocks take the tiles of all heads. Where the keys and values of all heads stay in
// the L2 cache together, heads take turns, from the end of the sequence, where unions are longest, to its
// begin, and back and forth over the blocks: none gets the longest tile of every round, and the last ones are
// short. Else one head comes after another, so that its keys stay there, in opposite directions: who got the
// longer tiles of one gets the shorter ones of the next, and the last ones of all are short. By a ticket, who
// is done takes the next one: not all SMs are equally fast, nor do all begin at the same time.
struct TileOrder {
  int num_tiles, num_heads;
  bool heads_take_turns;
  int* ticket;  // or null; 0 at first

  __device__ __forceinline__ int num_items() const { return num_tiles * num_heads; }
  // The item of this thread block that follows; by one thread.
  __device__ __forceinline__ int next(int item) const {
    if (ticket != nullptr) return static_cast<int>(gridDim.x) + atomicAdd(ticket, 1);
    if (!heads_take_turns) return item + gridDim.x;
    return item + 1 + 2 * (item / gridDim.x & 1 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  }
  __device__ __forceinline__ int head(int item) const {
    return heads_take_turns ? item % num_heads : item / num_tiles;
  }
  __device__ __forceinline__ int tile(int item) const {
    if (heads_take_turns) return num_tiles - 1 - item / num_heads;
    return num_heads - head(item) & 1 ? num_tiles - 1 - item % num_tiles : item % num_tiles;
  }
};

// One warp: the unions of all tiles, one ahead of their use.
template <int kGroups, typename S>
__device__ __forceinline__ void list_tiles(const SelectedAttentionFwdParams& p, const S& shared,
                                           const RowPlan& rows, const UnionPlan& plan, const TileOrder& order,
                                           int lane) {
  uint32_t index = 0;
  // This warp has few registers: what it keeps over a union goes through shared memory.
  int& last_item = shared.control->last_item;
  if (lane == 0) last_item = -1;
#pragma unroll 1
  while (true) {
    ptx::barrier_wait(at(shared.control->list_empty[index & 1]), ~index >> 1 & 1);
    __syncwarp();
    if (lane == 0) last_item = last_item < 0 ? blockIdx.x : order.next(last_item);
    __syncwarp();
    const int item = last_item;
    const bool end = item >= order.num_items();
    SequenceTile tile{};
    if (!end) tile = find_sequence_tile(p.seqs, order.tile(item), rows.tokens);
    if (!end && tile.count == 0) continue;
    ChosenTile& chosen = shared.control->tiles[index & 1];
    if (lane == 0) {
      chosen = {end ? kNoMoreTiles : 0,
                tile.count,
                order.head(item),
                static_cast<int>(tile.seq.q_begin + tile.begin),
                static_cast<int>(tile.seq.position(tile.begin)),
                static_cast<int>(tile.seq.k_begin),
                static_cast<int>(min64(count_keys(p.seqs, tile.seq, KeyBlocks{}), plan.max_keys))};
    }
    __syncwarp();
    if (!end) {
      const int count = build_union(p, chosen, plan, rows, kGroups * 4, shared.scratch(plan.words),
                                    shared.lists + (index & 1) * shared.list_size, lane);
      // All wait for the first list, so its blocks stay ascending where they need not be divided.
      if (index > 0 || plan.parts > 1)
        balance_parts(shared.lists + (index & 1) * shared.list_size, count, plan.parts, lane);
      if (lane == 0) chosen.num_parts = count * plan.parts;
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(at(shared.control->list_full[index & 1]));
    if (end) return;
    ++index;
  }
}

// One warp: K and V of every part of every tile. Warps that do not take a part never look at it: this one
// arrives for them.
template <int kKeys, int kGroups, typename S>
__device__ __forceinline__ void load_keys(const S& shared, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                          int lane) {
  SelectedControl& c = *shared.control;
  SlotPosition ring;
  uint32_t issued = 0;
  for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart* parts, uint32_t) {
    if (lane != 0) return;
    const int head = tile.head, key_row = tile.key_row;
#pragma unroll 1
    for (int i = 0; i < tile.num_parts; ++i) {
      const ChosenPart chosen = parts[i];
      const int begin = chosen.part() * kKeys, s = ring.slot;
      int absent = 0;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t warps = chosen.warps() >> (group * 4) & 15;
        absent += is_together<kKeys>(warps) ? 0 : 4 - __popc(warps);
      }
      ++issued;
      ptx::barrier_wait(at(c.k_empty[s]), ring.phase ^ 1);
      if (absent > 0) ptx::barrier_arrive(at(c.k_empty[s]), absent);
      ptx::barrier_arrive_expect(at(c.k_full[s]), S::kKBytes);
      ptx::bulk_load_4d(shared.k(s), k_map, at(c.k_full[s]), 0, head, key_row + begin, 0);
      *static_cast<volatile uint32_t*>(&c.k_issued) = issued;
      const uint32_t v_full = at(begin + kKeys > tile.end(chosen.tokens) ? c.v_landed[s] : c.v_full[s]);
      ptx::barrier_wait(at(c.v_empty[s]), ring.phase ^ 1);
      if (absent > 0) ptx::barrier_arrive(at(c.v_empty[s]), absent);
      ptx::barrier_arrive_expect(v_full, S::kVBytes);
      ptx::bulk_load_4d(shared.v(s), v_map, v_full, 0, head, key_row + begin, 0);
      *static_cast<volatile uint32_t*>(&c.v_issued) = issued;
      ring.advance(shared.slots);
    }
  });
}

// One warp: zeroes the values that no token of the tile sees: there may be anything, and 0 * NaN is NaN.
template <int kKeys, int kDimV, typename S>
__device__ __forceinline__ void clear_unseen_values(const S& shared, int lane) {
  SlotPosition ring;
  uint32_t phases = 0;  // of v_landed
  for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart* parts, uint32_t) {
#pragma unroll 1
    for (int i = 0; i < tile.num_parts; ++i) {
      const ChosenPart chosen = parts[i];
      const int seen = tile.end(chosen.tokens) - chosen.part() * kKeys, s = ring.slot;
      if (seen < kKeys) {
        ptx::barrier_wait(at(shared.control->v_landed[s]), phases >> s & 1);
        phases ^= 1u << s;
        for (int row = max(seen, 0) + lane / 8; row < kKeys; row += 4) {
#pragma unroll
          for (int panel = 0; panel < kDimV / kPanel; ++panel)
            ptx::store_shared_16(shared.v(s) + (panel * kKeys + row) * kPanelPitch + lane % 8 * 16, 0, 0, 0,
                                 0);
        }
        ptx::async_proxy_fence();
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(at(shared.control->v_full[s]));
      }
      ring.advance(shared.slots);
    }
  });
}

// One warp: the queries of every tile; then near_end(tile), by all lanes, when the keys of all parts but the
// last few are under way.
template <int kDimQK, int kGroups, typename S, typename NearEnd>
__device__ __forceinline__ void load_queries(const S& shared, const CUtensorMap* q_map, int shift, int lane,
                                             const NearEnd& near_end) {
  constexpr uint32_t kLastParts = 4;
  uint32_t parts = 0;  // of the tiles so far
  for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart*, uint32_t index) {
    if (lane == 0) {
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t full = at(shared.control->q_full[group]);
        ptx::barrier_wait(at(shared.control->q_empty[group]), ~index & 1);
        ptx::barrier_arrive_expect(full, S::kQBytes);
#pragma unroll
        for (int panel = 0; panel < kDimQK / kPanel; ++panel)
          ptx::bulk_load_4d(shared.q(group) + panel * S::kRows * kPanelPitch, q_map, full, panel * kPanel, 0,
                            tile.head, tile.query_row + group * (S::kRows >> shift));
      }
    }
    parts += tile.num_parts;
    const volatile uint32_t& issued = shared.control->k_issued;
    while (static_cast<int32_t>(issued - (parts - kLastParts)) < 0) __nanosleep(200);
    near_end(tile);
  });
}

}  // namespace nsa::cuda::sm90
