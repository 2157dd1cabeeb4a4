// The ring between the producer and the consumers of phi's kernels: a warpgroup copies slices of both
// operands (cp.async and TMA), two warpgroups multiply them.
#pragma once

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace nsa::cuda::sm90 {

constexpr int kRingStages = 4;
constexpr int kRingConsumers = 256;  // threads; they come first in the block
constexpr int kRingProducers = 128;
constexpr int kRingThreads = kRingConsumers + kRingProducers;

struct SliceRing {
  uint32_t barriers;  // full and empty, kRingStages of each

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + (kRingStages + stage) * 8; }

  // By one thread, before a __syncthreads.
  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < kRingStages; ++stage) {
      ptx::barrier_init(full(stage), kRingProducers + 1);  // everybody's copies, and TMA
      ptx::barrier_init(empty(stage), kRingConsumers / 32);
    }
    ptx::barrier_init_fence();
  }

  // The producer's turn at slice i: copy(stage) issues this thread's cp.async, and one thread's TMA of
  // `bytes` after order(stage).
  template <typename Order, typename Copy>
  __device__ __forceinline__ void produce(int i, int bytes, const Order& order, const Copy& copy) const {
    const int stage = i % kRingStages;
    ptx::barrier_wait(empty(stage), (i / kRingStages & 1) ^ 1);
    if (threadIdx.x == kRingConsumers) {
      ptx::barrier_arrive_expect(full(stage), bytes);
      order(stage);
    }
    copy(stage);
    ptx::barrier_arrive_after_copies(full(stage));
  }

  // acc = the sum over slices [begin, begin + count) of what multiply(stage, accumulate) issues.
  template <int kCount, typename Multiply>
  __device__ __forceinline__ void consume(float (&acc)[kCount], int begin, int count,
                                          const Multiply& multiply) const {
    const bool leads = threadIdx.x % 32 == 0;
#pragma unroll 1
    for (int i = begin; i < begin + count; ++i) {
      const int stage = i % kRingStages;
      ptx::barrier_wait(full(stage), i / kRingStages & 1);
      ptx::async_proxy_fence();  // for what came by cp.async
      ptx::wgmma_fence();
      multiply(stage, i > begin);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      ptx::barrier_arrive_if(empty((i + kRingStages - 1) % kRingStages), leads && i > begin);
    }
    ptx::wgmma_wait<0>();
    ptx::pin_registers(acc);
    ptx::barrier_arrive_if(empty((begin + count + kRingStages - 1) % kRingStages), leads && count > 0);
  }
};

}  // namespace nsa::cuda::sm90
