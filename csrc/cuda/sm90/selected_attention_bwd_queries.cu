// Attention over chosen blocks, backward, dQ = dS K from the dS that the pass over the keys has left.
//
// A thread block takes 12 slabs of query rows at a time, a warp each: adjacent tokens of one KV head. One
// warp lists the blocks that any of them chose, one tile ahead; one brings K of these, once, through a ring
// by TMA; one zeroes what no token sees. A warp goes from one of its own blocks to the next, by mma.sync; a
// block that most warps of a warpgroup chose is one wgmma product for all four, in tiles where that is the
// rule. Fragments of dS are fetched two blocks ahead.
#include "cuda/common/choices.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/selected_attention_bwd.h"
#include "cuda/sm90/selected_pipeline.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/gradient_store.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

using Params = SelectedAttentionBwdParams;

constexpr int kConsumers = 12;                   // warps
constexpr int kThreads = (kConsumers + 4) * 32;  // registers are handed out to four warps at a time
constexpr int kMaxKeyStages = 16;
constexpr int kFragments = kKeyTile / 16;

// The key tiles that a tile of queries needs, in shared memory.
struct Plan {
  int* count;        // of parts
  int* together;     // whether warpgroups take parts together
  Choosable* token;  // [kConsumers]
  uint32_t* bitmap;  // [words]
  int* rank;         // [words]: blocks before this word
  int* key_row;      // [parts]
  int* seen;         // [parts]: keys that the last of them sees
  uint32_t* warps;   // [parts]: bit i for warp i; none where no key is seen
  int* choice;       // [choices]: of the tokens, legal or -1
  uint8_t* slot;     // [parts, kConsumers]: of the warp's token's row of block_indices

  __host__ __device__ static int64_t bytes(int64_t words, int64_t parts) {
    return round_up(16 + kConsumers * 16 + 8 * words + (16 + kConsumers) * parts, 16);
  }
  __device__ Plan(unsigned char* memory, int words, int parts)
      : count(reinterpret_cast<int*>(memory)),
        together(count + 1),
        token(reinterpret_cast<Choosable*>(memory + 16)),
        bitmap(reinterpret_cast<uint32_t*>(token + kConsumers)),
        rank(reinterpret_cast<int*>(bitmap + words)),
        key_row(rank + words),
        seen(key_row + parts),
        warps(reinterpret_cast<uint32_t*>(seen + parts)),
        choice(reinterpret_cast<int*>(warps + parts)),
        slot(reinterpret_cast<uint8_t*>(choice + parts)) {}
};

struct QueriesWork {
  SelectedBwdChunk chunk;
  int tokens;          // of a tile
  int64_t tiles, all;  // of one head, of all
  int words, parts;    // of a plan
};

template <int kDim>
struct QueriesLayout {
  static constexpr int kTile = swizzled_tile_bytes<kDim>(kKeyTile);
  struct Control {
    uint64_t full[kMaxKeyStages], empty[kMaxKeyStages];
    uint64_t landed[kMaxKeyStages];  // keys that are not seen whole: to be zeroed behind what is seen
    uint64_t plan_full[2], plan_empty[2];
    uint32_t issued;  // parts whose loads are under way or done, counted over all tiles
  };
  static int64_t bytes(const QueriesWork& work, int stages) {
    return stages * kTile + round_up(sizeof(Control), 16) + 2 * Plan::bytes(work.words, work.parts);
  }
};

struct Tile {
  int head;
  int first;  // row of the chunk
  __device__ Tile(const QueriesWork& work, int64_t index)
      : head(static_cast<int>(index / work.tiles)),
        first(static_cast<int>(index % work.tiles) * work.tokens) {}
};

// One warp: which blocks the tokens of a tile chose, ascending, each once.
__device__ void make_plan(const Params& p, const QueriesWork& work, const Tile& tile, const Plan& plan,
                          int lane) {
  const int n = p.num_selected_blocks, choices = work.tokens * n, parts = work.chunk.ds.parts;
  const int slabs = work.chunk.ds.slabs;
  const int64_t first_row = work.chunk.first_row + tile.first;
  for (int i = lane; i < work.words; i += 32) plan.bitmap[i] = 0;
  if (lane < work.tokens) {
    const bool exists = tile.first + lane < work.chunk.num_rows;
    plan.token[lane] =
        exists ? find_choosable(p.seqs, first_row + lane, p.block_size, work.chunk.num_blocks) : Choosable{};
  }
  __syncwarp();
  for (int i = lane; i < choices; i += 32) {
    const int token = i / n;
    const Choosable choosable = plan.token[token];
    int j = -1;
    if (choosable.legal > 0)
      j = p.block_indices[((first_row + token) * p.shape.num_heads_kv + tile.head) * n + i - token * n];
    if (j >= choosable.legal) j = -1;
    plan.choice[i] = j;
    if (j < 0) continue;
    const int block = choosable.first + j;
    atomicOr(&plan.bitmap[block / 32], 1u << (block % 32));
  }
  __syncwarp();
  int count = 0;
  for (int begin = 0; begin < work.words; begin += 32) {
    const int own = begin + lane < work.words ? __popc(plan.bitmap[begin + lane]) : 0;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (begin + lane < work.words) plan.rank[begin + lane] = count + sum - own;
    count += __shfl_sync(~0u, sum, 31);
  }
  count *= parts;
  for (int i = lane; i < count; i += 32) plan.warps[i] = 0, plan.seen[i] = 0;
  if (lane == 0) *plan.count = count;
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i - lane < choices; i += 32) {
    const int token = i / n, slot = i - token * n, j = i < choices ? plan.choice[i] : -1;
    bool repeats = j < 0;
    if (32 % n == 0) {
      // A row lies in one round of the warp.
      const unsigned same = __match_any_sync(~0u, j < 0 ? ~lane : j) & ((1u << lane) - 1);
      repeats |= (same >> (lane - slot)) != 0;
    } else {
      for (int k = i - slot; k < i && !repeats; ++k) repeats = plan.choice[k] == j;
    }
    if (repeats) continue;
    const Choosable choosable = plan.token[token];
    const int block = choosable.first + j;
    int at = plan.rank[block / 32] + __popc(plan.bitmap[block / 32] & ((1u << (block % 32)) - 1));
    int begin = j * static_cast<int>(p.block_size);
    at *= parts;
    for (int part = 0; part < parts && begin < choosable.seen; ++part, ++at, begin += kKeyTile) {
      plan.key_row[at] = choosable.key_begin + begin;
      for (int slab = 0; slab < slabs; ++slab)
        plan.slot[at * kConsumers + token * slabs + slab] = static_cast<uint8_t>(slot);
      atomicMax(&plan.seen[at], choosable.seen - begin);
      atomicOr(&plan.warps[at], ((1u << slabs) - 1) << (token * slabs));
    }
  }
  __syncwarp();
  // Products of a warpgroup make its warps wait for each other: they pay where most choices are common.
  int common = 0;
  for (int i = lane; i < count; i += 32) {
    const uint32_t warps = plan.warps[i];
#pragma unroll
    for (int group = 0; group < kConsumers / 4; ++group) {
      const uint32_t chosen = warps >> (group * 4) & 15;
      common += is_together<kKeyTile>(chosen) ? __popc(chosen) : -__popc(chosen);
    }
  }
  common = __reduce_add_sync(~0u, common);
  if (lane == 0) *plan.together = common > 0;
  __syncwarp();
}

// Whether the four warps that `chosen` names take a part together.
__device__ __forceinline__ bool is_shared(uint32_t chosen, bool together) {
  return together && is_together<kKeyTile>(chosen);
}

// One thread: K of the plan's parts into the ring. Warps that do not take a part never look at it: this one
// arrives for them.
template <int kDim>
__device__ __forceinline__ void bring_keys(const Plan& plan, int head, const CUtensorMap& map, uint32_t ring,
                                           typename QueriesLayout<kDim>::Control& control, int stages,
                                           SlotPosition& at_slot, uint32_t& issued) {
  using Layout = QueriesLayout<kDim>;
  const int count = *plan.count;
  const bool together = *plan.together != 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const uint32_t warps = plan.warps[i];
    int absent = 0;
#pragma unroll
    for (int group = 0; group < kConsumers / 4; ++group) {
      const uint32_t chosen = warps >> (group * 4) & 15;
      absent += is_shared(chosen, together) ? 0 : 4 - __popc(chosen);
    }
    const int s = at_slot.slot;
    ptx::barrier_wait(at(control.empty[s]), at_slot.phase ^ 1);
    if (absent > 0) ptx::barrier_arrive(at(control.empty[s]), absent);
    if (warps == 0) {
      // Nobody else looks at this phase, and synccheck takes one that no thread waits for as an error.
      ptx::barrier_arrive(at(control.full[s]));
      ptx::barrier_wait(at(control.full[s]), at_slot.phase);
    } else {
      const uint32_t landing = at(plan.seen[i] < kKeyTile ? control.landed[s] : control.full[s]);
      ptx::barrier_arrive_expect(landing, Layout::kTile);
      ptx::bulk_load_4d(ring + s * Layout::kTile, &map, landing, 0, head, plan.key_row[i], 0);
    }
    *static_cast<volatile uint32_t*>(&control.issued) = ++issued;
    at_slot.advance(stages);
  }
}

// One warp: zeroes the keys that no token of the tile sees: there may be anything, and 0 * NaN is NaN.
template <int kDim>
__device__ __forceinline__ void clear_unseen_keys(const Plan& plan, uint32_t ring,
                                                  typename QueriesLayout<kDim>::Control& control, int stages,
                                                  SlotPosition& at_slot, uint32_t& phases, int lane) {
  const int count = *plan.count;
#pragma unroll 1
  for (int i = 0; i < count; ++i, at_slot.advance(stages)) {
    const int seen = plan.seen[i], s = at_slot.slot;
    if (plan.warps[i] == 0 || seen >= kKeyTile) continue;
    ptx::barrier_wait(at(control.landed[s]), phases >> s & 1);
    phases ^= 1u << s;
    for (int row = seen + lane / 8; row < kKeyTile; row += 4) {
#pragma unroll
      for (int panel = 0; panel < kDim / kPanel; ++panel) {
        ptx::store_shared_16(
            ring + s * QueriesLayout<kDim>::kTile + (panel * kKeyTile + row) * kPanelPitch + lane % 8 * 16, 0,
            0, 0, 0);
      }
    }
    ptx::async_proxy_fence();
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(at(control.full[s]));
  }
}

// The parts that a warp takes part in, one after another. 32 parts at a time, a lane looks at one of them.
class OwnParts {
 public:
  struct Part {
    int index;      // -1: no more
    bool own;       // else the warp only keeps the warpgroup company
    bool together;  // taken by the warpgroup
  };

  __device__ __forceinline__ OwnParts(const Plan& plan, int warp, int lane)
      : warps_(plan.warps), count_(*plan.count), warp_(warp), lane_(lane), shares_(*plan.together != 0) {}

  __device__ __forceinline__ Part next() {
    while (left_ == 0) {
      if (end_ >= count_) return {-1, false, false};
      const uint32_t group = end_ + lane_ < count_ ? warps_[end_ + lane_] >> (warp_ & ~3) & 15 : 0;
      end_ += 32;
      together_ = __ballot_sync(~0u, is_shared(group, shares_));
      own_ = __ballot_sync(~0u, group >> (warp_ & 3) & 1);
      left_ = own_ | together_;
    }
    const int bit = __ffs(left_) - 1;
    left_ &= left_ - 1;
    return {end_ - 32 + bit, (own_ >> bit & 1) != 0, (together_ >> bit & 1) != 0};
  }

 private:
  const uint32_t* warps_;
  int count_, warp_, lane_, end_ = 0;
  bool shares_;
  uint32_t left_ = 0, own_ = 0, together_ = 0;
};

// dq += dS . K for one slab: ds are the fragments of 16 rows x 64 keys.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&dq)[kDim / 2], const uint4 (&ds)[kFragments],
                                              uint32_t keys, int lane) {
  const uint32_t row = keys + (lane & 7) * kPanelPitch + ((lane >> 3) & 1) * 8 * kPanelPitch;
#pragma unroll
  for (int k = 0; k < kFragments; ++k) {
    const uint32_t a[4] = {ds[k].x, ds[k].y, ds[k].z, ds[k].w};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t b[4];
      const uint32_t chunk = ((lane >> 4) + d % kPanel / 8) ^ (lane & 7);
      ptx::load_matrices_transposed(b, row + (d / kPanel * kKeyTile + k * 16) * kPanelPitch + (chunk << 4));
      float(&low)[4] = reinterpret_cast<float(&)[4]>(dq[d / 2]);
      float(&high)[4] = reinterpret_cast<float(&)[4]>(dq[d / 2 + 4]);
      ptx::mma<T>(low, a, b[0], b[1]);
      ptx::mma<T>(high, a, b[2], b[3]);
    }
  }
}

// Arrives on a slot's empty barrier behind multiply_keys, for the warp. An arrival does not wait for the
// ldmatrix in front of it, and TMA, which then fills the slot again, is another proxy: so the address depends
// on what came of every load (one serves 16 columns). Lane 0, which arrives, adds nothing to it.
template <int kCount>
__device__ __forceinline__ void release_keys(const uint64_t& barrier, const float (&dq)[kCount], int lane) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 7; i < kCount; i += 8) bits ^= __float_as_uint(dq[i]);
  __syncwarp();
  ptx::barrier_arrive_if(at(barrier) + (bits & lane), lane == 0);
}

// dq += dS . K by four warps together.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys_together(float (&dq)[kDim / 2], const uint4 (&ds)[kFragments],
                                                       uint32_t keys) {
  ptx::pin_registers(dq);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kFragments; ++k) {
    const uint32_t a[4] = {ds[k].x, ds[k].y, ds[k].z, ds[k].w};
    ptx::wgmma_registers<T, kDim>(dq, a, mn_major_descriptor(keys, kKeyTile, k * 16), true);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(dq);
}

// dQ of a slab whose first row is `row` of [T, Hq] and has `rows` rows; any: the row's token chose something.
template <typename T, int kCount>
__device__ __forceinline__ void put_gradient(float (&dq)[kCount], bool any, const Params& p, int64_t row,
                                             int rows, int lane) {
  constexpr int kDim = kCount * 2;
  const QueryGrads& out = p.grads.dq;
  if (!any && out.begun && out.result == nullptr) return;
  int64_t at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int slab_row = lane / 4 + 8 * h;
    at[h] = slab_row < rows ? (row + slab_row) * kDim : -1;
  }
  put_query_grads<T, true, 32>(out, dq, static_cast<float>(p.softmax_scale), at, lane);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    selected_attention_bwd_queries_sm90(const __grid_constant__ Params p,
                                        const __grid_constant__ QueriesWork work,
                                        const __grid_constant__ RingSize size,
                                        const __grid_constant__ CUtensorMap keys_map) {
  using Layout = QueriesLayout<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& control = *reinterpret_cast<typename Layout::Control*>(shared + size.slots * Layout::kTile);
  unsigned char* plans = reinterpret_cast<unsigned char*>(&control) + (sizeof(control) + 15) / 16 * 16;
  const int64_t plan_bytes = Plan::bytes(work.words, work.parts);
  const auto plan_of = [&](int64_t round) {
    return Plan(plans + (round & 1) * plan_bytes, work.words, work.parts);
  };
  const uint32_t ring = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < size.slots; ++stage) {
      ptx::barrier_init(at(control.full[stage]), 1);
      ptx::barrier_init(at(control.empty[stage]), kConsumers);
      ptx::barrier_init(at(control.landed[stage]), 1);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(at(control.plan_full[i]), 1);
      ptx::barrier_init(at(control.plan_empty[i]), kConsumers + 2);
    }
    control.issued = 0;
    ptx::barrier_init_fence();
  }
  // dS of a chunk lies where that of the one before did, which this multiprocessor may have read.
  if (work.chunk.first_row > 0) ptx::wait_for_dependency();
  __syncthreads();

  // Calls work_on(tile, plan) for every tile of this thread block.
  const auto for_each_tile = [&](const auto& work_on) {
#pragma unroll 1
    for (int64_t index = blockIdx.x, round = 0; index < work.all; index += gridDim.x, ++round) {
      ptx::barrier_wait(at(control.plan_full[round & 1]), round / 2 & 1);
      work_on(Tile(work, index), plan_of(round), [&] {
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(at(control.plan_empty[round & 1]));
      });
    }
  };
  SlotPosition slot;
  if (warp >= kConsumers) {
    ptx::release_registers<56>();
    if (warp == kConsumers) {
      uint32_t issued = 0;
      for_each_tile([&](const Tile& tile, const Plan& plan, const auto& release) {
        if (lane == 0) bring_keys<kDim>(plan, tile.head, keys_map, ring, control, size.slots, slot, issued);
        release();
      });
    } else if (warp == kConsumers + 1) {
#pragma unroll 1
      for (int64_t index = blockIdx.x, round = 0; index < work.all; index += gridDim.x, ++round) {
        ptx::barrier_wait(at(control.plan_empty[round & 1]), (round / 2 & 1) ^ 1);
        make_plan(p, work, Tile(work, index), plan_of(round), lane);
        if (lane == 0) ptx::barrier_arrive(at(control.plan_full[round & 1]));
      }
    } else if (warp == kConsumers + 2) {
      uint32_t phases = 0;
      for_each_tile([&](const Tile&, const Plan& plan, const auto& release) {
        clear_unseen_keys<kDim>(plan, ring, control, size.slots, slot, phases, lane);
        release();
      });
    } else {  // what comes next may begin where this kernel leaves room
      ptx::wait_for_dependency();
      ptx::launch_dependents();
    }
    return;
  }

  ptx::claim_registers<152>();
  const ScoreGrads& grads = work.chunk.ds;
  const int token = warp / grads.slabs, slab = warp - token * grads.slabs, group = p.shape.group();
  uint32_t first_part = 0;  // of the tile, counted over all tiles
  for_each_tile([&](const Tile& tile, const Plan& plan, const auto& release) {
    const int count = *plan.count;
    float dq[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dq[i] = 0.f;
    OwnParts parts(plan, warp, lane);
    using Part = OwnParts::Part;
    bool any = false;
    const int first_slab = grads.index(tile.first + token, tile.head, 0, 0) + slab;
    const auto fetch = [&](uint4(&ds)[kFragments], Part& part) {
      part = parts.next();
      any |= part.own;
      if (part.own) {
        const int in_block = grads.parts == 1 ? 0 : part.index % grads.parts;
        const int64_t at =
            first_slab + (plan.slot[part.index * kConsumers + warp] * grads.parts + in_block) * grads.slabs;
        const uint4* source = grads.data + at * ScoreGrads::kVectors + lane;
#pragma unroll
        for (int k = 0; k < kFragments; ++k) ds[k] = __ldcs(source + k * 32);
      } else {
#pragma unroll
        for (int k = 0; k < kFragments; ++k) ds[k] = make_uint4(0, 0, 0, 0);
      }
    };
    const auto take = [](uint4(&ds)[kFragments], const uint4(&fetched)[kFragments]) {
#pragma unroll
      for (int k = 0; k < kFragments; ++k) ds[k] = fetched[k];
    };
    int position = 0;  // where `slot` stands
    const auto multiply = [&](const uint4(&ds)[kFragments], const Part& part) {
      slot = slot.after(part.index - position, size);
      position = part.index;
      // A warp that has skipped parts may be rounds behind a barrier's phase, where a wait by parity alone
      // would pass too early; so it first waits until the loads of its part are under way.
      const uint32_t number = first_part + part.index;
      while (static_cast<int32_t>(*static_cast<volatile uint32_t*>(&control.issued) - number) <= 0)
        __nanosleep(32);
      ptx::barrier_wait(at(control.full[slot.slot]), slot.phase);
      const uint32_t keys = ring + slot.slot * Layout::kTile;
      if (part.together) {
        multiply_keys_together<T, kDim>(dq, ds, keys);
      } else {
        multiply_keys<T, kDim>(dq, ds, keys, lane);
      }
      release_keys(control.empty[slot.slot], dq, lane);
    };
    // Two fetches are under way at any time. The warps of a warpgroup must meet in the same instructions, so
    // there is one product in the code, whoever is in which round.
    uint4 first[kFragments], second[kFragments];
    Part of_first, of_second;
    fetch(first, of_first);
    fetch(second, of_second);
#pragma unroll 1
    for (bool even = true;; even = !even) {
      uint4 ds[kFragments];
      const Part part = even ? of_first : of_second;
      if (part.index < 0) break;
      if (even) {
        take(ds, first);
        fetch(first, of_first);
      } else {
        take(ds, second);
        fetch(second, of_second);
      }
      multiply(ds, part);
    }
    slot = slot.after(count - position, size);
    first_part += count;
    release();
    if (tile.first + token < work.chunk.num_rows) {
      const int64_t row = (work.chunk.first_row + tile.first + token) * p.shape.num_heads_q +
                          tile.head * group + slab * kSlabRows;
      put_gradient<T>(dq, any, p, row, group - slab * kSlabRows, lane);
    }
  });
}

}  // namespace

bool selected_attention_bwd_queries(const Params& p, const SelectedBwdChunk& chunk, const Stream& stream,
                                    Status* status) {
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        if constexpr (kDimQK == kDimV) {
          using Layout = QueriesLayout<kDimQK>;
          CUtensorMap map;
          if (!make_panel_tensor_map(&map, p.dtype, p.k, p.seqs.key_rows, p.shape.num_heads_kv, kDimQK,
                                     kKeyTile))
            return false;
          QueriesWork work{};
          work.chunk = chunk;
          work.tokens = kConsumers / chunk.ds.slabs;
          work.tiles = ceil_div(chunk.num_rows, work.tokens);
          work.all = work.tiles * p.shape.num_heads_kv;
          work.words = static_cast<int>(ceil_div(chunk.num_blocks, 32));
          work.parts = work.tokens * p.num_selected_blocks * chunk.ds.parts;
          const int64_t available =
              device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - Layout::bytes(work, 0);
          const int stages = static_cast<int>(min64(kMaxKeyStages, available / Layout::kTile));
          if (stages < 2) return false;
          const int64_t grid = min64(work.all, device_attribute(cudaDevAttrMultiProcessorCount));
          *status = launch_chained(
              "selected_attention_bwd_queries_sm90", selected_attention_bwd_queries_sm90<T, kDimQK>,
              dim3(static_cast<unsigned>(grid)), kThreads, static_cast<size_t>(Layout::bytes(work, stages)),
              stream, p, work, RingSize(stages), map);
          return true;
        } else {
          return false;
        }
      });
}

}  // namespace nsa::cuda::sm90
