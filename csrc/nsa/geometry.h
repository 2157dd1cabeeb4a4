// Which blocks exist, who sees them and how they overlap: the integer arithmetic of the specification, for
// host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NSA_HOST_DEVICE __host__ __device__
#else
#define NSA_HOST_DEVICE
#endif

namespace nsa {

NSA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NSA_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
NSA_HOST_DEVICE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
NSA_HOST_DEVICE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Keys of a banded attention: key i of a sequence ends at position i * stride + block - 1. Tokens are {1, 1};
// compressed blocks are {compress_block_size, compress_stride}.
struct KeyBlocks {
  int64_t block = 1;
  int64_t stride = 1;

  // Keys of a sequence of seqlen tokens: only whole blocks count.
  NSA_HOST_DEVICE constexpr int64_t count(int64_t seqlen) const {
    return seqlen < block ? 0 : (seqlen - block) / stride + 1;
  }
  // Row of a sequence's first key in the packed tensor. Sequences never overlap, since floor(a/d) +
  // floor(s/d) <= floor((a+s)/d).
  NSA_HOST_DEVICE constexpr int64_t first_row(int64_t seq_begin) const { return seq_begin / stride; }
  // Row of block i in a cache: beside its last token, so that a page depends on no token behind it and can be
  // shared by sequences that agree up to its end.
  NSA_HOST_DEVICE constexpr int64_t cached_row(int64_t i) const { return i + block / stride - 1; }
  // One past the last key that ends at or before position t.
  NSA_HOST_DEVICE constexpr int64_t end_visible(int64_t t) const { return count(t + 1); }
  // The first key that ends behind position t - window; 0 without a window (window <= 0).
  NSA_HOST_DEVICE constexpr int64_t begin_visible(int64_t t, int64_t window) const {
    return window <= 0 || t < window ? 0 : count(t - window + 1);
  }
};

// Tokens that compression block i and selection block j share.
NSA_HOST_DEVICE constexpr int64_t overlap(int64_t i, int64_t j, KeyBlocks compressed, int64_t block_size) {
  const int64_t begin = max64(i * compressed.stride, j * block_size);
  const int64_t end = min64(i * compressed.stride + compressed.block, (j + 1) * block_size);
  return max64(0, end - begin);
}

}  // namespace nsa
