// Attention over chosen blocks, backward, dQ = dS K from the dS that the pass over the keys has left.
//
// A thread block takes 12 slabs of query rows at a time, a warp each: adjacent tokens of one KV head. One
// warp brings K of the blocks that any of them chose, once, through a ring by TMA; another makes the list of
// those blocks for the tile that follows (portable/selected_tile.cuh does the same with a whole thread
// block). The products are mma.sync: a token's rows fill one slab and few tokens share a block.
#include "cuda/common/choices.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/selected_attention_bwd.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/gradient_store.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

using Params = SelectedAttentionBwdParams;

constexpr int kConsumers = 12;                   // warps
constexpr int kThreads = (kConsumers + 4) * 32;  // registers are handed out to four warps at a time
constexpr int kMaxStages = 16;
constexpr int kFragments = kKeyTile / 16;

// The blocks that a tile needs, in shared memory.
struct Plan {
  int* count;
  Choosable* token;  // [kConsumers]
  uint32_t* bitmap;  // [words]
  int* rank;         // [words]: blocks before this word
  int* key_row;      // [entries]
  int* seen;         // [entries]: keys of the block that the last of them sees
  uint32_t* mask;    // [entries]: bit i for token i
  uint8_t* slot;     // [entries, kConsumers]: of the token's row of block_indices

  __host__ __device__ static int64_t bytes(int64_t words, int64_t entries) {
    return round_up(16 + kConsumers * 16 + 8 * words + (12 + kConsumers) * entries, 16);
  }
  __device__ Plan(unsigned char* memory, int words, int entries)
      : count(reinterpret_cast<int*>(memory)),
        token(reinterpret_cast<Choosable*>(memory + 16)),
        bitmap(reinterpret_cast<uint32_t*>(token + kConsumers)),
        rank(reinterpret_cast<int*>(bitmap + words)),
        key_row(rank + words),
        seen(key_row + entries),
        mask(reinterpret_cast<uint32_t*>(seen + entries)),
        slot(reinterpret_cast<uint8_t*>(mask + entries)) {}
};

struct QueriesWork {
  SelectedBwdChunk chunk;
  int tokens;          // of a tile
  int64_t tiles, all;  // of one head, of all
  int words, entries, stages;
};

template <int kDim>
struct QueriesLayout {
  static constexpr int kTile = swizzled_tile_bytes<kDim>(kKeyTile);
  struct Barriers {
    uint64_t full[kMaxStages], empty[kMaxStages], plan_full[2], plan_empty[2], patch;
  };
  static int64_t bytes(const QueriesWork& work) {
    return work.stages * kTile + round_up(sizeof(Barriers), 16) + 2 * Plan::bytes(work.words, work.entries);
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
  const int n = p.num_selected_blocks, choices = work.tokens * n;
  const int64_t first_row = work.chunk.first_row + tile.first;
  for (int i = lane; i < work.words; i += 32) plan.bitmap[i] = 0;
  if (lane < work.tokens) {
    const bool exists = tile.first + lane < work.chunk.num_rows;
    plan.token[lane] =
        exists ? find_choosable(p.seqs, first_row + lane, p.block_size, work.chunk.num_blocks) : Choosable{};
  }
  __syncwarp();
  const auto for_each = [&](const auto& visit) {
    for (int i = lane; i < choices; i += 32) {
      const int token = i / n, slot = i - token * n;
      const Choosable choosable = plan.token[token];
      if (choosable.legal == 0) continue;
      const int32_t* row = p.block_indices + ((first_row + token) * p.shape.num_heads_kv + tile.head) * n;
      const int j = row[slot];
      if (j >= 0 && j < choosable.legal) visit(token, slot, j, choosable, row);
    }
  };
  for_each([&](int, int, int j, const Choosable& choosable, const int32_t*) {
    const int block = choosable.first + j;
    atomicOr(&plan.bitmap[block / 32], 1u << (block % 32));
  });
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
  for (int i = lane; i < count; i += 32) plan.mask[i] = 0, plan.seen[i] = 0;
  if (lane == 0) *plan.count = count;
  __syncwarp();
  for_each([&](int token, int slot, int j, const Choosable& choosable, const int32_t* row) {
    for (int i = 0; i < slot; ++i) {
      if (row[i] == j) return;
    }
    const int block = choosable.first + j;
    const int at = plan.rank[block / 32] + __popc(plan.bitmap[block / 32] & ((1u << (block % 32)) - 1));
    const int begin = j * static_cast<int>(p.block_size);
    plan.key_row[at] = choosable.key_begin + begin;
    plan.slot[at * kConsumers + token] = static_cast<uint8_t>(slot);
    atomicMax(&plan.seen[at], choosable.seen - begin);
    atomicOr(&plan.mask[at], 1u << token);
  });
  __syncwarp();
}

// One warp: K of the plan's blocks into the ring. What nobody sees of a block becomes zero.
template <int kDim>
__device__ void bring_keys(const QueriesWork& work, const Tile& tile, const Plan& plan,
                           const CUtensorMap& map, uint32_t ring,
                           typename QueriesLayout<kDim>::Barriers& barriers, int* stage, uint32_t* parity,
                           uint32_t* patches, int lane) {
  using Layout = QueriesLayout<kDim>;
  const auto address = [](const uint64_t& barrier) { return ptx::shared_address(&barrier); };
  const int count = *plan.count;
  for (int entry = 0; entry < count; ++entry) {
    const int seen = plan.seen[entry], key_row = plan.key_row[entry];
    for (int part = 0; part < work.chunk.ds.parts && part * kKeyTile < seen; ++part) {
      const uint32_t target = ring + *stage * Layout::kTile, full = address(barriers.full[*stage]);
      const int visible = seen - part * kKeyTile;
      const bool whole = visible >= kKeyTile;
      const uint32_t landing = whole ? full : address(barriers.patch);
      ptx::barrier_wait(address(barriers.empty[*stage]), *parity ^ 1);
      if (lane == 0) ptx::barrier_arrive_expect(landing, Layout::kTile);
      __syncwarp();
      if (lane < kDim / kPanel) {
        ptx::bulk_load_3d(target + lane * kKeyTile * kPanelPitch, &map, landing, lane * kPanel, tile.head,
                          key_row + part * kKeyTile);
      }
      if (!whole) {
        ptx::barrier_wait(landing, *patches);
        *patches ^= 1;
        for (int i = lane; i < (kKeyTile - visible) * (kDim / 8); i += 32) {
          const int row = visible + i / (kDim / 8);
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                           target + swizzled_offset(kKeyTile, row, i % (kDim / 8))),
                       "r"(0)
                       : "memory");
        }
        ptx::async_proxy_fence();
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(full);
      }
      if (++*stage == work.stages) *stage = 0, *parity ^= 1;
    }
  }
}

__device__ __forceinline__ int next_chosen(const Plan& plan, int begin, int count, int token, int lane) {
  for (; begin < count; begin += 32) {
    const bool chosen = begin + lane < count && (plan.mask[begin + lane] >> token & 1);
    const unsigned found = __ballot_sync(~0u, chosen);
    if (found != 0) return begin + __ffs(found) - 1;
  }
  return count;
}

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

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    selected_attention_bwd_queries_sm90(const Params p, const QueriesWork work,
                                        const __grid_constant__ CUtensorMap keys_map) {
  using Layout = QueriesLayout<kDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& barriers = *reinterpret_cast<typename Layout::Barriers*>(shared + work.stages * Layout::kTile);
  unsigned char* plans = reinterpret_cast<unsigned char*>(&barriers) + (sizeof(barriers) + 15) / 16 * 16;
  const int64_t plan_bytes = Plan::bytes(work.words, work.entries);
  const auto plan_of = [&](int64_t round) {
    return Plan(plans + (round & 1) * plan_bytes, work.words, work.entries);
  };
  const auto address = [](const uint64_t& barrier) { return ptx::shared_address(&barrier); };
  const uint32_t ring = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < work.stages; ++stage) {
      ptx::barrier_init(address(barriers.full[stage]), 1);
      ptx::barrier_init(address(barriers.empty[stage]), kConsumers);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(address(barriers.plan_full[i]), 1);
      ptx::barrier_init(address(barriers.plan_empty[i]), kConsumers + 1);
    }
    ptx::barrier_init(address(barriers.patch), 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();

  int stage = 0;
  uint32_t parity = 0, patches = 0;
  if (warp >= kConsumers) {
    ptx::release_registers<56>();
    for (int64_t index = blockIdx.x, round = 0; index < work.all; index += gridDim.x, ++round) {
      const Tile tile(work, index);
      const Plan plan = plan_of(round);
      if (warp == kConsumers) {
        ptx::barrier_wait(address(barriers.plan_full[round & 1]), round / 2 & 1);
        bring_keys<kDim>(work, tile, plan, keys_map, ring, barriers, &stage, &parity, &patches, lane);
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(address(barriers.plan_empty[round & 1]));
      } else if (warp == kConsumers + 1) {
        ptx::barrier_wait(address(barriers.plan_empty[round & 1]), (round / 2 & 1) ^ 1);
        make_plan(p, work, tile, plan, lane);
        if (lane == 0) ptx::barrier_arrive(address(barriers.plan_full[round & 1]));
      }
    }
    return;
  }

  ptx::claim_registers<152>();
  const ScoreGrads& grads = work.chunk.ds;
  const int token = warp / grads.slabs, slab = warp - token * grads.slabs, group = p.shape.group();
  for (int64_t index = blockIdx.x, round = 0; index < work.all; index += gridDim.x, ++round) {
    const Tile tile(work, index);
    const Plan plan = plan_of(round);
    ptx::barrier_wait(address(barriers.plan_full[round & 1]), round / 2 & 1);
    const int count = *plan.count;
    float dq[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dq[i] = 0.f;
    // dS of the next key tile that this token chose is on its way while others are waited for.
    uint4 coming[kFragments];
    const auto fetch = [&](int entry, int part) {
      if (entry >= count) return;
      const int64_t at =
          grads.index(tile.first + token, tile.head, plan.slot[entry * kConsumers + token], part) + slab;
      const uint4* source = grads.data + at * ScoreGrads::kVectors + lane;
#pragma unroll
      for (int k = 0; k < kFragments; ++k) coming[k] = __ldcs(source + k * 32);
    };
    int next = next_chosen(plan, 0, count, token, lane);
    const bool any = next < count;
    fetch(next, 0);
    for (int entry = 0; entry < count; ++entry) {
      const int seen = plan.seen[entry];
      const bool chosen = entry == next;
      if (chosen) next = next_chosen(plan, entry + 1, count, token, lane);
      for (int part = 0; part < grads.parts && part * kKeyTile < seen; ++part) {
        ptx::barrier_wait(address(barriers.full[stage]), parity);
        if (chosen) {
          uint4 ds[kFragments];
#pragma unroll
          for (int k = 0; k < kFragments; ++k) ds[k] = coming[k];
          const bool more = part + 1 < grads.parts && (part + 1) * kKeyTile < seen;
          fetch(more ? entry : next, more ? part + 1 : 0);
          multiply_keys<T, kDim>(dq, ds, ring + stage * Layout::kTile, lane);
        }
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(address(barriers.empty[stage]));
        if (++stage == work.stages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(address(barriers.plan_empty[round & 1]));
    const QueryGrads& out = p.grads.dq;
    const bool unchanged = !any && out.begun && out.result == nullptr;
    if (tile.first + token < work.chunk.num_rows && !unchanged) {
      const int64_t row = (work.chunk.first_row + tile.first + token) * p.shape.num_heads_q +
                          tile.head * group + slab * kSlabRows;
      int64_t at[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int slab_row = lane / 4 + 8 * h;
        at[h] = slab * kSlabRows + slab_row < group ? (row + slab_row) * kDim : -1;
      }
      put_query_grads<T, true, 32>(out, dq, static_cast<float>(p.softmax_scale), at, lane);
    }
  }
}

}  // namespace

bool selected_attention_bwd_queries(const Params& p, const SelectedBwdChunk& chunk, const Stream& stream,
                                    Status* status) {
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        if constexpr (kDimQK == kDimV) {
          using Layout = QueriesLayout<kDimQK>;
          CUtensorMap map;
          if (!make_tensor_map(&map, p.dtype, p.k, p.seqs.key_rows, p.shape.num_heads_kv, kDimQK, kKeyTile,
                               1))
            return false;
          QueriesWork work{};
          work.chunk = chunk;
          work.tokens = kConsumers / chunk.ds.slabs;
          work.tiles = ceil_div(chunk.num_rows, work.tokens);
          work.all = work.tiles * p.shape.num_heads_kv;
          work.words = static_cast<int>(ceil_div(chunk.num_blocks, 32));
          work.entries = work.tokens * p.num_selected_blocks;
          work.stages = 0;
          const int64_t available =
              device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - Layout::bytes(work);
          work.stages = static_cast<int>(min64(kMaxStages, available / Layout::kTile));
          if (work.stages < 2) return false;
          const int64_t grid = min64(work.all, device_attribute(cudaDevAttrMultiProcessorCount));
          *status = launch("selected_attention_bwd_queries_sm90",
                           selected_attention_bwd_queries_sm90<T, kDimQK>, dim3(static_cast<unsigned>(grid)),
                           kThreads, static_cast<size_t>(Layout::bytes(work)), stream, p, work, map);
          return true;
        } else {
          return false;
        }
      });
}

}  // namespace nsa::cuda::sm90
