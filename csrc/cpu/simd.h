// Vectors of the instruction set this file is compiled for, through the vector extension of GCC and Clang.
//
// Everything here lives in a namespace of its own per instruction set (NSA_CPU_ISA), and kernels use no
// container of the standard library: a template instantiated with AVX-512 flags must never be the copy that
// the linker keeps for all.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

namespace nsa::cpu::NSA_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline BFloat16 to_bfloat16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // a NaN stays one
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};                  // to nearest even
}

// Accumulator type of a storage type.
template <typename T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<BFloat16> {
  using type = float;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename A, typename T>
inline A convert(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return to_float(x);
  } else if constexpr (std::is_same_v<A, BFloat16>) {
    return to_bfloat16(static_cast<float>(x));
  } else {
    return static_cast<A>(x);
  }
}

template <typename A>
struct VecOf {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kVectorBytes)));
  typedef A unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(A)), may_alias));
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Int int_type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
constexpr int kLanes = VecOf<A>::kLanes;

template <typename A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VecOf<A>::unaligned*>(p);
}
template <typename A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VecOf<A>::unaligned*>(p) = v;
}
template <typename A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}
template <typename V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}

namespace detail {
template <typename A, int kStep, int... kLane>
inline Vec<A> swap_lanes(Vec<A> v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
}
template <typename A, int kStep, typename Op>
inline Vec<A> reduce_steps(Vec<A> v, Op op) {
  if constexpr (kStep == 0) {
    return v;
  } else {
    v = op(v, swap_lanes<A, kStep>(v, std::make_integer_sequence<int, kLanes<A>>{}));
    return reduce_steps<A, kStep / 2>(v, op);
  }
}
}  // namespace detail

template <typename A>
inline A reduce_max(Vec<A> v) {
  return detail::reduce_steps<A, kLanes<A> / 2>(v, [](Vec<A> a, Vec<A> b) { return vmax(a, b); })[0];
}
template <typename A>
inline A reduce_sum(Vec<A> v) {
  return detail::reduce_steps<A, kLanes<A> / 2>(v, [](Vec<A> a, Vec<A> b) { return a + b; })[0];
}

constexpr double kLn2 = 0.693147180559945309417232121458176568;
constexpr double kLog2e = 1.442695040888963407359924681001892137;

namespace detail {
constexpr int kMaxTerms = 14;
struct Exp2Terms {
  double c[kMaxTerms];
};
constexpr Exp2Terms exp2_terms() {
  Exp2Terms terms{};
  double term = 1;
  for (int i = 0; i < kMaxTerms; ++i) {
    terms.c[i] = term;
    term *= kLn2 / (i + 1);
  }
  return terms;
}
}  // namespace detail

// 2^x: Taylor's series on [-0.5, 0.5], whose remainder is 5e-9 (float, degree 7) or 4e-18 (double, degree
// 13), times a power of two. Results below the smallest normal number are zero; NaN stays NaN; x at most 127
// (float) or 1023.
template <typename A>
inline Vec<A> exp2(Vec<A> x) {
  using I = typename VecOf<A>::int_type;
  constexpr bool kSingle = sizeof(A) == 4;
  constexpr int kMantissa = kSingle ? 23 : 52, kBias = kSingle ? 127 : 1023, kDegree = kSingle ? 7 : 13;
  constexpr A kMagic = static_cast<A>(3LL << (kMantissa - 1));  // adding it rounds to a whole number
  constexpr detail::Exp2Terms kTerms = detail::exp2_terms();
  const I underflow = x < static_cast<A>(1 - kBias);
  const Vec<A> rounded = x + kMagic;
  const Vec<A> whole = rounded - kMagic;
  const Vec<A> f = x - whole;
  Vec<A> p = broadcast(static_cast<A>(kTerms.c[kDegree]));
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = p * f + static_cast<A>(kTerms.c[i]);
  // The low bits of `rounded` hold the whole number, offset by the magic constant's own.
  constexpr auto kMagicBits = std::bit_cast<typename VecOf<A>::Int>(kMagic);
  I n;
  std::memcpy(&n, &rounded, sizeof(n));
  const I bits = (n - kMagicBits + kBias) << kMantissa;
  Vec<A> scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return underflow ? Vec<A>{} : p * scale;
}

template <typename A>
constexpr A kNegInf = -std::numeric_limits<A>::infinity();

// dst[0 .. n) = src converted; dst[n .. padded) = 0.
template <typename A, typename T>
inline void load_row(A* dst, const T* src, int64_t n, int64_t padded) {
  for (int64_t i = 0; i < n; ++i) dst[i] = convert<A>(src[i]);
  for (int64_t i = n; i < padded; ++i) dst[i] = 0;
}

}  // namespace nsa::cpu::NSA_CPU_ISA
