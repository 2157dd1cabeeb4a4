// nsa::compressed_attention and nsa::sliding_window_attention: one family (csrc/nsa/params.h), so one
// implementation.
#include "ops/autograd.h"
#include "ops/branches.h"
#include "ops/checks.h"
#include "ops/gradients.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {

at::Tensor attention_delta(const AttentionCall& call, const at::Tensor& d_o, const at::Tensor& o) {
  const at::Tensor delta = at::empty({o.size(0), o.size(1)}, o.options().dtype(acc_dtype(o.scalar_type())));
  if (call.batch.empty()) return delta;
  const at::Tensor o_contiguous = as_block(o);
  DeltaParams params{};
  params.dtype = dtype_of(o);
  params.num_tokens = call.batch.rows_q;
  params.num_heads = call.shape.num_heads_q;
  params.head_dim_v = call.shape.head_dim_v;
  params.d_o = rows_view(d_o);
  params.o = o_contiguous.const_data_ptr();
  params.delta = delta.mutable_data_ptr();
  launch(call.op, o.device(), params);
  return delta;
}

BandedForward::BandedForward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v,
                             KeyBlocks keys, int64_t window, const BranchOutput& out)
    : k(as_rows(k)), v(as_rows(v)), params(call.params<BandedAttentionFwdParams>()) {
  params.seqs.key_rows = k.size(0);
  params.keys = keys;
  params.window = window;
  params.k = rows_view(this->k);
  params.v = rows_view(this->v);
  params.o = out.o.mutable_data_ptr();
  params.lse = out.lse.mutable_data_ptr();
}

void banded_forward(const AttentionCall& call, const at::Tensor& k, const at::Tensor& v, KeyBlocks keys,
                    int64_t window, const BranchOutput& out) {
  fill_padding(out, call.batch);
  if (call.batch.empty()) return;
  launch(call.op, k.device(), BandedForward(call, k, v, keys, window, out).params);
}

namespace {

BandedAttentionBwdParams backward_params(const AttentionCall& call, const BandedBranch& branch,
                                         const at::Tensor& k_rows, const at::Tensor& v_rows) {
  auto params = call.params<BandedAttentionBwdParams>();
  params.seqs.key_rows = branch.k.size(0);
  params.keys = branch.keys;
  params.window = branch.window;
  params.k = rows_view(k_rows);
  params.v = rows_view(v_rows);
  params.grads = branch.grads.params();
  return params;
}

}  // namespace

void banded_backward(const AttentionCall& call, const BandedBranch& branch) {
  if (call.batch.empty() || !branch.grads.wanted()) return;
  const at::Tensor k_rows = as_rows(branch.k), v_rows = as_rows(branch.v);
  BandedAttentionBwdParams params = backward_params(call, branch, k_rows, v_rows);
  const at::Tensor workspace = allocate_workspace(branch.k.device(), &params);
  launch(call.op, branch.k.device(), params);
}

bool writes_key_results(const AttentionCall& call, const BandedBranch& branch) {
  const at::Tensor k_rows = as_rows(branch.k), v_rows = as_rows(branch.v);
  return !call.batch.empty() &&
         writes_key_results(branch.k.device(), backward_params(call, branch, k_rows, v_rows));
}

BandedBranchesBackward::BandedBranchesBackward(const AttentionCall& call, const BandedBranch& first,
                                               const BandedBranch& second)
    : k{as_rows(first.k), as_rows(second.k)}, v{as_rows(first.v), as_rows(second.v)}, params{} {
  params.branch[0] = backward_params(call, first, k[0], v[0]);
  params.branch[1] = backward_params(call, second, k[1], v[1]);
  workspace = allocate_workspace(call.q.device(), &params);
}

namespace {

// The two members of the family. A window of 0 means none.
struct Band {
  KeyBlocks keys;
  int64_t window;

  static Band compressed(int64_t block_size, int64_t stride) { return {{block_size, stride}, 0}; }
  static Band sliding(int64_t window_size) { return {{1, 1}, window_size}; }
  bool is_compressed() const { return window == 0; }
};

struct Names {
  const char *op, *support_row, *k, *v;
};
constexpr Names kCompressed = {"compressed_attention", "compressed_attention", "k_cmp", "v_cmp"};
constexpr Names kCompressedBackward = {"compressed_attention_backward", "compressed_attention", "k_cmp",
                                       "v_cmp"};
constexpr Names kSliding = {"sliding_window_attention", "sliding_window_attention", "k", "v"};
constexpr Names kSlidingBackward = {"sliding_window_attention_backward", "sliding_window_attention", "k",
                                    "v"};

AttentionShape check(const Checks& checks, const Names& names, const Tensor& q, const Tensor& k,
                     const Tensor& v, const SequenceArgs& sequences, const Band& band, double softmax_scale) {
  checks.positive("softmax_scale", softmax_scale);
  const AttentionShape shape = checks.attention({"q", q}, {names.k, k}, {names.v, v});
  checks.sequences(q, sequences);
  checks.key_rows({names.k, k}, sequences, band.keys);
  return shape;
}

Tensor2 forward(const Names& names, const Tensor& q, const Tensor& k, const Tensor& v,
                const SequenceArgs& sequences, const Band& band, double softmax_scale) {
  const Checks checks(names.op, names.support_row);
  const AttentionShape shape = check(checks, names, q, k, v, sequences, band, softmax_scale);
  const BranchOutput out = empty_output(q, shape);
  if (!q.is_meta()) {
    banded_forward({names.op, shape, softmax_scale, q, sequences}, k, v, band.keys, band.window, out);
  }
  return {out.o, out.lse};
}

Tensor3 backward(const Names& names, const Tensor& d_o, const Tensor& q, const Tensor& k, const Tensor& v,
                 const Tensor& o, const Tensor& lse, const SequenceArgs& sequences, const Band& band,
                 double softmax_scale, const GradMask<3>& mask) {
  const Checks checks(names.op, names.support_row);
  const AttentionShape shape = check(checks, names, q, k, v, sequences, band, softmax_scale);
  checks.like_output({"d_o", d_o}, q, shape.head_dim_v);
  checks.like_output({"o", o}, q, shape.head_dim_v);
  checks.lse({"lse", lse}, q);

  BranchGrads grads;
  grads.dq = empty_gradient(q, mask[0]);
  const std::vector<bool> wanted{mask[1], mask[2]};
  KeyGradients keys;
  if (q.is_meta() || !(mask[0] || mask[1] || mask[2])) {
    keys = KeyGradients({k, v}, wanted, {false, false});
  } else {
    const AttentionCall call(names.op, shape, softmax_scale, q, sequences);
    const BandedBranch branch{k, v, band.keys, band.window, grads};
    grads.d_o = as_rows(d_o);
    grads.key_results = writes_key_results(call, branch);
    keys = KeyGradients({k, v}, wanted, {grads.key_results, grads.key_results});
    grads.dk = keys[0];
    grads.dv = keys[1];
    grads.delta = attention_delta(call, grads.d_o, o);
    grads.lse = lse.contiguous();
    banded_backward(call, branch);
    fill_padding({{grads.dq, 0}}, call.batch);
  }
  const std::vector<Tensor> key_grads = keys.finish();
  return {finished_gradient(grads.dq, q), key_grads[0], key_grads[1]};
}

struct BandedAttention : torch::autograd::Function<BandedAttention> {
  static constexpr bool is_traceable = true;

  // lse, which is not differentiable, leaves through a pointer: autograd does not see it.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k,
                        const Tensor& v, const OptTensor& cu_q, const OptTensor& cu_k, const SymInt& max_q,
                        const SymInt& max_k, const Band& band, double softmax_scale, Tensor* lse) {
    Tensor o;
    std::tie(o, *lse) = band.is_compressed()
                            ? below_autograd(compressed_attention, q, k, v, cu_q, cu_k, max_q, max_k,
                                             band.keys.block, band.keys.stride, softmax_scale)
                            : below_autograd(sliding_window_attention, q, k, v, cu_q, cu_k, max_q, max_k,
                                             band.window, softmax_scale);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, o, *lse, or_undefined(cu_q), or_undefined(cu_k)});
    ctx->saved_data["max_seqlen_q"] = max_q;
    ctx->saved_data["max_seqlen_k"] = max_k;
    ctx->saved_data["block"] = band.keys.block;
    ctx->saved_data["stride"] = band.keys.stride;
    ctx->saved_data["window"] = band.window;
    ctx->saved_data["softmax_scale"] = softmax_scale;
    return o;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& d_outputs) {
    constexpr size_t kNumInputs = 10;
    const Tensor& d_o = d_outputs[0];
    if (!d_o.defined()) return torch::autograd::variable_list(kNumInputs);
    const auto saved = ctx->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &o = saved[3], &lse = saved[4];
    const OptTensor cu_q = or_none(saved[5]), cu_k = or_none(saved[6]);
    const SymInt max_q = ctx->saved_data["max_seqlen_q"].toSymInt();
    const SymInt max_k = ctx->saved_data["max_seqlen_k"].toSymInt();
    const int64_t window = ctx->saved_data["window"].toInt();
    const double softmax_scale = ctx->saved_data["softmax_scale"].toDouble();
    const auto mask = wanted_gradients<3>(ctx);
    auto grads = window == 0
                     ? compressed_attention_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k,
                                                     ctx->saved_data["block"].toInt(),
                                                     ctx->saved_data["stride"].toInt(), softmax_scale, mask)
                     : sliding_window_attention_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k,
                                                         window, softmax_scale, mask);
    return input_gradients(to_array(std::move(grads)), mask, kNumInputs);
  }
};

}  // namespace

namespace kernels {

Tensor2 compressed_attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                             const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                             SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                             int64_t compress_stride, double softmax_scale) {
  Checks(kCompressed.op, kCompressed.support_row)
      .compression("compress_block_size", compress_block_size, "compress_stride", compress_stride);
  return forward(kCompressed, q, k_cmp, v_cmp, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                 Band::compressed(compress_block_size, compress_stride), softmax_scale);
}

Tensor3 compressed_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k_cmp,
                                      const Tensor& v_cmp, const Tensor& o, const Tensor& lse,
                                      const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                      SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                                      int64_t compress_stride, double softmax_scale, GradMask<3> grad_mask) {
  Checks(kCompressedBackward.op, kCompressedBackward.support_row)
      .compression("compress_block_size", compress_block_size, "compress_stride", compress_stride);
  return backward(kCompressedBackward, d_o, q, k_cmp, v_cmp, o, lse,
                  {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                  Band::compressed(compress_block_size, compress_stride), softmax_scale, grad_mask);
}

Tensor2 sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                 SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                 double softmax_scale) {
  Checks(kSliding.op, kSliding.support_row).at_least("window_size", window_size, 1);
  return forward(kSliding, q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                 Band::sliding(window_size), softmax_scale);
}

Tensor3 sliding_window_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                          const Tensor& v, const Tensor& o, const Tensor& lse,
                                          const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                          SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                          double softmax_scale, GradMask<3> grad_mask) {
  Checks(kSlidingBackward.op, kSlidingBackward.support_row).at_least("window_size", window_size, 1);
  return backward(kSlidingBackward, d_o, q, k, v, o, lse,
                  {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, Band::sliding(window_size),
                  softmax_scale, grad_mask);
}

}  // namespace kernels

namespace autograd {

Tensor2 compressed_attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                             const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                             SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                             int64_t compress_stride, double softmax_scale) {
  Tensor lse;
  Tensor o =
      BandedAttention::apply(q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                             Band::compressed(compress_block_size, compress_stride), softmax_scale, &lse);
  return {o, lse};
}

Tensor2 sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                 SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                 double softmax_scale) {
  Checks(kSliding.op, kSliding.support_row)
      .at_least("window_size", window_size, 1);  // 0 would mean the other operator
  Tensor lse;
  Tensor o = BandedAttention::apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                    Band::sliding(window_size), softmax_scale, &lse);
  return {o, lse};
}

Tensor3 compressed_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k_cmp,
                                      const Tensor& v_cmp, const Tensor& o, const Tensor& lse,
                                      const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                      SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                                      int64_t compress_stride, double softmax_scale, GradMask<3> grad_mask) {
  return once_differentiable(kCompressedBackward.op, {d_o, q, k_cmp, v_cmp, o, lse},
                             ops::compressed_attention_backward, d_o, q, k_cmp, v_cmp, o, lse, cu_seqlens_q,
                             cu_seqlens_k, max_seqlen_q, max_seqlen_k, compress_block_size, compress_stride,
                             softmax_scale, grad_mask);
}

Tensor3 sliding_window_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                          const Tensor& v, const Tensor& o, const Tensor& lse,
                                          const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                          SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                          double softmax_scale, GradMask<3> grad_mask) {
  return once_differentiable(kSlidingBackward.op, {d_o, q, k, v, o, lse},
                             ops::sliding_window_attention_backward, d_o, q, k, v, o, lse, cu_seqlens_q,
                             cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size, softmax_scale, grad_mask);
}

}  // namespace autograd
}  // namespace nsa::ops
