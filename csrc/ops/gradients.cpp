#include "ops/gradients.h"

#include <ATen/ops/_foreach_copy.h>

#include <algorithm>
#include <utility>

namespace nsa::ops {

GradientSums::GradientSums(std::vector<at::Tensor> inputs, std::vector<bool> wanted)
    : inputs_(std::move(inputs)), sums_(inputs_.size()) {
  const at::ScalarType dtype = inputs_[0].scalar_type(), acc = acc_dtype(dtype);
  if (inputs_[0].is_meta() || acc == dtype) {  // returned as they are, so each is a tensor of its own
    for (size_t i = 0; i < sums_.size(); ++i) sums_[i] = gradient_accumulator(inputs_[i], wanted[i]);
    return;
  }
  int64_t size = 0;
  for (size_t i = 0; i < sums_.size(); ++i) size += wanted[i] ? inputs_[i].numel() : 0;
  if (std::find(wanted.begin(), wanted.end(), true) == wanted.end()) return;
  const at::Tensor all = at::zeros({size}, inputs_[0].options().dtype(acc));
  int64_t begin = 0;
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (!wanted[i]) continue;
    sums_[i] = all.narrow(0, begin, inputs_[i].numel()).view(inputs_[i].sizes());
    begin += inputs_[i].numel();
  }
}

std::vector<at::Tensor> GradientSums::finish() {
  std::vector<at::Tensor> results, rounded, sums;
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (!sums_[i].defined()) {
      results.push_back(at::empty({0}, inputs_[i].options()));
    } else if (sums_[i].scalar_type() == inputs_[i].scalar_type()) {
      results.push_back(sums_[i]);
    } else {
      results.push_back(empty_gradient(inputs_[i], true));
      rounded.push_back(results.back());
      sums.push_back(sums_[i]);
    }
  }
  if (!rounded.empty() && !rounded[0].is_meta()) at::_foreach_copy_(rounded, sums);
  sums_.clear();
  return results;
}

}  // namespace nsa::ops
