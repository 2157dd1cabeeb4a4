// dK and dV of key tiles whose queries are dealt out to several blocks: every block leaves its part in a
// workspace, and one kernel adds the parts in their order.
#pragma once

#include "cuda/host/launch_kernel.h"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/key_tile.cuh"

namespace nsa::cuda {

// [split][tile][head][key of the tile][Dk + Dv] floats.
struct KeyParts {
  static constexpr int64_t kMaxBytes = int64_t{256} << 20;
  float* data;
  int splits;  // 1: no parts, blocks add to the gradients, or write them, themselves
  int num_tiles, heads, tile_keys, dim_qk, dim_v;
  // Split i of every tile has the queries [i * chunk, (i + 1) * chunk) of the sequence, as far as they see
  // the tile. 0: each tile's queries are dealt out evenly.
  int chunk = 0;
  // Tiles whose queries begin at the same place of a chunk are so many apart.
  int period = 1;

  __host__ __device__ int64_t row_floats() const { return dim_qk + dim_v; }
  __host__ __device__ int64_t split_floats() const {
    return int64_t{num_tiles} * heads * tile_keys * row_floats();
  }
  __host__ __device__ int64_t bytes() const { return splits == 1 ? 0 : 4 * splits * split_floats(); }
  // The splits of a tile that have something to walk.
  __device__ int first_split(const KeyTile& tile) const {
    return chunk == 0 ? 0 : min(static_cast<int>(tile.query_lo) / chunk, splits - 1);
  }
  __device__ int end_split(const KeyTile& tile) const {
    return chunk == 0 ? splits : min((max(static_cast<int>(tile.query_hi), 1) - 1) / chunk + 1, splits);
  }
  __device__ float* tile(int split, int64_t tile, int head) const {
    return data + split * split_floats() + (tile * heads + head) * tile_keys * row_floats();
  }
};

// As many splits as make `blocks` blocks of all key tiles: a function of shapes alone. A split has at least
// `least_rows` query rows to walk in the longest sequence there can be.
inline KeyParts describe_key_parts(const BandedAttentionBwdParams& p, int tile_keys, int64_t blocks,
                                   int64_t least_rows) {
  constexpr int64_t kMaxSplits = 32;
  KeyParts parts{static_cast<float*>(p.workspace),
                 1,
                 static_cast<int>(num_key_tiles(p.seqs, tile_keys)),
                 p.shape.num_heads_kv,
                 tile_keys,
                 p.shape.head_dim_qk,
                 p.shape.head_dim_v};
  const int64_t tiles = int64_t{parts.num_tiles} * parts.heads;
  if (tiles == 0) return parts;
  const int64_t splits = min64(ceil_div(blocks, tiles), kMaxSplits);
  const int64_t useful = ceil_div(p.seqs.total_q * p.shape.group(), least_rows);
  parts.splits = static_cast<int>(
      max64(1, min64(min64(splits, useful), KeyParts::kMaxBytes / (4 * parts.split_floats()))));
  return parts;
}

// dk, dv += the parts of all splits, in the order of the splits, or their sum as results of type T, every row
// of them. Either may be null. early: the parts are there when the
// kernel in front lets this one begin.
template <typename T, bool kResults>
__global__ void __launch_bounds__(256)
    banded_attention_bwd_sum(const SequenceBatch seqs, const KeyBlocks keys, const int64_t window,
                             const KeyParts parts, void* dk, void* dv, const bool early) {
  if (!early) ptx::wait_for_dependency();
  const int tile_number = blockIdx.x, head = blockIdx.y;
  const KeyTile tile = find_key_tile(seqs, keys, window, tile_number, parts.tile_keys);
  const int chunks = static_cast<int>(parts.row_floats()) / 4;
  const int first = parts.first_split(tile), count = parts.end_split(tile) - first;
  const float4* const part = reinterpret_cast<const float4*>(parts.tile(first, tile_number, head));
  const int begin = kResults ? tile.begin : tile.seen.lo,
            end = kResults ? tile.begin + tile.rows : tile.seen.hi;
  for (int i = blockIdx.z * blockDim.x + threadIdx.x; i < (end - begin) * chunks;
       i += gridDim.z * blockDim.x) {
    const int key = begin + i / chunks, column = i % chunks * 4;
    const bool is_dk = column < parts.dim_qk;
    void* const gradient = is_dk ? dk : dv;
    if (gradient == nullptr) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    if (key >= tile.seen.lo && key < tile.seen.hi) {
      const float4* source = part + (key - tile.begin) * chunks + column / 4;
      sum = *source;
#pragma unroll 8
      for (int split = 1; split < count; ++split) {
        source += parts.split_floats() / 4;
        const float4 x = *source;
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
    }
    const int64_t row = (tile.first_row + key) * parts.heads + head;
    const int64_t at = is_dk ? row * parts.dim_qk + column : row * parts.dim_v + column - parts.dim_qk;
    if constexpr (kResults) {
      *reinterpret_cast<uint2*>(static_cast<T*>(gradient) + at) =
          make_uint2(ptx::pack2<T>(sum.x, sum.y), ptx::pack2<T>(sum.z, sum.w));
    } else {
      float4* const target = reinterpret_cast<float4*>(static_cast<float*>(gradient) + at);
      const float4 before = *target;
      *target = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
    }
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) ptx::wait_for_dependency();  // ends behind it
}

// Zeros in the rows of a tile that no query sees, as results of type T; by `threads` threads.
template <typename T>
__device__ __forceinline__ void clear_key_results(const AttentionGrads& grads, const KeyTile& tile, int heads,
                                                  int head, int dim_qk, int dim_v, int thread, int threads) {
  const auto clear = [&](void* gradient, int dim) {
    if (gradient == nullptr) return;
    const int chunks = dim / 8;
    for (int i = thread; i < tile.rows * chunks; i += threads) {
      const int64_t row = (tile.first_row + tile.begin + i / chunks) * heads + head;
      *reinterpret_cast<uint4*>(static_cast<T*>(gradient) + row * dim + i % chunks * 8) =
          make_uint4(0, 0, 0, 0);
    }
  };
  clear(grads.dk, dim_qk);
  clear(grads.dv, dim_v);
}

template <typename T>
Status launch_sum(const BandedAttentionBwdParams& p, const KeyParts& parts, const Stream& stream,
                  bool early = false) {
  if (parts.splits == 1) return {};
  constexpr unsigned kSlices = 16;  // of a tile: few tiles are what parts are for
  return launch_chained(
      "banded_attention_bwd_sum",
      p.grads.key_results ? banded_attention_bwd_sum<T, true> : banded_attention_bwd_sum<T, false>,
      dim3(static_cast<unsigned>(parts.num_tiles), static_cast<unsigned>(parts.heads), kSlices), 256, 0,
      stream, p.seqs, p.keys, p.window, parts, p.grads.dk, p.grads.dv, early);
}

}  // namespace nsa::cuda
