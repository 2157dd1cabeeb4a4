// What the two operators on an inference cache share: checks of its tensors, and its Params.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

#include "nsa/params.h"
#include "ops/checks.h"
#include "ops/tensors.h"

namespace nsa::ops {

// How a step and the cache's pages are given.
struct CacheArgs {
  const at::Tensor& cache_seqlens;                // [B]
  const std::optional<at::Tensor>& block_table;   // [B, W], or None: contiguous
  const std::optional<at::Tensor>& cu_seqlens_q;  // [B + 1], or None
  const c10::SymInt& max_seqlen_q;
};

class CacheChecks {
 public:
  CacheChecks(const char* op, const CacheArgs& args) : op_(op), checks_(op, op), args_(args) {}

  const Checks& checks() const { return checks_; }
  // The step's T rows of `first` and its sequences.
  void sequences(Arg first) const;
  // A stream [num_pages, page_block_size / stride, Hkv, D] of `first`'s dtype and device; contiguous: [B,
  // rows, ...].
  void pages(Arg rows, Arg first, int64_t page_rows, int64_t heads, int64_t dim) const;
  // A ring [B, R, Hkv, D] that holds at least `least` tokens, or all that a sequence may have.
  void ring(Arg rows, Arg first, int64_t heads, int64_t dim, int64_t least) const;
  // Tokens of a page, and of a sequence; k_slc_cache gives them.
  int64_t page_block_size(Arg k_slc_cache, const char* divisor_name, int64_t divisor) const;
  int64_t capacity(Arg k_slc_cache) const;
  // On the CPU: lengths and page numbers of sequences that get tokens.
  void values(Arg first, Arg k_slc_cache) const;

 private:
  void layout(Arg rows, Arg first) const;

  const char* op_;
  Checks checks_;
  CacheArgs args_;
};

// The batch with the tensors behind its pointers.
struct CacheStep {
  at::Tensor cache_seqlens, block_table, cu_seqlens_q;
  CachedBatch seqs;
  int64_t rows_q = 0;  // rows before the padding, where that is known; else T

  CacheStep(const at::Tensor& first, const CacheArgs& args, int64_t capacity);
  CachedRows pages(const at::Tensor& rows) const;
  CachedRows ring(const at::Tensor& rows) const;
  bool empty() const { return seqs.batch == 0 || seqs.total_q == 0; }
};

// Autograd: nothing here is differentiable.
void check_no_gradients(const char* op, at::TensorList inputs);

}  // namespace nsa::ops
