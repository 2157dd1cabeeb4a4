#include "ops/autograd.h"

#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <string>

namespace nsa::ops {

void forbid_double_backward(const char* op, const torch::autograd::variable_list& inputs,
                            const torch::autograd::variable_list& outputs) {
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(inputs)) return;
  const auto error = std::make_shared<torch::autograd::Error>(
      "nsa::" + std::string(op) + ": double backward is not supported",
      torch::autograd::collect_next_edges(inputs));
  torch::autograd::set_history(outputs, error);
}

}  // namespace nsa::ops
