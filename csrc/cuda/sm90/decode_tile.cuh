// Attention of 16 query rows over keys that are scattered in a cache, on Hopper: what the kernels of
// decode_attention share.
//
// A warp has keys of its own, 16 at a time through a ring of its own, and a running softmax of its own;
// nothing synchronises the warps before they are merged. Rows come by bulk copies, one lane's order each: a
// row of a head is contiguous, and pages, rings and odd beginnings cost nothing. Rows lie at the pitch of
// tile/warp_tile.cuh, so ldmatrix meets no bank conflict.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/decode_plan.h"
#include "cuda/tile/cached_sequence.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kDecodeRows = 16;
constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kMaxDecodeStages = 4;

template <int kDimQK, int kDimV>
struct DecodeLayout {
  static constexpr int kKTileBytes = tile_bytes<kDimQK>(kDecodeKeys);
  static constexpr int kStageBytes = kKTileBytes + tile_bytes<kDimV>(kDecodeKeys);
  static constexpr int kQBytes = tile_bytes<kDimQK>(kDecodeRows);
  // The warps' outputs, in place of the ring; the pitch spreads the rows of a quad's store over the banks.
  static constexpr int kOutputPitch = kDimV + 8;
  static constexpr int kOutputBytes = kDecodeWarps * kDecodeRows * kOutputPitch * 4;
  static_assert(kOutputBytes <= kDecodeWarps * kStageBytes);

  static constexpr int ring_bytes(int stages) { return kDecodeWarps * stages * kStageBytes; }
};

// Keys (lanes 0 .. 15) or values (the others) of one sequence and KV head, which lie in the same pages and
// rows: what a lane needs to find a row, in registers. Key i is row i + shift.
struct LaneRows {
  const char* data;  // of the head
  int64_t page_bytes, row_bytes;
  const int32_t* pages;  // null: one page
  unsigned page_rows;
  int num_pages, only_page, shift;

  __device__ LaneRows(const CachedRows& k, const CachedRows& v, int64_t b, int head, int shift, int lane)
      : pages(k.block_table == nullptr ? nullptr : k.block_table + b * k.table_width),
        page_rows(static_cast<unsigned>(k.page_rows)),
        num_pages(static_cast<int>(k.num_pages)),
        only_page(static_cast<int>(b)),
        shift(shift) {
    // Values are chosen, not structs: those are in the constant bank, where lanes cannot point to.
    const bool is_value = lane >= kDecodeKeys;
    data = static_cast<const char*>(is_value ? v.data : k.data) +
           head * (is_value ? v.stride_head : k.stride_head) * 2;
    page_bytes = (is_value ? v.stride_page : k.stride_page) * 2;
    row_bytes = (is_value ? v.stride_row : k.stride_row) * 2;
  }
  // Null for a page that does not exist.
  __device__ __forceinline__ const char* row(int key) const {
    const unsigned index = static_cast<unsigned>(key + shift), page_index = index / page_rows;
    const int page = pages == nullptr ? only_page : pages[page_index];
    if (page < 0 || page >= num_pages) return nullptr;
    return data + page * page_bytes + static_cast<int64_t>(index - page_index * page_rows) * row_bytes;
  }
};

// A row of a tile to shared memory; none (source = null): zeros, since what lies there may be NaN.
__device__ __forceinline__ void load_decode_row(uint32_t target, const void* source, int bytes,
                                                uint32_t barrier) {
  if (source != nullptr) {
    ptx::bulk_load(target, source, barrier, bytes);
  } else {
#pragma unroll 1
    for (int i = 0; i < bytes; i += 16) ptx::store_shared_16(target + i, 0, 0, 0, 0);
    ptx::async_proxy_fence();
  }
}

// Row r of Q at rows(r), or zeros where it returns null; by one warp. One arrival at the barrier.
template <typename T, int kDimQK, typename RowPointer>
__device__ __forceinline__ void load_decode_queries(uint32_t tile, uint32_t barrier, const RowPointer& rows,
                                                    int lane) {
  const void* source = lane < kDecodeRows ? rows(lane) : nullptr;
  const int count = __popc(__ballot_sync(~0u, source != nullptr));
  if (lane == 0) ptx::barrier_arrive_expect(barrier, count * kDimQK * 2);
  __syncwarp();
  if (lane < kDecodeRows) load_decode_row(tile + lane * kPitch<kDimQK> * 2, source, kDimQK * 2, barrier);
}

// The ring of a warp: tiles go in and come out in the same order.
template <typename T, int kDimQK, int kDimV>
struct DecodeRing {
  using Layout = DecodeLayout<kDimQK, kDimV>;
  uint32_t tiles, barriers;
  int stages;
  int loaded = 0, stage_in = 0, stage_out = 0;
  uint32_t parity = 0;

  __device__ DecodeRing(uint32_t ring, uint32_t all_barriers, int stages, int warp)
      : tiles(ring + warp * stages * Layout::kStageBytes),
        barriers(all_barriers + warp * kMaxDecodeStages * 8),
        stages(stages) {}

  // Keys first .. first + kDecodeKeys - 1; zeros from `end` on.
  __device__ __forceinline__ void load(const LaneRows& rows, int first, int end, int lane) {
    static_assert(kDecodeKeys == 16);
    const int i = lane & (kDecodeKeys - 1), key = first + i;
    const bool is_value = lane >= kDecodeKeys;
    const uint32_t tile = tiles + stage_in * Layout::kStageBytes, barrier = barriers + stage_in * 8;
    const uint32_t target =
        is_value ? tile + Layout::kKTileBytes + i * kPitch<kDimV> * 2 : tile + i * kPitch<kDimQK> * 2;
    const int bytes = is_value ? kDimV * 2 : kDimQK * 2;
    const char* source = key < end ? rows.row(key) : nullptr;
    const int count = __popc(__ballot_sync(~0u, source != nullptr) >> kDecodeKeys);
    if (lane == 0) ptx::barrier_arrive_expect(barrier, count * (kDimQK + kDimV) * 2);
    __syncwarp();
    load_decode_row(target, source, bytes, barrier);
    ++loaded;
    if (++stage_in == stages) stage_in = 0;
  }

  // The oldest tile, once it is there.
  __device__ __forceinline__ uint32_t front() const {
    ptx::barrier_wait(barriers + stage_out * 8, parity);
    __syncwarp();  // for the zeros of other lanes
    return tiles + stage_out * Layout::kStageBytes;
  }

  __device__ __forceinline__ void pop() {
    __syncwarp();
    if (++stage_out == stages) stage_out = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void init_decode_barriers(uint32_t barriers, int count) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) ptx::barrier_init(barriers + i * 8, 1);
    ptx::barrier_init_fence();
  }
}

// What the rows lane / 4 and lane / 4 + 8 see: low <= key < high; all rows see full_low <= key < full_high.
struct VisibleKeys {
  int low[2], high[2];
  int full_low, full_high;
};

// One warp's attention: rows lane / 4 and lane / 4 + 8.
template <typename T, int kDimQK, int kDimV>
struct DecodeWarp {
  float out[1][kDimV / 8][4] = {};
  float max[2] = {kNegInf, kNegInf};  // of the raw scores
  float sum[2] = {0.f, 0.f};          // of this thread's columns

  // Scores of a tile, 2^(scale * (score - max)) then; use_scores(score) gets these.
  template <typename UseScores>
  __device__ __forceinline__ void attend(uint32_t q, uint32_t tile, int first, int end,
                                         const VisibleKeys& visible, float scale, int lane,
                                         const UseScores& use_scores) {
    float score[1][kDecodeKeys / 8][4] = {};
    multiply_transposed<T, kDimQK, kDecodeKeys, 1>(score, q, tile, lane);
    if (first < visible.full_low || first + kDecodeKeys > min(visible.full_high, end)) {
#pragma unroll
      for (int i = 0; i < kDecodeKeys / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first + i * 8 + (lane & 3) * 2 + (c & 1), half = c >> 1;
          if (key < visible.low[half] || key >= min(visible.high[half], end)) score[0][i][c] = kNegInf;
        }
      }
    }
    update(score[0], scale);
    use_scores(score[0]);
    multiply_probabilities<T, kDimV, kDecodeKeys, 1>(out, score,
                                                     tile + DecodeLayout<kDimQK, kDimV>::kKTileBytes, lane);
  }

  // (largest logit in base 2, sum of 2^(logit - largest)) of a row; (-inf, 0) for no key.
  __device__ __forceinline__ float2 state(int half, float scale) const {
    return make_float2(max[half] == kNegInf ? kNegInf : max[half] * scale, quad_sum(sum[half]));
  }

 private:
  // Rescales only when a maximum grows, which after the first tiles is seldom.
  __device__ __forceinline__ void update(float (&score)[kDecodeKeys / 8][4], float scale) {
    float high[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      high[h] = max[h];
#pragma unroll
      for (int n = 0; n < kDecodeKeys / 8; ++n)
        high[h] = fmaxf(high[h], fmaxf(score[n][2 * h], score[n][2 * h + 1]));
      high[h] = quad_max(high[h]);
    }
    if (__any_sync(~0u, high[0] > max[0] || high[1] > max[1])) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shrink = high[h] == kNegInf ? 1.f : ptx::exp2_approx((max[h] - high[h]) * scale);
        max[h] = high[h];
        sum[h] *= shrink;
#pragma unroll
        for (int d = 0; d < kDimV / 8; ++d) {
          out[0][d][2 * h] *= shrink;
          out[0][d][2 * h + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = max[h] == kNegInf ? 0.f : max[h] * scale;
#pragma unroll
      for (int n = 0; n < kDecodeKeys / 8; ++n) {
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; ++c) {
          score[n][c] = ptx::exp2_approx(fmaf(score[n][c], scale, -base));
          sum[h] += score[n][c];
        }
      }
    }
  }
};

}  // namespace nsa::cuda::sm90
