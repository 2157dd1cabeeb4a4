// nsa::compress: phi, from tokens to compressed blocks.
#include "ops/compress.h"

#include "ops/autograd.h"
#include "ops/launch_device.h"
#include "ops/tensors.h"

namespace nsa::ops {
namespace {

constexpr const char* kForward = "compress";
constexpr const char* kBackward = "compress_backward";
constexpr size_t kNumTensors = 1 + kNumPhiParameters;  // x and the parameters
constexpr const char* kParameterNames[kNumPhiParameters] = {"pe", "w1", "b1", "w2", "b2"};

PhiParameters parameters(const OptTensor& pe, const OptTensor& w1, const OptTensor& b1, const OptTensor& w2,
                         const OptTensor& b2) {
  return {or_undefined(pe), or_undefined(w1), or_undefined(b1), or_undefined(w2), or_undefined(b2)};
}

enum class Presence { kAbsent, kOptional, kRequired };

}  // namespace

Phi check_phi(const Checks& checks, const Tensor& x, const PhiParameters& parameters,
              const OptTensor& cu_seqlens, const SymInt& max_seqlen, int64_t block_size, int64_t stride,
              std::string_view kind) {
  using enum Presence;
  Phi phi{};
  std::array<Presence, kNumPhiParameters> presence;  // of pe, w1, b1, w2, b2
  if (kind == "mlp") {
    phi.kind = CompressKind::kMlp;
    presence = {kOptional, kRequired, kOptional, kRequired, kOptional};
  } else if (kind == "linear") {
    phi.kind = CompressKind::kLinear;
    presence = {kOptional, kRequired, kOptional, kAbsent, kAbsent};
  } else {
    TORCH_CHECK_VALUE(kind == "mean", "nsa::", kForward, ": kind = \"", kind,
                      "\"; expected \"mlp\", \"linear\" or \"mean\"");
    phi.kind = CompressKind::kMean;
    presence = {kAbsent, kAbsent, kAbsent, kAbsent, kAbsent};
  }

  checks.compression("block_size", block_size, "stride", stride);
  phi.blocks = {block_size, stride};
  checks.dim({"x", x}, 3, "[S, H, D]");
  checks.supported({"x", x}, nullptr);
  phi.num_heads = static_cast<int>(x.sym_size(1).guard_int(__FILE__, __LINE__));
  phi.head_dim = static_cast<int>(x.sym_size(2).guard_int(__FILE__, __LINE__));
  checks.at_least("number of heads of x", phi.num_heads, 1);
  checks.at_least("head dim of x", phi.head_dim, 1);
  checks.token_sequences({"x", x}, cu_seqlens, max_seqlen);

  SymInt heads = 1;  // the leading dimension of every parameter
  phi.hidden_size = phi.head_dim;
  for (size_t i = 0; i < kNumPhiParameters; ++i) {
    const Tensor& parameter = parameters[i];
    TORCH_CHECK_VALUE(parameter.defined() ? presence[i] != kAbsent : presence[i] != kRequired,
                      "nsa::", kForward, ": ", kParameterNames[i],
                      parameter.defined() ? " is given" : " is None", "; kind = \"", kind, "\" ",
                      parameter.defined() ? "has no such parameter" : "needs it");
  }
  if (const Tensor& w1 = parameters[1]; w1.defined()) {
    checks.dim({"w1", w1}, 3, "[h, block_size * D, F]");
    const int64_t h = w1.sym_size(0).guard_int(__FILE__, __LINE__);
    TORCH_CHECK_VALUE(h == 1 || h == phi.num_heads, "nsa::", kForward, ": w1 has shape ", w1.sym_sizes(),
                      "; its leading dimension must be 1 or the number of heads of x, ", phi.num_heads);
    heads = h;
    phi.per_head = h != 1;
    if (phi.kind == CompressKind::kMlp)
      phi.hidden_size = static_cast<int>(w1.sym_size(2).guard_int(__FILE__, __LINE__));
    checks.at_least("hidden size of w1", phi.hidden_size, 1);
  }
  const SymInt l = block_size, D = phi.head_dim, F = phi.hidden_size;
  const auto check_shape = [&](size_t i, std::initializer_list<SymInt> expected, const char* layout) {
    if (!parameters[i].defined()) return;
    checks.shape({kParameterNames[i], parameters[i]}, expected, layout);
    checks.alike({"x", x}, {{kParameterNames[i], parameters[i]}});
  };
  check_shape(0, {heads, l, D}, "[h, block_size, D]");
  check_shape(1, {heads, l * D, F},
              phi.kind == CompressKind::kMlp ? "[h, block_size * D, F]" : "[h, block_size * D, D]");
  check_shape(2, {heads, F}, phi.kind == CompressKind::kMlp ? "[h, F]" : "[h, D]");
  check_shape(3, {heads, F, D}, "[h, F, D]");
  check_shape(4, {heads, D}, "[h, D]");
  return phi;
}

PhiParameters set_phi(const Phi& phi, const PhiParameters& given, DType dtype, CompressFwdParams* params) {
  PhiParameters parameters;
  for (size_t i = 0; i < kNumPhiParameters; ++i) {
    if (given[i].defined()) parameters[i] = as_block(given[i]);
  }
  params->dtype = dtype;
  params->kind = phi.kind;
  params->blocks = phi.blocks;
  params->num_heads = phi.num_heads;
  params->head_dim = phi.head_dim;
  params->hidden_size = phi.hidden_size;
  params->per_head = phi.per_head;
  params->pe = const_pointer(parameters[0]);
  params->w1 = const_pointer(parameters[1]);
  params->b1 = const_pointer(parameters[2]);
  params->w2 = const_pointer(parameters[3]);
  params->b2 = const_pointer(parameters[4]);
  return parameters;
}

namespace {

SymInt num_rows(const Tensor& x, int64_t stride) { return x.sym_size(0) / stride; }

// The parameters of a launch, with the tensors behind their pointers.
struct Prepared {
  Tensor x, cu_seqlens, workspace;
  PhiParameters parameters;
  CompressFwdParams params{};

  Prepared(const Phi& phi, const Tensor& x_, const PhiParameters& given, const OptTensor& cu_seqlens_,
           const SymInt& max_seqlen)
      : x(as_rows(x_)) {
    parameters = set_phi(phi, given, dtype_of(x), &params);
    params.x = rows_view(x);
    params.num_rows = x.size(0) / phi.blocks.stride;
    if (x.is_cuda()) {
      const int64_t heads = phi.per_head ? phi.num_heads : 1;
      workspace = at::empty({heads, kCompressBiasParts, phi.hidden_size}, x.options().dtype(at::kFloat));
      params.workspace = workspace.mutable_data_ptr();
    }
    SequenceBatch& seqs = params.seqs;
    seqs.key_rows = x.size(0);
    seqs.total_q = seqs.max_seqlen_q = seqs.max_seqlen_k = max_seqlen.expect_int();
    if (!cu_seqlens_.has_value()) return;
    cu_seqlens = cu_seqlens_->contiguous();
    seqs.cu_seqlens_q = seqs.cu_seqlens_k = cu_seqlens.const_data_ptr<int32_t>();
    seqs.batch = cu_seqlens.numel() - 1;
    seqs.total_q = x.size(0);
  }
};

struct Compress : torch::autograd::Function<Compress> {
  static constexpr bool is_traceable = true;

  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const OptTensor& pe,
                        const OptTensor& w1, const OptTensor& b1, const OptTensor& w2, const OptTensor& b2,
                        const OptTensor& cu_seqlens, const SymInt& max_seqlen, int64_t block_size,
                        int64_t stride, std::string_view kind) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, or_undefined(pe), or_undefined(w1), or_undefined(b1), or_undefined(w2),
                            or_undefined(b2), or_undefined(cu_seqlens)});
    ctx->saved_data["max_seqlen"] = max_seqlen;
    ctx->saved_data["block_size"] = block_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["kind"] = std::string(kind);
    return below_autograd(compress, x, pe, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, stride, kind);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& d_outputs) {
    constexpr size_t kNumInputs = 11;
    if (!d_outputs[0].defined()) return torch::autograd::variable_list(kNumInputs);
    const auto saved = ctx->get_saved_variables();
    GradMask<kNumTensors> mask{};
    size_t edge = 0;  // absent parameters have none
    for (size_t i = 0; i < kNumTensors; ++i) mask[i] = saved[i].defined() && ctx->needs_input_grad(edge++);
    auto grads =
        compress_backward(d_outputs[0], saved[0], or_none(saved[1]), or_none(saved[2]), or_none(saved[3]),
                          or_none(saved[4]), or_none(saved[5]), or_none(saved[6]),
                          ctx->saved_data["max_seqlen"].toSymInt(), ctx->saved_data["block_size"].toInt(),
                          ctx->saved_data["stride"].toInt(), ctx->saved_data["kind"].toStringView(), mask);
    return input_gradients(to_array(std::move(grads)), mask, kNumInputs);
  }
};

}  // namespace

namespace kernels {

Tensor compress(const Tensor& x, const OptTensor& pe, const OptTensor& w1, const OptTensor& b1,
                const OptTensor& w2, const OptTensor& b2, const OptTensor& cu_seqlens, SymInt max_seqlen,
                int64_t block_size, int64_t stride, std::string_view kind) {
  const PhiParameters given = parameters(pe, w1, b1, w2, b2);
  const Phi phi =
      check_phi(Checks(kForward, kForward), x, given, cu_seqlens, max_seqlen, block_size, stride, kind);
  const Tensor out = at::zeros_symint({num_rows(x, stride), phi.num_heads, phi.head_dim}, x.options());
  if (out.is_meta()) return out;
  Prepared prepared(phi, x, given, cu_seqlens, max_seqlen);
  if (out.numel() == 0 || prepared.params.seqs.batch == 0) return out;
  prepared.params.out = out.mutable_data_ptr();
  launch(kForward, x.device(), prepared.params);
  return out;
}

Tensor6 compress_backward(const Tensor& d_out, const Tensor& x, const OptTensor& pe, const OptTensor& w1,
                          const OptTensor& b1, const OptTensor& w2, const OptTensor& b2,
                          const OptTensor& cu_seqlens, SymInt max_seqlen, int64_t block_size, int64_t stride,
                          std::string_view kind, GradMask<6> grad_mask) {
  const PhiParameters given = parameters(pe, w1, b1, w2, b2);
  const Checks checks(kBackward, kForward);
  const Phi phi = check_phi(checks, x, given, cu_seqlens, max_seqlen, block_size, stride, kind);
  checks.shape({"d_out", d_out}, {num_rows(x, stride), phi.num_heads, phi.head_dim}, "[S // stride, H, D]");
  checks.alike({"x", x}, {{"d_out", d_out}});

  std::array<Tensor, kNumTensors> inputs{x, given[0], given[1], given[2], given[3], given[4]};
  std::array<Tensor, kNumTensors> grads;
  bool any_wanted = false;
  for (size_t i = 0; i < kNumTensors; ++i) {
    const bool wanted = grad_mask[i] && inputs[i].defined();
    if (i == 0 && wanted && x.is_cuda()) {
      grads[i] = at::zeros_symint(x.sym_sizes(), x.options());
    } else {
      grads[i] = gradient_accumulator(inputs[i], wanted);
    }
    any_wanted |= wanted;
  }
  if (!x.is_meta() && any_wanted && d_out.numel() != 0) {
    CompressBwdParams params{};
    const Prepared prepared(phi, x, given, cu_seqlens, max_seqlen);
    const Tensor d_out_rows = as_rows(d_out);
    params.fwd = prepared.params;
    params.d_out = rows_view(d_out_rows);
    params.dx = pointer(grads[0]);
    params.d_pe = pointer(grads[1]);
    params.d_w1 = pointer(grads[2]);
    params.d_b1 = pointer(grads[3]);
    params.d_w2 = pointer(grads[4]);
    params.d_b2 = pointer(grads[5]);
    if (prepared.params.seqs.batch != 0) {
      const Tensor workspace = allocate_workspace(x.device(), &params);
      launch(kBackward, x.device(), params);
    }
  }
  for (size_t i = 0; i < kNumTensors; ++i) {
    grads[i] = finished_gradient(grads[i], inputs[i].defined() ? inputs[i] : x);
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace kernels

namespace autograd {

Tensor compress(const Tensor& x, const OptTensor& pe, const OptTensor& w1, const OptTensor& b1,
                const OptTensor& w2, const OptTensor& b2, const OptTensor& cu_seqlens, SymInt max_seqlen,
                int64_t block_size, int64_t stride, std::string_view kind) {
  return Compress::apply(x, pe, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, stride, kind);
}

Tensor6 compress_backward(const Tensor& d_out, const Tensor& x, const OptTensor& pe, const OptTensor& w1,
                          const OptTensor& b1, const OptTensor& w2, const OptTensor& b2,
                          const OptTensor& cu_seqlens, SymInt max_seqlen, int64_t block_size, int64_t stride,
                          std::string_view kind, GradMask<6> grad_mask) {
  return once_differentiable(
      kBackward,
      {d_out, x, or_undefined(pe), or_undefined(w1), or_undefined(b1), or_undefined(w2), or_undefined(b2)},
      ops::compress_backward, d_out, x, pe, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, stride, kind,
      grad_mask);
}

}  // namespace autograd
}  // namespace nsa::ops
