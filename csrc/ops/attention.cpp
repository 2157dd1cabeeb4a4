// nsa::attention: the three branches and the gate as one autograd node.
#include <torch/csrc/autograd/functions/utils.h>

#include <optional>

#include "ops/autograd.h"
#include "ops/branches.h"
#include "ops/checks.h"
#include "ops/gated_combine.h"
#include "ops/gradients.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {
namespace {

constexpr const char* kSupportRow = "attention";
constexpr const char* kForward = "attention";  // what users call; attention_forward is its kernel
constexpr const char* kBackward = "attention_backward";

struct Config {
  int64_t compress_block_size, compress_stride, block_size;
  int64_t num_selected_blocks, num_initial_blocks, num_local_blocks, window_size;
  double softmax_scale;

  KeyBlocks compressed() const { return {compress_block_size, compress_stride}; }
  Selection selection() const {
    return {block_size, num_selected_blocks, num_initial_blocks, num_local_blocks};
  }
};

// q and the keys and values of the branches.
struct Inputs {
  const Tensor &q, &k_cmp, &v_cmp, &k_slc, &v_slc, &k_swa, &v_swa, &gate_logits;
};

// Without offsets k_swa and v_swa may hold only the last keys, all that a query sees. Backward wants all.
enum class WindowKeys { kLast, kAll };

void check_window_rows(const Checks& checks, const Inputs& in, const SequenceArgs& sequences, int64_t window,
                       WindowKeys keys) {
  const auto rows = in.k_swa.sym_size(0).maybe_as_int(), tokens = in.q.sym_size(0).maybe_as_int();
  const auto max_seqlen_k = sequences.max_seqlen_k.maybe_as_int();
  const bool are_last = keys == WindowKeys::kLast && !sequences.cu_seqlens_k.has_value() && rows && tokens &&
                        max_seqlen_k && *rows < *max_seqlen_k && *rows >= *tokens + window - 1;
  if (!are_last) checks.key_rows({"k_swa", in.k_swa}, sequences, KeyBlocks{});
}

AttentionShape check(const Checks& checks, const Inputs& in, const SequenceArgs& sequences,
                     const Config& config, WindowKeys window_keys) {
  checks.compression("compress_block_size", config.compress_block_size, "compress_stride",
                     config.compress_stride);
  checks.selection_block(config.block_size, config.compress_stride);
  checks.selection(config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks);
  checks.at_least("window_size", config.window_size, 1);
  checks.positive("softmax_scale", config.softmax_scale);

  const AttentionShape shape = checks.attention({"q", in.q}, {"k_cmp", in.k_cmp}, {"v_cmp", in.v_cmp});
  const auto token_branch = [&](Arg k, Arg v) {
    checks.dim(k, 3, "[S, Hkv, Dk]");
    checks.shape(k, {k.tensor.sym_size(0), shape.num_heads_kv, shape.head_dim_qk}, "[S, Hkv, Dk]");
    checks.shape(v, {k.tensor.sym_size(0), shape.num_heads_kv, shape.head_dim_v}, "[S, Hkv, Dv]");
    checks.alike({"q", in.q}, {k, v});
  };
  token_branch({"k_slc", in.k_slc}, {"v_slc", in.v_slc});
  token_branch({"k_swa", in.k_swa}, {"v_swa", in.v_swa});
  checks.gate_logits({"gate_logits", in.gate_logits}, in.q);

  checks.sequences(in.q, sequences);
  checks.key_rows({"k_cmp", in.k_cmp}, sequences, config.compressed());
  checks.key_rows({"k_slc", in.k_slc}, sequences, KeyBlocks{});
  check_window_rows(checks, in, sequences, config.window_size, window_keys);
  return shape;
}

// Where the tokens of the last sequence end, if only the device knows.
const int32_t* end_on_device(const Tensor& q, const Batch& batch) {
  const int32_t* offsets = batch.seqs.cu_seqlens_q;
  return offsets == nullptr || q.is_cpu() ? nullptr : offsets + batch.seqs.batch;
}

// What the backward reads beside o and block_indices; without, the selected output is not kept.
enum class Keep { kAll, kResults };

Tensor8 forward(const Inputs& in, const SequenceArgs& sequences, const Config& config, Keep keep) {
  const AttentionShape shape = check(Checks(kForward, kSupportRow), in, sequences, config, WindowKeys::kLast);
  const BranchOutput cmp = empty_output(in.q, shape), swa = empty_output(in.q, shape);
  BranchOutput slc = empty_output(in.q, shape, keep == Keep::kAll);
  const Tensor block_indices = empty_block_indices(in.q, shape, config.num_selected_blocks);
  const Tensor o = at::empty_symint(cmp.o.sym_sizes(), cmp.o.options());
  if (keep == Keep::kResults) slc.o = o;
  if (!in.q.is_meta()) {
    const AttentionCall call(kForward, shape, config.softmax_scale, in.q, sequences);
    fill_padding({{cmp.o, 0},
                  {cmp.lse, kNoLse},
                  {slc.o, 0},  // perhaps o
                  {slc.lse, kNoLse},
                  {swa.o, 0},
                  {swa.lse, kNoLse},
                  {o, 0},
                  {block_indices, -1}},
                 call.batch);
    if (!call.batch.empty()) {
      const BandedForward compressed(call, in.k_cmp, in.v_cmp, config.compressed(), 0, cmp);
      const SelectForward select(call, in.k_cmp, cmp.lse, config.compressed(), config.selection(),
                                 block_indices);
      const SelectedForward selected(call, in.k_slc, in.v_slc, block_indices, config.block_size, slc);
      BandedForward window(call, in.k_swa, in.v_swa, KeyBlocks{}, config.window_size, swa);
      if (!sequences.cu_seqlens_k.has_value()) {  // queries stand at the end of the keys that there are
        int64_t& keys = window.params.seqs.max_seqlen_k;
        keys = min64(keys, in.k_swa.size(0));
      }
      const CombineForward combine({cmp.o, slc.o, swa.o}, in.gate_logits, call.batch.rows_q, o,
                                   end_on_device(in.q, call.batch));
      AttentionFwdParams params{compressed.params, select.params, selected.params, window.params,
                                combine.params};
      const Tensor workspace = allocate_workspace(in.q.device(), &params);
      launch(kForward, in.q.device(), params);
    }
  }
  return {o, block_indices, cmp.o, slc.o, swa.o, cmp.lse, slc.lse, swa.lse};
}

struct Attention : torch::autograd::Function<Attention> {
  static constexpr bool is_traceable = true;

  // All results but o, which are not differentiable, leave through a pointer: autograd does not see them.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k_cmp,
                        const Tensor& v_cmp, const Tensor& k_slc, const Tensor& v_slc, const Tensor& k_swa,
                        const Tensor& v_swa, const Tensor& gate_logits, const OptTensor& cu_q,
                        const OptTensor& cu_k, const SymInt& max_q, const SymInt& max_k, const Config& config,
                        Tensor8* results) {
    *results = below_autograd(attention_forward, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits,
                              cu_q, cu_k, max_q, max_k, config.compress_block_size, config.compress_stride,
                              config.block_size, config.num_selected_blocks, config.num_initial_blocks,
                              config.num_local_blocks, config.window_size, config.softmax_scale);
    const auto& [o, block_indices, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa] = *results;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, block_indices, o_cmp,
                            o_slc, o_swa, lse_cmp, lse_slc, lse_swa, or_undefined(cu_q), or_undefined(cu_k)});
    ctx->saved_data["max_seqlen_q"] = max_q;
    ctx->saved_data["max_seqlen_k"] = max_k;
    ctx->saved_data["compress_block_size"] = config.compress_block_size;
    ctx->saved_data["compress_stride"] = config.compress_stride;
    ctx->saved_data["block_size"] = config.block_size;
    ctx->saved_data["num_selected_blocks"] = config.num_selected_blocks;
    ctx->saved_data["num_initial_blocks"] = config.num_initial_blocks;
    ctx->saved_data["num_local_blocks"] = config.num_local_blocks;
    ctx->saved_data["window_size"] = config.window_size;
    ctx->saved_data["softmax_scale"] = config.softmax_scale;
    return o;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& d_outputs) {
    constexpr size_t kNumInputs = 14;
    const Tensor& d_o = d_outputs[0];
    if (!d_o.defined()) return torch::autograd::variable_list(kNumInputs);
    const auto saved = ctx->get_saved_variables();
    const auto integer = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    const auto mask = wanted_gradients<8>(ctx);
    auto grads = attention_backward(
        d_o, saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8],
        saved[9], saved[10], saved[11], saved[12], saved[13], saved[14], or_none(saved[15]),
        or_none(saved[16]), ctx->saved_data["max_seqlen_q"].toSymInt(),
        ctx->saved_data["max_seqlen_k"].toSymInt(), integer("compress_block_size"),
        integer("compress_stride"), integer("block_size"), integer("num_selected_blocks"),
        integer("num_initial_blocks"), integer("num_local_blocks"), integer("window_size"),
        ctx->saved_data["softmax_scale"].toDouble(), mask);
    return input_gradients(to_array(std::move(grads)), mask, kNumInputs);
  }
};

}  // namespace

namespace kernels {

Tensor8 attention_forward(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                          const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                          const Tensor& gate_logits, const OptTensor& cu_seqlens_q,
                          const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                          int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                          int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                          int64_t window_size, double softmax_scale) {
  return forward({q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits},
                 {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                 {compress_block_size, compress_stride, block_size, num_selected_blocks, num_initial_blocks,
                  num_local_blocks, window_size, softmax_scale},
                 Keep::kAll);
}

Tensor2 attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                  const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa, const Tensor& gate_logits,
                  const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                  SymInt max_seqlen_k, int64_t compress_block_size, int64_t compress_stride,
                  int64_t block_size, int64_t num_selected_blocks, int64_t num_initial_blocks,
                  int64_t num_local_blocks, int64_t window_size, double softmax_scale) {
  const Tensor8 results = forward({q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits},
                                  {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                                  {compress_block_size, compress_stride, block_size, num_selected_blocks,
                                   num_initial_blocks, num_local_blocks, window_size, softmax_scale},
                                  Keep::kResults);
  return {std::get<0>(results), std::get<1>(results)};
}

Tensor8 attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                           const Tensor& k_slc, const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                           const Tensor& gate_logits, const Tensor& block_indices, const Tensor& o_cmp,
                           const Tensor& o_slc, const Tensor& o_swa, const Tensor& lse_cmp,
                           const Tensor& lse_slc, const Tensor& lse_swa, const OptTensor& cu_seqlens_q,
                           const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                           int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                           int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                           int64_t window_size, double softmax_scale, GradMask<8> grad_mask) {
  const SequenceArgs sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const Config config{compress_block_size, compress_stride,  block_size,  num_selected_blocks,
                      num_initial_blocks,  num_local_blocks, window_size, softmax_scale};
  const Checks checks(kBackward, kSupportRow);
  const AttentionShape shape = check(checks, {q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits},
                                     sequences, config, WindowKeys::kAll);
  checks.like_output({"d_o", d_o}, q, shape.head_dim_v);
  checks.like_output({"o_cmp", o_cmp}, q, shape.head_dim_v);
  checks.like_output({"o_slc", o_slc}, q, shape.head_dim_v);
  checks.like_output({"o_swa", o_swa}, q, shape.head_dim_v);
  checks.lse({"lse_cmp", lse_cmp}, q);
  checks.lse({"lse_slc", lse_slc}, q);
  checks.lse({"lse_swa", lse_swa}, q);
  checks.block_indices({"block_indices", block_indices}, q, shape);

  // Gradients of keys: in the order of the branches, k before v.
  const std::vector<Tensor> key_inputs{k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa};
  const std::vector<bool> keys_wanted(grad_mask.begin() + 1, grad_mask.begin() + 7);
  const Tensor d_gate_logits = empty_gradient(gate_logits, grad_mask[7]);
  KeyGradients keys;
  Tensor dq;

  if (q.is_meta()) {
    dq = empty_gradient(q, grad_mask[0]);
    keys = KeyGradients(key_inputs, keys_wanted, std::vector<bool>(6));
  } else {
    const AttentionCall call(kBackward, shape, softmax_scale, q, sequences);
    std::array<BranchGrads, kNumBranches> branches;
    const Tensor d_o_rows = as_rows(d_o);
    for (BranchGrads& grads : branches) grads.d_o = d_o_rows;
    const BandedBranch cmp{k_cmp, v_cmp, config.compressed(), 0, branches[0]};
    const BandedBranch swa{k_swa, v_swa, KeyBlocks{}, window_size, branches[2]};
    SelectedBackward slc(call, k_slc, v_slc, block_indices, block_size, branches[1]);
    branches[0].key_results = writes_key_results(call, cmp);
    branches[2].key_results = writes_key_results(call, swa);
    std::vector<bool> keys_written;
    for (int i = 0; i < 2 * kNumBranches; ++i) keys_written.push_back(branches[i / 2].key_results);
    keys = KeyGradients(key_inputs, keys_wanted, keys_written);

    const Tensor* const lse[kNumBranches] = {&lse_cmp, &lse_slc, &lse_swa};
    // One pass over dO and the outputs gives all that the branches need of them.
    CombineGrads combine;
    combine.d_gate_logits = d_gate_logits;
    const int32_t* end_token = end_on_device(q, call.batch);
    if (end_token == nullptr) fill_padding({{d_gate_logits, 0}}, call.batch);
    // The branches add to one dQ in turn (QueryGrads), the selected one first.
    Tensor dq_sum;
    if (grad_mask[0]) dq_sum = at::empty(q.sizes(), q.options().dtype(acc_dtype(q.scalar_type())));
    for (int b = 0; b < kNumBranches; ++b) {
      BranchGrads& grads = branches[b];
      grads.dq_sum = dq_sum;
      grads.dq_begun = b != 1;
      grads.dk = keys[2 * b];
      grads.dv = keys[2 * b + 1];
      if (!grads.wanted()) continue;
      grads.lse = lse[b]->contiguous();
      grads.d_o_scale = combine.gates[b] = at::empty_like(grads.lse);
      grads.delta = combine.delta[b] = at::empty_like(grads.lse);
    }
    std::optional<BandedBranchesBackward> banded;
    if (branches[0].wanted() && branches[2].wanted() && !call.batch.empty()) banded.emplace(call, cmp, swa);
    const bool any_wanted =
        branches[0].wanted() || branches[1].wanted() || branches[2].wanted() || d_gate_logits.defined();
    if (any_wanted && call.batch.rows_q != 0) {
      const CombineBackward gate(d_o_rows, {o_cmp, o_slc, o_swa}, gate_logits, call.batch.rows_q, combine,
                                 end_token);
      if (branches[1].wanted() && !call.batch.empty()) {
        launch(kBackward, q.device(),
               SelectedBranchBwdParams{gate.params, slc.with(branches[1]),
                                       banded.has_value() ? &banded->params : nullptr});
        slc.workspace.reset();
      } else {
        launch(kBackward, q.device(), gate.params);
      }
    }
    // Not allocated before it is written: the workspace of the selected branch is gone by then.
    if (grad_mask[0]) dq = dq_sum.scalar_type() == q.scalar_type() ? dq_sum : empty_gradient(q, true);
    branches[2].dq = dq;
    if (banded.has_value()) {
      banded->params.branch[1].grads.dq.result = pointer(dq);
      launch(kBackward, q.device(), banded->params);
    } else {
      banded_backward(call, cmp);
      banded_backward(call, swa);
    }
    fill_padding({{dq, 0}}, call.batch);
  }
  const std::vector<Tensor> key_grads = keys.finish();
  return {finished_gradient(dq, q),
          key_grads[0],
          key_grads[1],
          key_grads[2],
          key_grads[3],
          key_grads[4],
          key_grads[5],
          finished_gradient(d_gate_logits, gate_logits)};
}

}  // namespace kernels

namespace autograd {

Tensor8 attention_forward(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                          const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                          const Tensor& gate_logits, const OptTensor& cu_seqlens_q,
                          const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                          int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                          int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                          int64_t window_size, double softmax_scale) {
  const Config config{compress_block_size, compress_stride,  block_size,  num_selected_blocks,
                      num_initial_blocks,  num_local_blocks, window_size, softmax_scale};
  Tensor8 results;
  Tensor o = Attention::apply(q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, cu_seqlens_q,
                              cu_seqlens_k, max_seqlen_q, max_seqlen_k, config, &results);
  std::get<0>(results) = std::move(o);
  return results;
}

Tensor2 attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                  const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa, const Tensor& gate_logits,
                  const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                  SymInt max_seqlen_k, int64_t compress_block_size, int64_t compress_stride,
                  int64_t block_size, int64_t num_selected_blocks, int64_t num_initial_blocks,
                  int64_t num_local_blocks, int64_t window_size, double softmax_scale) {
  if (!torch::autograd::compute_requires_grad(q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits)) {
    return below_autograd(ops::attention, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits,
                          cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, compress_block_size,
                          compress_stride, block_size, num_selected_blocks, num_initial_blocks,
                          num_local_blocks, window_size, softmax_scale);
  }
  const Tensor8 results = autograd::attention_forward(
      q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
      max_seqlen_k, compress_block_size, compress_stride, block_size, num_selected_blocks, num_initial_blocks,
      num_local_blocks, window_size, softmax_scale);
  return {std::get<0>(results), std::get<1>(results)};
}

Tensor8 attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                           const Tensor& k_slc, const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                           const Tensor& gate_logits, const Tensor& block_indices, const Tensor& o_cmp,
                           const Tensor& o_slc, const Tensor& o_swa, const Tensor& lse_cmp,
                           const Tensor& lse_slc, const Tensor& lse_swa, const OptTensor& cu_seqlens_q,
                           const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                           int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                           int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                           int64_t window_size, double softmax_scale, GradMask<8> grad_mask) {
  return once_differentiable(
      kBackward, {d_o, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, o_cmp, o_slc, o_swa},
      ops::attention_backward, d_o, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, block_indices,
      o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
      compress_block_size, compress_stride, block_size, num_selected_blocks, num_initial_blocks,
      num_local_blocks, window_size, softmax_scale, grad_mask);
}

}  // namespace autograd
}  // namespace nsa::ops
