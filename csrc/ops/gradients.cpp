#include "ops/gradients.h"

#include <ATen/ops/_foreach_copy.h>

#include <utility>

namespace nsa::ops {

KeyGradients::KeyGradients(std::vector<at::Tensor> inputs, const std::vector<bool>& wanted,
                           const std::vector<bool>& written)
    : inputs_(std::move(inputs)), gradients_(inputs_.size()) {
  const at::ScalarType dtype = inputs_[0].scalar_type(), acc = acc_dtype(dtype);
  // Accumulators that are returned as they are are tensors of their own.
  const bool together = !inputs_[0].is_meta() && acc != dtype;
  int64_t size = 0;
  for (size_t i = 0; i < gradients_.size(); ++i) {
    if (!wanted[i]) continue;
    if (written[i]) {
      gradients_[i] = empty_gradient(inputs_[i], true);
    } else if (together) {
      size += inputs_[i].numel();
    } else {
      gradients_[i] = gradient_accumulator(inputs_[i], true);
    }
  }
  if (!together) return;
  const at::Tensor all = at::zeros({size}, inputs_[0].options().dtype(acc));
  int64_t begin = 0;
  for (size_t i = 0; i < gradients_.size(); ++i) {
    if (!wanted[i] || gradients_[i].defined()) continue;
    gradients_[i] = all.narrow(0, begin, inputs_[i].numel()).view(inputs_[i].sizes());
    begin += inputs_[i].numel();
  }
}

std::vector<at::Tensor> KeyGradients::finish() {
  std::vector<at::Tensor> results, rounded, sums;
  for (size_t i = 0; i < gradients_.size(); ++i) {
    if (!gradients_[i].defined()) {
      results.push_back(at::empty({0}, inputs_[i].options()));
    } else if (gradients_[i].scalar_type() == inputs_[i].scalar_type()) {
      results.push_back(gradients_[i]);
    } else {
      results.push_back(empty_gradient(inputs_[i], true));
      rounded.push_back(results.back());
      sums.push_back(gradients_[i]);
    }
  }
  if (!rounded.empty() && !rounded[0].is_meta()) at::_foreach_copy_(rounded, sums);
  gradients_.clear();
  return results;
}

}  // namespace nsa::ops
