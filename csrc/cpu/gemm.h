// The one matrix product of the CPU kernels: C[m][n] (+)= sum_k A(m, k) * B[k][n], lanes along n.
//
// A is read one scalar at a time through two strides, so a transposed A costs nothing; B and C have unit
// stride in n, and n is a multiple of the vector length (operands are padded where they are packed).
#pragma once

#include "cpu/simd.h"

namespace nsa::cpu::NSA_CPU_ISA {

// 6 x 4 vectors fill 32 registers with 4 of B and a broadcast, 6 x 2 fill 16.
constexpr int kGemmRows = 6;
constexpr int kGemmVecs = kVectorRegisters == 32 ? 4 : 2;

template <typename A>
struct GemmOperands {
  const A* a;
  int64_t a_row, a_col;  // A(m, k) = a[m * a_row + k * a_col]
  const A* b;
  int64_t ldb;
  A* c;
  int64_t ldc;
};

template <typename A, int kRows, int kVecs>
inline void gemm_tile(const GemmOperands<A>& g, int64_t k, bool accumulate) {
  Vec<A> acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Vec<A>{};
  }
  const A* a = g.a;
  const A* b = g.b;
  for (int64_t kk = 0; kk < k; ++kk, a += g.a_col, b += g.ldb) {
    Vec<A> bv[kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) bv[j] = load(b + j * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const A x = a[i * g.a_row];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[i][j] += x * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    A* c = g.c + i * g.ldc;
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      store(c + j * kLanes<A>, accumulate ? acc[i][j] + load(c + j * kLanes<A>) : acc[i][j]);
    }
  }
}

template <typename A, int kVecs, int kRows = kGemmRows>
inline void gemm_rows(int rows, const GemmOperands<A>& g, int64_t k, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gemm_rows<A, kVecs, kRows - 1>(rows, g, k, accumulate);
  }
  gemm_tile<A, kRows, kVecs>(g, k, accumulate);
}

template <typename A, int kVecs>
inline void gemm_columns(int64_t m, GemmOperands<A> g, int64_t k, bool accumulate) {
  // Even shares: 8 rows are 4 + 4, not 6 + 2.
  for (int64_t chunks = (m + kGemmRows - 1) / kGemmRows; chunks > 0; --chunks) {
    const int rows = static_cast<int>((m + chunks - 1) / chunks);
    gemm_rows<A, kVecs>(rows, g, k, accumulate);
    g.a += rows * g.a_row;
    g.c += rows * g.ldc;
    m -= rows;
  }
}

template <typename A>
inline void gemm(int64_t m, int64_t n, int64_t k, GemmOperands<A> g, bool accumulate) {
  constexpr int64_t kWide = kGemmVecs * kLanes<A>;
  for (; n >= kWide; n -= kWide, g.b += kWide, g.c += kWide) gemm_columns<A, kGemmVecs>(m, g, k, accumulate);
  for (; n > 0; n -= kLanes<A>, g.b += kLanes<A>, g.c += kLanes<A>) gemm_columns<A, 1>(m, g, k, accumulate);
}

}  // namespace nsa::cpu::NSA_CPU_ISA
