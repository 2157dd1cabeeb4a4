// 16 bytes of 16-bit elements at a time: what kernels that are bound by memory read and write.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nsa::cuda {

constexpr int kVector = 8;  // elements of 16 bits in 16 bytes

template <typename T>
struct alignas(16) Vector {
  T value[kVector];
};

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

template <typename T>
__device__ __forceinline__ void load_floats(float (&x)[kVector], const T* source) {
  const Vector<T> v = *reinterpret_cast<const Vector<T>*>(source);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_float(v.value[i]);
}

template <typename T>
__device__ __forceinline__ void store_floats(T* target, const float (&x)[kVector]) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.value[i] = from_float<T>(x[i]);
  *reinterpret_cast<Vector<T>*>(target) = v;
}

}  // namespace nsa::cuda
