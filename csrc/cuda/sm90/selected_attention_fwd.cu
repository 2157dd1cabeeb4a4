// Attention over chosen blocks, forward, for Hopper.
//
// A thread block walks tiles of adjacent tokens of one KV head. Of the last warpgroup, one warp lists the
// union of the blocks that a tile's tokens chose (while the tile before is at work), one brings every
// block's K and V once into rings of slots by TMA, one brings queries, one zeroes what no token sees. Each
// consumer warpgroup owns 64 query rows, a warp 16 of them: a block that most of its warps chose is one wgmma
// product for all four, another one is mma.sync work of those that chose it; both keep the same registers.
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/selected_pipeline.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/gated_row.cuh"
#include "cuda/tile/lazy_softmax.cuh"
#include "cuda/tile/swizzled_warp_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

// A consumer warp: 16 rows, of which a thread holds lane / 4 and lane / 4 + 8.
template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
struct Consumer {
  using S = SelectedShared<kDimQK, kDimV, kKeys, kGroups>;
  const S& shared;
  const int group, warp, lane;  // warp: within the warpgroup
  const float& scale;           // times log2(e)
  const RowPlan& plan;
  SlotPosition ring;
  float out[kDimV / 8][4];
  LazySoftmax softmax;

  int position;             // of the tile's first token
  uint32_t first_part = 0;  // of the tile, counted over all tiles

  // Recomputed where they are needed, because registers are scarce: the thread's first row in the tile (the
  // second is 8 further), a row's token, this warp's tokens as bits.
  __device__ __forceinline__ int row() const { return group * 64 + warp * 16 + lane / 4; }
  __device__ __forceinline__ int token(int h) const { return row() + 8 * h >> plan.shift; }
  __device__ __forceinline__ uint32_t own_tokens() const { return plan.tokens_of_warp(group * 4 + warp); }

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
    const uint32_t own = own_tokens();
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

  // The same behind a product of this warp alone, acc. An arrival does not wait for ldmatrix in front of it,
  // and TMA, which then fills the slot again, is another proxy: so the address depends on what came of every
  // load (one serves two tiles of 8 columns). Lane 0, which arrives, adds nothing to it.
  template <int kTiles>
  __device__ __forceinline__ void release_after(const uint64_t& barrier,
                                                const float (&acc)[kTiles][4]) const {
    uint32_t bits = 0;
#pragma unroll
    for (int n = 1; n < kTiles; n += 2) bits ^= __float_as_uint(acc[n][3]);
    __syncwarp();
    ptx::barrier_arrive_if(at(barrier) + (bits & lane), lane == 0);
  }

  // A warp that has skipped parts may be rounds behind a barrier's phase, where a wait by parity alone would
  // pass too early; so it first waits until the loads of its part are under way.
  __device__ __forceinline__ static void wait_for(const uint32_t& issued, uint32_t part, const uint64_t& full,
                                                  uint32_t phase) {
    while (static_cast<int32_t>(*static_cast<const volatile uint32_t*>(&issued) - part) <= 0) __nanosleep(32);
    ptx::barrier_wait(at(full), phase);
  }
  __device__ __forceinline__ void wait_for_k(const SlotPosition& at, uint32_t part) const {
    wait_for(shared.control->k_issued, part, shared.control->k_full[at.slot], at.phase);
  }
  __device__ __forceinline__ void wait_for_v(const SlotPosition& at, uint32_t part) const {
    wait_for(shared.control->v_issued, part, shared.control->v_full[at.slot], at.phase);
  }

  // This warp alone. part: its number over all tiles.
  __device__ __forceinline__ void attend(const ChosenPart& chosen, uint32_t part) {
    const SelectedControl& c = *shared.control;
    const int s = ring.slot;
    float score[kKeys / 8][4];
    uint32_t p[kKeys / 16][4];
    wait_for_k(ring, part);
    multiply_swizzled_transposed<T, kDimQK, kKeys, S::kRows>(score, shared.q(group) + warp * 16 * kPanelPitch,
                                                             shared.k(s), lane);
    mask_scores(score, chosen.tokens, chosen.part() * kKeys);
    softmax.update(score, out, scale);
    release(c.k_empty[s]);  // its vote took every score, so no load of a key is under way
    pack_fragments<T>(p, score);
    wait_for_v(ring, part);
    multiply_swizzled<T, kDimV, kKeys>(out, p, shared.v(s), lane);
    release_after(c.v_empty[s], out);
  }

  template <int kTiles>
  static __device__ __forceinline__ auto flat(float (&acc)[kTiles][4]) -> float (&)[kTiles * 4] {
    return reinterpret_cast<float(&)[kTiles * 4]>(acc);
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
  static __device__ __forceinline__ void finish_products() {
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  // The warpgroup together; warps that did not choose the part add zeros.
  __device__ __forceinline__ void attend_together(const ChosenPart& chosen, uint32_t part) {
    const SelectedControl& c = *shared.control;
    const int s = ring.slot;
    float score[kKeys / 8][4];
    uint32_t p[kKeys / 16][4];
    wait_for_k(ring, part);
    ptx::wgmma_fence();
    issue_scores(score, s);
    finish_products();
    ptx::pin_registers(flat(score));
    release(c.k_empty[s]);
    mask_scores(score, chosen.tokens, chosen.part() * kKeys);
    softmax.update(score, out, scale);
    pack_fragments<T>(p, score);
    wait_for_v(ring, part);
    ptx::pin_registers(flat(out));
    ptx::wgmma_fence();
    issue_values(p, s);
    finish_products();
    ptx::pin_registers(flat(out));
    release(c.v_empty[s]);
  }

  // 32 parts at a time, a lane looks at one of them; then the warp goes from one of its own to the next.
  __device__ __forceinline__ void attend_tile(const ChosenTile& tile, const ChosenPart* parts,
                                              const RingSize& size) {
    int at = 0;  // where `ring` stands
#pragma unroll 1
    for (int begin = 0; begin < tile.num_parts; begin += 32) {
      const uint32_t warps =
          begin + lane < tile.num_parts ? parts[begin + lane].warps() >> (group * 4) & 15 : 0;
      const uint32_t together = __ballot_sync(~0u, is_together<kKeys>(warps));
      uint32_t left = __ballot_sync(~0u, warps >> warp & 1) | together;
#pragma unroll 1
      while (left != 0) {
        const int i = __ffs(left) - 1;
        left &= left - 1;
        ring = ring.after(begin + i - at, size);
        at = begin + i;
        if (together >> i & 1) {
          if constexpr (kKeys == 64) attend_together(parts[at], first_part + at);
        } else {
          attend(parts[at], first_part + at);
        }
      }
    }
    ring = ring.after(tile.num_parts - at, size);
    first_part += tile.num_parts;
  }

  // gate.o: the weighted sum of all branches, or null for none.
  __device__ __forceinline__ void store(const SelectedAttentionFwdParams& p,
                                        const GatedCombineFwdParams& gate, const ChosenTile& tile) const {
    const int lane = ptx::lane_id(), first = group * 64 + warp * 16 + lane / 4;
    int64_t rows[2];
    bool valid[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first + 8 * h >> plan.shift, member = first + 8 * h - (token << plan.shift);
      valid[h] = token < tile.num_tokens && member < p.shape.group();
      // Rows of nobody read the first one.
      rows[h] = static_cast<int64_t>(tile.query_row + (valid[h] ? token : 0)) * p.shape.num_heads_q +
                tile.head * p.shape.group() + (valid[h] ? member : 0);
    }
    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) factor[h] = sum[h] == 0.f ? 0.f : __fdividef(1.f, sum[h]);
    // Lane h of a quad writes the statistics of row h.
    const bool second = lane & 1;
    const float max = second ? softmax.max[1] : softmax.max[0];
    const float lse = max == kNegInf ? kNegInf : (max * scale + log2f(second ? sum[1] : sum[0])) * kLn2;
    if ((lane & 2) == 0 && (second ? valid[1] : valid[0]))
      static_cast<float*>(p.lse)[second ? rows[1] : rows[0]] = lse;
    T* o = static_cast<T*>(p.o);
    if (gate.o != nullptr) {
      const GatedRows<T, kDimV / 8> gated{
          gate, p.o == gate.o ? nullptr : o, {rows[0], rows[1]}, {valid[0], valid[1]}, lane};
      return gated.store(out, factor);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_row<T>(valid[h] ? o + rows[h] * kDimV : nullptr, out, h, factor[h], lane);
  }

  __device__ __forceinline__ void run(const SelectedAttentionFwdParams& p, const GatedCombineFwdParams& gate,
                                      const RingSize& size) {
    for_each_tile(shared, lane, [&](const ChosenTile& tile, const ChosenPart* parts, uint32_t index) {
      begin_tile(tile);
      ptx::barrier_wait(at(shared.control->q_full[group]), index & 1);
      attend_tile(tile, parts, size);
      release(shared.control->q_empty[group]);
      ptx::wait_for_dependency();  // for what the gate weighs
      store(p, gate, tile);
    });
  }
};

// By one warp: what the gate reads at the end of a tile into the L2 cache.
template <int kDimV>
__device__ __forceinline__ void prefetch_branches(const AttentionShape& shape,
                                                  const GatedCombineFwdParams& gate, const ChosenTile& tile,
                                                  int lane) {
  const int group = shape.group();
  const auto row = [&](int token) {
    return static_cast<int64_t>(tile.query_row + token) * shape.num_heads_q + tile.head * group;
  };
#pragma unroll 1
  for (int i = lane; i < 2 * tile.num_tokens; i += 32) {
    const void* branch = i & 1 ? gate.o_branch[2] : gate.o_branch[0];
    ptx::bulk_prefetch(static_cast<const char*>(branch) + row(i >> 1) * kDimV * 2, group * kDimV * 2);
    const int64_t bytes = kNumBranches * (gate.gate_dtype == DType::kF32 ? 4 : 2);
    const int64_t end = (i & 1) * (group - 1);
    ptx::prefetch(static_cast<const char*>(gate.gate_logits) + (row(i >> 1) + end) * bytes);
  }
}

template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
__global__ void __launch_bounds__(SelectedLayout<kDimQK, kDimV, kKeys, kGroups>::kThreads, 1)
    selected_attention_fwd_sm90(const __grid_constant__ SelectedAttentionFwdParams p,
                                const __grid_constant__ GatedCombineFwdParams gate, const bool early,
                                const __grid_constant__ CUtensorMap q_map,
                                const __grid_constant__ CUtensorMap k_map,
                                const __grid_constant__ CUtensorMap v_map,
                                const __grid_constant__ RowPlan plan, const __grid_constant__ float scale,
                                const __grid_constant__ RingSize size,
                                const __grid_constant__ UnionPlan unions, const int list_size,
                                const __grid_constant__ TileOrder order) {
  using S = SelectedShared<kDimQK, kDimV, kKeys, kGroups>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const S shared(memory, size.slots, list_size, unions.words);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    SelectedControl& c = *shared.control;
    for (int s = 0; s < size.slots; ++s) {
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
    c.k_issued = c.v_issued = 0;
    ptx::barrier_init_fence();
  }
  if (!early) ptx::wait_for_dependency();
  __syncthreads();

  if (warp >= kGroups * 4) {
    ptx::release_registers<kProducerRegisters<kGroups>>();
    switch (warp - kGroups * 4) {
      case 0:
        return load_keys<kKeys, kGroups>(shared, &k_map, &v_map, lane);
      case 1:
        return list_tiles<kGroups>(p, shared, plan, unions, order, lane);
      case 2:
        return clear_unseen_values<kKeys, kDimV>(shared, lane);
      default:
        load_queries<kDimQK, kGroups>(shared, &q_map, plan.shift, lane, [&](const ChosenTile& tile) {
          if (gate.o != nullptr) prefetch_branches<kDimV>(p.shape, gate, tile, lane);
        });
        ptx::wait_for_dependency();
        return ptx::launch_dependents();
    }
  }
  ptx::claim_registers<kConsumerRegisters<kGroups>>();
  Consumer<T, kDimQK, kDimV, kKeys, kGroups> consumer{
      .shared = shared, .group = warp / 4, .warp = warp % 4, .lane = lane, .scale = scale, .plan = plan};
  consumer.run(p, gate, size);
}

// Keys and values that stay in the L2 cache (50 MB on an H100).
constexpr int64_t kMaxCachedBytes = int64_t{24} << 20;

template <typename T, int kDimQK, int kDimV, int kKeys, int kGroups>
bool launch_selected(const SelectedAttentionFwdParams& p, const GatedCombineFwdParams& gate, Begin begin,
                     int* ticket, const Stream& stream, Status* status) {
  using S = SelectedShared<kDimQK, kDimV, kKeys, kGroups>;
  const RowPlan plan(p.shape.group(), kGroups * S::kRows);
  const int64_t words = ceil_div(ceil_div(p.seqs.max_seqlen_k, p.block_size), 32);
  const int64_t num_tiles = num_sequence_tiles(p.seqs, plan.tokens);
  if (words > kMaxWords || num_tiles * p.shape.num_heads_kv > INT32_MAX / 2) return false;
  UnionPlan unions{};
  while (1 << unions.slot_bits < p.num_selected_blocks) ++unions.slot_bits;
  while (int64_t{1} << unions.block_shift < p.block_size) ++unions.block_shift;
  unions.parts = static_cast<int>(p.block_size / kKeys);
  unions.words = static_cast<int>(words);
  unions.max_keys = unions.words * 32 << unions.block_shift;
  const int list_size =
      static_cast<int>(min64(plan.tokens * p.num_selected_blocks, 32 * words)) * unions.parts;
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
  const int64_t bytes = p.seqs.key_rows * heads_kv * (kDimQK + kDimV) * static_cast<int64_t>(sizeof(T));
  const TileOrder order{static_cast<int>(num_tiles), heads_kv, bytes <= kMaxCachedBytes, ticket};
  const int64_t grid = min64(num_tiles * heads_kv, device_attribute(cudaDevAttrMultiProcessorCount));
  *status = launch_chained(
      "selected_attention_fwd_sm90", selected_attention_fwd_sm90<T, kDimQK, kDimV, kKeys, kGroups>,
      dim3(static_cast<unsigned>(grid)), S::kThreads, fixed + slots * slot_bytes, stream, p, gate,
      begin == Begin::kEarly, q_map, k_map, v_map, plan, static_cast<float>(p.softmax_scale) * kLog2e,
      RingSize(slots), unions, list_size, order);
  return true;
}

bool dispatch_selected(const SelectedAttentionFwdParams& p, const GatedCombineFwdParams& gate, Begin begin,
                       int* ticket, const Stream& stream, Status* status) {
  const int64_t l = p.block_size;
  if ((l != 32 && l != 64 && l != 128) || p.shape.group() > 64 || p.num_selected_blocks > 64 ||
      p.seqs.total_q > INT32_MAX / 2 || p.seqs.key_rows > INT32_MAX / 2) {
    return false;
  }
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        if (l == 32) return launch_selected<T, kDimQK, kDimV, 32, 2>(p, gate, begin, ticket, stream, status);
        // Three warpgroups share a load among more tokens; queries of 192 columns would leave no ring.
        constexpr int kGroups = kDimQK <= 128 ? 3 : 2;
        return launch_selected<T, kDimQK, kDimV, 64, kGroups>(p, gate, begin, ticket, stream, status);
      });
}

}  // namespace

bool selected_attention_forward(const SelectedAttentionFwdParams& p, const Stream& stream, Status* status) {
  return dispatch_selected(p, {}, Begin::kOnTime, nullptr, stream, status);
}

bool gated_selected_attention_forward(const SelectedAttentionFwdParams& p, const GatedCombineFwdParams& gate,
                                      Begin begin, int* ticket, const Stream& stream, Status* status) {
  return dispatch_selected(p, gate, begin, ticket, stream, status);
}

}  // namespace nsa::cuda::sm90
