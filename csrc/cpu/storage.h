// From a run-time dtype to the storage type of a CPU kernel.
#pragma once

#include "cpu/simd.h"
#include "nsa/launch.h"

namespace nsa::cpu::NSA_CPU_ISA {

template <typename F>
Status dispatch_storage(const char* name, DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<float>();
    case DType::kF64:
      return f.template operator()<double>();
    case DType::kBF16:
      return f.template operator()<BFloat16>();
    default:
      return Status::error(StatusCode::kUnsupported,
                           "%s has no CPU kernel; there are float32, float64 and bfloat16", name);
  }
}

#define NSA_DECLARE_ISA(name, Params) Status name(const Params& p, const Parallel& parallel);
NSA_FOR_EACH_OP(NSA_DECLARE_ISA)
#undef NSA_DECLARE_ISA

}  // namespace nsa::cpu::NSA_CPU_ISA
