// From tensors to what Params hold. Arguments have been checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <initializer_list>
#include <optional>

#include "nsa/params.h"
#include "ops/checks.h"

namespace nsa::ops {

inline std::optional<DType> find_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return DType::kF32;
    case at::kDouble:
      return DType::kF64;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

inline DType dtype_of(const at::Tensor& t) { return *find_dtype(t.scalar_type()); }

// The tensor itself if its last dim is contiguous, however the others are strided; else a copy. CUDA kernels
// read 16 bytes at a time, so there every row has to begin on a multiple of that.
inline at::Tensor as_rows(const at::Tensor& t) {
  if (t.stride(-1) != 1 && t.size(-1) != 1) return t.contiguous();
  if (!t.is_cuda()) return t;
  const int64_t step = 16 / t.element_size();
  const bool aligned = t.stride(0) % step == 0 && t.stride(1) % step == 0 &&
                       reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return aligned ? t : t.clone(at::MemoryFormat::Contiguous);
}

// The tensor itself if it is contiguous and, on CUDA, begins on a multiple of 16 bytes; else a copy.
inline at::Tensor as_block(const at::Tensor& t) {
  const at::Tensor block = t.contiguous();
  const bool aligned = !block.is_cuda() || reinterpret_cast<uintptr_t>(block.const_data_ptr()) % 16 == 0;
  return aligned ? block : block.clone();
}

// A view of what as_rows returned, which must outlive it.
inline RowsView rows_view(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

inline void* pointer(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }
inline const void* const_pointer(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Where the gradient of `input` will be written, and as an accumulator that is added to; undefined (a null
// pointer) if it is not wanted.
inline at::Tensor empty_gradient(const at::Tensor& input, bool wanted) {
  return wanted ? at::empty_symint(input.sym_sizes(), input.options()) : at::Tensor();
}
inline at::Tensor gradient_accumulator(const at::Tensor& input, bool wanted) {
  if (!wanted) return {};
  return at::zeros_symint(input.sym_sizes(), input.options().dtype(acc_dtype(input.scalar_type())));
}

// What an operator returns for them: the gradient in the dtype of its input; empty if it is not wanted.
inline at::Tensor finished_gradient(const at::Tensor& gradient, const at::Tensor& input) {
  return gradient.defined() ? gradient.to(input.scalar_type()) : at::empty({0}, input.options());
}

// The packed batch as kernels see it, with the tensors behind its pointers.
struct Batch {
  at::Tensor cu_seqlens_q, cu_seqlens_k;
  SequenceBatch seqs;
  // Rows of q before those behind the last sequence; T where the offsets are not on the host.
  int64_t rows_q = 0;

  bool empty() const { return seqs.batch == 0 || rows_q == 0; }
};

inline Batch make_batch(const at::Tensor& q, const SequenceArgs& args) {
  Batch batch;
  batch.seqs.total_q = batch.rows_q = q.size(0);
  batch.seqs.max_seqlen_q = args.max_seqlen_q.expect_int();
  batch.seqs.max_seqlen_k = args.max_seqlen_k.expect_int();
  if (!args.cu_seqlens_q.has_value()) return batch;
  batch.cu_seqlens_q = args.cu_seqlens_q->contiguous();
  batch.cu_seqlens_k = args.cu_seqlens_k->contiguous();
  batch.seqs.cu_seqlens_q = batch.cu_seqlens_q.const_data_ptr<int32_t>();
  batch.seqs.cu_seqlens_k = batch.cu_seqlens_k.const_data_ptr<int32_t>();
  batch.seqs.batch = batch.cu_seqlens_q.numel() - 1;
  if (!batch.cu_seqlens_q.is_cpu()) return batch;
  batch.rows_q = batch.seqs.cu_seqlens_q[batch.seqs.batch];
  // Any upper bound is legal, but scratch memory follows it: use the true one where it is known.
  batch.seqs.max_seqlen_q = batch.seqs.max_seqlen_k = 0;
  for (int64_t b = 0; b < batch.seqs.batch; ++b) {
    const Sequence sequence = batch.seqs.sequence(b);
    batch.seqs.max_seqlen_q = max64(batch.seqs.max_seqlen_q, sequence.q_len);
    batch.seqs.max_seqlen_k = max64(batch.seqs.max_seqlen_k, sequence.k_len);
  }
  return batch;
}

// Gives the rows behind the last sequence, which attention kernels need not write, the value that the
// specification wants there. tensors: a row for each of q, contiguous, or undefined.
struct Padded {
  const at::Tensor& tensor;
  double value;
};
void fill_padding(std::initializer_list<Padded> tensors, const Batch& batch);

}  // namespace nsa::ops
