// Division by a number that the host knows: a multiplication. Where a kernel does little else, its divisions
// are what takes time.
#pragma once

#include <cstdint>

namespace nsa::cuda {

struct Divisor {
  unsigned value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<unsigned>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<unsigned>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value) / value + 1);
  }
  // n from 0 to 2^31 - 1.
  __device__ __forceinline__ int divide(int n) const {
    const unsigned dividend = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(dividend, multiplier) + dividend) >> shift);
  }
  __device__ __forceinline__ int times(int n) const { return n * static_cast<int>(value); }
};

}  // namespace nsa::cuda
