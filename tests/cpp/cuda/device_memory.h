// Memory and device of the GPU tests.
#pragma once

#include <cuda_runtime.h>

#include <vector>

namespace nsa_test {

// Device memory that lives as long as the test; zeroed.
template <typename T>
struct DeviceArray {
  T* data = nullptr;
  size_t size;

  explicit DeviceArray(size_t size) : size(size) {
    cudaMalloc(&data, size * sizeof(T));
    cudaMemset(data, 0, size * sizeof(T));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    cudaMemcpy(data, values.data(), size * sizeof(T), cudaMemcpyHostToDevice);
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> values(size);
    cudaMemcpy(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }
};

inline bool is_hopper() {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
}

}  // namespace nsa_test
