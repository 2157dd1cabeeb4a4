// Compressed attention and the sliding window, backward, dQ by TMA and wgmma.
// docs/kernels/banded_attention_backward.md tells the dataflow.
//
// Persistent blocks walk the work items, a tile of adjacent tokens of one KV head each, longest first. Two
// consumer warpgroups own 64 query rows each, the heads of the group packed as rows: row r is token r / G,
// head r % G. Scores S = Q K^T and dP = dO V^T are multiplied again; dS is the A fragment in registers of
// dQ += dS K. The producer warp brings Q and dO of an item and the key tiles.
#include "cuda/sm90/banded_attention_bwd.h"
#include "cuda/sm90/launch.h"
#include "cuda/tile/gradient_store.cuh"

namespace nsa::cuda::sm90 {
namespace {

// A work item, as the producer tells the consumers: the tokens of both warpgroups, and the keys [lo, hi) that
// some of them see. It stays in shared memory, since the consumers have no registers for it.
struct Item {
  int64_t row;  // of q: the first token
  int tokens;   // none: there is no further item
  int position, head;
  int lo, hi, num_tiles;
};

// What the query rows of an item bring beside q and dO. With g the factor of a row's dO, P g = exp2(scale s -
// lse): lse in base 2 less the logarithm of g, delta divided by g. Rows of no query have P = 0.
struct RowStats {
  float2 lse_delta[kConsumers * kWarpgroupRows];
};

template <int kDimQK, int kDimV>
struct QueriesLayout : BandedBwdConfig<kDimQK, kDimV> {
  using Config = BandedBwdConfig<kDimQK, kDimV>;
  static constexpr int kKeys = Config::kWalkedKeys, kStages = Config::kKeyStages;
  static constexpr int kFullK = 0;
  static constexpr int kEmptyK = kFullK + 8 * kStages;
  static constexpr int kFullV = kEmptyK + 8 * kStages;
  static constexpr int kEmptyV = kFullV + 8 * kStages;
  static constexpr int kFullQ = kEmptyV + 8 * kStages;
  static constexpr int kEmptyQ = kFullQ + 8 * kConsumers;
  static constexpr int kLanded = kEmptyQ + 8 * kConsumers;  // of a tile the producer still works on
  static constexpr int kItems = kLanded + 8;
  static constexpr int kItemSlots =
      2;  // an item is told when Q of the last one is used up: the one before is over
  static constexpr int kBytesQ = swizzled_tile_bytes<kDimQK>(kWarpgroupRows);
  static constexpr int kBytesO = swizzled_tile_bytes<kDimV>(kWarpgroupRows);
  static constexpr int kBytesK = swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kBytesV = swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kStats = 1024;
  static constexpr int kQ = kStats + 1024;
  static constexpr int kO = kQ + kConsumers * kBytesQ;
  static constexpr int kK = kO + kConsumers * kBytesO;
  static constexpr int kV = kK + kStages * kBytesK;
  static constexpr int kBytes = 1024 + kV + kStages * kBytesV;
  static_assert(kItems % 8 == 0 && kItems + kItemSlots * static_cast<int>(sizeof(Item)) <= kStats &&
                kStats + static_cast<int>(sizeof(RowStats)) <= kQ && kBytes <= 232448);
};

// The items of one block.
struct Schedule {
  int num_tiles, heads, tokens, keys;
  int round = 0;

  // By one warp. False: there is no further item. Those of no token are skipped, and those of no key finished
  // at once. first_key_row, seen_hi: of the sequence, behind the last key that any of its queries sees.
  template <typename T, int kDimQK>
  __device__ __forceinline__ bool next(const BandedAttentionBwdParams& p, Item* item, int* first_key_row,
                                       int* seen_hi) {
    const int total = num_tiles * heads, blocks = gridDim.x, block = blockIdx.x;
    while (round * blocks < total) {
      // Back and forth over the blocks, so that none gets the longest of every round.
      const int k = round * blocks + (round & 1 ? blocks - 1 - block : block);
      ++round;
      if (k >= total) continue;
      const SequenceTile tile = find_sequence_tile(p.seqs, num_tiles - 1 - k / heads, tokens);
      if (tile.count == 0) continue;
      const int64_t position = tile.seq.position(tile.begin), num_keys = count_keys(p.seqs, tile.seq, p.keys);
      item->row = tile.seq.q_begin + tile.begin;
      item->tokens = tile.count;
      item->position = static_cast<int>(max64(position, kNoPosition));
      item->head = k % heads;
      item->lo = static_cast<int>(min64(p.keys.begin_visible(position, p.window), num_keys));
      item->hi = static_cast<int>(min64(p.keys.end_visible(position + tile.count - 1), num_keys));
      if (item->lo >= item->hi) {
        for (int i = 0; i < item->tokens; ++i) {
          const int64_t row = (item->row + i) * p.shape.num_heads_q + item->head * p.shape.group();
          put_no_query_grads<T>(p.grads.dq, row * kDimQK, p.shape.group() * kDimQK, threadIdx.x & 31);
        }
        continue;
      }
      item->num_tiles = (item->hi - item->lo + keys - 1) / keys;
      *first_key_row = static_cast<int>(p.keys.first_row(tile.seq.k_begin));
      *seen_hi = static_cast<int>(num_keys);
      return true;
    }
    return false;
  }
};

template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void produce(const BandedAttentionBwdParams& p, const BandedBwdMaps& maps,
                                        Schedule schedule, const uint32_t base, unsigned char* shared) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys;
  const int lane = threadIdx.x & 31, group = p.shape.group(), part = kWarpgroupRows / group;
  Item* const items = reinterpret_cast<Item*>(shared + Layout::kItems);
  RingPosition<Layout::kStages> ring;
  uint32_t landed_parity = 0;
  int count = 0, first_key_row = 0, seen_hi = 0;  // items so far
  Item item;
  RowStats& stats = *reinterpret_cast<RowStats*>(shared + Layout::kStats);
  const auto tell_item = [&] {  // when the Q of the last one is used up
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) ptx::barrier_wait(base + Layout::kEmptyQ + 8 * w, (count & 1) ^ 1);
    if (lane == 0) items[count % Layout::kItemSlots] = item;
    __syncwarp();
    const volatile Item& told = items[count % Layout::kItemSlots];
#pragma unroll 2
    for (int i = lane; i < kConsumers * kWarpgroupRows; i += 32) {
      const int row = i % kWarpgroupRows, token = GroupRows(group).token(row);
      const int in_item = i / kWarpgroupRows * part + token;
      const bool valid = token < part && in_item < told.tokens;
      const int64_t at = told.row * p.shape.num_heads_q +
                         (told.head * group + in_item * p.shape.num_heads_q + row - token * group);
      const float factor =
          valid && p.grads.d_o_scale != nullptr ? static_cast<const float*>(p.grads.d_o_scale)[at] : 1.f;
      const float lse = valid ? static_cast<const float*>(p.grads.lse)[at] : -kNegInf;
      const float delta = valid ? static_cast<const float*>(p.grads.delta)[at] : 0.f;
      stats.lse_delta[i] =
          make_float2(lse * kLog2e - __log2f(factor), factor > 0.f ? __fdividef(delta, factor) : 0.f);
    }
    __syncwarp();
    ++count;
  };
#pragma unroll 1
  while (schedule.next<T, kDimQK>(p, &item, &first_key_row, &seen_hi)) {
#pragma unroll 1
    for (int i = 0; i < item.num_tiles; ++i) {
      const int begin = item.lo + i * kKeys;
      const uint32_t k = base + Layout::kK + ring.slot * Layout::kBytesK,
                     v = base + Layout::kV + ring.slot * Layout::kBytesV;
      const uint32_t full_k = base + Layout::kFullK + 8 * ring.slot,
                     full_v = base + Layout::kFullV + 8 * ring.slot;
      // Keys that nobody sees are multiplied by dS = 0, so they must be numbers.
      const bool partial = begin + kKeys > seen_hi;
      const uint32_t landed = partial ? base + Layout::kLanded : full_k;
      ptx::barrier_wait(base + Layout::kEmptyK + 8 * ring.slot, ring.parity ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(landed, Layout::kBytesK);
        load_panels<kDimQK>(k, kKeys, maps.k, landed, item.head, first_key_row + begin);
      }
      if (i == 0) {
        tell_item();
        if (lane == 0) {
#pragma unroll 1
          for (int w = 0; w < kConsumers; ++w) {
            const uint32_t full_q = base + Layout::kFullQ + 8 * w;
            const int row = static_cast<int>(item.row) + w * part;
            ptx::barrier_arrive_expect(full_q, part * group * (kDimQK + kDimV) * 2);
            load_panels<kDimQK>(base + Layout::kQ + w * Layout::kBytesQ, kWarpgroupRows, maps.q, full_q,
                                item.head * group, row);
            load_panels<kDimV>(base + Layout::kO + w * Layout::kBytesO, kWarpgroupRows, maps.d_o, full_q,
                               item.head * group, row);
          }
        }
      }
      ptx::barrier_wait(base + Layout::kEmptyV + 8 * ring.slot, ring.parity ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(full_v, Layout::kBytesV);
        load_panels<kDimV>(v, kKeys, maps.v, full_v, item.head, first_key_row + begin);
      }
      if (partial) {
        ptx::barrier_wait(landed, landed_parity);
        landed_parity ^= 1;
        clear_rows<kDimQK>(k, kKeys, max(seen_hi - begin, 0), kKeys, lane);
        ptx::async_proxy_fence();
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(full_k);
      }
      ring.advance();
    }
  }
  item.tokens = 0;
  tell_item();
  if (lane == 0) {
#pragma unroll 1
    for (int w = 0; w < kConsumers; ++w) ptx::barrier_arrive(base + Layout::kFullQ + 8 * w);
  }
}

// What a thread's two rows bring beside q and dO.
struct RowPair {
  float lse[2], delta[2];
  int position[2];
};

// The number of a row in [T, Hq], or -1 for one of no query. first_token: of this warpgroup, within the item.
__device__ __forceinline__ int64_t row_number(const BandedAttentionBwdParams& p, const volatile Item& item,
                                              int first_token, int row) {
  const int group = p.shape.group(), token = GroupRows(group).token(row);
  if (token >= kWarpgroupRows / group || first_token + token >= item.tokens) return -1;
  return (item.row + first_token + token) * p.shape.num_heads_q + item.head * group + row - token * group;
}

__device__ __forceinline__ RowPair read_rows(int group, const volatile Item& item, const RowStats& stats,
                                             int consumer, int row0) {
  RowPair pair;
  const int part = kWarpgroupRows / group;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = GroupRows(group).token(row0 + 8 * h), in_item = consumer * part + token;
    const float2 row = stats.lse_delta[consumer * kWarpgroupRows + row0 + 8 * h];
    pair.lse[h] = row.x;
    pair.delta[h] = row.y;
    pair.position[h] = token < part && in_item < item.tokens ? item.position + in_item : kNoPosition;
  }
  return pair;
}

template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void consume(const BandedAttentionBwdParams& p, const uint32_t base,
                                        const unsigned char* shared, const int consumer) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys;
  const int lane = threadIdx.x & 31, row0 = (threadIdx.x & 127) / 32 * 16 + lane / 4;
  const int part = kWarpgroupRows / p.shape.group();
  const Visibility visible(p.keys, p.window);
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const uint32_t q = base + Layout::kQ + consumer * Layout::kBytesQ,
                 d_o = base + Layout::kO + consumer * Layout::kBytesO;
  const volatile Item* const items = reinterpret_cast<const volatile Item*>(shared + Layout::kItems);
  RingPosition<Layout::kStages> ring;
#pragma unroll 1
  for (int count = 0;; ++count) {
    ptx::barrier_wait(base + Layout::kFullQ + 8 * consumer, count & 1);
    const volatile Item& item = items[count % Layout::kItemSlots];
    if (item.tokens == 0) break;
    const RowPair rows = read_rows(
        p.shape.group(), item, *reinterpret_cast<const RowStats*>(shared + Layout::kStats), consumer, row0);
    const int num_tiles = item.num_tiles, hi = item.hi;
    const int oldest = item.position + consumer * part, newest = oldest + part - 1;
    const bool whole_rows = (consumer + 1) * part <= item.tokens;
    int begin = item.lo;
    [[maybe_unused]] uint32_t q_fragments[kDimQK / 16][4], d_o_fragments[kDimV / 16][4];
    if constexpr (Layout::kRowsInRegisters) {
      load_fragments<kDimQK>(q_fragments, q, threadIdx.x / 32 % 4, lane);
      load_fragments<kDimV>(d_o_fragments, d_o, threadIdx.x / 32 % 4, lane);
    }
    __syncwarp();  // all lanes have read before lane 0 says so, here or behind the last tile
    if constexpr (Layout::kRowsInRegisters)
      ptx::barrier_arrive_if(base + Layout::kEmptyQ + 8 * consumer, lane == 0);
    float dq[kDimQK / 2];
#pragma unroll
    for (float& x : dq) x = 0.f;

    const auto run_tile = [&]<bool kMasked>(bool last) {
      const uint32_t k = base + Layout::kK + ring.slot * Layout::kBytesK,
                     v = base + Layout::kV + ring.slot * Layout::kBytesV;
      float s[kKeys / 2], dp[kKeys / 2];
      uint32_t ds[kKeys / 16][4];
      ptx::barrier_wait(base + Layout::kFullK + 8 * ring.slot, ring.parity);
      ptx::barrier_wait(base + Layout::kFullV + 8 * ring.slot, ring.parity);
      ptx::wgmma_fence();
      if constexpr (Layout::kRowsInRegisters) {
        multiply_rows<T, kDimQK, kKeys>(s, q_fragments, k);
        multiply_rows<T, kDimV, kKeys>(dp, d_o_fragments, v);
      } else {
        multiply_rows<T, kDimQK, kKeys>(s, q, kWarpgroupRows, k);
        multiply_rows<T, kDimV, kKeys>(dp, d_o, kWarpgroupRows, v);
      }
      ptx::wgmma_wait<1>();
      ptx::pin_registers(s);
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] = ptx::exp2_approx(fmaf(s[i], scale, -rows.lse[i / 2 % 2]));
      ptx::pin_registers(s);  // while dP is multiplied, not behind it
      ptx::wgmma_wait<0>();
      ptx::pin_registers(dp);
      ptx::barrier_arrive_if(base + Layout::kEmptyV + 8 * ring.slot, lane == 0);
      if constexpr (!Layout::kRowsInRegisters)
        ptx::barrier_arrive_if(base + Layout::kEmptyQ + 8 * consumer, lane == 0 && last);
#pragma unroll
      for (int i = 0; i < kKeys / 2; i += 2) {
        const int h = i / 2 % 2;
        float x = s[i] * (dp[i] - rows.delta[h]), y = s[i + 1] * (dp[i + 1] - rows.delta[h]);
        if constexpr (kMasked) {  // whatever P and dP are there
          const int key = begin + i / 4 * 8 + (lane & 3) * 2;
          x = key < hi && visible(rows.position[h], visible.end_of(key)) ? x : 0.f;
          y = key + 1 < hi && visible(rows.position[h], visible.end_of(key + 1)) ? y : 0.f;
        }
        ds[i / 8][i / 2 % 4] = ptx::pack2<T>(x, y);
      }
      ptx::wgmma_fence();
      multiply_fragments<T, kDimQK, kKeys>(dq, ds, k);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(dq);
      ptx::barrier_arrive_if(base + Layout::kEmptyK + 8 * ring.slot, lane == 0);
      ring.advance();
    };

#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, begin += kKeys) {
      const bool whole = whole_rows && begin + kKeys <= hi &&
                         visible(oldest, visible.end_of(begin + kKeys - 1)) &&
                         visible(newest, visible.end_of(begin));
      if (whole) {
        run_tile.template operator()<false>(i + 1 == num_tiles);
      } else {
        run_tile.template operator()<true>(i + 1 == num_tiles);
      }
    }
    int64_t at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = row_number(p, item, consumer * part, row0 + 8 * h);
      at[h] = row < 0 ? -1 : row * kDimQK;
    }
    put_query_grads<T, true, kDimQK>(p.grads.dq, dq, static_cast<float>(p.softmax_scale), at, lane);
  }
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(QueriesLayout<kDimQK, kDimV>::kThreads, 1)
    banded_attention_bwd_queries_sm90(const __grid_constant__ BandedAttentionBwdParams p,
                                      const __grid_constant__ BandedBwdMaps maps, const int num_tiles) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  extern __shared__ unsigned char unaligned[];
  const uint32_t unaligned_address = ptx::shared_address(unaligned);
  const uint32_t base = (unaligned_address + 1023) / 1024 * 1024;
  unsigned char* const shared = unaligned + (base - unaligned_address);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::barrier_init(base + Layout::kFullK + 8 * i, 1);
      ptx::barrier_init(base + Layout::kFullV + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyK + 8 * i, Layout::kConsumerWarps);
      ptx::barrier_init(base + Layout::kEmptyV + 8 * i, Layout::kConsumerWarps);
    }
    for (int i = 0; i < kConsumers; ++i) {
      ptx::barrier_init(base + Layout::kFullQ + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyQ + 8 * i, 4);
    }
    ptx::barrier_init(base + Layout::kLanded, 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const Schedule schedule{num_tiles, p.shape.num_heads_kv, kWarpgroupRows / p.shape.group() * kConsumers,
                          Layout::kKeys};
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == kConsumers) {
    ptx::release_registers<Layout::kProducerRegisters>();
    if (threadIdx.x % 128 < 32) produce<T, kDimQK, kDimV>(p, maps, schedule, base, shared);
  } else {
    ptx::claim_registers<Layout::kConsumerRegisters>();
    consume<T, kDimQK, kDimV>(p, base, shared, warpgroup);
  }
}

}  // namespace

bool banded_attention_bwd_queries(const BandedAttentionBwdParams& p, const Stream& stream, Status* status) {
  const auto run = [&]<typename T, int kDimQK, int kDimV>() {
    using Layout = QueriesLayout<kDimQK, kDimV>;
    BandedBwdMaps maps;
    const int group = p.shape.group(), part = kWarpgroupRows / group;
    if (!make_maps<kDimQK, kDimV>(&maps, p, part, Layout::kKeys)) return false;
    const int64_t num_tiles = num_sequence_tiles(p.seqs, part * kConsumers);
    const int64_t blocks =
        min64(num_tiles * p.shape.num_heads_kv, device_attribute(cudaDevAttrMultiProcessorCount));
    *status = launch("banded_attention_bwd_queries_sm90", banded_attention_bwd_queries_sm90<T, kDimQK, kDimV>,
                     dim3(static_cast<unsigned>(blocks)), Layout::kThreads, Layout::kBytes, stream, p, maps,
                     static_cast<int>(num_tiles));
    return true;
  };
  return dispatch_kernels(p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, run);
}

bool banded_attention_backward(const BandedAttentionBwdParams& p, const Stream& stream, Status* status) {
  // What fits one of the kernels fits the other, but for groups too large for the rows of the first.
  if (p.shape.group() > (p.shape.head_dim_qk > 128 ? 32 : 64)) return false;
  const bool want_keys = p.grads.dk != nullptr || p.grads.dv != nullptr;
  if (want_keys && !banded_attention_bwd_keys(p, stream, status)) return false;
  if (!p.grads.dq.wanted() || (want_keys && !status->ok())) return true;
  return banded_attention_bwd_queries(p, stream, status);
}

}  // namespace nsa::cuda::sm90
