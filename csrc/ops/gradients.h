// Gradients that kernels add to.
#pragma once

#include <vector>

#include "ops/tensors.h"

namespace nsa::ops {

// Zeroed accumulators of the gradients of several inputs of one dtype, and what they become: one fill and one
// rounding for all of them, since at short lengths launches are what these cost.
class GradientSums {
 public:
  GradientSums(std::vector<at::Tensor> inputs, std::vector<bool> wanted);

  // Undefined (a null pointer) if it is not wanted.
  const at::Tensor& operator[](size_t i) const { return sums_[i]; }

  // What an operator returns for them: in the dtype of the inputs; empty where not wanted. The sums are given
  // up.
  std::vector<at::Tensor> finish();

 private:
  std::vector<at::Tensor> inputs_, sums_;
};

}  // namespace nsa::ops
