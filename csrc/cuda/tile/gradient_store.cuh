// Gradients from the accumulators of a 16-row slab to global memory.
#pragma once

#include <cstdint>

#include "cuda/tile/vector.cuh"
#include "cuda/tile/warp_tile.cuh"
#include "nsa/params.h"

namespace nsa::cuda {

// PTX: red.global.add.v4.f32 (sm_90), where valid: adds without waiting for what was there. Where every
// address is added to once, the result does not depend on any order.
__device__ __forceinline__ void add_4(float* address, float4 x, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, "
      "%4};\n}" ::"l"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(static_cast<int>(valid))
      : "memory");
}

// PTX: st.global.v4, where valid.
__device__ __forceinline__ void store_4(float* address, float4 x, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(
          address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(static_cast<int>(valid))
      : "memory");
}

// x: an accumulator tile's four values. Neighbouring lanes exchange a pair each, so that the even one has
// four columns of row lane / 4 and the odd one of row lane / 4 + 8.
__device__ __forceinline__ float4 exchange_pairs(const float* x, bool odd) {
  const float sent[2] = {odd ? x[0] : x[2], odd ? x[1] : x[3]};
  const float got[2] = {__shfl_xor_sync(~0u, sent[0], 1), __shfl_xor_sync(~0u, sent[1], 1)};
  return make_float4(odd ? got[0] : x[0], odd ? got[1] : x[1], odd ? x[2] : got[0], odd ? x[3] : got[1]);
}

// acc: accumulators of a warp, [kColumns / 8][4] as mma.sync and wgmma lay them out, times factor. Row r of
// the slab (< rows) lies at first + r * stride.
template <bool kAdd, int kCount>
__device__ __forceinline__ void put_slab(const float (&acc)[kCount], float factor, float* first,
                                         int64_t stride, int rows, int lane) {
  const bool odd = lane & 1;
  const int row = lane / 4 + (odd ? 8 : 0);
  float* target = first + row * stride + (lane & 2) * 2;
#pragma unroll
  for (int d = 0; d < kCount / 4; ++d) {
    const float4 x = exchange_pairs(&acc[4 * d], odd);
    const float4 four = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
    kAdd ? add_4(target + d * 8, four, row < rows) : store_4(target + d * 8, four, row < rows);
  }
}

// acc: dQ of a warp's slab, [kColumns / 8][4] as mma.sync and wgmma lay it out, times factor; changed. at:
// the elements of dQ where the rows lane / 4 and lane / 4 + 8 begin, -1 for none. kReduce (sm_90): the sum is
// added to without waiting for what was there; where it has to be read, kBatch columns are on their way at a
// time.
template <typename T, bool kReduce, int kBatch, int kCount>
__device__ __forceinline__ void put_query_grads(const QueryGrads& grads, float (&acc)[kCount], float factor,
                                                const int64_t (&at)[2], int lane) {
  static_assert(kBatch % 32 == 0 && 2 * kCount % kBatch == 0);
  float* const sum = static_cast<float*>(grads.sum);
  const bool finish = grads.result != nullptr, odd = lane & 1;
  const int64_t own = odd ? at[1] : at[0];
#pragma unroll
  for (float& x : acc) x *= factor;
#pragma unroll
  for (int begin = 0; begin < 2 * kCount; begin += kBatch) {
    float(&batch)[kBatch / 8][4] = reinterpret_cast<float(&)[kBatch / 8][4]>(acc[begin / 2]);
    if (grads.begun && (finish || !kReduce)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (at[h] < 0) continue;
        const float2* const before = reinterpret_cast<const float2*>(sum + at[h] + begin) + (lane & 3);
#pragma unroll
        for (int n = 0; n < kBatch / 8; ++n) {
          const float2 x = __ldcs(before + n * 4);
          batch[n][2 * h] += x.x;
          batch[n][2 * h + 1] += x.y;
        }
      }
    }
    if (finish) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T* const row = at[h] < 0 ? nullptr : static_cast<T*>(grads.result) + at[h] + begin;
        store_row(row, batch, h, 1.f, lane);
      }
    } else {
      float* const row = sum + own + begin + (lane & 2) * 2;
#pragma unroll
      for (int n = 0; n < kBatch / 8; ++n) {
        const float4 x = exchange_pairs(batch[n], odd);
        kReduce&& grads.begun ? add_4(row + n * 8, x, own >= 0) : store_4(row + n * 8, x, own >= 0);
      }
    }
  }
}

// The same for `count` elements, a multiple of 8, from `at` on, of rows that see no key; by one warp.
template <typename T>
__device__ __forceinline__ void put_no_query_grads(const QueryGrads& grads, int64_t at, int count, int lane) {
  float4* const sum = reinterpret_cast<float4*>(static_cast<float*>(grads.sum) + at);
  uint4* const result = reinterpret_cast<uint4*>(static_cast<T*>(grads.result) + at);
#pragma unroll 2
  for (int i = lane; i < count / 8; i += 32) {
    if (grads.result != nullptr) {
      const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
      const float4 x = grads.begun ? __ldcs(sum + 2 * i) : zero,
                   y = grads.begun ? __ldcs(sum + 2 * i + 1) : zero;
      result[i] = make_uint4(ptx::pack2<T>(x.x, x.y), ptx::pack2<T>(x.z, x.w), ptx::pack2<T>(y.x, y.y),
                             ptx::pack2<T>(y.z, y.w));
    } else if (!grads.begun) {
      sum[2 * i] = sum[2 * i + 1] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
}

}  // namespace nsa::cuda
