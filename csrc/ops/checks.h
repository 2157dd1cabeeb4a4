// All argument checks of the operators. Each raises a ValueError that names the argument, its value and what
// is allowed.
//
// The same checks run on real tensors and on the symbolic shapes of tracing. Number of heads, head dims and
// block counts are concrete in both. The number of rows and the maximal lengths may be symbols: relations
// among them that are not known while tracing pass (so that they never narrow a dynamic graph) and are
// checked with numbers when the kernel runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <optional>

#include "nsa/params.h"

namespace nsa::ops {

// A tensor and what the operator calls it.
struct Arg {
  const char* name;
  const at::Tensor& tensor;
};

// The packed batch as the operators receive it. compress has one cu_seqlens for both sides.
struct SequenceArgs {
  const std::optional<at::Tensor>& cu_seqlens_q;
  const std::optional<at::Tensor>& cu_seqlens_k;
  const c10::SymInt& max_seqlen_q;
  const c10::SymInt& max_seqlen_k;
};

at::ScalarType acc_dtype(at::ScalarType dtype);

class Checks {
 public:
  // `op` is what messages name; `support_row` the operator's name in nsa/support.h.
  Checks(const char* op, const char* support_row) : op_(op), support_row_(support_row) {}

  // q [T, Hq, Dk], k [R, Hkv, Dk] and v [R, Hkv, Dv] with Hkv | Hq, on one device with one dtype that has a
  // kernel.
  AttentionShape attention(Arg q, Arg k, Arg v) const;
  // The same without v.
  AttentionShape attention(Arg q, Arg k) const;
  // One dtype, one device, and a kernel for both (shape may be left out where head dims do not matter).
  void alike(Arg first, std::initializer_list<Arg> others) const;
  void supported(Arg first, const AttentionShape* shape) const;

  void dim(Arg arg, int64_t rank, const char* layout) const;
  void shape(Arg arg, std::initializer_list<c10::SymInt> expected, const char* layout) const;
  void dtype(Arg arg, at::ScalarType allowed) const;
  void device(Arg arg, c10::Device expected) const;

  // lse [T, Hq] in the accumulator dtype of q.
  void lse(Arg lse, const at::Tensor& q) const;
  // o or its gradient: [T, Hq, Dv] in the dtype of q.
  void like_output(Arg o, const at::Tensor& q, int64_t head_dim_v) const;
  // block_indices [T, Hkv, n] int32, n >= 1.
  void block_indices(Arg indices, const at::Tensor& q, const AttentionShape& shape) const;
  // gate_logits [T, Hq, 3] in the dtype of o or of its accumulator.
  void gate_logits(Arg logits, const at::Tensor& o) const;

  void at_least(const char* name, int64_t value, int64_t least) const;
  void positive(const char* name, double value) const;
  // l, d: the stride divides the block size.
  void compression(const char* block_name, int64_t block_size, const char* stride_name, int64_t stride) const;
  // l': a multiple of d.
  void selection_block(int64_t block_size, int64_t compress_stride) const;
  // n and the forced blocks, which must fit into it.
  void selection(int64_t num_selected, int64_t num_initial, int64_t num_local) const;

  // Offsets: both or neither, int32 [B + 1], beside q; on the CPU also their values: from 0, non-decreasing,
  // inside q, no sequence longer than max_seqlen, nor with more queries than keys.
  void sequences(const at::Tensor& q, const SequenceArgs& args) const;
  // The rows of k hold every sequence's keys.
  void key_rows(Arg k, const SequenceArgs& args, KeyBlocks keys) const;
  // The one offsets array of compress, and the rows of x.
  void token_sequences(Arg x, const std::optional<at::Tensor>& cu_seqlens,
                       const c10::SymInt& max_seqlen) const;

 private:
  void offsets(const char* name, const at::Tensor& cu_seqlens, c10::Device device) const;
  void offset_values(const char* name, const at::Tensor& cu_seqlens, const c10::SymInt& rows,
                     const char* rows_name, const char* max_name, const c10::SymInt& max_seqlen) const;

  const char* op_;
  const char* support_row_;
};

}  // namespace nsa::ops
