// What every launcher does on the host: dtypes to template arguments, shared memory, launch, error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

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

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
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

// The same for a kernel that waits for the one in front of it before it relies on what is in memory: it may
// begin before that one has ended (sm_90). In clusters of `cluster` thread blocks along x.
template <typename Kernel, typename... Args>
Status launch_chained_clusters(const char* name, Kernel kernel, dim3 grid, int cluster, int threads,
                               size_t shared_bytes, const Stream& stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, args...);
  return last_error(name);
}

// The same without clusters. Code for devices older than sm_90 does not wait, and is launched as usual.
template <typename Kernel, typename... Args>
Status launch_chained(const char* name, Kernel kernel, dim3 grid, int threads, size_t shared_bytes,
                      const Stream& stream, const Args&... args) {
  cudaFuncAttributes code{};
  cudaFuncGetAttributes(&code, kernel);
  if (code.ptxVersion < 90 || code.binaryVersion < 90)
    return launch(name, kernel, grid, threads, shared_bytes, stream, args...);
  return launch_chained_clusters(name, kernel, grid, 1, threads, shared_bytes, stream, args...);
}

}  // namespace nsa::cuda
