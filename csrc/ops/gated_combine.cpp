// nsa::gated_combine.
#include "ops/gated_combine.h"

#include "ops/autograd.h"
#include "ops/checks.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {

CombineForward::CombineForward(const BranchTensors& o_branch, const at::Tensor& gate_logits, int64_t num_rows,
                               const at::Tensor& o, const int32_t* end_token)
    : o_branch{as_block(o_branch[0]), as_block(o_branch[1]), as_block(o_branch[2])},
      gate_logits(gate_logits.contiguous()),
      params{} {
  params.dtype = dtype_of(o);
  params.gate_dtype = dtype_of(this->gate_logits);
  params.num_rows = num_rows * o.size(1);
  params.num_heads = static_cast<int>(o.size(1));
  params.end_token = end_token;
  params.head_dim_v = static_cast<int>(o.size(2));
  for (int b = 0; b < kNumBranches; ++b) params.o_branch[b] = this->o_branch[b].const_data_ptr();
  params.gate_logits = this->gate_logits.const_data_ptr();
  params.o = o.mutable_data_ptr();
}

void combine_forward(const char* op, const BranchTensors& o_branch, const at::Tensor& gate_logits,
                     int64_t num_rows, const at::Tensor& o, const int32_t* end_token) {
  if (num_rows == 0) return;
  launch(op, o.device(), CombineForward(o_branch, gate_logits, num_rows, o, end_token).params);
}

CombineBackward::CombineBackward(const at::Tensor& d_o, const BranchTensors& o_branch,
                                 const at::Tensor& gate_logits, int64_t num_rows, const CombineGrads& grads,
                                 const int32_t* end_token)
    : d_o(as_rows(d_o)),
      gate_logits(gate_logits.contiguous()),
      o_branch{as_block(o_branch[0]), as_block(o_branch[1]), as_block(o_branch[2])},
      params{} {
  params.dtype = dtype_of(d_o);
  params.gate_dtype = dtype_of(this->gate_logits);
  params.num_tokens = num_rows;
  params.num_heads = static_cast<int>(d_o.size(1));
  params.head_dim_v = static_cast<int>(d_o.size(2));
  params.d_o = rows_view(this->d_o);
  params.gate_logits = this->gate_logits.const_data_ptr();
  params.d_gate_logits = pointer(grads.d_gate_logits);
  params.end_token = end_token;
  for (int b = 0; b < kNumBranches; ++b) {
    params.o_branch[b] = this->o_branch[b].const_data_ptr();
    params.d_o_branch[b] = pointer(grads.d_o_branch[b]);
    params.gates[b] = pointer(grads.gates[b]);
    params.delta[b] = pointer(grads.delta[b]);
  }
}

void combine_backward(const char* op, const at::Tensor& d_o, const BranchTensors& o_branch,
                      const at::Tensor& gate_logits, int64_t num_rows, const CombineGrads& grads,
                      const int32_t* end_token) {
  if (num_rows == 0) return;
  launch(op, d_o.device(), CombineBackward(d_o, o_branch, gate_logits, num_rows, grads, end_token).params);
}

namespace {

constexpr const char* kForward = "gated_combine";
constexpr const char* kBackward = "gated_combine_backward";

void check(const Checks& checks, const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
           const Tensor& gate_logits) {
  checks.dim({"o_cmp", o_cmp}, 3, "[T, Hq, Dv]");
  for (const Arg& branch : {Arg{"o_slc", o_slc}, Arg{"o_swa", o_swa}}) {
    checks.shape(branch, {o_cmp.sym_size(0), o_cmp.sym_size(1), o_cmp.sym_size(2)}, "[T, Hq, Dv] of o_cmp");
  }
  checks.alike({"o_cmp", o_cmp}, {{"o_slc", o_slc}, {"o_swa", o_swa}});
  checks.supported({"o_cmp", o_cmp}, nullptr);
  checks.gate_logits({"gate_logits", gate_logits}, o_cmp);
}

Tensor empty_if(bool wanted, const Tensor& like) {
  return wanted ? at::empty_symint(like.sym_sizes(), like.options()) : at::empty({0}, like.options());
}

struct GatedCombine : torch::autograd::Function<GatedCombine> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& o_cmp, const Tensor& o_slc,
                        const Tensor& o_swa, const Tensor& gate_logits) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({o_cmp, o_slc, o_swa, gate_logits});
    return below_autograd(gated_combine, o_cmp, o_slc, o_swa, gate_logits);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& d_outputs) {
    constexpr size_t kNumInputs = 4;
    if (!d_outputs[0].defined()) return torch::autograd::variable_list(kNumInputs);
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<4>(ctx);
    auto grads = gated_combine_backward(d_outputs[0], saved[0], saved[1], saved[2], saved[3], mask);
    return input_gradients(to_array(std::move(grads)), mask, kNumInputs);
  }
};

}  // namespace

namespace kernels {

Tensor gated_combine(const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
                     const Tensor& gate_logits) {
  check(Checks(kForward, kForward), o_cmp, o_slc, o_swa, gate_logits);
  const Tensor o = at::empty_symint(o_cmp.sym_sizes(), o_cmp.options());
  if (!o.is_meta() && o.numel() != 0)
    combine_forward(kForward, {o_cmp, o_slc, o_swa}, gate_logits, o.size(0), o);
  return o;
}

Tensor4 gated_combine_backward(const Tensor& d_o, const Tensor& o_cmp, const Tensor& o_slc,
                               const Tensor& o_swa, const Tensor& gate_logits, GradMask<4> grad_mask) {
  const Checks checks(kBackward, kForward);
  check(checks, o_cmp, o_slc, o_swa, gate_logits);
  checks.shape({"d_o", d_o}, {o_cmp.sym_size(0), o_cmp.sym_size(1), o_cmp.sym_size(2)},
               "[T, Hq, Dv] of o_cmp");
  checks.alike({"o_cmp", o_cmp}, {{"d_o", d_o}});

  const Tensor d_o_cmp = empty_if(grad_mask[0], o_cmp), d_o_slc = empty_if(grad_mask[1], o_slc);
  const Tensor d_o_swa = empty_if(grad_mask[2], o_swa), d_gate_logits = empty_if(grad_mask[3], gate_logits);
  const bool any_wanted = grad_mask[0] || grad_mask[1] || grad_mask[2] || grad_mask[3];
  if (!d_o.is_meta() && any_wanted && d_o.size(1) != 0) {
    CombineGrads grads;  // an empty tensor has a null pointer: not wanted
    grads.d_o_branch = {d_o_cmp, d_o_slc, d_o_swa};
    grads.d_gate_logits = d_gate_logits;
    combine_backward(kBackward, d_o, {o_cmp, o_slc, o_swa}, gate_logits, d_o.size(0), grads);
  }
  return {d_o_cmp, d_o_slc, d_o_swa, d_gate_logits};
}

}  // namespace kernels

namespace autograd {

Tensor gated_combine(const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
                     const Tensor& gate_logits) {
  return GatedCombine::apply(o_cmp, o_slc, o_swa, gate_logits);
}

Tensor4 gated_combine_backward(const Tensor& d_o, const Tensor& o_cmp, const Tensor& o_slc,
                               const Tensor& o_swa, const Tensor& gate_logits, GradMask<4> grad_mask) {
  return once_differentiable(kBackward, {d_o, o_cmp, o_slc, o_swa, gate_logits}, ops::gated_combine_backward,
                             d_o, o_cmp, o_slc, o_swa, gate_logits, grad_mask);
}

}  // namespace autograd
}  // namespace nsa::ops
