// Gradients of keys and values.
#pragma once

#include <vector>

#include "ops/tensors.h"

namespace nsa::ops {

// The gradients of several inputs of one dtype, as kernels get them: those that kernels write are results as
// they are; those that they add to are zeroed accumulators, with one fill and one rounding for all of them,
// since at short lengths launches are what these cost.
class KeyGradients {
 public:
  KeyGradients() = default;
  KeyGradients(std::vector<at::Tensor> inputs, const std::vector<bool>& wanted,
               const std::vector<bool>& written);

  // Undefined (a null pointer) if it is not wanted.
  const at::Tensor& operator[](size_t i) const { return gradients_[i]; }

  // What an operator returns for them: in the dtype of the inputs; empty where not wanted. The accumulators
  // are given up.
  std::vector<at::Tensor> finish();

 private:
  std::vector<at::Tensor> inputs_, gradients_;
};

}  // namespace nsa::ops
