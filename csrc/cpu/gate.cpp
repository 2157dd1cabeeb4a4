// The gate: o = sum over branches of sigmoid(logit) * o_branch, and the pre-pass of every backward.
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

constexpr int64_t kRowsPerTask = 256;

template <typename A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + static_cast<A>(__builtin_exp(-x)));
}

template <typename Body>
Status for_each_row(int64_t num_rows, const Parallel& parallel, const Body& body) {
  return parallel_tasks(parallel, ceil_div(num_rows, kRowsPerTask), [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < min64(num_rows, (task + 1) * kRowsPerTask); ++row)
      body(row);
  });
}

template <typename A, typename T>
inline A dot(const T* x, const T* y, int dim) {
  constexpr int kPartial = 16;  // partial sums: vectorises, and keeps the rounding error small
  A partial[kPartial] = {};
  int d = 0;
  for (; d + kPartial <= dim; d += kPartial) {
    for (int i = 0; i < kPartial; ++i) partial[i] += convert<A>(x[d + i]) * convert<A>(y[d + i]);
  }
  A sum = 0;
  for (; d < dim; ++d) sum += convert<A>(x[d]) * convert<A>(y[d]);
  for (int i = 0; i < kPartial; ++i) sum += partial[i];
  return sum;
}

template <typename T, typename G>
Status forward(const GatedCombineFwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  return for_each_row(p.num_rows, parallel, [&](int64_t row) {
    const G* logits = static_cast<const G*>(p.gate_logits) + row * kNumBranches;
    const T* o[kNumBranches];
    A gate[kNumBranches];
    for (int b = 0; b < kNumBranches; ++b) {
      o[b] = static_cast<const T*>(p.o_branch[b]) + row * p.head_dim_v;
      gate[b] = sigmoid(convert<A>(logits[b]));
    }
    T* out = static_cast<T*>(p.o) + row * p.head_dim_v;
    for (int d = 0; d < p.head_dim_v; ++d) {
      out[d] = convert<T>(gate[0] * convert<A>(o[0][d]) + gate[1] * convert<A>(o[1][d]) +
                          gate[2] * convert<A>(o[2][d]));
    }
  });
}

template <typename T, typename G>
Status backward(const GatedCombineBwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  return for_each_row(p.num_tokens * p.num_heads, parallel, [&](int64_t row) {
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    const T* d_o = static_cast<const T*>(p.d_o.data) + token * p.d_o.stride_row + head * p.d_o.stride_head;
    for (int b = 0; b < kNumBranches; ++b) {
      const A gate = sigmoid(convert<A>(static_cast<const G*>(p.gate_logits)[row * kNumBranches + b]));
      if (p.gates[b]) static_cast<A*>(p.gates[b])[row] = gate;
      if (T* d_branch = static_cast<T*>(p.d_o_branch[b])) {
        for (int d = 0; d < p.head_dim_v; ++d)
          d_branch[row * p.head_dim_v + d] = convert<T>(gate * convert<A>(d_o[d]));
      }
      if (!p.delta[b] && !p.d_gate_logits) continue;
      const A d_gate = dot<A>(d_o, static_cast<const T*>(p.o_branch[b]) + row * p.head_dim_v, p.head_dim_v);
      if (p.delta[b]) static_cast<A*>(p.delta[b])[row] = gate * d_gate;
      if (p.d_gate_logits) {
        static_cast<G*>(p.d_gate_logits)[row * kNumBranches + b] = convert<G>(d_gate * gate * (1 - gate));
      }
    }
  });
}

template <typename Params, typename F>
Status dispatch_types(const Params& p, F&& f) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() {
    return dispatch_storage("gate_logits", p.gate_dtype,
                            [&]<typename G>() { return f.template operator()<T, G>(); });
  });
}

}  // namespace

Status gated_combine_forward(const GatedCombineFwdParams& p, const Parallel& parallel) {
  return dispatch_types(p, [&]<typename T, typename G>() { return forward<T, G>(p, parallel); });
}

Status gated_combine_backward(const GatedCombineBwdParams& p, const Parallel& parallel) {
  return dispatch_types(p, [&]<typename T, typename G>() { return backward<T, G>(p, parallel); });
}

Status attention_delta(const DeltaParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    return for_each_row(p.num_tokens * p.num_heads, parallel, [&](int64_t row) {
      const int64_t token = row / p.num_heads, head = row % p.num_heads;
      const T* d_o = static_cast<const T*>(p.d_o.data) + token * p.d_o.stride_row + head * p.d_o.stride_head;
      static_cast<A*>(p.delta)[row] =
          dot<A>(d_o, static_cast<const T*>(p.o) + row * p.head_dim_v, p.head_dim_v);
    });
  });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
