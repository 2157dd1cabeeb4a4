// nsa::selected_attention.
#include "ops/autograd.h"
#include "ops/branches.h"
#include "ops/checks.h"
#include "ops/gradients.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {
namespace {

// The fields that forward and backward share. k and v are as_rows, block_indices as_block.
template <typename Params>
Params selected_params(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& block_indices, int64_t block_size) {
  Params params = call.params<Params>();
  params.seqs.key_rows = k.size(0);
  params.block_size = block_size;
  params.num_selected_blocks = static_cast<int>(block_indices.size(2));
  params.k = rows_view(k);
  params.v = rows_view(v);
  params.block_indices = block_indices.const_data_ptr<int32_t>();
  return params;
}

}  // namespace

SelectedForward::SelectedForward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                                 const at::Tensor& block_indices, int64_t block_size, const BranchOutput& out)
    : k(as_rows(k)),
      v(as_rows(v)),
      block_indices(as_block(block_indices)),
      params(selected_params<SelectedAttentionFwdParams>(call, this->k, this->v, this->block_indices,
                                                         block_size)) {
  params.o = out.o.mutable_data_ptr();
  params.lse = out.lse.mutable_data_ptr();
}

void selected_forward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& block_indices, int64_t block_size, const BranchOutput& out) {
  fill_padding(out, call.batch);
  if (call.batch.empty()) return;
  launch(call.op, k.device(), SelectedForward(call, k, v, block_indices, block_size, out).params);
}

SelectedBackward::SelectedBackward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                                   const at::Tensor& block_indices, int64_t block_size,
                                   const BranchGrads& grads)
    : k(as_rows(k)),
      v(as_rows(v)),
      block_indices(as_block(block_indices)),
      params(selected_params<SelectedAttentionBwdParams>(call, this->k, this->v, this->block_indices,
                                                         block_size)) {
  params.grads = grads.params();
}

const SelectedAttentionBwdParams& SelectedBackward::with(const BranchGrads& grads) {
  params.grads = grads.params();
  workspace = allocate_workspace(k.device(), &params);
  return params;
}

namespace {

constexpr const char* kForward = "selected_attention";
constexpr const char* kBackward = "selected_attention_backward";

AttentionShape check(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& block_indices, const SequenceArgs& sequences, int64_t block_size,
                     double softmax_scale) {
  checks.at_least("block_size", block_size, 1);
  checks.positive("softmax_scale", softmax_scale);
  const AttentionShape shape = checks.attention({"q", q}, {"k", k}, {"v", v});
  checks.block_indices({"block_indices", block_indices}, q, shape);
  checks.sequences(q, sequences);
  checks.key_rows({"k", k}, sequences, KeyBlocks{});
  return shape;
}

struct SelectedAttention : torch::autograd::Function<SelectedAttention> {
  static constexpr bool is_traceable = true;

  // lse, which is not differentiable, leaves through a pointer: autograd does not see it.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& block_indices, const OptTensor& cu_q,
                        const OptTensor& cu_k, const SymInt& max_q, const SymInt& max_k, int64_t block_size,
                        double softmax_scale, Tensor* lse) {
    Tensor o;
    std::tie(o, *lse) = below_autograd(selected_attention, q, k, v, block_indices, cu_q, cu_k, max_q, max_k,
                                       block_size, softmax_scale);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, o, *lse, block_indices, or_undefined(cu_q), or_undefined(cu_k)});
    ctx->saved_data["max_seqlen_q"] = max_q;
    ctx->saved_data["max_seqlen_k"] = max_k;
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["softmax_scale"] = softmax_scale;
    return o;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& d_outputs) {
    constexpr size_t kNumInputs = 11;
    const Tensor& d_o = d_outputs[0];
    if (!d_o.defined()) return torch::autograd::variable_list(kNumInputs);
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<3>(ctx);
    auto grads = selected_attention_backward(
        d_o, saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], or_none(saved[6]), or_none(saved[7]),
        ctx->saved_data["max_seqlen_q"].toSymInt(), ctx->saved_data["max_seqlen_k"].toSymInt(),
        ctx->saved_data["block_size"].toInt(), ctx->saved_data["softmax_scale"].toDouble(), mask);
    return input_gradients(to_array(std::move(grads)), mask, kNumInputs);
  }
};

}  // namespace

namespace kernels {

Tensor2 selected_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_indices,
                           const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                           SymInt max_seqlen_k, int64_t block_size, double softmax_scale) {
  const SequenceArgs sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const AttentionShape shape =
      check(Checks(kForward, kForward), q, k, v, block_indices, sequences, block_size, softmax_scale);
  const BranchOutput out = empty_output(q, shape);
  if (!q.is_meta()) {
    selected_forward({kForward, shape, softmax_scale, q, sequences}, k, v, block_indices, block_size, out);
  }
  return {out.o, out.lse};
}

Tensor3 selected_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& o, const Tensor& lse, const Tensor& block_indices,
                                    const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                    SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t block_size,
                                    double softmax_scale, GradMask<3> grad_mask) {
  const SequenceArgs sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const Checks checks(kBackward, kForward);
  const AttentionShape shape = check(checks, q, k, v, block_indices, sequences, block_size, softmax_scale);
  checks.like_output({"d_o", d_o}, q, shape.head_dim_v);
  checks.like_output({"o", o}, q, shape.head_dim_v);
  checks.lse({"lse", lse}, q);

  BranchGrads grads;
  grads.dq = empty_gradient(q, grad_mask[0]);
  const std::vector<bool> wanted{grad_mask[1], grad_mask[2]};
  KeyGradients keys({k, v}, wanted, {false, false});
  if (!q.is_meta() && (grad_mask[0] || grad_mask[1] || grad_mask[2])) {
    const AttentionCall call(kBackward, shape, softmax_scale, q, sequences);
    grads.d_o = as_rows(d_o);
    SelectedBackward selected(call, k, v, block_indices, block_size, grads);
    grads.dk = keys[0];
    grads.dv = keys[1];
    if (!call.batch.empty()) {
      grads.delta = attention_delta(call, grads.d_o, o);
      grads.lse = lse.contiguous();
      launch(kBackward, k.device(), selected.with(grads));
    }
    fill_padding({{grads.dq, 0}}, call.batch);
  }
  const std::vector<Tensor> key_grads = keys.finish();
  return {finished_gradient(grads.dq, q), key_grads[0], key_grads[1]};
}

}  // namespace kernels

namespace autograd {

Tensor2 selected_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_indices,
                           const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                           SymInt max_seqlen_k, int64_t block_size, double softmax_scale) {
  Tensor lse;
  Tensor o = SelectedAttention::apply(q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                      max_seqlen_k, block_size, softmax_scale, &lse);
  return {o, lse};
}

Tensor3 selected_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& o, const Tensor& lse, const Tensor& block_indices,
                                    const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                    SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t block_size,
                                    double softmax_scale, GradMask<3> grad_mask) {
  return once_differentiable(kBackward, {d_o, q, k, v, o, lse}, ops::selected_attention_backward, d_o, q, k,
                             v, o, lse, block_indices, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                             block_size, softmax_scale, grad_mask);
}

}  // namespace autograd
}  // namespace nsa::ops
