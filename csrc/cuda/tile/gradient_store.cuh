// Sums of a 16-row slab of accumulators to fp32 rows in global memory.
#pragma once

#include <cstdint>

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

// acc: accumulators of a warp, [kColumns / 8][4] as mma.sync and wgmma lay them out, times factor. Row r of
// the slab (< rows) lies at first + r * stride. Neighbouring lanes exchange a pair each, so that the even one
// has four columns of row lane / 4 and the odd one of row lane / 4 + 8.
template <bool kAdd, int kCount>
__device__ __forceinline__ void put_slab(const float (&acc)[kCount], float factor, float* first,
                                         int64_t stride, int rows, int lane) {
  const bool odd = lane & 1;
  const int row = lane / 4 + (odd ? 8 : 0);
  float* target = first + row * stride + (lane & 2) * 2;
#pragma unroll
  for (int d = 0; d < kCount / 4; ++d) {
    const float* x = &acc[4 * d];
    const float sent[2] = {odd ? x[0] : x[2], odd ? x[1] : x[3]};
    const float got[2] = {__shfl_xor_sync(~0u, sent[0], 1), __shfl_xor_sync(~0u, sent[1], 1)};
    const float4 four = make_float4((odd ? got[0] : x[0]) * factor, (odd ? got[1] : x[1]) * factor,
                                    (odd ? x[2] : got[0]) * factor, (odd ? x[3] : got[1]) * factor);
    kAdd ? add_4(target + d * 8, four, row < rows) : store_4(target + d * 8, four, row < rows);
  }
}

}  // namespace nsa::cuda
