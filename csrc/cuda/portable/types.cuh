// From run-time dtypes and head dims to template arguments of the portable kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nsa/dispatch.h"
#include "nsa/launch.h"

namespace nsa::cuda {

inline Status last_error(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return Status::error(StatusCode::kDeviceError, "%s: %s", kernel, cudaGetErrorString(error));
}

template <typename F>
Status dispatch_half(DType dtype, F&& f) {
  if (dtype == DType::kBF16) return f.template operator()<__nv_bfloat16>();
  if (dtype == DType::kF16) return f.template operator()<__half>();
  return Status::error(StatusCode::kUnsupported, "dtype has no CUDA kernel; there are bfloat16 and float16");
}

template <typename F>
Status dispatch_head_dims(int dim_qk, int dim_v, F&& f) {
  if (dim_qk == 64 && dim_v == 64) return f.template operator()<64, 64>();
  if (dim_qk == 96 && dim_v == 96) return f.template operator()<96, 96>();
  if (dim_qk == 128 && dim_v == 128) return f.template operator()<128, 128>();
  if (dim_qk == 192 && dim_v == 128) return f.template operator()<192, 128>();
  if (dim_qk == 256 && dim_v == 256) return f.template operator()<256, 256>();
  return Status::error(StatusCode::kUnsupported,
                       "head dims (%d, %d) have no CUDA kernel; there are (64, 64), (96, 96), (128, 128), "
                       "(192, 128), (256, 256)",
                       dim_qk, dim_v);
}

// Asks for the dynamic shared memory that a kernel needs, then launches it.
template <typename Kernel, typename... Args>
Status launch(const char* name, Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
              const Stream& stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(args...);
  return last_error(name);
}

}  // namespace nsa::cuda
