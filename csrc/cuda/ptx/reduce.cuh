// red (sm_90 for vectors): adds to global memory without reading it back. Where an address gets one addition
// of a kernel, the result does not depend on any order.
#pragma once

namespace nsa::cuda::ptx {

// PTX: red.global.add.v2.f32.
__device__ __forceinline__ void add_to_global(float* address, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x), "f"(y) : "memory");
}

}  // namespace nsa::cuda::ptx
