// Bulk copies (TMA, sm_90): bytes, or a box of a tensor, from global into shared memory by one thread's
// order.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace nsa::cuda::ptx {

// PTX: cp.async.bulk.tensor.3d, tile mode. Coordinates in elements, innermost dimension first; they may lie
// outside the tensor, and what does is filled with zeros (and counted like what does not). The barrier gets
// the bytes of the whole box.
__device__ __forceinline__ void bulk_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x,
                                             int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same under a policy of the L2 cache.
__device__ __forceinline__ void bulk_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x,
                                             int y, int z, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(policy)
      : "memory");
}

// PTX: cp.async.bulk.tensor.4d, tile mode.
__device__ __forceinline__ void bulk_load_4d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x,
                                             int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
      "%5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// PTX: cp.async.bulk: contiguous `bytes`, a multiple of 16, from an address that is one too; the barrier gets
// their number.
__device__ __forceinline__ void bulk_load(uint32_t shared, const void* global, uint32_t barrier,
                                          uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

// PTX: cp.async.bulk.prefetch.L2: contiguous memory into the L2 cache; address and size are multiples of 16
// bytes.
__device__ __forceinline__ void bulk_prefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// PTX: fence.proxy.async: what this thread wrote to shared memory becomes visible to TMA and wgmma.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace nsa::cuda::ptx
