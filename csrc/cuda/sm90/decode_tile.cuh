// Attention of 16 query rows of one token over keys that are scattered in a cache, on Hopper: what
// decode_attention does with a tile of keys.
//
// A warp has keys of its own, 16 at a time through a ring of its own, and a running softmax of its own;
// nothing synchronises the warps before they are merged. Rows come by cp.async: a lane finds the address of a
// row, whatever its page, and all lanes copy. A bulk copy for each row would cost no addresses, but a warp
// orders them one after the other, which takes longer than the products of the tile. Rows lie at the pitch of
// tile/warp_tile.cuh, so ldmatrix meets no bank conflict.
#pragma once

#include <bit>

#include "cuda/common/decode_attention.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90/decode_plan.h"
#include "cuda/tile/cached_sequence.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kDecodeKeys = 16;  // of a tile

// A row of a sequence and KV head in a cache: lanes 0 .. 15 have rows of keys, the others of values.
struct LaneRow {
  static constexpr unsigned kNone = ~0u;
  int row, page;

  // Without kCached nothing of the table stays in the L1 cache: the kernel in front may be writing it.
  template <bool kCached = true>
  __device__ __forceinline__ void look_up(const DecodeStream& stream, int b) {
    page = b;
    if (stream.pages == nullptr) return;
    const int32_t* entry =
        stream.pages + b * static_cast<int64_t>(stream.table_width) + stream.page_rows.divide(row);
    page = kCached ? *entry : __ldcg(entry);
  }
  // Where it is behind stream.k or stream.v, in units of 16 bytes; kNone in a page that does not exist.
  __device__ __forceinline__ unsigned offset(const DecodeStream& stream, int head, int lane) const {
    if (static_cast<unsigned>(page) >= stream.num_pages) return kNone;
    const bool is_value = lane >= kDecodeKeys;
    return page * (is_value ? stream.v_page : stream.k_page) +
           head * (is_value ? stream.v_head : stream.k_head) +
           (row - stream.page_rows.times(stream.page_rows.divide(row))) *
               (is_value ? stream.v_row : stream.k_row);
  }
};

// The ring of a warp: tiles go in and come out in the same order. Nothing is read twice, so rows are the
// first to leave the L2 cache: what else is there, code too, stays.
template <int kDimQK, int kDimV>
struct DecodeRing {
  static constexpr int kKTileBytes = tile_bytes<kDimQK>(kDecodeKeys);
  static constexpr int kStageBytes = kKTileBytes + tile_bytes<kDimV>(kDecodeKeys);
  uint32_t tiles, barriers;
  int stages;
  int loaded = 0, stage_in = 0, stage_out = 0;
  uint32_t parity = 0;

  __device__ DecodeRing(uint32_t tiles, uint32_t barriers, int stages)
      : tiles(tiles), barriers(barriers), stages(stages) {}

  // 16 keys and values that lie one behind the other in the sequence, at the lanes' offsets; zeros where
  // there is none, since what lies there may be NaN.
  __device__ __forceinline__ void load(const DecodeStream& stream, unsigned offset, int lane) {
    static_assert(kDecodeKeys == 16);
    const uint32_t tile = tiles + stage_in * kStageBytes;
    const bool there = offset != LaneRow::kNone;
    // Without pages all rows are there at the same distances, but at the ends.
    const unsigned of_k = __shfl_sync(~0u, offset, 0), of_v = __shfl_sync(~0u, offset, kDecodeKeys);
    const bool strided = offset == (lane < kDecodeKeys ? of_k + lane * stream.k_row
                                                       : of_v + (lane - kDecodeKeys) * stream.v_row);
    if (__all_sync(~0u, there && strided)) {
      copy_strided<kDimQK>(tile, stream.k, of_k, stream.k_row, lane);
      copy_strided<kDimV>(tile + kKTileBytes, stream.v, of_v, stream.v_row, lane);
    } else {
      copy_rows<kDimQK>(tile, stream.k, offset, 0, lane);
      copy_rows<kDimV>(tile + kKTileBytes, stream.v, offset, kDecodeKeys, lane);
    }
    ptx::barrier_arrive_after_copies(barriers + stage_in * 8);
    ++loaded;
    if (++stage_in == stages) stage_in = 0;
  }

  // Of the columns from 16-byte chunk kFirst on, as many at a time as divide the lanes.
  template <int kDim, int kFirst>
  static constexpr int kChunks = std::bit_floor(static_cast<unsigned>(kDim / 8 - kFirst));

  // Rows at `offset`, offset + row_units, .., 16 bytes a lane.
  template <int kDim, int kFirst = 0>
  __device__ __forceinline__ static void copy_strided(uint32_t tile, const char* data, unsigned offset,
                                                      unsigned row_units, int lane) {
    constexpr int kWidth = kChunks<kDim, kFirst>;
    const int row = lane / kWidth, chunk = kFirst + lane % kWidth;
    const char* from = data + uint64_t{offset + row_units * row + chunk} * 16;
    const uint32_t to = tile + row * kPitch<kDim> * 2 + chunk * 16;
#pragma unroll
    for (int r = 0; r < kDecodeKeys; r += 32 / kWidth)
      ptx::async_copy_16(to + r * kPitch<kDim> * 2, from + uint64_t{row_units} * (16 * r), true,
                         ptx::kEvictFirst);
    if constexpr (kFirst + kWidth < kDim / 8)
      copy_strided<kDim, kFirst + kWidth>(tile, data, offset, row_units, lane);
  }

  // Rows whose offsets the lanes lane0, lane0 + 1, .. have, 16 bytes a lane; zeros for none.
  template <int kDim, int kFirst = 0>
  __device__ __forceinline__ static void copy_rows(uint32_t tile, const char* data, unsigned offset,
                                                   int lane0, int lane) {
    constexpr int kWidth = kChunks<kDim, kFirst>;
    const int row = lane / kWidth, chunk = kFirst + lane % kWidth;
    const uint32_t to = tile + row * kPitch<kDim> * 2 + chunk * 16;
#pragma unroll
    for (int r = 0; r < kDecodeKeys; r += 32 / kWidth) {
      const unsigned from = __shfl_sync(~0u, offset, lane0 + row + r);
      ptx::async_copy_16(to + r * kPitch<kDim> * 2, data + chunk * 16 + uint64_t{from} * 16,
                         from != LaneRow::kNone, ptx::kEvictFirst);
    }
    if constexpr (kFirst + kWidth < kDim / 8)
      copy_rows<kDim, kFirst + kWidth>(tile, data, offset, lane0, lane);
  }

  __device__ __forceinline__ bool is_there() const {
    return __all_sync(~0u, ptx::barrier_test(barriers + stage_out * 8, parity));
  }

  // The oldest tile, once it is there.
  __device__ __forceinline__ uint32_t front() const {
    ptx::barrier_wait(barriers + stage_out * 8, parity);
    __syncwarp();
    return tiles + stage_out * kStageBytes;
  }

  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (++stage_out == stages) stage_out = 0, parity ^= 1;
  }
};

// One warp's attention: rows lane / 4 and lane / 4 + 8.
template <typename T, int kDimQK, int kDimV>
struct DecodeWarp {
  static constexpr int kSlack = 8;  // 2^8 is no loss in fp32 sums and 16-bit probabilities
  float out[1][kDimV / 8][4] = {};
  DecodeSoftmax softmax;

  // Keys below `end`. use_scores gets 2^(scale * (score - max)); raise what earlier ones shrink by where that
  // maximum grows.
  template <typename Raise, typename UseScores>
  __device__ __forceinline__ void attend(uint32_t q, uint32_t tile, int first, int end, float scale, int lane,
                                         const Raise& raise, const UseScores& use_scores) {
    float score[1][kDecodeKeys / 8][4] = {};
    multiply_transposed<T, kDimQK, kDecodeKeys, 1>(score, q, tile, lane);
    if (first + kDecodeKeys > end) {
#pragma unroll
      for (int i = 0; i < kDecodeKeys / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (first + i * 8 + (lane & 3) * 2 + (c & 1) >= end) score[0][i][c] = kNegInf;
        }
      }
    }
    softmax.update<kSlack>(score[0], out[0], scale, raise);
    use_scores(score[0]);
    multiply_probabilities<T, kDimV, kDecodeKeys, 1>(out, score,
                                                     tile + DecodeRing<kDimQK, kDimV>::kKTileBytes, lane);
  }

  // (largest logit in base 2, sum of 2^(logit - largest)) of a row; (-inf, 0) for no key.
  __device__ __forceinline__ float2 state(int half, float scale) const {
    return make_float2(largest(half, scale), quad_sum(softmax.sum[half]));
  }
  __device__ __forceinline__ float largest(int half, float scale) const {
    return softmax.max[half] == kNegInf ? kNegInf : softmax.max[half] * scale;
  }
};

}  // namespace nsa::cuda::sm90
