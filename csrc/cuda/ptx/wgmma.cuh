// wgmma (sm_90a): the tensor-core instructions of a warpgroup (four warps), which run beside its other
// instructions.
//
// A product of shape 64 x kN x 16 adds into fp32 registers: acc[i] is row 16 * warp + lane / 4 + 8 * (i / 2 %
// 2), column 8 * (i / 4) + 2 * (lane % 4) + i % 2. Per warp that is the layout of mma.sync.m16n8k16, so both
// can work on the same registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace nsa::cuda::ptx {

// PTX: wgmma.fence: registers and shared memory written before may be read by the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// PTX: wgmma.commit_group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// PTX: wgmma.wait_group: at most kPending of the latest groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler keeps x in a register instead of computing it again where it is used.
__device__ __forceinline__ int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Keeps the compiler from moving reads and writes of these registers over this point; no instruction.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

// PTX: setmaxnreg: the warpgroup hands back registers, or takes more of them; kCount a multiple of 8.
template <int kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

#define NSA_ACC_8(i)                                                                                      \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define NSA_ACC_32(i) NSA_ACC_8(i), NSA_ACC_8(i + 8), NSA_ACC_8(i + 16), NSA_ACC_8(i + 24)
#define NSA_ACC_64(i) NSA_ACC_32(i), NSA_ACC_32(i + 32)
#define NSA_ACC_16(i) NSA_ACC_8(i), NSA_ACC_8(i + 8)
#define NSA_ACC_96(i) NSA_ACC_64(i), NSA_ACC_32(i + 64)
#define NSA_ACC_40(i) NSA_ACC_32(i), NSA_ACC_8(i + 32)
#define NSA_ACC_72(i) NSA_ACC_64(i), NSA_ACC_8(i + 64)
#define NSA_ACC_88(i) NSA_ACC_64(i), NSA_ACC_8(i + 64), NSA_ACC_8(i + 72), NSA_ACC_8(i + 80)
#define NSA_ACC_128(i) NSA_ACC_64(i), NSA_ACC_64(i + 64)
// Each list goes on where the one before ends.
#define NSA_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NSA_REGISTERS_16 NSA_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NSA_REGISTERS_32                     \
  NSA_REGISTERS_16                           \
  ", %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NSA_REGISTERS_40 NSA_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NSA_REGISTERS_64                     \
  NSA_REGISTERS_40                           \
  ", %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NSA_REGISTERS_72 NSA_REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NSA_REGISTERS_88                     \
  NSA_REGISTERS_72                           \
  ", %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NSA_REGISTERS_96 NSA_REGISTERS_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NSA_REGISTERS_128                            \
  NSA_REGISTERS_96                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103"     \
  ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" \
  ", %120, %121, %122, %123, %124, %125, %126, %127"

// One instruction of each form. kRegisters = kN / 2 accumulators come first in the operand list.
#define NSA_WGMMA_SHARED(kN, kRegisters, type, a, b, flag)                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN        \
               "k16.f32." type "." type " {" NSA_REGISTERS_##kRegisters "}, " a ", " b ", p, 1, 1, 0, 0;\n}" \
               : NSA_ACC_##kRegisters(0)                                                                     \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(accumulate)))
#define NSA_WGMMA_NATURAL(kN, kRegisters, type, a, b, flag)                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN        \
               "k16.f32." type "." type " {" NSA_REGISTERS_##kRegisters "}, " a ", " b ", p, 1, 1, 0, 1;\n}" \
               : NSA_ACC_##kRegisters(0)                                                                     \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(accumulate)))
#define NSA_WGMMA_TRANSPOSED(kN, kRegisters, type, a, b, flag)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN        \
               "k16.f32." type "." type " {" NSA_REGISTERS_##kRegisters "}, " a ", " b ", p, 1, 1, 1, 1;\n}" \
               : NSA_ACC_##kRegisters(0)                                                                     \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(accumulate)))
#define NSA_WGMMA_REGISTERS(kN, kRegisters, type, transposed, a0, a1, a2, a3, b, flag)                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned.m64n" #kN \
               "k16.f32." type "." type " {" NSA_REGISTERS_##kRegisters                               \
               "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p, 1, 1, " transposed ";\n}"              \
               : NSA_ACC_##kRegisters(0)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(static_cast<int>(accumulate)))

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<__half> = true;

// PTX: wgmma.mma_async. acc (+)= A . B^T, both K-major in shared memory: A [64 x 16], B [kN x 16]; acc is
// written, not added to, where accumulate is false.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_shared(float (&acc)[kN / 2], uint64_t a_desc, uint64_t b_desc,
                                             bool accumulate) {
  static_assert(kN == 32 || kN == 64 || kN == 80 || kN == 128 || kN == 176 || kN == 256);
  if constexpr (kIsHalf<T>) {
    if constexpr (kN == 32) NSA_WGMMA_SHARED(32, 16, "f16", "%16", "%17", "%18");
    if constexpr (kN == 64) NSA_WGMMA_SHARED(64, 32, "f16", "%32", "%33", "%34");
    if constexpr (kN == 80) NSA_WGMMA_SHARED(80, 40, "f16", "%40", "%41", "%42");
    if constexpr (kN == 128) NSA_WGMMA_SHARED(128, 64, "f16", "%64", "%65", "%66");
    if constexpr (kN == 176) NSA_WGMMA_SHARED(176, 88, "f16", "%88", "%89", "%90");
    if constexpr (kN == 256) NSA_WGMMA_SHARED(256, 128, "f16", "%128", "%129", "%130");
  } else {
    if constexpr (kN == 32) NSA_WGMMA_SHARED(32, 16, "bf16", "%16", "%17", "%18");
    if constexpr (kN == 64) NSA_WGMMA_SHARED(64, 32, "bf16", "%32", "%33", "%34");
    if constexpr (kN == 80) NSA_WGMMA_SHARED(80, 40, "bf16", "%40", "%41", "%42");
    if constexpr (kN == 128) NSA_WGMMA_SHARED(128, 64, "bf16", "%64", "%65", "%66");
    if constexpr (kN == 176) NSA_WGMMA_SHARED(176, 88, "bf16", "%88", "%89", "%90");
    if constexpr (kN == 256) NSA_WGMMA_SHARED(256, 128, "bf16", "%128", "%129", "%130");
  }
}

// PTX: wgmma.mma_async. acc (+)= A . B, both in shared memory: A [64 x 16] K-major, B [16 x kN] with kN
// contiguous.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_shared_natural(float (&acc)[kN / 2], uint64_t a_desc, uint64_t b_desc,
                                                     bool accumulate) {
  static_assert(kN == 128 || kN == 256);
  if constexpr (kIsHalf<T>) {
    if constexpr (kN == 128) NSA_WGMMA_NATURAL(128, 64, "f16", "%64", "%65", "%66");
    if constexpr (kN == 256) NSA_WGMMA_NATURAL(256, 128, "f16", "%128", "%129", "%130");
  } else {
    if constexpr (kN == 128) NSA_WGMMA_NATURAL(128, 64, "bf16", "%64", "%65", "%66");
    if constexpr (kN == 256) NSA_WGMMA_NATURAL(256, 128, "bf16", "%128", "%129", "%130");
  }
}

// PTX: wgmma.mma_async. acc (+)= A^T . B, both in shared memory: A [16 x 64] and B [16 x kN] with the other
// dimension contiguous.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_shared_transposed(float (&acc)[kN / 2], uint64_t a_desc,
                                                        uint64_t b_desc, bool accumulate) {
  static_assert(kN == 128 || kN == 256);
  if constexpr (kIsHalf<T>) {
    if constexpr (kN == 128) NSA_WGMMA_TRANSPOSED(128, 64, "f16", "%64", "%65", "%66");
    if constexpr (kN == 256) NSA_WGMMA_TRANSPOSED(256, 128, "f16", "%128", "%129", "%130");
  } else {
    if constexpr (kN == 128) NSA_WGMMA_TRANSPOSED(128, 64, "bf16", "%64", "%65", "%66");
    if constexpr (kN == 256) NSA_WGMMA_TRANSPOSED(256, 128, "bf16", "%128", "%129", "%130");
  }
}

// PTX: wgmma.mma_async. acc (+)= A . B: A [64 x 16] in registers (the fragments of mma.sync), B [16 x kN] in
// shared memory with kN contiguous.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_registers(float (&acc)[kN / 2], const uint32_t (&a)[4], uint64_t b_desc,
                                                bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 144 || kN == 192);
  if constexpr (kIsHalf<T>) {
    if constexpr (kN == 64) NSA_WGMMA_REGISTERS(64, 32, "f16", "1", "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128)
      NSA_WGMMA_REGISTERS(128, 64, "f16", "1", "%64", "%65", "%66", "%67", "%68", "%69");
    if constexpr (kN == 144)
      NSA_WGMMA_REGISTERS(144, 72, "f16", "1", "%72", "%73", "%74", "%75", "%76", "%77");
    if constexpr (kN == 192)
      NSA_WGMMA_REGISTERS(192, 96, "f16", "1", "%96", "%97", "%98", "%99", "%100", "%101");
  } else {
    if constexpr (kN == 64)
      NSA_WGMMA_REGISTERS(64, 32, "bf16", "1", "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128)
      NSA_WGMMA_REGISTERS(128, 64, "bf16", "1", "%64", "%65", "%66", "%67", "%68", "%69");
    if constexpr (kN == 144)
      NSA_WGMMA_REGISTERS(144, 72, "bf16", "1", "%72", "%73", "%74", "%75", "%76", "%77");
    if constexpr (kN == 192)
      NSA_WGMMA_REGISTERS(192, 96, "bf16", "1", "%96", "%97", "%98", "%99", "%100", "%101");
  }
}

// PTX: wgmma.mma_async. acc (+)= A . B^T: A [64 x 16] in registers, B [kN x 16] K-major in shared memory.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_registers_rows(float (&acc)[kN / 2], const uint32_t (&a)[4],
                                                     uint64_t b_desc, bool accumulate) {
  static_assert(kN == 16 || kN == 64 || kN == 128);
  if constexpr (kIsHalf<T>) {
    if constexpr (kN == 16) NSA_WGMMA_REGISTERS(16, 8, "f16", "0", "%8", "%9", "%10", "%11", "%12", "%13");
    if constexpr (kN == 64) NSA_WGMMA_REGISTERS(64, 32, "f16", "0", "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128)
      NSA_WGMMA_REGISTERS(128, 64, "f16", "0", "%64", "%65", "%66", "%67", "%68", "%69");
  } else {
    if constexpr (kN == 16) NSA_WGMMA_REGISTERS(16, 8, "bf16", "0", "%8", "%9", "%10", "%11", "%12", "%13");
    if constexpr (kN == 64)
      NSA_WGMMA_REGISTERS(64, 32, "bf16", "0", "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128)
      NSA_WGMMA_REGISTERS(128, 64, "bf16", "0", "%64", "%65", "%66", "%67", "%68", "%69");
  }
}

#undef NSA_WGMMA_SHARED
#undef NSA_WGMMA_NATURAL
#undef NSA_WGMMA_TRANSPOSED
#undef NSA_WGMMA_REGISTERS
#undef NSA_REGISTERS_8
#undef NSA_REGISTERS_16
#undef NSA_REGISTERS_32
#undef NSA_REGISTERS_40
#undef NSA_REGISTERS_64
#undef NSA_REGISTERS_72
#undef NSA_REGISTERS_88
#undef NSA_REGISTERS_96
#undef NSA_REGISTERS_128
#undef NSA_ACC_8
#undef NSA_ACC_16
#undef NSA_ACC_32
#undef NSA_ACC_40
#undef NSA_ACC_64
#undef NSA_ACC_72
#undef NSA_ACC_88
#undef NSA_ACC_96
#undef NSA_ACC_128

}  // namespace nsa::cuda::ptx
