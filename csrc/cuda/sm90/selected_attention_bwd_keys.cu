// Attention over chosen blocks, backward, dK and dV, by TMA and wgmma; dS is kept for dQ.
//
// Two consumer warpgroups, each with a producer warp, K and V of its own 64 keys, and a ring: they take items
// (common/invert_blocks.h) independently, so that one's exponentials run beside the other's products. A
// tile is 64 query rows: the heads of a few tokens of the list. Scores are computed transposed, S^T = K Q^T
// and dP^T = V dO^T, so that P^T and dS^T are in registers as the left operands of dV += P^T dO and dK +=
// dS^T Q.
//
// The factor g of dO goes into the exponent: p g = 2^(s - (lse - log2 g)), dS = p g (dP - delta / g).
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/selected_attention_bwd.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/gradient_store.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

using Params = SelectedAttentionBwdParams;

constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kTileRows = 64;
constexpr int kSlabs = kTileRows / kSlabRows;

// Beside a tile of Q and dO.
struct alignas(16) TileInfo {
  float2 rows[kTileRows];  // see RowStats
  int seen[kSlabs];        // keys that the slab's token sees
  int ds[kSlabs];          // where dS of the slab goes; -1: nowhere
  int fewest_seen;
  int unused[3];
};

struct ItemInfo {
  int tiles;  // 0: there is no more work
  int head, key_row, num_keys, partial;
  int unused[3];
};

template <int kDim>
struct KeysLayout {
  static constexpr int kTile = swizzled_tile_bytes<kDim>(64);
  static constexpr int kStages = kDim == 128 ? 5 : 6;  // tiles of dO and of Q in turn
  static constexpr int kInfos = kStages / 2;           // of tiles in the ring: a tile takes two places
  static constexpr int kV = kTile, kRing = 2 * kTile;
  static constexpr int kConsumerBytes = (2 + kStages) * kTile;

  struct Control {
    // One is written when the place of its Q is free, so that the scores of the tile kInfos before are done:
    // the place was that tile's of dO (an odd number of stages) or of Q.
    TileInfo tile[kInfos];
    ItemInfo item[2];
    uint64_t full[kStages], empty[kStages], keys_full, keys_empty;
  };
  static constexpr int kBytes = kConsumers * (kConsumerBytes + static_cast<int>(sizeof(Control)));
};

// A place in the ring and the parity of the phase in which it is filled.
template <int kStages>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) slot = 0, parity ^= 1;
  }
};

struct KeysMaps {
  CUtensorMap q, k, v, d_o;
};

template <typename T, int kDim>
__device__ void produce(const Params& p, const SelectedBwdChunk& chunk, const KeysMaps& maps, uint32_t memory,
                        typename KeysLayout<kDim>::Control& control, int lane) {
  using Layout = KeysLayout<kDim>;
  constexpr int kPanels = kDim / kPanel;
  const int num_items = *chunk.num_items, slabs = chunk.ds.slabs, tokens = kSlabs / slabs;
  const auto address = [](const auto& x) { return ptx::shared_address(&x); };
  // Lane i < 8 has word i of an item. The next ticket is taken three tiles before the end of an item: whoever
  // held one for longer would keep others from work at the end.
  const auto take = [&] { return lane == 0 ? atomicAdd(chunk.ticket, 1) : 0; };
  const auto word_of = [&](int ticket) {
    return ticket < num_items && lane < 8 ? reinterpret_cast<const int*>(chunk.items + ticket)[lane] : 0;
  };
  // Lane i has entry i of a tile.
  const auto load_entry = [&](const WorkItem& item, int tile) {
    const int index = tile * tokens + lane;
    const uint32_t* list = chunk.entries + item.head * p.seqs.total_q * p.num_selected_blocks + item.first;
    return lane < tokens && index < item.count ? list[index] : ~0u;
  };
  const auto unpack = [&](int word) {
    WorkItem item{};
    const int head_and_part = __shfl_sync(~0u, word, 0);
    item.head = static_cast<int16_t>(head_and_part), item.part = static_cast<int16_t>(head_and_part >> 16);
    item.first = __shfl_sync(~0u, word, 1), item.count = __shfl_sync(~0u, word, 2);
    item.key_row = __shfl_sync(~0u, word, 3), item.num_keys = __shfl_sync(~0u, word, 4);
    item.shift = __shfl_sync(~0u, word, 5), item.partial = __shfl_sync(~0u, word, 6);
    return item;
  };
  int ticket = __shfl_sync(~0u, take(), 0), next_ticket = 0;
  WorkItem item = unpack(word_of(ticket));
  uint32_t entry = load_entry(item, 0);
  const int token_bytes = slabs * kSlabRows * kPanelPitch;  // in a panel
  const uint32_t tile_bytes = tokens * token_bytes * kPanels;
  const int stats_bytes = slabs * kSlabRows * static_cast<int>(sizeof(float2));
  const int first_row = static_cast<int>(chunk.first_row), none = static_cast<int>(p.seqs.total_q);
  // Lane i < tokens * panels brings one panel of one token, lane i < tokens also its statistics; slab lane %
  // 4 is described by its lane.
  const int own_token = lane / kPanels, own_panel = lane % kPanels, slab_token = lane % kSlabs / slabs;
  RingPosition<Layout::kStages> at;
  int info_at = 0;

#pragma unroll 1
  for (int round = 0;; ++round) {
    const bool last = ticket >= num_items;
    int word = 0;
    const int tiles = last ? 0 : (item.count + tokens - 1) / tokens;
    WorkItem next{};
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const uint32_t own = entry;
      const int left = tiles - tile;
      if (left == min(tiles, 3)) next_ticket = take();
      if (left == min(tiles, 2)) {
        ticket = __shfl_sync(~0u, next_ticket, 0);
        word = word_of(ticket);
      }
      if (left == 1) next = unpack(word);
      entry = tile + 1 < tiles ? load_entry(item, tile + 1) : load_entry(next, 0);
      const auto row_of = [&](uint32_t e) { return first_row + static_cast<int>(e & kEntryTokenMask); };
      const uint32_t copied = __shfl_sync(~0u, own, own_token % kSlabs),
                     described = __shfl_sync(~0u, own, slab_token);
      // Tokens that are missing lie outside the tensor.
      const int row = copied == ~0u ? -1 : row_of(copied);
      const auto bring = [&](const CUtensorMap& map, uint32_t more_bytes) {
        const uint32_t full = address(control.full[at.slot]);
        if (lane == 0) ptx::barrier_arrive_expect(full, tile_bytes + more_bytes);
        __syncwarp();
        if (own_token < tokens) {
          ptx::bulk_load_4d(memory + Layout::kRing + at.slot * Layout::kTile +
                                own_panel * kTileRows * kPanelPitch + own_token * token_bytes,
                            &map, full, own_panel * kPanel, 0, item.head, row);
        }
      };
      ptx::barrier_wait(address(control.empty[at.slot]), at.parity ^ 1);
      bring(maps.d_o, 0);
      at.advance();
      ptx::barrier_wait(address(control.empty[at.slot]), at.parity ^ 1);
      TileInfo& info = control.tile[info_at];
      if (++info_at == Layout::kInfos) info_at = 0;
      const bool present = slab_token < tokens && described != ~0u;
      const int seen = present ? row_of(described) + item.shift : 0;
      int fewest = min(seen, __shfl_xor_sync(~0u, seen, 1));
      fewest = min(fewest, __shfl_xor_sync(~0u, fewest, 2));
      if (lane < kSlabs) {
        info.seen[lane] = seen;
        info.ds[lane] = present && chunk.ds.data != nullptr
                            ? chunk.ds.index(described & kEntryTokenMask, item.head,
                                             described >> kEntrySlotShift, item.part) +
                                  lane % kSlabs - slab_token * slabs
                            : -1;
        info.fewest_seen = fewest;
      }
      __syncwarp();
      bring(maps.q, tokens * stats_bytes);
      if (lane < tokens) {
        ptx::bulk_load(address(info.rows) + lane * stats_bytes,
                       chunk.stats.data + chunk.stats.index(own == ~0u ? none : row_of(own), item.head),
                       address(control.full[at.slot]), stats_bytes);
      }
      at.advance();

      if (tile > 0) continue;
      // The keys, when those of the item before are no longer needed.
      ptx::barrier_wait(address(control.keys_empty), (round & 1) ^ 1);
      const uint32_t full = address(control.keys_full);
      if (lane == 0) {
        control.item[round & 1] = {tiles, item.head, item.key_row, item.num_keys, item.partial, {}};
        ptx::barrier_arrive_expect(full, 2 * Layout::kTile);
      }
      __syncwarp();
      if (lane < 2 * kPanels) {
        const bool is_v = lane >= kPanels;
        ptx::bulk_load_3d(memory + (is_v ? Layout::kV : 0) + lane % kPanels * kKeyTile * kPanelPitch,
                          is_v ? &maps.v : &maps.k, full, lane % kPanels * kPanel, item.head, item.key_row);
      }
    }
    if (last) {
      ptx::barrier_wait(address(control.keys_empty), (round & 1) ^ 1);
      if (lane == 0) {
        control.item[round & 1].tiles = 0;
        ptx::barrier_arrive(address(control.keys_full));
      }
      return;
    }
    item = next;
  }
}

// Stores four registers where offset >= 0, without a branch, which between products would serialise them.
// They are not read again here: the cache is for the rows of q and dO.
__device__ __forceinline__ void store_if(uint4* data, int64_t offset, uint4 value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ge.s64 p, %1, 0;\n@p st.global.cs.v4.u32 [%0], {%2, %3, %4, %5};\n}" ::"l"(
          data + offset),
      "l"(offset), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// P and dS of a tile, packed as left operands: per slab of 16 query rows four registers.
template <typename T>
__device__ __forceinline__ void finish_scores(float (&s)[32], float (&dp)[32], uint32_t (&prob)[kSlabs][4],
                                              uint32_t (&ds)[kSlabs][4], const TileInfo& info, float scale,
                                              int warp, int lane) {
  if (info.fewest_seen < kKeyTile) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int key = warp * 16 + lane / 4 + 8 * (i / 2 % 2);
      if (key >= info.seen[i / 8]) s[i] = kNegInf, dp[i] = 0.f;
    }
  }
#pragma unroll
  for (int column = 0; column < 8; ++column) {
    // Query rows 8 * column + 2 * (lane % 4) and the next one.
    const float4 row = *reinterpret_cast<const float4*>(&info.rows[8 * column + 2 * (lane & 3)]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * column + 2 * h;
      const float p0 = ptx::exp2_approx(fmaf(s[i], scale, -row.x)),
                  p1 = ptx::exp2_approx(fmaf(s[i + 1], scale, -row.z));
      prob[column / 2][column % 2 * 2 + h] = ptx::pack2<T>(p0, p1);
      ds[column / 2][column % 2 * 2 + h] = ptx::pack2<T>(p0 * (dp[i] - row.y), p1 * (dp[i + 1] - row.w));
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void consume(const Params& p, const SelectedBwdChunk& chunk, uint32_t memory,
                                        typename KeysLayout<kDim>::Control& control, int warp) {
  using Layout = KeysLayout<kDim>;
  const int lane = threadIdx.x & 31, heads_kv = p.shape.num_heads_kv;
  const float scale = static_cast<float>(p.softmax_scale);
  const auto address = [](const uint64_t& barrier) { return ptx::shared_address(&barrier); };
  RingPosition<Layout::kStages> at;
  int info_at = 0;
  for (int round = 0;; ++round) {
    ptx::barrier_wait(address(control.keys_full), round & 1);
    const ItemInfo& item = control.item[round & 1];
    const int tiles = item.tiles;
    if (tiles == 0) return;
    float dk[kDim / 2], dv[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dk[i] = dv[i] = 0.f;

#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      RingPosition<Layout::kStages> at_q = at;
      at_q.advance();
      const uint32_t d_o = memory + Layout::kRing + at.slot * Layout::kTile,
                     q = memory + Layout::kRing + at_q.slot * Layout::kTile;
      float s[32], dp[32];
      ptx::barrier_wait(address(control.full[at.slot]), at.parity);
      ptx::barrier_wait(address(control.full[at_q.slot]), at_q.parity);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim; k += 16) {
        ptx::wgmma_shared<T, 64>(s, k_major_descriptor(memory, kKeyTile, k),
                                 k_major_descriptor(q, kTileRows, k), k > 0);
      }
#pragma unroll
      for (int k = 0; k < kDim; k += 16) {
        ptx::wgmma_shared<T, 64>(dp, k_major_descriptor(memory + Layout::kV, kKeyTile, k),
                                 k_major_descriptor(d_o, kTileRows, k), k > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::pin_registers(s);
      ptx::pin_registers(dp);
      // The next item's keys may come; every lane has read what described the item before.
      __syncwarp();
      ptx::barrier_arrive_if(address(control.keys_empty), lane == 0 && tile + 1 == tiles);

      const TileInfo& info = control.tile[info_at];
      if (++info_at == Layout::kInfos) info_at = 0;
      uint32_t prob[kSlabs][4], ds[kSlabs][4];
      finish_scores<T>(s, dp, prob, ds, info, scale * kLog2e, warp, lane);
      int target[kSlabs];
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) target[slab] = info.ds[slab];

      ptx::pin_registers(dk);
      ptx::pin_registers(dv);
      ptx::wgmma_fence();
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        ptx::wgmma_registers<T, kDim>(dv, prob[slab], mn_major_descriptor(d_o, kTileRows, slab * kSlabRows),
                                      true);
      }
      ptx::wgmma_commit();
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        ptx::wgmma_registers<T, kDim>(dk, ds[slab], mn_major_descriptor(q, kTileRows, slab * kSlabRows),
                                      true);
      }
      ptx::wgmma_commit();
      // Meanwhile dS leaves, the other way round.
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        const uint4 turned =
            make_uint4(ptx::transpose_matrix(ds[slab][0]), ptx::transpose_matrix(ds[slab][2]),
                       ptx::transpose_matrix(ds[slab][1]), ptx::transpose_matrix(ds[slab][3]));
        store_if(chunk.ds.data, int64_t{target[slab]} * ScoreGrads::kVectors + warp * 32 + lane, turned);
      }
      ptx::wgmma_wait<1>();
      // Every lane has read the tile's info, which is written again when either place is free (see kInfos).
      __syncwarp();
      ptx::barrier_arrive_if(address(control.empty[at.slot]), lane == 0);
      ptx::wgmma_wait<0>();
      ptx::pin_registers(dk);
      ptx::pin_registers(dv);
      ptx::barrier_arrive_if(address(control.empty[at_q.slot]), lane == 0);
      at = at_q;
      at.advance();
    }
    const int64_t row = (int64_t{item.key_row} + warp * 16) * heads_kv + item.head;
    const int partial = item.partial, rows = item.num_keys - warp * 16;
    if (partial >= 0) {
      float* sums = chunk.partials + (int64_t{partial} * kKeyTile + warp * 16) * (2 * kDim);
      put_slab<false>(dk, scale, sums, 2 * kDim, 16, lane);
      put_slab<false>(dv, 1.f, sums + kDim, 2 * kDim, 16, lane);
    } else {
      if (p.grads.dk != nullptr)
        put_slab<true>(dk, scale, static_cast<float*>(p.grads.dk) + row * kDim, heads_kv * kDim, rows, lane);
      if (p.grads.dv != nullptr)
        put_slab<true>(dv, 1.f, static_cast<float*>(p.grads.dv) + row * kDim, heads_kv * kDim, rows, lane);
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    selected_attention_bwd_keys_sm90(const Params p, const SelectedBwdChunk chunk,
                                     const __grid_constant__ KeysMaps maps) {
  using Layout = KeysLayout<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto* controls = reinterpret_cast<typename Layout::Control*>(shared + kConsumers * Layout::kConsumerBytes);
  const uint32_t base = ptx::shared_address(shared);
  // The same number in all lanes, which the compiler cannot know.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;
  if (threadIdx.x < kConsumers) {
    auto& control = controls[threadIdx.x];
    for (int slot = 0; slot < Layout::kStages; ++slot) {
      ptx::barrier_init(ptx::shared_address(&control.full[slot]), 1);
      ptx::barrier_init(ptx::shared_address(&control.empty[slot]), 4);
    }
    ptx::barrier_init(ptx::shared_address(&control.keys_full), 1);
    ptx::barrier_init(ptx::shared_address(&control.keys_empty), 4);
    ptx::barrier_init_fence();
  }
  // Rows of a tile that no token fills are multiplied by zero: they must be finite.
  for (int i = threadIdx.x; i < kConsumers * Layout::kInfos * kTileRows; i += kThreads) {
    auto& control = controls[i / (Layout::kInfos * kTileRows)];
    control.tile[i / kTileRows % Layout::kInfos].rows[i % kTileRows] = make_float2(-kNegInf, 0.f);
  }
  for (int i = threadIdx.x; i < kConsumers * Layout::kConsumerBytes / 16; i += kThreads)
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  ptx::async_proxy_fence();
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  __syncthreads();
  if (warpgroup == 0) {
    ptx::release_registers<40>();
    if (warp < kConsumers)
      produce<T, kDim>(p, chunk, maps, base + warp * Layout::kConsumerBytes, controls[warp],
                       threadIdx.x & 31);
  } else {
    ptx::claim_registers<232>();
    const int consumer = warpgroup - 1;
    consume<T, kDim>(p, chunk, base + consumer * Layout::kConsumerBytes, controls[consumer], warp % 4);
  }
}

}  // namespace

bool selected_attention_bwd_keys(const Params& p, const SelectedBwdChunk& chunk, const Stream& stream,
                                 Status* status) {
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        if constexpr (kDimQK == kDimV) {
          using Layout = KeysLayout<kDimQK>;
          const int group = p.shape.group(), rows = chunk.ds.slabs * kSlabRows,
                    heads_kv = p.shape.num_heads_kv;
          KeysMaps maps;
          const bool suits =
              make_group_tensor_map(&maps.q, p.dtype, p.q, p.seqs.total_q, heads_kv, group, kDimQK, 1,
                                    rows) &&
              make_group_tensor_map(&maps.d_o, p.dtype, p.grads.d_o, p.seqs.total_q, heads_kv, group, kDimV,
                                    1, rows) &&
              make_tensor_map(&maps.k, p.dtype, p.k, p.seqs.key_rows, heads_kv, kDimQK, kKeyTile, 1) &&
              make_tensor_map(&maps.v, p.dtype, p.v, p.seqs.key_rows, heads_kv, kDimV, kKeyTile, 1);
          if (!suits) return false;
          *status =
              launch_chained("selected_attention_bwd_keys_sm90", selected_attention_bwd_keys_sm90<T, kDimQK>,
                             dim3(static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount))),
                             kThreads, Layout::kBytes, stream, p, chunk, maps);
          return true;
        } else {
          return false;
        }
      });
}

}  // namespace nsa::cuda::sm90
