// cp.async (sm_80): 16 bytes from global to shared memory without registers in between.
#pragma once

#include <cstdint>

namespace nsa::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// PTX: st.shared.v4.
__device__ __forceinline__ void store_shared_16(uint32_t shared, uint32_t a, uint32_t b, uint32_t c,
                                                uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// PTX: ld.shared.v4.
__device__ __forceinline__ void load_shared_16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                               uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(shared)
               : "memory");
}

// PTX: cp.async. With valid == false nothing is read and 16 zero bytes are written.
__device__ __forceinline__ void async_copy_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// What createpolicy.fractional.L2::evict_first of all accesses makes on sm_90. As a constant: a policy in a
// register would be moved to uniform ones in front of every copy.
constexpr uint64_t kEvictFirst = 0x12F0000000000000;

// cp.async under a policy of the L2 cache.
__device__ __forceinline__ void async_copy_16(uint32_t shared, const void* global, bool valid,
                                              uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// The same of 4 bytes, which also go to the first-level cache.
__device__ __forceinline__ void async_copy_4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// PTX: cp.async.commit_group.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// PTX: cp.async.wait_group: at most kPending of the latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// PTX: %laneid, read anew: what depends on it alone is not kept in registers from before.
__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// PTX: ld.global under a predicate, or zeros: no branch, and here, not behind one further down.
__device__ __forceinline__ int load_4(const void* global, bool valid) {
  int x;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n@p ld.global.b32 %0, [%1];\n}"
               : "=r"(x)
               : "l"(global), "r"(static_cast<int>(valid))
               : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_16(const void* global, bool valid) {
  uint4 x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, "
      "0;\n@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(global), "r"(static_cast<int>(valid))
      : "memory");
  return x;
}

// PTX: prefetch.global.L1: the line of an address into the L1 cache.
__device__ __forceinline__ void prefetch_l1(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global) : "memory");
}

// PTX: discard.global.L2: 128 bytes, aligned, hold nothing any more, and need not be written to memory.
__device__ __forceinline__ void discard(void* global) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(global) : "memory");
}

// PTX: prefetch.global.L2: the line of an address into the L2 cache.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}

}  // namespace nsa::cuda::ptx
