// The branches of attention on checked arguments and allocated outputs: what the single-branch operators and
// nsa::attention, which runs all three, share.
#pragma once

#include <limits>

#include "nsa/params.h"
#include "ops/tensors.h"

namespace nsa::ops {

// What all branches of one call have in common.
struct AttentionCall {
  const char* op;  // for messages
  AttentionShape shape;
  double softmax_scale;
  at::Tensor q;  // as_rows
  Batch batch;

  AttentionCall(const char* op, const AttentionShape& shape, double softmax_scale, const at::Tensor& q,
                const SequenceArgs& sequences)
      : op(op), shape(shape), softmax_scale(softmax_scale), q(as_rows(q)), batch(make_batch(q, sequences)) {}

  // The fields that every attention's Params share.
  template <typename Params>
  Params params() const {
    Params params{};
    params.dtype = dtype_of(q);
    params.seqs = batch.seqs;
    params.shape = shape;
    params.softmax_scale = softmax_scale;
    params.q = rows_view(q);
    return params;
  }
};

struct BranchOutput {
  at::Tensor o;    // [T, Hq, Dv]
  at::Tensor lse;  // [T, Hq], acc
};

// Without its o where that is not wanted.
inline BranchOutput empty_output(const at::Tensor& q, const AttentionShape& shape, bool with_o = true) {
  return {
      with_o ? at::empty_symint({q.sym_size(0), q.sym_size(1), shape.head_dim_v}, q.options()) : at::Tensor(),
      at::empty_symint({q.sym_size(0), q.sym_size(1)}, q.options().dtype(acc_dtype(q.scalar_type())))};
}

constexpr double kNoLse = -std::numeric_limits<double>::infinity();  // of a query that sees no key

inline void fill_padding(const BranchOutput& out, const Batch& batch) {
  fill_padding({{out.o, 0}, {out.lse, kNoLse}}, batch);
}

inline at::Tensor empty_block_indices(const at::Tensor& q, const AttentionShape& shape,
                                      int64_t num_selected_blocks) {
  return at::empty_symint({q.sym_size(0), shape.num_heads_kv, num_selected_blocks},
                          q.options().dtype(at::kInt));
}

// The tensors of AttentionGrads.
struct BranchGrads {
  at::Tensor d_o;        // as_rows
  at::Tensor d_o_scale;  // or undefined
  at::Tensor delta, lse;
  at::Tensor dq_sum, dq;  // of QueryGrads, or undefined
  bool dq_begun = false;
  at::Tensor dk, dv;         // or undefined
  bool key_results = false;  // of AttentionGrads

  bool wanted() const { return dq_sum.defined() || dq.defined() || dk.defined() || dv.defined(); }
  AttentionGrads params() const {
    return {rows_view(d_o),
            const_pointer(d_o_scale),
            const_pointer(delta),
            const_pointer(lse),
            {pointer(dq_sum), pointer(dq), dq_begun},
            pointer(dk),
            pointer(dv),
            key_results};
  }
};

// The Params of a branch's forward, with the tensors behind their pointers. Made in front of any launch that
// others follow without a gap: tensors may be copied.
struct BandedForward {
  at::Tensor k, v;
  BandedAttentionFwdParams params;

  BandedForward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v, KeyBlocks keys,
                int64_t window, const BranchOutput& out);
};
struct SelectedForward {
  at::Tensor k, v, block_indices;
  SelectedAttentionFwdParams params;

  SelectedForward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& block_indices, int64_t block_size, const BranchOutput& out);
};
struct Selection {
  int64_t block_size, num_selected_blocks, num_initial_blocks, num_local_blocks;
};
struct SelectForward {
  at::Tensor k_cmp, lse, workspace;
  SelectBlocksParams params;

  SelectForward(const AttentionCall& call, const at::Tensor& k_cmp, const at::Tensor& lse, KeyBlocks keys,
                const Selection& selection, const at::Tensor& block_indices);
};

// rowsum(dO * o), for a branch that is used alone.
at::Tensor attention_delta(const AttentionCall& call, const at::Tensor& d_o, const at::Tensor& o);

// Compressed attention (keys are blocks, window 0) and the sliding window (keys are tokens).
void banded_forward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v, KeyBlocks keys,
                    int64_t window, const BranchOutput& out);
struct BandedBranch {
  const at::Tensor &k, &v;
  KeyBlocks keys;
  int64_t window;
  const BranchGrads& grads;
};
void banded_backward(const AttentionCall& call, const BandedBranch& branch);
bool writes_key_results(const AttentionCall& call, const BandedBranch& branch);
// Two of which gradients are wanted, one behind the other; together where the device can. Made in front of
// any launch that others follow without a gap.
struct BandedBranchesBackward {
  at::Tensor k[2], v[2], workspace;
  BandedBranchesBwdParams params;

  BandedBranchesBackward(const AttentionCall& call, const BandedBranch& first, const BandedBranch& second);
};

void selected_forward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& block_indices, int64_t block_size, const BranchOutput& out);
struct SelectedBackward {
  at::Tensor k, v, block_indices, workspace;
  SelectedAttentionBwdParams params;

  // grads: d_o alone is needed.
  SelectedBackward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& block_indices, int64_t block_size, const BranchGrads& grads);
  // What to launch, with a workspace.
  const SelectedAttentionBwdParams& with(const BranchGrads& grads);
};

void select(const AttentionCall& call, const at::Tensor& k_cmp, const at::Tensor& lse, KeyBlocks keys,
            const Selection& selection, const at::Tensor& block_indices);

}  // namespace nsa::ops
