// A callable for a registered operator: the C++ way into torch.ops.nsa.*, through autocast, autograd and the
// device.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace nsa::ops {

// Not inline, so that a program that calls an operator truly links (and so loads and registers) this library.
c10::OperatorHandle find_operator(const char* name);

// Tag::kName is the name of the operator, Fn its signature.
template <typename Tag, typename Fn>
struct Operator;

template <typename Tag, typename Result, typename... Args>
struct Operator<Tag, Result(Args...)> {
  Result operator()(Args... args) const {
    static const auto handle = find_operator(Tag::kName).template typed<Result(Args...)>();
    return handle.call(std::forward<Args>(args)...);
  }
};

}  // namespace nsa::ops
