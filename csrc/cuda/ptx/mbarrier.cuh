// mbarrier (sm_80): a barrier in shared memory that counts arrivals, asynchronous copies among them.
#pragma once

#include <cstdint>

namespace nsa::cuda::ptx {

// PTX: mbarrier.init.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// PTX: mbarrier.arrive.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// PTX: mbarrier.arrive under a predicate: no branch, which between the issue of a wgmma and its wait would
// serialise it.
__device__ __forceinline__ void barrier_arrive_if(uint32_t barrier, bool arrives) {
  asm volatile(
      "{\n.reg .b64 state;\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 state, "
      "[%0];\n}" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}

// The same for several arrivals.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int count) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0], %1;\n}" ::"r"(barrier),
               "r"(count)
               : "memory");
}

// PTX: cp.async.mbarrier.arrive.noinc: arrives when this thread's asynchronous copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// PTX: mbarrier.try_wait.parity (sm_90: the thread sleeps meanwhile), else mbarrier.test_wait.parity with a
// pause between two looks, so that waiting warps leave the issue slots to the others. Returns when the phase
// with this parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (true) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
#else
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
    __nanosleep(32);
#endif
  }
}

// PTX: mbarrier.test_wait.parity: whether the phase with this parity is over; does not wait.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
// PTX: mbarrier.arrive.expect_tx (sm_90): arrives, and the phase also waits for so many bytes of bulk copies.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// PTX: fence.mbarrier_init (sm_90): fresh barriers become visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
#endif

// PTX: bar.sync on a named barrier: `threads` threads, whole warps, meet. Number 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// PTX: bar.arrive: they are counted among those that meet, but do not wait. The condition is the same for a
// warp; no branch.
__device__ __forceinline__ void named_barrier_arrive_if(int number, int threads, bool condition) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n@p bar.arrive %0, %1;\n}" ::"r"(number),
               "r"(threads), "r"(static_cast<int>(condition))
               : "memory");
}

}  // namespace nsa::cuda::ptx
