// Picks the instruction set once per process; the only CPU file that is compiled for the baseline alone.
#include <cstdlib>
#include <cstring>

#include "nsa/launch.h"

namespace nsa::cpu {

#define NSA_DECLARE(name, Params) Status name(const Params&, const Parallel&);
namespace generic {
NSA_FOR_EACH_OP(NSA_DECLARE)
}
#ifdef NSA_HAS_AVX2
namespace avx2 {
NSA_FOR_EACH_OP(NSA_DECLARE)
}
#endif
#ifdef NSA_HAS_AVX512
namespace avx512 {
NSA_FOR_EACH_OP(NSA_DECLARE)
}
#endif
#undef NSA_DECLARE

namespace {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa best_isa() {
#ifdef NSA_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
#endif
#ifdef NSA_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

// NSA_CPU_ISA lowers the choice, never raises it.
Isa active() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wish = std::getenv("NSA_CPU_ISA");
    if (wish == nullptr) return best;
    if (std::strcmp(wish, "generic") == 0) return Isa::kGeneric;
    if (std::strcmp(wish, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
    return best;
  }();
  return isa;
}

}  // namespace

const char* active_isa() {
  switch (active()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

#ifdef NSA_HAS_AVX512
#define NSA_TRY_AVX512(name) \
  if (active() == Isa::kAvx512) return avx512::name(p, parallel);
#else
#define NSA_TRY_AVX512(name)
#endif
#ifdef NSA_HAS_AVX2
#define NSA_TRY_AVX2(name) \
  if (active() == Isa::kAvx2) return avx2::name(p, parallel);
#else
#define NSA_TRY_AVX2(name)
#endif
#define NSA_DEFINE(name, Params)                           \
  Status name(const Params& p, const Parallel& parallel) { \
    NSA_TRY_AVX512(name)                                   \
    NSA_TRY_AVX2(name)                                     \
    return generic::name(p, parallel);                     \
  }
NSA_FOR_EACH_OP(NSA_DEFINE)

}  // namespace nsa::cpu
