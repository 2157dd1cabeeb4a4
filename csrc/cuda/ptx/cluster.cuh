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

// PTX: barrier.cluster: all threads of all blocks meet.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

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
