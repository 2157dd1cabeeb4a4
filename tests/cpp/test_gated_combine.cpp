// The gate, its gradients and the deltas against naive loops.
#include "buffers.h"
#include "catch2_bridge.h"

using namespace nsa_test;

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <typename T>
std::vector<double> fill_random(Guarded<T>& memory, uint32_t seed, double scale = 1) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  for (int64_t i = 0; i < memory.size(); ++i) memory.set(i, normal(generator));
  return memory.values();
}

template <typename T, typename Gate>
std::string check_gate(int64_t num_tokens, int heads, int dim, int num_threads, bool with_optional) {
  const int64_t rows = num_tokens * heads;
  std::vector<Guarded<T>> o;
  std::vector<std::vector<double>> o_values;
  for (uint32_t b = 0; b < 3; ++b) {
    o.emplace_back(rows * dim);
    o_values.push_back(fill_random(o.back(), b));
  }
  Guarded<Gate> logits(rows * 3);
  std::vector<double> logit_values = fill_random(logits, 9, 3);
  for (int64_t i = 0; i < logits.size(); i += 5) {  // saturated gates
    logits.set(i, i % 2 ? 1000 : -1000);
    logit_values[static_cast<size_t>(i)] = logits.get(i);
  }

  Guarded<T> out(rows * dim);
  nsa::GatedCombineFwdParams f{};
  f.dtype = dtype_of<T>();
  f.gate_dtype = dtype_of<Gate>();
  f.num_rows = rows;
  f.head_dim_v = dim;
  for (int b = 0; b < 3; ++b) f.o_branch[b] = o[static_cast<size_t>(b)].data();
  f.gate_logits = logits.data();
  f.o = out.data();
  nsa::Status status = nsa::cpu::gated_combine_forward(f, threads(num_threads));
  if (!status.ok()) return status.message;
  std::vector<double> expected(static_cast<size_t>(rows * dim), 0);
  for (int64_t i = 0; i < rows * dim; ++i) {
    for (int b = 0; b < 3; ++b) {
      expected[static_cast<size_t>(i)] += sigmoid(logit_values[static_cast<size_t>(i / dim * 3 + b)]) *
                                          o_values[static_cast<size_t>(b)][static_cast<size_t>(i)];
    }
  }
  std::string wrong = mismatch("o", out.values(), expected, bound<T, Acc<T>>());
  if (!wrong.empty() || !out.intact()) return wrong + (out.intact() ? "" : " wrote in front of o");

  Rows<T> d_o(num_tokens, heads, dim, 2, 3);
  d_o.randomize(31);
  std::vector<Guarded<T>> d_branch;
  std::vector<Guarded<Acc<T>>> gates, delta;
  for (int b = 0; b < 3; ++b) {
    d_branch.emplace_back(rows * dim);
    gates.emplace_back(rows);
    delta.emplace_back(rows);
  }
  Guarded<Gate> d_logits(rows * 3);
  nsa::GatedCombineBwdParams p{};
  p.dtype = f.dtype;
  p.gate_dtype = f.gate_dtype;
  p.num_tokens = num_tokens;
  p.num_heads = heads;
  p.head_dim_v = dim;
  p.d_o = d_o.view();
  p.gate_logits = logits.data();
  p.d_gate_logits = d_logits.data();
  for (size_t b = 0; b < 3; ++b) {
    p.o_branch[b] = o[b].data();
    if (!with_optional && b != 1) continue;
    p.d_o_branch[b] = d_branch[b].data();
    p.gates[b] = gates[b].data();
    p.delta[b] = delta[b].data();
  }
  status = nsa::cpu::gated_combine_backward(p, threads(num_threads));
  if (!status.ok()) return status.message;
  std::vector<double> exact_logits(static_cast<size_t>(rows * 3));
  for (size_t b = 0; b < 3; ++b) {
    std::vector<double> exact_branch(static_cast<size_t>(rows * dim)), exact_gate(static_cast<size_t>(rows)),
        exact_delta(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      const double g = sigmoid(logit_values[static_cast<size_t>(r) * 3 + b]);
      double sum = 0;
      for (int c = 0; c < dim; ++c) {
        const double grad = d_o(r / heads, static_cast<int>(r % heads), c);
        sum += grad * o_values[b][static_cast<size_t>(r * dim + c)];
        exact_branch[static_cast<size_t>(r * dim + c)] = g * grad;
      }
      exact_gate[static_cast<size_t>(r)] = g;
      exact_delta[static_cast<size_t>(r)] = g * sum;
      exact_logits[static_cast<size_t>(r) * 3 + b] = sum * g * (1 - g);
    }
    if (!with_optional && b != 1) continue;
    wrong += mismatch("d_o_branch", d_branch[b].values(), exact_branch, bound<T, Acc<T>>());
    wrong += mismatch("gates", gates[b].values(), exact_gate, bound<Acc<T>, Acc<T>>());
    wrong += mismatch("delta", delta[b].values(), exact_delta, bound<Acc<T>, Acc<T>>());
    if (!d_branch[b].intact() || !gates[b].intact() || !delta[b].intact())
      wrong += "wrote in front of an output";
  }
  return wrong + mismatch("d_gate_logits", d_logits.values(), exact_logits, bound<Gate, Acc<T>>());
}

template <typename T, typename Gate>
void check_gate_shapes() {
  for (const auto& [tokens, heads, dim] :
       {std::tuple{0, 2, 8}, {1, 1, 1}, {7, 3, 5}, {40, 4, 64}, {33, 2, 100}}) {
    for (int num_threads : {1, 3}) {
      for (bool with_optional : {true, false}) {
        CAPTURE(nsa::cpu::active_isa(), tokens, heads, dim, num_threads, with_optional);
        CHECK(check_gate<T, Gate>(tokens, heads, dim, num_threads, with_optional) == "");
      }
    }
  }
}

}  // namespace

TEST_CASE("the gate equals the naive loops", "[gate]") {
  check_gate_shapes<float, float>();
  check_gate_shapes<double, double>();
  check_gate_shapes<BF16, BF16>();
  check_gate_shapes<BF16, float>();
}

TEMPLATE_TEST_CASE("delta is the row sum of dO * o", "[gate]", float, double, BF16) {
  for (const auto& [tokens, heads, dim] : {std::tuple{0, 2, 8}, {1, 1, 1}, {17, 3, 5}, {40, 4, 72}}) {
    Rows<TestType> d_o(tokens, heads, dim, 1, 4);
    d_o.randomize(2);
    const int64_t rows = static_cast<int64_t>(tokens) * heads;
    Guarded<TestType> o(rows * dim);
    const std::vector<double> o_values = fill_random(o, 3);
    Guarded<Acc<TestType>> delta(rows);
    nsa::DeltaParams p{};
    p.dtype = dtype_of<TestType>();
    p.num_tokens = tokens;
    p.num_heads = heads;
    p.head_dim_v = dim;
    p.d_o = d_o.view();
    p.o = o.data();
    p.delta = delta.data();
    REQUIRE(nsa::cpu::attention_delta(p, threads(2)).ok());
    std::vector<double> expected(static_cast<size_t>(rows), 0);
    for (int64_t i = 0; i < rows * dim; ++i) {
      const int64_t r = i / dim;
      expected[static_cast<size_t>(r)] +=
          d_o(r / heads, static_cast<int>(r % heads), static_cast<int>(i % dim)) *
          o_values[static_cast<size_t>(i)];
    }
    CAPTURE(tokens, heads, dim);
    CHECK(mismatch("delta", delta.values(), expected, bound<Acc<TestType>, Acc<TestType>>()) == "");
    CHECK(delta.intact());
  }
}
