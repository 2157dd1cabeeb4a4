// Compressed attention and the sliding window, forward, by mma.sync (sm_80 and newer).
//
// A block of 4 warps owns kRows query rows: adjacent tokens of one KV head, all heads of the group packed as
// rows, so that a key tile is read once for the group. Key tiles come through a ring of two by cp.async. Row
// r is token r / G, head r % G.
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {
namespace {

// Keys [lo, hi) of a sequence, seen by a row.
struct Band {
  int lo, hi;
};

template <int kDimQK, int kDimV>
struct BandedLayout : BandedConfig<kDimQK, kDimV> {
  using Config = BandedConfig<kDimQK, kDimV>;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kStages = 2;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + tile_bytes<kDimQK>(Config::kRows);
  static constexpr int kV = kK + kStages * tile_bytes<kDimQK>(Config::kKeys);
  static constexpr int kBands = kV + kStages * tile_bytes<kDimV>(Config::kKeys);
  static constexpr int kBytes = kBands + Config::kRows * sizeof(Band);
};

__device__ __forceinline__ Band band_of(const BandedAttentionFwdParams& p, int64_t position,
                                        int64_t num_keys) {
  return {static_cast<int>(min64(p.keys.begin_visible(position, p.window), num_keys)),
          static_cast<int>(min64(p.keys.end_visible(position), num_keys))};
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(BandedLayout<kDimQK, kDimV>::kThreads)
    banded_attention_fwd_portable(const BandedAttentionFwdParams p, const int64_t num_tiles) {
  using Layout = BandedLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys, kSlabs = Layout::kSlabs, kRows = Layout::kRows;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = p.shape.group(), tokens = kRows / group;
  const int head = blockIdx.y;
  // Late tiles see the most keys: they go first.
  const SequenceTile tile = find_sequence_tile(p.seqs, num_tiles - 1 - blockIdx.x, tokens);
  if (tile.count == 0) return;
  const int64_t num_keys = count_keys(p.seqs, tile.seq, p.keys);
  const int64_t first_key_row = p.keys.first_row(tile.seq.k_begin);
  const Band first = band_of(p, tile.seq.position(tile.begin), num_keys);
  const Band last = band_of(p, tile.seq.position(tile.begin + tile.count - 1), num_keys);
  const int lo = first.lo, hi = last.hi;  // the union of all bands

  const auto q_row = [&](int row) -> const T* {
    const int token = row / group;
    if (token >= tile.count) return nullptr;
    return static_cast<const T*>(p.q.data) + (tile.seq.q_begin + tile.begin + token) * p.q.stride_row +
           (head * group + row - token * group) * p.q.stride_head;
  };
  const auto key_row = [&](const RowsView& view, int key) -> const T* {
    if (key < lo || key >= hi) return nullptr;
    return static_cast<const T*>(view.data) + (first_key_row + key) * view.stride_row +
           head * view.stride_head;
  };
  const auto load_keys = [&](int index) {
    const int stage = index & 1, begin = index * kKeys;
    load_tile<kDimQK, kKeys, Layout::kThreads>(
        base + Layout::kK + stage * tile_bytes<kDimQK>(kKeys),
        [&](int row) { return key_row(p.k, begin + row); }, threadIdx.x);
    load_tile<kDimV, kKeys, Layout::kThreads>(
        base + Layout::kV + stage * tile_bytes<kDimV>(kKeys),
        [&](int row) { return key_row(p.v, begin + row); }, threadIdx.x);
  };

  Band* bands = reinterpret_cast<Band*>(shared + Layout::kBands);  // of every row; rows of no token have none
  for (int row = threadIdx.x; row < kRows; row += Layout::kThreads) {
    const int token = row / group;
    bands[row] =
        token < tile.count ? band_of(p, tile.seq.position(tile.begin + token), num_keys) : Band{0, 0};
  }
  const bool full_rows = tile.count * group == kRows;

  float out[kSlabs][kDimV / 8][4] = {};
  SlabSoftmax softmax[kSlabs];
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const int first_tile = lo / kKeys, end_tile = lo < hi ? (hi + kKeys - 1) / kKeys : first_tile;

  load_tile<kDimQK, kRows, Layout::kThreads>(base + Layout::kQ, q_row, threadIdx.x);
  if (first_tile < end_tile) load_keys(first_tile);
  ptx::async_commit();
  for (int index = first_tile; index < end_tile; ++index) {
    if (index + 1 < end_tile) load_keys(index + 1);
    ptx::async_commit();
    ptx::async_wait<1>();
    __syncthreads();
    const int stage = index & 1, begin = index * kKeys;
    float score[kSlabs][kKeys / 8][4] = {};
    multiply_transposed<T, kDimQK, kKeys, kSlabs>(
        score, base + Layout::kQ + tile_bytes<kDimQK>(warp * kSlabs * 16),
        base + Layout::kK + stage * tile_bytes<kDimQK>(kKeys), lane);
    const bool whole = full_rows && begin >= last.lo && begin + kKeys <= first.hi;
    if (!whole) {
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Band band = bands[(warp * kSlabs + s) * 16 + lane / 4 + 8 * h];
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int key = begin + n * 8 + (lane & 3) * 2 + c;
              if (key < band.lo || key >= band.hi) score[s][n][2 * h + c] = kNegInf;
            }
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) softmax[s].update(score[s], out[s], scale);
    multiply_probabilities<T, kDimV, kKeys, kSlabs>(
        out, score, base + Layout::kV + stage * tile_bytes<kDimV>(kKeys), lane);
    __syncthreads();
  }

#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (warp * kSlabs + s) * 16 + lane / 4 + 8 * h, token = row / group;
      const float sum = quad_sum(softmax[s].sum[h]);
      const int64_t out_row =
          (tile.seq.q_begin + tile.begin + token) * p.shape.num_heads_q + head * group + row - token * group;
      const bool valid = token < tile.count;
      store_row<T>(valid ? static_cast<T*>(p.o) + out_row * kDimV : nullptr, out[s], h,
                   sum == 0.f ? 0.f : 1.f / sum, lane);
      if (valid && (lane & 3) == 0) {
        static_cast<float*>(p.lse)[out_row] =
            softmax[s].max[h] == kNegInf ? kNegInf : (softmax[s].max[h] * scale + log2f(sum)) * kLn2;
      }
    }
  }
}

}  // namespace

Status banded_attention_forward(const BandedAttentionFwdParams& p, const Stream& stream) {
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
      using Layout = BandedLayout<kDimQK, kDimV>;
      const int group = p.shape.group();
      if (group > Layout::kRows) {
        return Status::error(StatusCode::kUnsupported,
                             "G = num_heads_q / num_heads_kv = %d; at most %d on CUDA", group, Layout::kRows);
      }
      const int64_t num_tiles = num_sequence_tiles(p.seqs, Layout::kRows / group);
      return launch("banded_attention_fwd_portable", banded_attention_fwd_portable<T, kDimQK, kDimV>,
                    dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(p.shape.num_heads_kv)),
                    Layout::kThreads, Layout::kBytes, stream, p, num_tiles);
    });
  });
}

}  // namespace nsa::cuda::portable
