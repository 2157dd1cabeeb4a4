// Work beside a stream.
#pragma once

#include <cuda_runtime.h>

#include "nsa/launch.h"

namespace nsa::cuda {

// While it lives, kernels on stream() run beside those that the given stream gets; what the given stream gets
// afterwards comes behind all of them. A capture of the given stream into a graph holds both.
class SideStream {
 public:
  explicit SideStream(const Stream& main) : main_(main) {
    if (main.side == nullptr || main.side == main.handle) return;
    if (cudaEventCreateWithFlags(&event_, cudaEventDisableTiming) != cudaSuccess) {
      event_ = nullptr;
      cudaGetLastError();  // goes on without
      return;
    }
    order(main_.handle, main_.side);
  }
  ~SideStream() {
    if (event_ == nullptr) return;
    order(main_.side, main_.handle);
    cudaEventDestroy(event_);  // what waits for it has been told already
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  bool exists() const { return event_ != nullptr; }
  Stream stream() const { return {main_.side}; }

 private:
  // What `second` gets from now on comes behind what `first` has.
  void order(void* first, void* second) const {
    cudaEventRecord(event_, static_cast<cudaStream_t>(first));
    cudaStreamWaitEvent(static_cast<cudaStream_t>(second), event_, 0);
  }

  Stream main_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace nsa::cuda
