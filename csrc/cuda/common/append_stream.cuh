// K or V of a step that is appended to a cache, for the kernels of both paths.
#pragma once

#include "cuda/tile/cached_sequence.cuh"

namespace nsa::cuda {

constexpr int kAppendThreads = 256;
constexpr int kAppendVector = 8;  // elements of 16 bits in 16 bytes
constexpr int kMaxAppendDim = 256;

using AppendStream = AppendKvParams::Stream;

__device__ __forceinline__ const AppendStream& stream_of(const AppendKvParams& p, int index) {
  return index == 0 ? p.k : p.v;
}

// Channels c and c + dim / 2 of a compressed key, turned. phi's result is rounded before it is rotated, as
// everywhere.
template <typename T>
__device__ __forceinline__ float2 rotate_compressed(float x, float y, float2 cos, float2 sin) {
  x = static_cast<float>(static_cast<T>(x));
  y = static_cast<float>(static_cast<T>(y));
  return make_float2(x * cos.x - y * sin.x, y * cos.y + x * sin.y);
}

}  // namespace nsa::cuda
