// The operators from a C++ program that links LibTorch and libnsa_ops, without Python.
#include <torch/torch.h>

#include <fstream>
#include <string>

#include "catch2_bridge.h"

namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <typename Fn>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Fn>();
}

const OptTensor kNone;

std::tuple<Tensor, Tensor> window(const Tensor& q, const Tensor& k, const Tensor& v, int64_t size,
                                  double scale) {
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                         const OptTensor&, c10::SymInt, c10::SymInt, int64_t, double)>(
          "nsa::sliding_window_attention");
  return op.call(q, k, v, kNone, kNone, q.size(0), k.size(0), size, scale);
}

std::tuple<Tensor, Tensor> selected(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& indices,
                                    int64_t block_size, double scale) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&, const OptTensor&,
      c10::SymInt, c10::SymInt, int64_t, double)>("nsa::selected_attention");
  return op.call(q, k, v, indices, kNone, kNone, q.size(0), k.size(0), block_size, scale);
}

Tensor mean_blocks(const Tensor& x, int64_t length, int64_t stride) {
  static const auto op =
      find_op<Tensor(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                     const OptTensor&, const OptTensor&, c10::SymInt, int64_t, int64_t, c10::string_view)>(
          "nsa::compress");
  return op.call(x, kNone, kNone, kNone, kNone, kNone, kNone, x.size(0), length, stride, "mean");
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const Tensor& gate_logits) {
  static const auto op = find_op<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const OptTensor&, const OptTensor&, c10::SymInt, c10::SymInt, int64_t, int64_t, int64_t,
      int64_t, int64_t, int64_t, int64_t, double)>("nsa::attention");
  return op.call(q, mean_blocks(k, 8, 4), mean_blocks(v, 8, 4), k, v, k, v, gate_logits, kNone, kNone,
                 q.size(0), k.size(0), 8, 4, 16, 3, 1, 1, 20, 0.25);
}

// Causal attention by LibTorch's own operators; q [T, Hq, D], k and v [T, Hkv, D].
Tensor dense(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window_size, double scale) {
  const int64_t group = q.size(1) / k.size(1);
  const Tensor t = at::arange(q.size(0));
  const Tensor distance = t.unsqueeze(1) - t;
  const Tensor hidden = distance.lt(0).logical_or(distance.ge(window_size));
  const Tensor logits = scale * at::einsum("thd,shd->hts", {q, k.repeat_interleave(group, 1)});
  const Tensor p = logits.masked_fill(hidden, -INFINITY).softmax(-1);
  return at::einsum("hts,shd->thd", {p, v.repeat_interleave(group, 1)});
}

struct Inputs {
  Tensor q, k, v;
  explicit Inputs(int64_t tokens) {
    at::manual_seed(1);
    const auto options = at::TensorOptions().dtype(at::kDouble).requires_grad(true);
    q = torch::randn({tokens, 4, 16}, options);
    k = torch::randn({tokens, 2, 16}, options);
    v = torch::randn({tokens, 2, 12}, options);
  }
};

void check_equals_dense(const Inputs& in, const Tensor& o, int64_t window_size) {
  const Tensor expected = dense(in.q, in.k, in.v, window_size, 0.25);
  CHECK(at::allclose(o, expected, 1e-11, 1e-12));
  const auto grads = torch::autograd::grad({o.square().sum()}, {in.q, in.k, in.v});
  const auto exact = torch::autograd::grad({expected.square().sum()}, {in.q, in.k, in.v});
  for (size_t i = 0; i < grads.size(); ++i) CHECK(at::allclose(grads[i], exact[i], 1e-10, 1e-11));
}

}  // namespace

TEST_CASE("this program runs without Python", "[libtorch]") {
  std::ifstream maps("/proc/self/maps");
  REQUIRE(maps.good());
  for (std::string line; std::getline(maps, line);) {
    INFO(line);
    REQUIRE(line.find("libpython") == std::string::npos);
    REQUIRE(line.find("libtorch_python") == std::string::npos);
  }
}

TEST_CASE("sliding window attention and its gradients equal dense attention", "[libtorch]") {
  const Inputs in(70);
  for (int64_t size : {1, 9, 64, 1000}) {
    CAPTURE(size);
    check_equals_dense(in, std::get<0>(window(in.q, in.k, in.v, size, 0.25)), size);
  }
}

TEST_CASE("selected attention over all blocks equals dense attention", "[libtorch]") {
  const Inputs in(70);
  const Tensor indices = at::arange(5, at::kInt).expand({70, 2, 5}).contiguous();
  check_equals_dense(in, std::get<0>(selected(in.q, in.k, in.v, indices, 16, 0.25)), 1000);
}

TEST_CASE("compression averages overlapping blocks", "[libtorch]") {
  const Inputs in(70);
  const Tensor out = mean_blocks(in.k, 8, 4);
  REQUIRE(out.size(0) == 17);
  CHECK(at::allclose(out.slice(0, 0, 16), in.k.unfold(0, 8, 4).mean(-1), 1e-12, 1e-13));
  CHECK(out[16].count_nonzero().item<int64_t>() == 0);
  const Tensor grad = torch::autograd::grad({out.sum()}, {in.k})[0];
  CHECK(at::allclose(grad[0], at::full_like(grad[0], 1.0 / 8)));
  CHECK(at::allclose(grad[6], at::full_like(grad[6], 2.0 / 8)));
}

TEST_CASE("attention with only the window's gate open is the window's attention", "[libtorch]") {
  const Inputs in(90);
  Tensor gates = at::full({90, 4, 3}, -1000.0, at::kDouble);
  gates.select(-1, 2).fill_(1000.0);
  const auto [o, indices] = attention(in.q, in.k, in.v, gates);
  CHECK(indices.sizes() == at::IntArrayRef({90, 2, 3}));
  CHECK(indices.scalar_type() == at::kInt);
  check_equals_dense(in, o, 20);
}

TEST_CASE("attention gives gradients to every input", "[libtorch]") {
  const Inputs in(90);
  const Tensor gates = torch::randn({90, 4, 3}, at::TensorOptions().dtype(at::kDouble).requires_grad(true));
  const auto [o, indices] = attention(in.q, in.k, in.v, gates);
  CHECK(o.requires_grad());
  CHECK_FALSE(indices.requires_grad());
  // A step along one direction changes the sum as the gradients say (the selected set is held by the small
  // step).
  const std::vector<Tensor> leaves = {in.q, in.k, in.v, gates};
  const auto grads = torch::autograd::grad({o.sum()}, leaves);
  at::NoGradGuard no_grad;
  std::vector<Tensor> ahead, behind;
  double slope = 0;
  const double step = 1e-6;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Tensor direction = at::randn_like(leaves[i]);
    slope += (grads[i] * direction).sum().item<double>();
    ahead.push_back(leaves[i] + step * direction);
    behind.push_back(leaves[i] - step * direction);
  }
  const auto sum = [](const std::vector<Tensor>& t) {
    return std::get<0>(attention(t[0], t[1], t[2], t[3])).sum().item<double>();
  };
  CHECK((sum(ahead) - sum(behind)) / (2 * step) == Approx(slope).epsilon(1e-5));
}

TEST_CASE("a wrong argument is a c10::ValueError", "[libtorch]") {
  const Inputs in(20);
  CHECK_THROWS_AS(window(in.q, in.k, in.v, 0, 0.25), c10::ValueError);
  CHECK_THROWS_AS(window(in.q, in.k.to(at::kFloat), in.v, 5, 0.25), c10::ValueError);
  try {
    window(in.q, in.k, in.v, 0, 0.25);
  } catch (const c10::ValueError& error) {
    CHECK(std::string(error.what()).find("window_size") != std::string::npos);
  }
}

TEST_CASE("double backward is an error", "[libtorch]") {
  const Inputs in(20);
  const Tensor o = std::get<0>(window(in.q, in.k, in.v, 5, 0.25));
  const Tensor grad = torch::autograd::grad({o.square().sum()}, {in.q}, {}, true, true)[0];
  CHECK_THROWS(grad.sum().backward());
}

TEST_CASE("meta tensors give shapes", "[libtorch]") {
  const Tensor q = at::empty({33, 4, 16}, at::TensorOptions().device(at::kMeta));
  const Tensor k = at::empty({33, 2, 16}, at::TensorOptions().device(at::kMeta));
  const auto [o, lse] = window(q, k, k, 5, 0.25);
  CHECK(o.sizes() == q.sizes());
  CHECK(lse.sizes() == at::IntArrayRef({33, 4}));
  CHECK(lse.scalar_type() == at::kFloat);
}
