// Attention over chosen blocks, forward, for Hopper.
//
// A thread block walks tiles of adjacent tokens of one KV head. Of the last warpgroup, one warp lists the
// sorted union of the blocks that a tile's tokens chose (while the tile before is at work), one brings every
// block's K and V once into rings of slots by TMA, one brings queries, one zeroes what no token sees. Each
// consumer warpgroup owns 64 query rows, a warp 16 of them: a block that most of its warps chose is one wgmma
// product for all four, another one is mma.sync work of those that chose it; both keep the same registers.
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/selected_tile.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/lazy_softmax.cuh"
#include "cuda/tile/swizzled_warp_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kMaxStages = 8;
constexpr int kMaxWords = 1 << 10;  // of the bitmap of blocks

// Registers of a consumer thread; the producers get what is left.
template <int kGroups>
constexpr int kConsumerRegisters = kGroups == 3 ? 152 : 224;
template <int kGroups>
constexpr int kProducerRegisters = kGroups == 3 ? 56 : 56;

template <int kDimQK, int kDimV, int kKeys, int kGroups>
struct Layout {
  static constexpr int kRows = 64;  // of a consumer warpgroup
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kQBytes = swizzled_tile_bytes<kDimQK>(kRows);
  static constexpr int kKBytes = swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kVBytes = swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kRing = kGroups * kQBytes;  // K slots, then V slots
};

// Barriers, and the tiles whose lists are ready.
struct Control {
  uint64_t k_full[kMaxStages], k_empty[kMaxStages];
  uint64_t v_full[kMaxStages], v_empty[kMaxStages];
  uint64_t v_landed[kMaxStages];  // V of a block that is not seen whole: to be zeroed behind what is seen
  uint64_t q_full[4], q_empty[4];
  uint64_t list_full[2], list_empty[2];
  ChosenTile tiles[2];
};

// Slots are used in turn; the phase of a barrier flips with every round.
struct RingPosition {
  int slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

template <int kDimQK, int kDimV, int kKeys, int kGroups>
struct Shared : Layout<kDimQK, kDimV, kKeys, kGroups> {
  using Sizes = Layout<kDimQK, kDimV, kKeys, kGroups>;
  Control* control;
  ChosenPart* lists;  // two, and the scratch memory of their builder
  uint32_t tiles;
  int slots, list_size;

  __device__ Shared(unsigned char* memory, int slots, int list_size, int words)
      : control(reinterpret_cast<Control*>(memory)),
        lists(reinterpret_cast<ChosenPart*>(memory + sizeof(Control))),
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
    return {bitmap, reinterpret_cast<int*>(bitmap + words), words};
  }
  // What lies in front of the tiles; these begin at multiples of 1,024 bytes.
  __host__ __device__ static int front_bytes(int list_size, int words) {
    return (static_cast<int>(sizeof(Control) + 2 * list_size * sizeof(ChosenPart)) + 8 * words + 1023) /
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

// One warp: the unions of all tiles, one ahead of their use. Heads are taken one after another, so that the
// keys of one stay in the L2 cache.
template <int kGroups, typename S>
__device__ __forceinline__ void list_tiles(const SelectedAttentionFwdParams& p, const S& shared,
                                           const RowPlan& plan, int num_tiles, int part_shift, int words,
                                           int lane) {
  RingPosition list;
  const int num_items = num_tiles * p.shape.num_heads_kv;
#pragma unroll 1
  for (int item = blockIdx.x;; item += gridDim.x) {
    const bool end = item >= num_items;
    SequenceTile tile{};
    if (!end) tile = find_sequence_tile(p.seqs, item % num_tiles, plan.tokens);
    if (!end && tile.count == 0) continue;
    ptx::barrier_wait(at(shared.control->list_empty[list.slot]), list.phase ^ 1);
    // The fields go through shared memory: this warp has few registers.
    ChosenTile& chosen = shared.control->tiles[list.slot];
    if (lane == 0) {
      chosen = {end ? kNoMoreTiles : 0,
                tile.count,
                item / num_tiles,
                static_cast<int>(tile.seq.q_begin + tile.begin),
                static_cast<int>(tile.seq.position(tile.begin)),
                static_cast<int>(tile.seq.k_begin),
                static_cast<int>(count_keys(p.seqs, tile.seq, KeyBlocks{}))};
    }
    __syncwarp();
    if (!end) {
      const int count = build_union(p, chosen, plan, kGroups * 4, part_shift, shared.scratch(words),
                                    shared.lists + list.slot * shared.list_size, lane);
      if (lane == 0) chosen.num_parts = count;
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(at(shared.control->list_full[list.slot]));
    if (end) return;
    list.advance(2);
  }
}

// One warp: K and V of every part of every tile.
template <int kKeys, int kDimQK, int kDimV, typename S>
__device__ __forceinline__ void load_keys(const S& shared, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                          int lane) {
  const Control& c = *shared.control;
  RingPosition ring;
  for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart* parts, uint32_t) {
    if (lane != 0) return;
    const int head = tile.head, key_row = tile.key_row;
#pragma unroll 1
    for (int i = 0; i < tile.num_parts; ++i) {
      const ChosenPart chosen = parts[i];
      const int begin = chosen.part() * kKeys, s = ring.slot;
      ptx::barrier_wait(at(c.k_empty[s]), ring.phase ^ 1);
      ptx::barrier_arrive_expect(at(c.k_full[s]), S::kKBytes);
      ptx::bulk_load_4d(shared.k(s), k_map, at(c.k_full[s]), 0, head, key_row + begin, 0);
      const uint32_t v_full = at(begin + kKeys > tile.end(chosen.tokens) ? c.v_landed[s] : c.v_full[s]);
      ptx::barrier_wait(at(c.v_empty[s]), ring.phase ^ 1);
      ptx::barrier_arrive_expect(v_full, S::kVBytes);
      ptx::bulk_load_4d(shared.v(s), v_map, v_full, 0, head, key_row + begin, 0);
      ring.advance(shared.slots);
    }
  });
}

// One warp: zeroes the values that no token of the tile sees: there may be anything, and 0 * NaN is NaN.
template <int kKeys, int kDimV, typename S>
__device__ __forceinline__ void clear_unseen_values(const S& shared, int lane) {
  RingPosition ring;
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

// One warp: the queries of every tile.
template <int kDimQK, int kGroups, typename S>
__device__ __forceinline__ void load_queries(const S& shared, const CUtensorMap* q_map, int shift, int lane) {
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
  });
}

// A consumer warp: 16 rows, of which a thread holds lane / 4 and lane / 4 + 8.
template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
struct Consumer {
  using S = Shared<kDimQK, kDimV, kKeys, kGroups>;
  // At how many warps that chose a block all four take it together.
  static constexpr int kTogether = 3;

  const S& shared;
  const int group, warp, lane;  // warp: within the warpgroup
  const float scale;
  const RowPlan& plan;
  const int row;       // of the thread's first row in the tile; the second is 8 further
  const uint32_t own;  // bits of this warp's tokens
  RingPosition ring;
  float out[kDimV / 8][4];
  LazySoftmax softmax;

  int position;  // of the tile's first token

  __device__ __forceinline__ int token(int h) const { return row + 8 * h >> plan.shift; }

  __device__ __forceinline__ void begin_tile(const ChosenTile& tile) {
    softmax = LazySoftmax();
#pragma unroll
    for (int d = 0; d < kDimV / 8; ++d) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] = 0;
    }
    position = tile.position;
  }

  __device__ __forceinline__ void mask_scores(float (&score)[kKeys / 8][4], uint32_t mask, int begin) const {
    if ((mask & own) == own && begin + kKeys <= position + __ffs(own)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int visible = mask >> token(h) & 1 ? position + token(h) + 1 - begin - (lane & 3) * 2 : 0;
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        if (i / 2 * 8 + i % 2 >= visible) score[i / 2][2 * h + i % 2] = kNegInf;
      }
    }
  }

  __device__ __forceinline__ void release(const uint64_t& barrier) const {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(at(barrier));
  }

  // This warp alone.
  __device__ __forceinline__ void attend(float (&score)[kKeys / 8][4], uint32_t mask, int begin) {
    const Control& c = *shared.control;
    const int s = ring.slot;
    uint32_t p[kKeys / 16][4];
    ptx::barrier_wait(at(c.k_full[s]), ring.phase);
    multiply_swizzled_transposed<T, kDimQK, kKeys, S::kRows>(score, shared.q(group) + warp * 16 * kPanelPitch,
                                                             shared.k(s), lane);
    release(c.k_empty[s]);
    mask_scores(score, mask, begin);
    softmax.update(score, out, scale);
    pack_fragments<T>(p, score);
    ptx::barrier_wait(at(c.v_full[s]), ring.phase);
    multiply_swizzled<T, kDimV, kKeys>(out, p, shared.v(s), lane);
    release(c.v_empty[s]);
  }

  // The warpgroup together; warps that did not choose the part add zeros. Scores and values of two parts in a
  // row are one group of products, so that the tensor cores have work while the warps are at the barriers.
  static __device__ __forceinline__ bool is_together(const ChosenPart& chosen, int group) {
    return kKeys == 64 && __popc(chosen.warps() >> (group * 4) & 15) >= kTogether;
  }

  __device__ __forceinline__ void issue_scores(float (&score)[kKeys / 8][4], int slot) const {
#pragma unroll
    for (int k = 0; k < kDimQK; k += 16)
      ptx::wgmma_shared<T, kKeys>(flat(score), k_major_descriptor(shared.q(group), S::kRows, k),
                                  k_major_descriptor(shared.k(slot), kKeys, k), k > 0);
  }
  __device__ __forceinline__ void issue_values(const uint32_t (&p)[kKeys / 16][4], int slot) {
#pragma unroll
    for (int k = 0; k < kKeys; k += 16)
      ptx::wgmma_registers<T, kDimV>(flat(out), p[k / 16], mn_major_descriptor(shared.v(slot), kKeys, k),
                                     true);
  }
  template <int kTiles>
  static __device__ __forceinline__ auto flat(float (&acc)[kTiles][4]) -> float (&)[kTiles * 4] {
    return reinterpret_cast<float(&)[kTiles * 4]>(acc);
  }
  __device__ __forceinline__ void finish_products() const {
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  __device__ __forceinline__ void score_together(float (&score)[kKeys / 8][4]) const {
    const Control& c = *shared.control;
    ptx::barrier_wait(at(c.k_full[ring.slot]), ring.phase);
    ptx::wgmma_fence();
    issue_scores(score, ring.slot);
    finish_products();
    ptx::pin_registers(flat(score));
    release(c.k_empty[ring.slot]);
  }

  // From this part's scores; leaves the scores of the next part where that is the warpgroup's too.
  __device__ __forceinline__ void attend_together(float (&score)[kKeys / 8][4], uint32_t mask, int begin,
                                                  bool next_together) {
    const Control& c = *shared.control;
    uint32_t p[kKeys / 16][4];
    mask_scores(score, mask, begin);
    softmax.update(score, out, scale);
    pack_fragments<T>(p, score);
    ptx::barrier_wait(at(c.v_full[ring.slot]), ring.phase);
    ptx::pin_registers(flat(out));
    if (next_together) {
      RingPosition next = ring;
      next.advance(shared.slots);
      ptx::barrier_wait(at(c.k_full[next.slot]), next.phase);
      ptx::wgmma_fence();
      issue_values(p, ring.slot);
      issue_scores(score, next.slot);
      finish_products();
      ptx::pin_registers(flat(score));
      release(c.k_empty[next.slot]);
    } else {
      ptx::wgmma_fence();
      issue_values(p, ring.slot);
      finish_products();
    }
    ptx::pin_registers(flat(out));
    release(c.v_empty[ring.slot]);
  }

  __device__ __forceinline__ void attend_tile(const ChosenTile& tile, const ChosenPart* parts) {
    float score[kKeys / 8][4];
    bool scored = false;
#pragma unroll 1
    for (int i = 0; i < tile.num_parts; ++i) {
      const ChosenPart chosen = parts[i];
      const int begin = chosen.part() * kKeys;
      if (is_together(chosen, group)) {
        if constexpr (kKeys == 64) {
          if (!scored) score_together(score);
          scored = is_together(parts[i + 1], group);
          attend_together(score, chosen.tokens, begin, scored);
        }
      } else if (chosen.warps() >> (group * 4 + warp) & 1) {
        attend(score, chosen.tokens, begin);
      } else {
        // Not before both have landed: an earlier arrival would count for the round before.
        ptx::barrier_wait(at(shared.control->v_full[ring.slot]), ring.phase);
        if (lane == 0) {
          ptx::barrier_arrive(at(shared.control->k_empty[ring.slot]));
          ptx::barrier_arrive(at(shared.control->v_empty[ring.slot]));
        }
      }
      ring.advance(shared.slots);
    }
  }

  __device__ __forceinline__ void store(const SelectedAttentionFwdParams& p, const ChosenTile& tile) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int member = row + 8 * h - (token(h) << plan.shift);
      const bool valid = token(h) < tile.num_tokens && member < p.shape.group();
      const int64_t row = static_cast<int64_t>(tile.query_row + token(h)) * p.shape.num_heads_q +
                          tile.head * p.shape.group() + member;
      const float sum = quad_sum(softmax.sum[h]);
      store_row<T>(valid ? static_cast<T*>(p.o) + row * kDimV : nullptr, out, h, sum == 0.f ? 0.f : 1.f / sum,
                   lane);
      if (valid && (lane & 3) == 0) {
        static_cast<float*>(p.lse)[row] =
            softmax.max[h] == kNegInf ? kNegInf : (softmax.max[h] * scale + log2f(sum)) * kLn2;
      }
    }
  }

  __device__ __forceinline__ void run(const SelectedAttentionFwdParams& p) {
    for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart* parts, uint32_t index) {
      begin_tile(tile);
      ptx::barrier_wait(at(shared.control->q_full[group]), index & 1);
      attend_tile(tile, parts);
      release(shared.control->q_empty[group]);
      store(p, tile);
    });
  }
};

template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
__global__ void __launch_bounds__(Layout<kDimQK, kDimV, kKeys, kGroups>::kThreads, 1)
    selected_attention_fwd_sm90(const __grid_constant__ SelectedAttentionFwdParams p,
                                const __grid_constant__ CUtensorMap q_map,
                                const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map,
                                const __grid_constant__ RowPlan plan, const int slots, const int list_size,
                                const int part_shift, const int words, const int num_tiles) {
  using S = Shared<kDimQK, kDimV, kKeys, kGroups>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const S shared(memory, slots, list_size, words);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    Control& c = *shared.control;
    for (int s = 0; s < slots; ++s) {
      ptx::barrier_init(at(c.k_full[s]), 1);
      ptx::barrier_init(at(c.k_empty[s]), kGroups * 4);
      ptx::barrier_init(at(c.v_full[s]), 1);
      ptx::barrier_init(at(c.v_empty[s]), kGroups * 4);
      ptx::barrier_init(at(c.v_landed[s]), 1);
    }
    for (int group = 0; group < kGroups; ++group) {
      ptx::barrier_init(at(c.q_full[group]), 1);
      ptx::barrier_init(at(c.q_empty[group]), 4);
    }
    for (int list = 0; list < 2; ++list) {
      ptx::barrier_init(at(c.list_full[list]), 1);
      ptx::barrier_init(at(c.list_empty[list]), kGroups * 4 + 3);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();

  if (warp >= kGroups * 4) {
    ptx::release_registers<kProducerRegisters<kGroups>>();
    switch (warp - kGroups * 4) {
      case 0:
        return load_keys<kKeys, kDimQK, kDimV>(shared, &k_map, &v_map, lane);
      case 1:
        return list_tiles<kGroups>(p, shared, plan, num_tiles, part_shift, words, lane);
      case 2:
        return clear_unseen_values<kKeys, kDimV>(shared, lane);
      default:
        return load_queries<kDimQK, kGroups>(shared, &q_map, plan.shift, lane);
    }
  }
  ptx::claim_registers<kConsumerRegisters<kGroups>>();
  Consumer<T, kDimQK, kDimV, kKeys, kGroups> consumer{.shared = shared,
                                                      .group = warp / 4,
                                                      .warp = warp % 4,
                                                      .lane = lane,
                                                      .scale = static_cast<float>(p.softmax_scale) * kLog2e,
                                                      .plan = plan,
                                                      .row = warp * 16 + lane / 4,
                                                      .own = plan.tokens_of_warp(warp)};
  consumer.run(p);
}

template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
bool launch_selected(const SelectedAttentionFwdParams& p, const Stream& stream, Status* status) {
  using S = Shared<kDimQK, kDimV, kKeys, kGroups>;
  const RowPlan plan(p.shape.group(), kGroups * S::kRows);
  const int64_t words = ceil_div(ceil_div(p.seqs.max_seqlen_k, p.block_size), 32);
  const int64_t num_tiles = num_sequence_tiles(p.seqs, plan.tokens);
  if (words > kMaxWords || num_tiles * p.shape.num_heads_kv > INT32_MAX / 2) return false;
  const int part_shift = p.block_size > kKeys ? 1 : 0;
  const int list_size =
      (static_cast<int>(min64(plan.tokens * p.num_selected_blocks, 32 * words)) << part_shift) + 1;
  const int fixed = S::front_bytes(list_size, static_cast<int>(words)) + S::kRing;
  const int slot_bytes = S::kKBytes + S::kVBytes;
  const int available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int slots = static_cast<int>(min64(kMaxStages, (available - fixed) / slot_bytes));
  if (slots < 2) return false;

  CUtensorMap q_map, k_map, v_map;
  const int heads_kv = p.shape.num_heads_kv;
  if (!make_group_tensor_map(&q_map, p.dtype, p.q, p.seqs.total_q, heads_kv, p.shape.group(), kDimQK,
                             S::kRows >> plan.shift, 1 << plan.shift) ||
      !make_panel_tensor_map(&k_map, p.dtype, p.k, p.seqs.key_rows, heads_kv, kDimQK, kKeys) ||
      !make_panel_tensor_map(&v_map, p.dtype, p.v, p.seqs.key_rows, heads_kv, kDimV, kKeys)) {
    return false;
  }
  const int64_t grid = min64(num_tiles * heads_kv, device_attribute(cudaDevAttrMultiProcessorCount));
  *status = launch(
      "selected_attention_fwd_sm90", selected_attention_fwd_sm90<T, kDimQK, kDimV, kKeys, kGroups>,
      dim3(static_cast<unsigned>(grid)), S::kThreads, fixed + slots * slot_bytes, stream, p, q_map, k_map,
      v_map, plan, slots, list_size, part_shift, static_cast<int>(words), static_cast<int>(num_tiles));
  return true;
}

}  // namespace

bool selected_attention_forward(const SelectedAttentionFwdParams& p, const Stream& stream, Status* status) {
  const int64_t l = p.block_size;
  if ((l != 32 && l != 64 && l != 128) || p.shape.group() > 64 || p.num_selected_blocks > 64 ||
      p.seqs.total_q > INT32_MAX / 2 || p.seqs.key_rows > INT32_MAX / 2) {
    return false;
  }
  return dispatch_kernels(p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v,
                          [&]<typename T, int kDimQK, int kDimV>() {
                            if (l == 32) return launch_selected<T, kDimQK, kDimV, 32, 2>(p, stream, status);
                            return launch_selected<T, kDimQK, kDimV, 64, 3>(p, stream, status);
                          });
}

}  // namespace nsa::cuda::sm90
