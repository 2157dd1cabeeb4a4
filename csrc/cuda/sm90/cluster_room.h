// How many clusters of a kernel a device runs at once, asked once.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#include "cuda/host/launch_kernel.h"

namespace nsa::cuda::sm90 {

// 0 where the device has no clusters of this size.
template <typename Kernel>
int max_active_clusters(Kernel kernel, int cluster, int threads, int shared_bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster), 256);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) count = 0;
  cudaGetLastError();  // a size that the device does not have is no error of a launch
  return count;
}

// A property of devices that takes time to ask for.
template <typename Value>
class OncePerDevice {
 public:
  template <typename Ask>
  const Value& get(const Ask& ask) {
    int device = 0;
    cudaGetDevice(&device);
    const int i = device % kDevices;
    std::call_once(asked_[i], [&] { values_[i] = ask(); });
    return values_[i];
  }

 private:
  static constexpr int kDevices = 64;
  std::once_flag asked_[kDevices];
  Value values_[kDevices] = {};
};

}  // namespace nsa::cuda::sm90
