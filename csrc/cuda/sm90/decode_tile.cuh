// Attention of 16 query rows of one token over keys that are scattered in a cache, on Hopper: what
// decode_attention does with a tile of keys.
//
// A warp has keys of its own, 16 at a time through a ring of its own, and a running softmax of its own;
// nothing synchronises the warps before they are merged. Rows come by cp.async: a lane finds the address of a
// row, whatever its page, and all lanes copy. A bulk copy for each row would cost no addresses, but a warp
// orders them one after the other, which takes longer than the products of the tile. Rows lie at the pitch of
// tile/warp_tile.cuh, so ldmatrix meets no bank conflict.
#pragma once

#include "cuda/common/decode_attention.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/cached_sequence.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kDecodeKeys = 16;  // of a tile
constexpr int kDecodeRows = 16;

// Keys (lanes 0 .. 15) or values (the others) of one sequence and KV head, which lie in the same pages and
// rows: what a lane needs to find a row, in registers. Key i is row i + shift.
struct LaneRows {
  const char* data;  // of the head
  int64_t page_bytes;
  unsigned row_bytes;
  const int32_t* pages;            // null: one page
  unsigned page_rows, last_entry;  // of the table
  int num_pages, only_page, shift;

  LaneRows() = default;
  __device__ LaneRows(const CachedRows& k, const CachedRows& v, int64_t b, int head, int shift, int lane)
      : pages(k.block_table == nullptr ? nullptr : k.block_table + b * k.table_width),
        page_rows(static_cast<unsigned>(k.page_rows)),
        last_entry(static_cast<unsigned>(k.table_width) - 1),
        num_pages(static_cast<int>(k.num_pages)),
        only_page(static_cast<int>(b)),
        shift(shift) {
    // Values are chosen, not structs: those are in the constant bank, where lanes cannot point to.
    const bool is_value = lane >= kDecodeKeys;
    data = static_cast<const char*>(is_value ? v.data : k.data) +
           head * (is_value ? v.stride_head : k.stride_head) * 2;
    page_bytes = (is_value ? v.stride_page : k.stride_page) * 2;
    row_bytes = static_cast<unsigned>((is_value ? v.stride_row : k.stride_row) * 2);
  }
  // Null for a page that does not exist. Without kCached nothing of the table stays in the L1 cache: the
  // kernel in front may be writing it.
  template <bool kCached = true>
  __device__ __forceinline__ const char* row(int key) const {
    const unsigned index = static_cast<unsigned>(key + shift);
    const unsigned page_index = index < page_rows ? 0 : index / page_rows;
    int page = only_page;
    if (pages != nullptr) {
      page = kCached ? pages[page_index] : __ldcg(pages + page_index);
      // The warps of a thread block look up the entries behind these next: a line of 32.
      if (kCached) ptx::prefetch_l1(pages + min(page_index + 32, last_entry));
    }
    if (page < 0 || page >= num_pages) return nullptr;
    return data + page * page_bytes + uint64_t{row_bytes} * (index - page_index * page_rows);
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

  // Keys first .. first + kDecodeKeys - 1; zeros from `end` on, since what lies there may be NaN.
  __device__ __forceinline__ void load(const LaneRows& rows, int first, int end, int lane) {
    static_assert(kDecodeKeys == 16);
    const int key = first + (lane & (kDecodeKeys - 1));
    const uint32_t tile = tiles + stage_in * kStageBytes;
    const char* source = key < end ? rows.row(key) : nullptr;
    // Mostly all rows are there, at the same distances.
    const uint64_t from = reinterpret_cast<uint64_t>(source);
    const uint64_t from_k = __shfl_sync(~0u, from, 0), from_v = __shfl_sync(~0u, from, kDecodeKeys);
    const bool strided =
        source != nullptr && from == (lane < kDecodeKeys ? from_k : from_v) +
                                         (lane & (kDecodeKeys - 1)) * uint64_t{rows.row_bytes};
    if (__all_sync(~0u, strided)) {
      copy_strided<kDimQK>(tile, from_k, __shfl_sync(~0u, rows.row_bytes, 0), lane);
      copy_strided<kDimV>(tile + kKTileBytes, from_v, __shfl_sync(~0u, rows.row_bytes, kDecodeKeys), lane);
    } else {
      copy_rows<kDimQK>(tile, source, 0, lane);
      copy_rows<kDimV>(tile + kKTileBytes, source, kDecodeKeys, lane);
    }
    ptx::barrier_arrive_after_copies(barriers + stage_in * 8);
    ++loaded;
    if (++stage_in == stages) stage_in = 0;
  }

  // Rows `from`, from + row_bytes, .., 16 bytes a lane.
  template <int kDim>
  __device__ __forceinline__ static void copy_strided(uint32_t tile, uint64_t from, unsigned row_bytes,
                                                      int lane) {
    constexpr int kChunks = kDim / 8;
    if constexpr (32 % kChunks == 0) {
      const int row = lane / kChunks, chunk = lane % kChunks;
      from += uint64_t{row_bytes} * row + chunk * 16;
      tile += row * kPitch<kDim> * 2 + chunk * 16;
#pragma unroll
      for (int r = 0; r < kDecodeKeys; r += 32 / kChunks)
        ptx::async_copy_16(tile + r * kPitch<kDim> * 2,
                           reinterpret_cast<const void*>(from + uint64_t{row_bytes} * r), true,
                           ptx::kEvictFirst);
    } else {
#pragma unroll
      for (int k = lane; k < kDecodeKeys * kChunks; k += 32) {
        const int row = k / kChunks, chunk = k % kChunks;
        ptx::async_copy_16(tile + row * kPitch<kDim> * 2 + chunk * 16,
                           reinterpret_cast<const void*>(from + uint64_t{row_bytes} * row + chunk * 16), true,
                           ptx::kEvictFirst);
      }
    }
  }

  // Rows whose addresses the lanes first, first + 1, .. have, 16 bytes a lane; null: zeros.
  template <int kDim>
  __device__ __forceinline__ static void copy_rows(uint32_t tile, const char* source, int first, int lane) {
    constexpr int kChunks = kDim / 8;
    static_assert(kDecodeKeys * kChunks % 32 == 0);
#pragma unroll
    for (int k = 0; k < kDecodeKeys * kChunks; k += 32) {
      const int row = (k + lane) / kChunks, chunk = (k + lane) % kChunks;
      const uint64_t from = __shfl_sync(~0u, reinterpret_cast<uint64_t>(source), first + row);
      ptx::async_copy_16(tile + row * kPitch<kDim> * 2 + chunk * 16,
                         reinterpret_cast<const void*>(from + (from == 0 ? 0 : chunk * 16)), from != 0,
                         ptx::kEvictFirst);
    }
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
