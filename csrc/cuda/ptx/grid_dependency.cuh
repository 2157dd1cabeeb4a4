// Programmatic dependent launch (sm_90): a kernel may start before the one in front of it in the stream ends.
#pragma once

namespace nsa::cuda::ptx {

// PTX: griddepcontrol.launch_dependents: the next kernel may start once every thread block has said so or
// ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// PTX: griddepcontrol.wait: until the kernel in front has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace nsa::cuda::ptx
