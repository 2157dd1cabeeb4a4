// Compressed attention and the sliding window, backward, dQ by TMA and wgmma.
// docs/kernels/banded_attention_backward.md tells the dataflow.
//
// Persistent blocks walk the work items, a tile of adjacent tokens of one KV head each, longest first. Two
// consumer warpgroups own 64 query rows each, the heads of the group packed as rows: row r is token r / G,
// head r % G. Scores S = Q K^T and dP = dO V^T are multiplied again; dS is the A fragment in registers of
// dQ += dS K. Of the producer warps one describes the items, one brings Q and dO with what else belongs to
// their rows, one the key tiles, each as far ahead as its own ring allows. An item walks the keys of one
// branch after the other, so that branches that share q and dO share one load of them and one sum.
#include "cuda/sm90/banded_attention_bwd.h"
#include "cuda/sm90/launch.h"
#include "cuda/tile/gradient_store.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kMaxBranches = 2;

struct QueriesParams {
  SequenceBatch seqs;  // key_rows: of the branches
  AttentionShape shape;
  QueryGrads dq;
  struct Branch {
    KeyBlocks keys;
    int64_t window, key_rows;
    const float *factor, *delta, *lse;  // factor: d_o_scale
  } branch[kMaxBranches];
  int count;
  // What kernels would work out from the shape: there are no registers to keep it in.
  float scale, scale_log2;
  GroupRows rows;
  int part, num_items, heads;  // part: tokens of a consumer
  bool early;
  int* ticket;  // or null: every block has its items
};
struct BranchMaps {
  KeyMaps branch[kMaxBranches];
};

// A work item, tokens of both warpgroups, and the keys [lo, hi) of each branch that some of them see.
// num_keys: of the sequence. It stays in shared memory: the producers have no registers for it.
struct Item {
  int64_t row;  // of q: the first token
  int tokens, position, head;
  int last;  // of the branches with keys; -1 for none
  struct Keys {
    int lo, hi, first_row, num_keys;
  } keys[kMaxBranches];
};

// An item's walk over the keys of one branch, as a producer tells the consumers. It stays in shared memory,
// since the consumers have no registers for it.
struct Walk {
  int64_t row;
  int tokens;  // none: there is no further walk
  int position, head;
  int lo, hi;
  Visibility visible;
  bool last;  // of the item
};

// What the query rows of a walk bring beside q and dO. With g the factor of a row's dO, P g = exp2(scale s -
// lse): lse in base 2 less the logarithm of g, delta divided by g. Rows of no query have P = 0.
struct RowStats {
  float2 lse_delta[kConsumers * kWarpgroupRows];
};

template <int kDimQK, int kDimV>
struct QueriesLayout : BandedBwdConfig<kDimQK, kDimV> {
  using Config = BandedBwdConfig<kDimQK, kDimV>;
  static constexpr int kKeys = Config::kWalkedKeys, kStages = Config::kKeyStages;
  // The last tile of a walk is multiplied as one of so many keys where it has no more: 8 tokens see 519 keys
  // of a window of 512.
  static constexpr int kFewKeys = Config::kRowsInRegisters ? 16 : kKeys;
  static constexpr int kFullK = 0;
  static constexpr int kEmptyK = kFullK + 8 * kStages;
  static constexpr int kFullV = kEmptyK + 8 * kStages;
  static constexpr int kEmptyV = kFullV + 8 * kStages;
  // Q and dO, of each consumer on its own: one may be ahead of the other.
  static constexpr int kFullRows = kEmptyV + 8 * kStages;
  static constexpr int kEmptyRows = kFullRows + 8 * kConsumers;
  // A walk is told when both have begun the last but one: that before it is over, whose slot is not used
  // before the next walk.
  static constexpr int kStatSlots = 2, kWalkSlots = 4;
  static constexpr int kFullWalk = kEmptyRows + 8 * kConsumers;
  static constexpr int kEmptyWalk = kFullWalk + 8 * kStatSlots;
  static constexpr int kLanded = kEmptyWalk + 8 * kStatSlots;  // of a tile a producer still works on
  static constexpr int kItemSlots = 2;
  static constexpr int kFullItem = kLanded + 8;
  static constexpr int kEmptyItem = kFullItem + 8 * kItemSlots;
  static constexpr int kSchedule = kEmptyItem + 8 * kItemSlots;
  static constexpr int kItems = kSchedule + 8;
  static constexpr int kWalks = kItems + kItemSlots * static_cast<int>(sizeof(Item));
  static constexpr int kBytesQ = swizzled_tile_bytes<kDimQK>(kWarpgroupRows);
  static constexpr int kBytesO = swizzled_tile_bytes<kDimV>(kWarpgroupRows);
  static constexpr int kBytesK = swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kBytesV = swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kStats = 1024;
  static constexpr int kQ = kStats + kStatSlots * static_cast<int>(sizeof(RowStats));
  static constexpr int kO = kQ + kConsumers * kBytesQ;
  static constexpr int kK = kO + kConsumers * kBytesO;
  static constexpr int kV = kK + kStages * kBytesK;
  static constexpr int kBytes = kV + kStages * kBytesV;
  static_assert(kWalks % 8 == 0 && kWalks + kWalkSlots * static_cast<int>(sizeof(Walk)) <= kStats &&
                kQ % 1024 == 0 && kBytes <= 232448);
};

// The items of one block. It stays in shared memory, as the warp that describes has few registers.
struct Schedule {
  int round, items;  // so far: looked at, passed on

  // By one thread. False: there is no further item. Those of no token are skipped.
  static __device__ __forceinline__ bool next(const QueriesParams& p, volatile Schedule* schedule,
                                              Item* item) {
    const int blocks = gridDim.x, block = blockIdx.x;
    while (true) {
      int k;
      if (p.ticket != nullptr) {
        k = atomicAdd(p.ticket, 1);
        if (k >= p.num_items) return false;
      } else {
        const int round = schedule->round;
        if (round * blocks >= p.num_items) return false;
        schedule->round = round + 1;
        // Back and forth over the blocks, so that none gets the longest of every round.
        k = round * blocks + (round & 1 ? blocks - 1 - block : block);
        if (k >= p.num_items) continue;
      }
      const SequenceTile tile =
          find_sequence_tile(p.seqs, (p.num_items - 1 - k) / p.heads, p.part * kConsumers);
      if (tile.count == 0) continue;
      describe(p, tile, k % p.heads, item);
      return true;
    }
  }
  static __device__ __forceinline__ void describe(const QueriesParams& p, const SequenceTile& tile, int head,
                                                  Item* item) {
    const int64_t position = tile.seq.position(tile.begin);
    item->row = tile.seq.q_begin + tile.begin;
    item->tokens = tile.count;
    item->position = static_cast<int>(max64(position, kNoPosition));
    item->head = head;
    item->last = -1;
#pragma unroll 1
    for (int b = 0; b < p.count; ++b) {
      const QueriesParams::Branch& branch = p.branch[b];
      const int64_t first_row = branch.keys.first_row(tile.seq.k_begin);
      const int64_t num_keys =
          max64(0, min64(branch.keys.count(tile.seq.k_len), branch.key_rows - first_row));
      const int64_t lo = min64(branch.keys.begin_visible(position, branch.window), num_keys),
                    hi = min64(branch.keys.end_visible(position + tile.count - 1), num_keys);
      item->keys[b] = {static_cast<int>(lo), static_cast<int>(hi), static_cast<int>(first_row),
                       static_cast<int>(num_keys)};
      if (lo < hi) item->last = b;
    }
  }
};

// Items on their way from the warp that describes them to those that bring their rows and keys.
struct ItemRing {
  uint32_t full, empty;
  Item* items;
  int count = 0;

  __device__ __forceinline__ int slot() const { return count % 2; }
  __device__ __forceinline__ uint32_t parity() const { return count / 2 & 1; }
  __device__ __forceinline__ const volatile Item& wait() const {
    ptx::barrier_wait(full + 8 * slot(), parity());
    return items[slot()];
  }
  __device__ __forceinline__ void pass_on() {
    __syncwarp();  // all lanes have read
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(empty + 8 * slot());
    ++count;
  }
};

// One warp describes the items, and finishes those that see no key.
template <typename T, int kDimQK>
__device__ __forceinline__ void produce_items(const QueriesParams& p, ItemRing ring,
                                              volatile Schedule* schedule) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  while (true) {
    ring.count = schedule->items;
    ptx::barrier_wait(ring.empty + 8 * ring.slot(), ring.parity() ^ 1);
    if (lane == 0) {
      Item* const slot = ring.items + ring.slot();
      if (!Schedule::next(p, schedule, slot)) slot->tokens = 0;
    }
    __syncwarp();
    ring.count = schedule->items;
    const volatile Item& item = ring.items[ring.slot()];
    if (item.tokens > 0 && item.last < 0) {
#pragma unroll 1
      for (int i = 0; i < item.tokens; ++i) {
        const int64_t row = (item.row + i) * p.shape.num_heads_q + item.head * p.rows.group;
        put_no_query_grads<T>(p.dq, row * kDimQK, p.rows.group * kDimQK, lane);
      }
      __syncwarp();
      continue;
    }
    const bool over = item.tokens == 0;
    __syncwarp();  // all lanes have read
    if (lane == 0) {
      schedule->items = ring.count + 1;
      ptx::barrier_arrive(ring.full + 8 * ring.slot());
    }
    __syncwarp();
    if (over) break;
  }
}

// One warp brings Q and dO of an item and tells its walks.
template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void produce_rows(const QueriesParams& p, const QueryMaps& maps, ItemRing items,
                                             const uint32_t base, unsigned char* shared) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  const int lane = threadIdx.x & 31;
  Walk* const walks = reinterpret_cast<Walk*>(shared + Layout::kWalks);
  RowStats* const row_stats = reinterpret_cast<RowStats*>(shared + Layout::kStats);
  uint32_t rows_parity = 0;
  int count = 0;  // walks so far
  const auto wait_for_slot = [&] {
    ptx::barrier_wait(base + Layout::kEmptyWalk + 8 * (count % Layout::kStatSlots),
                      count / Layout::kStatSlots & 1 ^ 1);
  };
  const auto pass_on = [&] {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(base + Layout::kFullWalk + 8 * (count % Layout::kStatSlots));
    ++count;
  };
  const auto load_rows = [&](const volatile Item& item) {
    const int row = static_cast<int>(item.row), head = item.head * p.rows.group;
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) {
      const uint32_t full = base + Layout::kFullRows + 8 * w;
      ptx::barrier_wait(base + Layout::kEmptyRows + 8 * w, rows_parity ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(full, p.part * p.rows.group * (kDimQK + kDimV) * 2);
        load_panels<kDimQK>(base + Layout::kQ + w * Layout::kBytesQ, kWarpgroupRows, maps.q, full, head,
                            row + w * p.part);
        load_panels<kDimV>(base + Layout::kO + w * Layout::kBytesO, kWarpgroupRows, maps.d_o, full, head,
                           row + w * p.part);
      }
    }
    rows_parity ^= 1;
  };
  const auto tell_walk = [&](const volatile Item& item, int b) {
    const QueriesParams::Branch& branch = p.branch[b];
    RowStats& stats = row_stats[count % Layout::kStatSlots];
    wait_for_slot();
    if (lane == 0) {
      walks[count % Layout::kWalkSlots] = {item.row,
                                           item.tokens,
                                           item.position,
                                           item.head,
                                           item.keys[b].lo,
                                           item.keys[b].hi,
                                           Visibility(branch.keys, p.branch[b].window),
                                           b == item.last};
    }
#pragma unroll 2
    for (int i = lane; i < kConsumers * kWarpgroupRows; i += 32) {
      const int row = i % kWarpgroupRows, token = p.rows.token(row);
      const int in_item = i / kWarpgroupRows * p.part + token;
      const bool valid = token < p.part && in_item < item.tokens;
      const int64_t at =
          item.row * p.shape.num_heads_q +
          (item.head * p.rows.group + in_item * p.shape.num_heads_q + row - token * p.rows.group);
      const float factor = valid && branch.factor != nullptr ? branch.factor[at] : 1.f;
      const float lse = valid ? branch.lse[at] : -kNegInf;
      const float delta = valid ? branch.delta[at] : 0.f;
      stats.lse_delta[i] =
          make_float2(lse * kLog2e - __log2f(factor), factor > 0.f ? __fdividef(delta, factor) : 0.f);
    }
    pass_on();
  };
#pragma unroll 1
  while (true) {
    const volatile Item& item = items.wait();
    if (item.tokens == 0) break;
    load_rows(item);
#pragma unroll 1
    for (int b = 0; b <= item.last; ++b) {
      if (item.keys[b].lo < item.keys[b].hi) tell_walk(item, b);
    }
    items.pass_on();
  }
  wait_for_slot();
  if (lane == 0) walks[count % Layout::kWalkSlots].tokens = 0;
  pass_on();
}

// Another warp brings the keys.
template <int kDimQK, int kDimV>
__device__ __forceinline__ void produce_keys(const BranchMaps& maps, ItemRing items, const uint32_t base) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys;
  const int lane = threadIdx.x & 31;
  RingPosition<Layout::kStages> ring;
  uint32_t landed_parity = 0;
  const auto walk_keys = [&](const volatile Item& item, int b) {
    const KeyMaps& key_maps = maps.branch[b];
    const volatile Item::Keys& keys = item.keys[b];
#pragma unroll 1
    for (int begin = keys.lo; begin < keys.hi; begin += kKeys) {
      const uint32_t k = base + Layout::kK + ring.slot * Layout::kBytesK,
                     v = base + Layout::kV + ring.slot * Layout::kBytesV;
      const uint32_t full_k = base + Layout::kFullK + 8 * ring.slot,
                     full_v = base + Layout::kFullV + 8 * ring.slot;
      // Keys that nobody sees are multiplied by dS = 0, so they must be numbers.
      const bool partial = begin + kKeys > keys.num_keys;
      const uint32_t landed = partial ? base + Layout::kLanded : full_k;
      ptx::barrier_wait(base + Layout::kEmptyK + 8 * ring.slot, ring.parity ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(landed, Layout::kBytesK);
        load_panels<kDimQK>(k, kKeys, key_maps.k, landed, item.head, keys.first_row + begin);
      }
      ptx::barrier_wait(base + Layout::kEmptyV + 8 * ring.slot, ring.parity ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(full_v, Layout::kBytesV);
        load_panels<kDimV>(v, kKeys, key_maps.v, full_v, item.head, keys.first_row + begin);
      }
      if (partial) {
        ptx::barrier_wait(landed, landed_parity);
        landed_parity ^= 1;
        clear_rows<kDimQK>(k, kKeys, max(keys.num_keys - begin, 0), kKeys, lane);
        ptx::async_proxy_fence();
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(full_k);
      }
      ring.advance();
    }
  };
#pragma unroll 1
  while (true) {
    const volatile Item& item = items.wait();
    if (item.tokens == 0) break;
#pragma unroll 1
    for (int b = 0; b <= item.last; ++b) walk_keys(item, b);
    items.pass_on();
  }
}

// What a thread's two rows bring beside q and dO.
struct RowPair {
  float lse[2], delta[2];
};

// The number of a row in [T, Hq], or -1 for one of no query. first_token: of this warpgroup, within the item.
__device__ __forceinline__ int64_t row_number(const QueriesParams& p, const volatile Walk& walk,
                                              int first_token, int row) {
  const int token = p.rows.token(row);
  if (token >= p.part || first_token + token >= walk.tokens) return -1;
  return (walk.row + first_token + token) * p.shape.num_heads_q + walk.head * p.rows.group + row -
         token * p.rows.group;
}

__device__ __forceinline__ RowPair read_rows(const RowStats& stats, int consumer, int row0) {
  RowPair pair;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 row = stats.lse_delta[consumer * kWarpgroupRows + row0 + 8 * h];
    pair.lse[h] = row.x;
    pair.delta[h] = row.y;
  }
  return pair;
}

// Who sees a key tile: of a warpgroup's queries, all of them and all of its keys, or this row.
struct WalkMask {
  const QueriesParams& p;
  const volatile Walk& walk;
  int consumer;

  __device__ __forceinline__ Visibility visible() const {
    Visibility copy({1, 1}, 0);
    copy.block = walk.visible.block;
    copy.stride = walk.visible.stride;
    copy.span = walk.visible.span;
    return copy;
  }
  __device__ __forceinline__ bool whole(int begin, int end) const {
    const Visibility seen = visible();
    const int oldest = walk.position + consumer * p.part;
    const int tokens = walk.tokens, hi = walk.hi;
    // No short circuits: products are under way.
    return static_cast<bool>(static_cast<int>((consumer + 1) * p.part <= tokens) &
                             static_cast<int>(end <= hi) &
                             static_cast<int>(seen(oldest, seen.end_of(end - 1))) &
                             static_cast<int>(seen(oldest + p.part - 1, seen.end_of(begin))));
  }
  __device__ __forceinline__ int position(int row) const {
    const int token = p.rows.token(row), in_item = consumer * p.part + token;
    return token < p.part && in_item < walk.tokens ? walk.position + in_item : kNoPosition;
  }
};

// Arrives behind load_fragments, for the warp. An arrival does not wait for the ldmatrix in front of it, and
// TMA, which then brings the next item's rows, is another proxy: so the address depends on what came of every
// load. Lane 0, which arrives, adds nothing to it.
template <int kQ, int kO>
__device__ __forceinline__ void release_rows(uint32_t barrier, const uint32_t (&q)[kQ][4],
                                             const uint32_t (&d_o)[kO][4], int lane) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kQ; ++i) bits ^= q[i][3];
#pragma unroll
  for (int i = 0; i < kO; ++i) bits ^= d_o[i][3];
  __syncwarp();  // all lanes have read
  ptx::barrier_arrive_if(barrier + (bits & lane), lane == 0);
}

template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void consume(const QueriesParams& p, const uint32_t base,
                                        const unsigned char* shared, const int consumer) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys;
  const int lane = threadIdx.x & 31, row0 = (threadIdx.x & 127) / 32 * 16 + lane / 4;
  const uint32_t q = base + Layout::kQ + consumer * Layout::kBytesQ,
                 d_o = base + Layout::kO + consumer * Layout::kBytesO;
  const volatile Walk* const walks = reinterpret_cast<const volatile Walk*>(shared + Layout::kWalks);
  RingPosition<Layout::kStages> ring;
  int count = 0;  // walks so far
  uint32_t rows_parity = 0;
  const auto wait_for_walk = [&]() -> const volatile Walk& {
    ptx::barrier_wait(base + Layout::kFullWalk + 8 * (count % Layout::kStatSlots),
                      count / Layout::kStatSlots & 1);
    return walks[count % Layout::kWalkSlots];
  };
#pragma unroll 1
  while (wait_for_walk().tokens > 0) {
    ptx::barrier_wait(base + Layout::kFullRows + 8 * consumer, rows_parity);
    rows_parity ^= 1;
    [[maybe_unused]] uint32_t q_fragments[kDimQK / 16][4], d_o_fragments[kDimV / 16][4];
    if constexpr (Layout::kRowsInRegisters) {
      load_fragments<kDimQK>(q_fragments, q, threadIdx.x / 32 % 4, lane);
      load_fragments<kDimV>(d_o_fragments, d_o, threadIdx.x / 32 % 4, lane);
      release_rows(base + Layout::kEmptyRows + 8 * consumer, q_fragments, d_o_fragments, lane);
    }
    float dq[kDimQK / 2];
#pragma unroll
    for (float& x : dq) x = 0.f;
    // What the end of the item reads comes as far as L2 meanwhile.
    if (p.dq.begun && p.dq.result != nullptr && (threadIdx.x & 127) < p.part) {
      const volatile Walk& walk = walks[count % Layout::kWalkSlots];
      const int in_item = consumer * p.part + (threadIdx.x & 127);
      if (in_item < walk.tokens) {
        const int64_t row = (walk.row + in_item) * p.shape.num_heads_q + walk.head * p.rows.group;
        ptx::bulk_prefetch(static_cast<const float*>(p.dq.sum) + row * kDimQK, p.rows.group * kDimQK * 4);
      }
    }
    const auto run_walk = [&](const volatile Walk& walk) {
      const RowPair rows =
          read_rows(reinterpret_cast<const RowStats*>(shared + Layout::kStats)[count % Layout::kStatSlots],
                    consumer, row0);
      const WalkMask mask{p, walk, consumer};
      __syncwarp();  // all lanes have read before lane 0 says so
      ptx::barrier_arrive_if(base + Layout::kEmptyWalk + 8 * (count % Layout::kStatSlots), lane == 0);

      const auto run_tile = [&]<int kWidth>(int begin) {
        uint32_t ds[kWidth / 16][4];
        const uint32_t k = base + Layout::kK + ring.slot * Layout::kBytesK,
                       v = base + Layout::kV + ring.slot * Layout::kBytesV;
        float s[kWidth / 2], dp[kWidth / 2];
        ptx::barrier_wait(base + Layout::kFullK + 8 * ring.slot, ring.parity);
        ptx::barrier_wait(base + Layout::kFullV + 8 * ring.slot, ring.parity);
        ptx::wgmma_fence();
        if constexpr (Layout::kRowsInRegisters) {
          multiply_rows<T, kDimQK, kWidth, kKeys>(s, q_fragments, k);
        } else {
          multiply_rows<T, kDimQK, kKeys>(s, q, kWarpgroupRows, k);
        }
        const bool whole = mask.whole(begin, begin + kWidth);
        if constexpr (Layout::kRowsInRegisters) {
          multiply_rows<T, kDimV, kWidth, kKeys>(dp, d_o_fragments, v);
        } else {
          multiply_rows<T, kDimV, kKeys>(dp, d_o, kWarpgroupRows, v);
        }
        ptx::wgmma_wait<1>();
        ptx::pin_registers(s);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i)
          s[i] = ptx::exp2_approx(fmaf(s[i], p.scale_log2, -rows.lse[i / 2 % 2]));
        ptx::pin_registers(s);  // while dP is multiplied, not behind it
        ptx::wgmma_wait<0>();
        ptx::pin_registers(dp);
        ptx::barrier_arrive_if(base + Layout::kEmptyV + 8 * ring.slot, lane == 0);
        if constexpr (!Layout::kRowsInRegisters)
          ptx::barrier_arrive_if(base + Layout::kEmptyRows + 8 * consumer,
                                 lane == 0 && walk.last && begin + kKeys >= walk.hi);
        if (whole) {
#pragma unroll
          for (int i = 0; i < kWidth / 2; i += 2) {
            const int h = i / 2 % 2;
            ds[i / 8][i / 2 % 4] =
                ptx::pack2<T>(s[i] * (dp[i] - rows.delta[h]), s[i + 1] * (dp[i + 1] - rows.delta[h]));
          }
        } else {
          const Visibility visible = mask.visible();
          const int hi = walk.hi;
          int position[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) position[h] = mask.position(row0 + 8 * h);
#pragma unroll
          for (int i = 0; i < kWidth / 2; i += 2) {
            const int h = i / 2 % 2;
            const int key = begin + i / 4 * 8 + (lane & 3) * 2;
            float x = s[i] * (dp[i] - rows.delta[h]), y = s[i + 1] * (dp[i + 1] - rows.delta[h]);
            x = key < hi && visible(position[h], visible.end_of(key)) ? x
                                                                      : 0.f;  // whatever P and dP are there
            y = key + 1 < hi && visible(position[h], visible.end_of(key + 1)) ? y : 0.f;
            ds[i / 8][i / 2 % 4] = ptx::pack2<T>(x, y);
          }
        }
        ptx::wgmma_fence();
        multiply_fragments<T, kDimQK, kWidth, kKeys>(dq, ds, k);
        ptx::wgmma_wait<0>();
        ptx::pin_registers(dq);
        ptx::barrier_arrive_if(base + Layout::kEmptyK + 8 * ring.slot, lane == 0);
        ring.advance();
      };

      int begin = walk.lo;
      const int end = walk.hi;
#pragma unroll 1
      for (; begin < end; begin += kKeys) {
        if (Layout::kFewKeys < kKeys && end - begin <= Layout::kFewKeys) {
          run_tile.template operator()<Layout::kFewKeys>(begin);
        } else {
          run_tile.template operator()<kKeys>(begin);
        }
      }
    };
    while (true) {
      const volatile Walk& walk = wait_for_walk();
      run_walk(walk);
      ++count;
      if (walk.last) break;
    }
    const volatile Walk& walk = walks[(count - 1) % Layout::kWalkSlots];  // the last one
    int64_t at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = row_number(p, walk, consumer * p.part, row0 + 8 * h);
      at[h] = row < 0 ? -1 : row * kDimQK;
    }
    put_query_grads<T, true, kDimQK>(p.dq, dq, p.scale, at, lane);
  }
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(QueriesLayout<kDimQK, kDimV>::kThreads, 1)
    banded_attention_bwd_queries_sm90(const __grid_constant__ QueriesParams p,
                                      const __grid_constant__ QueryMaps maps,
                                      const __grid_constant__ BranchMaps branch_maps) {
  if (!p.early) ptx::wait_for_dependency();
  using Layout = QueriesLayout<kDimQK, kDimV>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    *reinterpret_cast<Schedule*>(shared + Layout::kSchedule) = {0, 0};
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::barrier_init(base + Layout::kFullK + 8 * i, 1);
      ptx::barrier_init(base + Layout::kFullV + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyK + 8 * i, Layout::kConsumerWarps);
      ptx::barrier_init(base + Layout::kEmptyV + 8 * i, Layout::kConsumerWarps);
    }
    for (int i = 0; i < kConsumers; ++i) {
      ptx::barrier_init(base + Layout::kFullRows + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyRows + 8 * i, 4);
    }
    for (int i = 0; i < Layout::kStatSlots; ++i) {
      ptx::barrier_init(base + Layout::kFullWalk + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyWalk + 8 * i, Layout::kConsumerWarps);
    }
    for (int i = 0; i < Layout::kItemSlots; ++i) {
      ptx::barrier_init(base + Layout::kFullItem + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyItem + 8 * i, 2);
    }
    ptx::barrier_init(base + Layout::kLanded, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == kConsumers) {
    ptx::release_registers<Layout::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    const ItemRing items{base + Layout::kFullItem, base + Layout::kEmptyItem,
                         reinterpret_cast<Item*>(shared + Layout::kItems)};
    if (warp == 0) {
      produce_rows<T, kDimQK, kDimV>(p, maps, items, base, shared);
    } else if (warp == 1) {
      produce_keys<kDimQK, kDimV>(branch_maps, items, base);
    } else if (warp == 2) {
      produce_items<T, kDimQK>(p, items, reinterpret_cast<Schedule*>(shared + Layout::kSchedule));
    } else {
      ptx::wait_for_dependency();
      ptx::launch_dependents();
    }
  } else {
    ptx::claim_registers<Layout::kConsumerRegisters>();
    consume<T, kDimQK, kDimV>(p, base, shared, warpgroup);
  }
}

}  // namespace

Status banded_attention_bwd_queries(const BandedAttentionBwdParams* branches, int count, Begin begin,
                                    int* ticket, const Stream& stream) {
  const BandedAttentionBwdParams& common = branches[0];
  QueriesParams p{common.seqs,
                  common.shape,
                  branches[count - 1].grads.dq,
                  {},
                  count,
                  static_cast<float>(common.softmax_scale),
                  static_cast<float>(common.softmax_scale) * kLog2e,
                  GroupRows(common.shape.group()),
                  kWarpgroupRows / common.shape.group(),
                  0,
                  common.shape.num_heads_kv,
                  begin == Begin::kEarly,
                  ticket};
  p.dq.begun = common.grads.dq.begun;
  for (int b = 0; b < count; ++b) {
    const AttentionGrads& grads = branches[b].grads;
    p.branch[b] = {branches[b].keys,
                   branches[b].window,
                   branches[b].seqs.key_rows,
                   static_cast<const float*>(grads.d_o_scale),
                   static_cast<const float*>(grads.delta),
                   static_cast<const float*>(grads.lse)};
  }
  return run_kernels(common, [&]<typename T, int kDimQK, int kDimV>(Status* status) {
    using Layout = QueriesLayout<kDimQK, kDimV>;
    QueryMaps maps;
    BranchMaps branch_maps;
    if (!make_maps<kDimQK, kDimV>(&maps, common, p.part)) return false;
    for (int b = 0; b < count; ++b) {
      if (!make_maps<kDimQK, kDimV>(&branch_maps.branch[b], branches[b], Layout::kKeys)) return false;
    }
    p.num_items = static_cast<int>(num_sequence_tiles(p.seqs, p.part * kConsumers) * p.heads);
    const int64_t blocks = min64(p.num_items, device_attribute(cudaDevAttrMultiProcessorCount));
    *status = launch_chained(
        "banded_attention_bwd_queries_sm90", banded_attention_bwd_queries_sm90<T, kDimQK, kDimV>,
        dim3(static_cast<unsigned>(blocks)), Layout::kThreads, Layout::kBytes, stream, p, maps, branch_maps);
    return true;
  });
}

namespace {

bool wants_keys(const BandedAttentionBwdParams& p) { return p.grads.dk != nullptr || p.grads.dv != nullptr; }

// What fits one of the kernels fits the other, but for groups too large for the rows of the first.
bool has_kernels(const BandedAttentionBwdParams& p) {
  if (p.shape.group() > (p.shape.head_dim_qk > 128 ? 32 : 64)) return false;
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        QueryMaps maps;
        KeyMaps key_maps;
        return make_maps<kDimQK, kDimV>(&maps, p, 1) && make_maps<kDimQK, kDimV>(&key_maps, p, 1);
      });
}

// No kernel needs what the one in front makes, but for the sums, so each begins in the tail of that: those
// for keys first, whose blocks are long; then dQ, whose items are dealt out to blocks as they come; then the
// sums of parts. After a launch for keys all that was in front of it has ended; that is what dQ needs. made:
// branches whose keys are done, and the ticket with them.
Status launch_all(const BandedAttentionBwdParams* branches, int count, int made, Begin begin, int* ticket,
                  const Stream& stream) {
  Status status;
  bool zeroed = made > 0, behind_keys = false;
  for (int b = made; b < count && status.ok(); ++b) {
    if (!wants_keys(branches[b])) continue;
    status = banded_attention_bwd_keys(branches[b], begin, zeroed ? nullptr : ticket, stream);
    begin = Begin::kEarly;
    zeroed = behind_keys = true;
  }
  const bool wants_queries = branches[0].grads.dq.wanted();
  if (status.ok() && wants_queries) {
    status = banded_attention_bwd_queries(branches, count, behind_keys ? Begin::kEarly : Begin::kOnTime,
                                          zeroed ? ticket : nullptr, stream);
  }
  begin = wants_queries ? Begin::kEarly : Begin::kOnTime;
  for (int b = 0; b < count && status.ok(); ++b) {
    if (!wants_keys(branches[b])) continue;
    status = banded_attention_bwd_key_sums(branches[b], begin, stream);
    begin = Begin::kOnTime;
  }
  return status;
}

// The workspace of both: the ticket, then those of each.
constexpr int64_t kTicketBytes = 256;
struct BranchesPlan {
  int* ticket;
  BandedAttentionBwdParams branch[kMaxBranches];
  int64_t bytes = kTicketBytes;

  explicit BranchesPlan(const BandedBranchesBwdParams& p)
      : ticket(static_cast<int*>(p.workspace)), branch{p.branch[0], p.branch[1]} {
    for (BandedAttentionBwdParams& own : branch) {
      own.workspace = static_cast<char*>(p.workspace) + bytes;
      bytes += round_up(workspace_bytes(own), 256);
    }
  }
  bool has_kernels() const {
    return branch[0].grads.dq.wanted() && sm90::has_kernels(branch[0]) && sm90::has_kernels(branch[1]);
  }
};

}  // namespace

bool banded_attention_backward(const BandedAttentionBwdParams& p, const Stream& stream, Status* status) {
  if (!has_kernels(p)) return false;
  *status = launch_all(&p, 1, 0, Begin::kOnTime, nullptr, stream);
  return true;
}

int64_t workspace_bytes(const BandedBranchesBwdParams& p) { return BranchesPlan(p).bytes; }

bool begin_banded_branches_backward(const BandedBranchesBwdParams& p, const Stream& stream, Status* status) {
  const BranchesPlan plan(p);
  if (!plan.has_kernels() || !wants_keys(plan.branch[0])) return false;
  *status = banded_attention_bwd_keys(plan.branch[0], Begin::kEarly, plan.ticket, stream);
  return true;
}

bool banded_branches_backward(const BandedBranchesBwdParams& p, const Stream& stream, Status* status) {
  const BranchesPlan plan(p);
  if (!plan.has_kernels()) return false;
  *status = launch_all(plan.branch, kMaxBranches, p.first_made ? 1 : 0,
                       p.early ? Begin::kEarly : Begin::kOnTime, plan.ticket, stream);
  return true;
}

}  // namespace nsa::cuda::sm90
