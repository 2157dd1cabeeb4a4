// Stores of what is not wanted in the caches again.
#pragma once

#include <cstdint>

namespace nsa::cuda::ptx {

// PTX: st.global.cs.v4 under a predicate: no branch, over which the compiler would not move instructions.
__device__ __forceinline__ void store_streaming_if(void* global, const uint4& value, bool stores) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(
          global),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(static_cast<int>(stores))
      : "memory");
}

}  // namespace nsa::cuda::ptx
