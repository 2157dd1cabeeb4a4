// Attention of 16 query rows over keys that are scattered in a cache: what the kernels of decode_attention
// share.
//
// Every warp has keys of its own, a tile at a time through a ring of its own, and a running softmax of its
// own; nothing synchronises the warps before they are merged.
#pragma once

#include "cuda/common/decode_attention.cuh"
#include "cuda/portable/config.h"
#include "cuda/tile/cached_sequence.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {

constexpr int kDecodeRows = 16;

template <int kDimQK, int kDimV>
struct DecodeLayout : DecodeConfig<kDimQK, kDimV> {
  using Config = DecodeConfig<kDimQK, kDimV>;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kStageBytes = tile_bytes<kDimQK>(Config::kKeys) + tile_bytes<kDimV>(Config::kKeys);
  static constexpr int kQ = 0;
  static constexpr int kRing = kQ + tile_bytes<kDimQK>(kDecodeRows);
  static constexpr int kRingBytes = Config::kWarps * Config::kStages * kStageBytes;
  // The warps' results, in place of the ring: outputs, then (max, sum) of the rows.
  static constexpr int kOutput = kRing;
  static constexpr int kState = kOutput + Config::kWarps * kDecodeRows * kDimV * 4;
  static constexpr int kBytes = kRing + kRingBytes;
  static_assert(kState + Config::kWarps * kDecodeRows * 8 <= kBytes);
};

// Where the partial result of a thread block over its keys goes.
struct PartialResult {
  float* o;       // [kDimV], not divided by the sum
  float2* state;  // (largest logit in base 2, sum of 2^(logit - largest)); (-inf, 0) for no key
};

// Keys and values of one sequence and KV head, which lie in the same pages and rows; key i is row i + shift.
struct CachedKeys {
  const CachedRows& k;
  const CachedRows& v;
  int64_t b;
  int head, shift;
};

// What the rows lane / 4 and lane / 4 + 8 see: low <= key < high; all rows see full_low <= key < full_high.
struct VisibleKeys {
  int low[2], high[2];
  int full_low, full_high;
};

// One operand of a tile: lane i holds the offset of key i, or -1 for zeros. Eight rows of 64 bytes at a time.
template <typename T, int kDim, int kKeys>
__device__ __forceinline__ void load_rows(uint32_t tile, const void* data, int64_t own_offset, int lane) {
  const uint32_t target = tile + ((lane >> 2) * kPitch<kDim> + (lane & 3) * 8) * 2;
#pragma unroll
  for (int row = 0; row < kKeys; row += 8) {
    const int64_t offset = __shfl_sync(~0u, own_offset, row + (lane >> 2));
    const T* source = static_cast<const T*>(data) + max64(offset, 0) + (lane & 3) * 8;
#pragma unroll
    for (int chunk = 0; chunk < kDim / 8; chunk += 4)
      ptx::async_copy_16(target + (row * kPitch<kDim> + chunk * 8) * 2, source + chunk * 8, offset >= 0);
  }
}

// Keys first .. first + kKeys - 1 into a stage; zeros from `end` on.
template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void load_keys(uint32_t stage, const CachedKeys& keys, int first, int end,
                                          int lane) {
  constexpr int kKeys = DecodeLayout<kDimQK, kDimV>::kKeys;
  int64_t k_offset = -1, v_offset = -1;
  if (lane < kKeys && first + lane < end) {
    const PageAndRow at(keys.k, keys.b, first + lane + keys.shift);
    k_offset = at.offset(keys.k, keys.head);
    v_offset = at.offset(keys.v, keys.head);
  }
  load_rows<T, kDimQK, kKeys>(stage, keys.k.data, k_offset, lane);
  load_rows<T, kDimV, kKeys>(stage + tile_bytes<kDimQK>(kKeys), keys.v.data, v_offset, lane);
}

// Starts the copy of Q; row r is at rows(r), or zeros where it returns null.
template <int kDimQK, int kDimV, typename RowPointer>
__device__ __forceinline__ void load_queries(uint32_t base, const RowPointer& rows) {
  using Layout = DecodeLayout<kDimQK, kDimV>;
  load_tile<kDimQK, kDecodeRows, Layout::kThreads>(base + Layout::kQ, rows, threadIdx.x);
  ptx::async_commit();
}

// Attends num_tiles tiles of keys; the warps take turns. first_key(tile) and end_key(tile) give the keys of a
// tile. use_scores(first, scores) gets the raw logits of a tile, unmasked. partial(r) says where row r goes
// (o = null: nowhere).
template <typename T, int kDimQK, int kDimV, typename FirstKey, typename EndKey, typename UseScores,
          typename Partial>
__device__ __forceinline__ void attend_tiles(unsigned char* shared, uint32_t base, const CachedKeys& keys,
                                             int num_tiles, const FirstKey& first_key, const EndKey& end_key,
                                             const VisibleKeys& visible, float scale,
                                             const UseScores& use_scores, const Partial& partial) {
  using Layout = DecodeLayout<kDimQK, kDimV>;
  constexpr int kWarps = Layout::kWarps, kStages = Layout::kStages, kKeys = Layout::kKeys;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t ring = base + Layout::kRing + warp * kStages * Layout::kStageBytes;
  const auto load = [&](int index, int stage) {
    const int tile = index * kWarps + warp;
    if (tile < num_tiles) {
      load_keys<T, kDimQK, kDimV>(ring + stage * Layout::kStageBytes, keys, first_key(tile), end_key(tile),
                                  lane);
    }
    ptx::async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage, stage);
  ptx::async_wait<kStages - 1>();  // for Q
  __syncthreads();

  float out[1][kDimV / 8][4] = {};
  DecodeSoftmax softmax;
  for (int index = 0; index * kWarps + warp < num_tiles; ++index) {
    load(index + kStages - 1, (index + kStages - 1) % kStages);
    ptx::async_wait<kStages - 1>();
    __syncwarp();
    const uint32_t k = ring + index % kStages * Layout::kStageBytes, v = k + tile_bytes<kDimQK>(kKeys);
    const int first = first_key(index * kWarps + warp), end = end_key(index * kWarps + warp);
    float score[1][kKeys / 8][4] = {};
    multiply_transposed<T, kDimQK, kKeys, 1>(score, base + Layout::kQ, k, lane);
    use_scores(first, score[0]);
    if (first < visible.full_low || first + kKeys > min(visible.full_high, end)) {
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first + i * 8 + (lane & 3) * 2 + (c & 1), half = c >> 1;
          if (key < visible.low[half] || key >= min(visible.high[half], end)) score[0][i][c] = kNegInf;
        }
      }
    }
    softmax.update(score[0], out[0], scale);
    multiply_probabilities<T, kDimV, kKeys, 1>(out, score, v, lane);
    __syncwarp();
  }
  ptx::async_wait<0>();
  __syncthreads();

  float* warp_out = reinterpret_cast<float*>(shared + Layout::kOutput);
  float2* state = reinterpret_cast<float2*>(shared + Layout::kState);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kDecodeRows + lane / 4 + 8 * half;
    const float sum = quad_sum(softmax.sum[half]);
    if ((lane & 3) == 0)
      state[row] = make_float2(softmax.max[half] == kNegInf ? kNegInf : softmax.max[half] * scale, sum);
#pragma unroll
    for (int d = 0; d < kDimV / 8; ++d) {
      *reinterpret_cast<float2*>(warp_out + row * kDimV + d * 8 + (lane & 3) * 2) =
          make_float2(out[0][d][2 * half], out[0][d][2 * half + 1]);
    }
  }
  __syncthreads();
  constexpr int kVectors = kDimV / 4;
  for (int i = threadIdx.x; i < kDecodeRows * kVectors; i += Layout::kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const PartialResult to = partial(row);
    if (to.o == nullptr) continue;
    float max = kNegInf;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, state[w * kDecodeRows + row].x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 s = state[w * kDecodeRows + row];
      if (s.y == 0.f) continue;
      const float weight = ptx::exp2_approx(s.x - max);
      const float4 x =
          *reinterpret_cast<const float4*>(warp_out + (w * kDecodeRows + row) * kDimV + vector * 4);
      total += weight * s.y;
      sum = make_float4(fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z),
                        fmaf(weight, x.w, sum.w));
    }
    if (total != 0.f) reinterpret_cast<float4*>(to.o)[vector] = sum;
    if (vector == 0) *to.state = make_float2(max, total);
  }
}

}  // namespace nsa::cuda::portable
