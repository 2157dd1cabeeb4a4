// What the autograd Functions of the operators share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>
#include <vector>

namespace nsa::ops {

// Calls an operator below autograd, where a Function's forward or a non-differentiable operator does its
// work.
template <typename Operator, typename... Args>
auto below_autograd(const Operator& op, Args&&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return op(std::forward<Args>(args)...);
}

// Saved tensors cannot be absent, only undefined.
inline at::Tensor or_undefined(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }
inline std::optional<at::Tensor> or_none(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// Which of the first N inputs want a gradient; those are tensors that are always given.
template <size_t N>
std::array<bool, N> wanted_gradients(const torch::autograd::AutogradContext* ctx) {
  std::array<bool, N> mask;
  for (size_t i = 0; i < N; ++i) mask[i] = ctx->needs_input_grad(i);
  return mask;
}

// What a Function with num_inputs arguments returns: the gradients of the first of them, undefined where
// unwanted.
template <size_t N>
torch::autograd::variable_list input_gradients(const std::array<at::Tensor, N>& grads,
                                               const std::array<bool, N>& mask, size_t num_inputs) {
  torch::autograd::variable_list result(num_inputs);
  for (size_t i = 0; i < N; ++i) {
    if (mask[i]) result[i] = grads[i];
  }
  return result;
}

template <typename... Tensors>
std::array<at::Tensor, sizeof...(Tensors)> to_array(std::tuple<Tensors...>&& tensors) {
  return std::apply([](auto&&... t) { return std::array<at::Tensor, sizeof...(Tensors)>{std::move(t)...}; },
                    std::move(tensors));
}

// Makes a backward through the results of a backward operator an error, instead of a gradient that stops
// silently.
void forbid_double_backward(const char* op, const torch::autograd::variable_list& inputs,
                            const torch::autograd::variable_list& outputs);

// The autograd kernel of a backward operator.
template <typename Operator, typename... Args>
auto once_differentiable(const char* name, const torch::autograd::variable_list& inputs, const Operator& op,
                         Args&&... args) {
  auto outputs = below_autograd(op, std::forward<Args>(args)...);
  std::apply([&](const auto&... tensors) { forbid_double_backward(name, inputs, {tensors...}); }, outputs);
  return outputs;
}

}  // namespace nsa::ops
