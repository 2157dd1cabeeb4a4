// Clusters (sm_90): blocks that run at the same time and reach each other's shared memory.
#pragma once

#include <cstdint>

namespace nsa::cuda::ptx {

// PTX: mapa: the address, valid in the whole cluster, of what lies at `shared` in the block of this rank.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// PTX: %cluster_ctarank.
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// PTX: st.async: stores at an address of cluster_address, and gives the bytes to the barrier there: whoever
// has waited for it sees them. No fence, unlike a store and barrier.cluster.
__device__ __forceinline__ void store_async(uint32_t address, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address),
               "f"(x), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(uint32_t address, float2 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_async(uint32_t address, float4 x, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}

// PTX: barrier.cluster: all threads of all blocks meet.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The two halves of it.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// The first half where it orders nothing but barriers behind barrier_init_fence.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

// PTX: ld.shared::cluster: 16 bytes at an address of cluster_address.
__device__ __forceinline__ float4 load_cluster_16(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace nsa::cuda::ptx
