// The two kernels of the banded backward on Hopper, and what they share.
#pragma once

#include "cuda/common/key_parts.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/reduce.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kWarpgroupRows = 64;
constexpr int kConsumers = 2;  // warpgroups that multiply; a third one brings the tiles

// By key tile, a consumer owns 64 keys: dK and dV take (kDimQK + kDimV) / 2 of its 232 registers, scores and
// their gradients kQueryRows. By query tile it owns 64 query rows: dQ takes kDimQK / 2, scores and their
// gradients kWalkedKeys, and Q and dO (kDimQK + kDimV) / 4 where kRowsInRegisters: that saves reading them
// from shared memory for every key tile, whose bandwidth is what bounds the kernel, and frees their tiles for
// the next item at once. The stages fill what 227 KB leave beside the tiles that stay.
template <int kDimQK, int kDimV>
struct BandedBwdConfig {
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr int kConsumerWarps = kConsumers * 4;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kQueryRows = kDimQK > 128 ? 32 : 64;
  static constexpr int kQueryStages = kDimQK > 128 ? 6 : 4;
  static constexpr bool kRowsInRegisters = kDimQK <= 128;
  static constexpr int kWalkedKeys = kDimQK > 64 ? 64 : 128;
  static constexpr int kKeyStages = kDimQK > 128 ? 3 : kDimQK > 64 ? 5 : 4;
};

struct QueryMaps {
  CUtensorMap q, d_o;
};
struct KeyMaps {
  CUtensorMap k, v;
};

// By key tile: dK and dV of a branch, or parts of them, which key_sums adds. By query tile: dQ of one branch
// or of two that share q and dO. ticket, or null: deals out the items of dQ; the launch for keys zeroes it.
// Each kernel lets the next one
// begin when the one in front has ended.
Status banded_attention_bwd_keys(const BandedAttentionBwdParams& p, Begin begin, int* ticket,
                                 const Stream& stream);
Status banded_attention_bwd_queries(const BandedAttentionBwdParams* branches, int count, Begin begin,
                                    int* ticket, const Stream& stream);
Status banded_attention_bwd_key_sums(const BandedAttentionBwdParams& p, Begin begin, const Stream& stream);

// f<T, kDimQK, kDimV>() -> bool as in dispatch_kernels, of shapes and tensors that have been found to have a
// kernel.
template <typename F>
Status run_kernels(const BandedAttentionBwdParams& p, F&& f) {
  Status status;
  const bool found = dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v,
      [&]<typename T, int kDimQK, int kDimV>() { return f.template operator()<T, kDimQK, kDimV>(&status); });
  return found ? status : Status::error(StatusCode::kDeviceError, "a tensor does not suit TMA any more");
}

// Tiles of tokens with the heads of a group, and of keys.
template <int kDimQK, int kDimV>
bool make_maps(QueryMaps* maps, const BandedAttentionBwdParams& p, int tokens) {
  const int heads = p.shape.num_heads_q, group = p.shape.group();
  return make_tensor_map(&maps->q, p.dtype, p.q, p.seqs.total_q, heads, kDimQK, tokens, group) &&
         make_tensor_map(&maps->d_o, p.dtype, p.grads.d_o, p.seqs.total_q, heads, kDimV, tokens, group);
}
template <int kDimQK, int kDimV>
bool make_maps(KeyMaps* maps, const BandedAttentionBwdParams& p, int keys) {
  const int heads = p.shape.num_heads_kv;
  return make_tensor_map(&maps->k, p.dtype, p.k, p.seqs.key_rows, heads, kDimQK, keys, 1) &&
         make_tensor_map(&maps->v, p.dtype, p.v, p.seqs.key_rows, heads, kDimV, keys, 1);
}

// Which slot of a ring, and the parity of the pass over it.
template <int kStages>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A tile of `rows` rows, panel by panel, by one thread.
template <int kDim>
__device__ __forceinline__ void load_panels(uint32_t tile, int rows, const CUtensorMap& map, uint32_t barrier,
                                            int head, int row) {
#pragma unroll 1
  for (int panel = 0; panel < kDim / kPanel; ++panel)
    ptx::bulk_load_3d(tile + panel * rows * kPanelPitch, &map, barrier, panel * kPanel, head, row);
}

// Zeros in rows [begin, end) of a tile, by one warp. What is multiplied by a probability of zero must be a
// number.
template <int kDim>
__device__ __forceinline__ void clear_rows(uint32_t tile, int rows, int begin, int end, int lane) {
#pragma unroll 1
  for (int i = lane; i < (end - begin) * (kDim / 8); i += 32) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                     tile + swizzled_offset(rows, begin + i / (kDim / 8), i % (kDim / 8))),
                 "r"(0)
                 : "memory");
  }
}

// acc = A . B^T over kDim, A: 64 rows of a tile of kRowsA from row first_a on, B a tile of kN rows.
template <typename T, int kDim, int kN>
__device__ __forceinline__ void multiply_rows(float (&acc)[kN / 2], uint32_t a, int rows_a, uint32_t b) {
#pragma unroll
  for (int d = 0; d < kDim; d += 16)
    ptx::wgmma_shared<T, kN>(acc, k_major_descriptor(a, rows_a, d), k_major_descriptor(b, kN, d), d > 0);
  ptx::wgmma_commit();
}

// The A fragments of 64 rows of a tile, for one warp's 16 of them.
template <int kDim>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[kDim / 16][4], uint32_t tile, int warp,
                                               int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    ptx::load_matrices(a[i], tile + swizzled_offset(kWarpgroupRows, row, 2 * i + (lane >> 4)));
}

// acc = A . B^T over kDim, A in registers, B the first kN rows of a tile of kRows.
template <typename T, int kDim, int kN, int kRows = kN>
__device__ __forceinline__ void multiply_rows(float (&acc)[kN / 2], const uint32_t (&a)[kDim / 16][4],
                                              uint32_t b) {
#pragma unroll
  for (int d = 0; d < kDim; d += 16)
    ptx::wgmma_registers_rows<T, kN>(acc, a[d / 16], k_major_descriptor(b, kRows, d), d > 0);
  ptx::wgmma_commit();
}

// acc += A . B, A in registers, B the first kK rows of a tile of kRows and kDim columns.
template <typename T, int kDim, int kK, int kRows = kK>
__device__ __forceinline__ void multiply_fragments(float (&acc)[kDim / 2], const uint32_t (&a)[kK / 16][4],
                                                   uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; k += 16)
    ptx::wgmma_registers<T, kDim>(acc, a[k / 16], mn_major_descriptor(b, kRows, k), true);
  ptx::wgmma_commit();
}

// A thread's two rows of an accumulator times factor, into rows of fp32; null: no such row.
template <int kCount>
__device__ __forceinline__ void write_accumulator(const float (&acc)[kCount], float factor, bool add,
                                                  float* row0, float* row1, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* const row = (h == 0 ? row0 : row1) + (lane & 3) * 2;
    if ((h == 0 ? row0 : row1) == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) {
      const float x = acc[4 * n + 2 * h] * factor, y = acc[4 * n + 2 * h + 1] * factor;
      if (add) {
        ptx::add_to_global(row + n * 8, x, y);
      } else {
        *reinterpret_cast<float2*>(row + n * 8) = make_float2(x, y);
      }
    }
  }
}

}  // namespace nsa::cuda::sm90
