#include "cuda/compress_bwd.h"
#include "cuda/portable/compress_bwd.h"
#include "cuda/sm90/compress_bwd.h"

namespace nsa::cuda {
namespace {

// Z of every block, in plan.dz: the first layer alone is phi of the kind kLinear.
Status recompute_hidden(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  CompressFwdParams first = p.fwd;
  first.kind = CompressKind::kLinear;
  first.out = plan.dz;
  return compress_forward(first, stream);
}

}  // namespace

Status compress_backward_steps(const CompressBwdParams& p, const Stream& stream, bool use_sm90) {
  namespace steps = portable;
  const CompressFwdParams& f = p.fwd;
  if (f.kind == CompressKind::kMean) return p.dx == nullptr ? Status{} : steps::compress_bwd_mean(p, stream);
  if (f.hidden_size % 8 != 0 || f.head_dim % 32 != 0) {
    return Status::error(
        StatusCode::kUnsupported,
        "head dim %d and hidden size %d of w1 have no CUDA kernel; they must be multiples of "
        "32 and of 8",
        f.head_dim, f.hidden_size);
  }
  const CompressBwdPlan plan(p, p.workspace);
  const bool mlp = f.kind == CompressKind::kMlp;
  const bool hidden = needs_hidden_sum(p) || p.dx != nullptr || p.d_w1 != nullptr || p.d_w2 != nullptr;

  Status status;
  const auto run = [&](bool wanted, auto&& step) {
    if (wanted && status.ok()) status = step(p, plan, stream);
  };
  const auto run_best = [&](bool wanted, auto&& hopper, auto&& step) {
    if (wanted && status.ok() && !(use_sm90 && hopper(p, plan, stream, &status)))
      status = step(p, plan, stream);
  };
  run(true, steps::compress_bwd_tokens);
  run(hidden && mlp, recompute_hidden);
  run(hidden && mlp, steps::compress_bwd_hidden);
  run(hidden && !mlp, steps::compress_bwd_linear);
  run(needs_hidden_sum(p) || p.d_b2 != nullptr, steps::compress_bwd_biases);
  run(p.d_pe != nullptr, steps::compress_bwd_pe);
  run_best(p.d_w1 != nullptr, sm90::compress_bwd_first_weight, steps::compress_bwd_first_weight);
  run(p.d_w1 != nullptr, steps::compress_bwd_add_first);
  run(p.d_w2 != nullptr, steps::compress_bwd_second_weight);
  run(p.d_w2 != nullptr, steps::compress_bwd_add_second);
  run_best(p.dx != nullptr, sm90::compress_bwd_input, steps::compress_bwd_input);
  return status;
}

int64_t compress_backward_workspace(const CompressBwdParams& p) {
  return p.fwd.kind == CompressKind::kMean ? 0 : CompressBwdPlan(p, nullptr).bytes;
}

}  // namespace nsa::cuda
