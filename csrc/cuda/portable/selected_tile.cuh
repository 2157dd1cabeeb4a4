// A few adjacent tokens of one KV head and the union of the blocks that they chose: what forward and backward
// of selected attention share where they go query by query.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {

// How the heads of a group lie in slabs of 16 rows: padded to a power of two, or to whole slabs.
struct RowPlan {
  int padded;           // rows of a token
  int tokens_per_slab;  // >= 1
  int slabs_per_token;  // >= 1
  int tokens;           // of a thread block

  __host__ __device__ RowPlan(int group, int slabs, int max_tokens) {
    padded = 1;
    while (padded < group && padded < 16) padded *= 2;
    if (group > 16) padded = static_cast<int>(round_up(group, 16));
    tokens_per_slab = padded < 16 ? 16 / padded : 1;
    slabs_per_token = padded > 16 ? padded / 16 : 1;
    tokens = static_cast<int>(min64(max_tokens, slabs * tokens_per_slab / slabs_per_token));
  }
};

// The union of the chosen blocks in shared memory, behind the ring.
struct Union {
  int* count;
  uint32_t* bitmap;  // [words]
  int* rank;         // [words]: blocks before this word
  int* block;        // [tokens * n]
  uint32_t* mask;    // [tokens * n]: bit i for token i

  __host__ __device__ static int64_t bytes(int64_t words, int64_t entries) {
    return 16 + 8 * words + 8 * entries;
  }
  __device__ Union(unsigned char* memory, int words, int entries)
      : count(reinterpret_cast<int*>(memory)),
        bitmap(reinterpret_cast<uint32_t*>(memory + 16)),
        rank(reinterpret_cast<int*>(bitmap + words)),
        block(rank + words),
        mask(reinterpret_cast<uint32_t*>(block + entries)) {}
};

// Calls visit(token, block) for every legal choice of the tile's tokens: numbers outside 0 .. own are
// ignored.
template <typename Params, typename Visit>
__device__ __forceinline__ void for_each_choice(const Params& p, const SequenceTile& tile, int head,
                                                int num_blocks, const Visit& visit) {
  const int n = p.num_selected_blocks;
  for (int i = threadIdx.x; i < tile.count * n; i += blockDim.x) {
    const int token = i / n;
    const int j =
        p.block_indices[((tile.seq.q_begin + tile.begin + token) * p.shape.num_heads_kv + head) * n + i -
                        token * n];
    const int64_t t = tile.seq.position(tile.begin + token);
    if (j >= 0 && j < num_blocks && t >= 0 && j <= t / p.block_size) visit(token, j);
  }
}

template <typename Params>
__device__ void build_union(const Params& p, const SequenceTile& tile, int head, int num_blocks,
                            const Union& u) {
  const int words = (num_blocks + 31) / 32, lane = threadIdx.x & 31;
  for (int i = threadIdx.x; i < words; i += blockDim.x) u.bitmap[i] = 0;
  __syncthreads();
  for_each_choice(p, tile, head, num_blocks,
                  [&](int, int j) { atomicOr(&u.bitmap[j >> 5], 1u << (j & 31)); });
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int begin = 0; begin < words; begin += 32) {
      const int own = begin + lane < words ? __popc(u.bitmap[begin + lane]) : 0;
      int sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (begin + lane < words) u.rank[begin + lane] = before + sum - own;
      before += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) *u.count = before;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < *u.count; i += blockDim.x) u.mask[i] = 0;
  __syncthreads();
  for_each_choice(p, tile, head, num_blocks, [&](int token, int j) {
    const int at = u.rank[j >> 5] + __popc(u.bitmap[j >> 5] & ((1u << (j & 31)) - 1));
    u.block[at] = j;
    atomicOr(&u.mask[at], 1u << token);
  });
  __syncthreads();
}

// Producer warps: K and V of the chosen blocks through a ring of stages, in the order of the union.
template <typename T, int kDimQK, int kDimV, int kKeys, typename Layout, typename Params, typename Full,
          typename Empty>
__device__ __forceinline__ void bring_keys(const Params& p, const SequenceTile& tile, const Union& chosen,
                                           int head, int64_t num_keys, int num_tiles, int parts, int stages,
                                           uint32_t base, const Full& full, const Empty& empty, int thread) {
  for (int index = 0; index < num_tiles; ++index) {
    const int stage = index % stages, entry = index / parts;
    if (index >= stages) ptx::barrier_wait(empty(stage), (index / stages - 1) & 1);
    const int begin = static_cast<int>(chosen.block[entry] * p.block_size) + index % parts * kKeys;
    // The last token that chose the block sees the most of it; what nobody sees is not read.
    const int64_t last = tile.seq.position(tile.begin + 31 - __clz(chosen.mask[entry]));
    const int end = static_cast<int>(min64(last + 1, num_keys));
    const uint32_t k = base + Layout::kRing + stage * Layout::kStageBytes, v = k + tile_bytes<kDimQK>(kKeys);
    const auto load = [&]<int kDim>(uint32_t target, const RowsView& view) {
      const int64_t offset = (tile.seq.k_begin + begin) * view.stride_row + head * view.stride_head;
      load_strided_tile<kDim, kKeys, Layout::kProducers * 32>(
          target, static_cast<const T*>(view.data) + offset, view.stride_row, end - begin, thread);
    };
    load.template operator()<kDimQK>(k, p.k);
    load.template operator()<kDimV>(v, p.v);
    ptx::barrier_arrive_after_copies(full(stage));
  }
}

}  // namespace nsa::cuda::portable
