// Compression (mlp, linear, mean) against naive loops.
#include "buffers.h"
#include "catch2_bridge.h"

using namespace nsa_test;

namespace {

struct Phi {
  nsa::CompressKind kind;
  int64_t length, stride;
  int hidden;
  bool per_head, with_pe, with_bias;
};

double silu(double x) { return x / (1 + std::exp(-x)); }
double silu_slope(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s * (1 + x * (1 - s));
}

template <typename T>
struct Parameter {
  Guarded<T> memory;
  Guarded<Acc<T>> grad;
  std::vector<double> values, exact_grad;

  Parameter(int64_t count, bool present, uint32_t seed, double scale)
      : memory(present ? count : 0), grad(memory.size()), exact_grad(static_cast<size_t>(memory.size()), 0) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < memory.size(); ++i) memory.set(i, normal(generator));
    values = memory.values();
    grad.fill(0);
  }
  bool present() const { return memory.size() > 0; }
  const void* data() const { return present() ? memory.data() : nullptr; }
  void* grad_data() const { return present() ? grad.data() : nullptr; }
  double operator[](int64_t i) const { return present() ? values[static_cast<size_t>(i)] : 0; }
  void add(int64_t i, double x) {
    if (present()) exact_grad[static_cast<size_t>(i)] += x;
  }
};

template <typename T>
std::string check_compress(const Batch& batch, int heads, int dim, const Phi& phi, int num_threads,
                           bool only_dx = false) {
  const bool mean = phi.kind == nsa::CompressKind::kMean, mlp = phi.kind == nsa::CompressKind::kMlp;
  const int64_t l = phi.length, hidden = phi.kind == nsa::CompressKind::kLinear ? dim : phi.hidden;
  const int64_t sets = phi.per_head ? heads : 1;
  Rows<T> x(batch.total_k(), heads, dim, 2, 1), d_out(batch.total_k() / phi.stride, heads, dim, 0, 3);
  x.randomize(1);
  d_out.randomize(2);
  Parameter<T> pe(sets * l * dim, !mean && phi.with_pe, 3, 1);
  Parameter<T> w1(sets * l * dim * hidden, !mean, 4, 1 / std::sqrt(static_cast<double>(l * dim)));
  Parameter<T> b1(sets * hidden, !mean && phi.with_bias, 5, 1);
  Parameter<T> w2(sets * hidden * dim, mlp, 6, 1 / std::sqrt(static_cast<double>(hidden)));
  Parameter<T> b2(sets * dim, mlp && phi.with_bias, 7, 1);

  // NaN in tokens of no block and in dO rows of no block.
  std::vector<bool> token_used(static_cast<size_t>(x.rows()), false),
      row_used(static_cast<size_t>(d_out.rows()), false);
  const auto for_each_block = [&](const auto& visit) {
    for (int64_t b = 0; b < batch.count(); ++b) {
      for (int64_t i = 0; i * phi.stride + l <= batch.k_lens[static_cast<size_t>(b)]; ++i) {
        const int64_t begin = batch.cu_k[static_cast<size_t>(b)];
        visit(begin / phi.stride + i, begin + i * phi.stride);
      }
    }
  };
  for_each_block([&](int64_t row, int64_t token) {
    row_used[static_cast<size_t>(row)] = true;
    for (int64_t s = token; s < token + l; ++s) token_used[static_cast<size_t>(s)] = true;
  });
  for (int64_t r = 0; r < x.rows(); ++r) {
    if (!token_used[static_cast<size_t>(r)]) x.poison_row(r);
  }
  for (int64_t r = 0; r < d_out.rows(); ++r) {
    if (!row_used[static_cast<size_t>(r)]) d_out.poison_row(r);
  }

  std::vector<double> exact(static_cast<size_t>(d_out.rows() * heads * dim), 0);
  std::vector<double> exact_dx(static_cast<size_t>(x.rows() * heads * dim), 0);
  for_each_block([&](int64_t row, int64_t token) {
    for (int h = 0; h < heads; ++h) {
      const int64_t set = phi.per_head ? h : 0;
      const auto out_at = [&](int c) { return static_cast<size_t>((row * heads + h) * dim + c); };
      const auto dx_at = [&](int64_t e) {
        return static_cast<size_t>(((token + e / dim) * heads + h) * dim + e % dim);
      };
      if (mean) {
        for (int64_t e = 0; e < l * dim; ++e) {
          exact[out_at(static_cast<int>(e % dim))] +=
              x(token + e / dim, h, static_cast<int>(e % dim)) / static_cast<double>(l);
          exact_dx[dx_at(e)] += d_out(row, h, static_cast<int>(e % dim)) / static_cast<double>(l);
        }
        continue;
      }
      std::vector<double> in(static_cast<size_t>(l * dim)), pre(static_cast<size_t>(hidden)),
          d_pre(pre.size(), 0);
      for (int64_t e = 0; e < l * dim; ++e) {
        in[static_cast<size_t>(e)] = x(token + e / dim, h, static_cast<int>(e % dim)) + pe[set * l * dim + e];
      }
      for (int64_t f = 0; f < hidden; ++f) {
        double sum = b1[set * hidden + f];
        for (int64_t e = 0; e < l * dim; ++e)
          sum += in[static_cast<size_t>(e)] * w1[(set * l * dim + e) * hidden + f];
        pre[static_cast<size_t>(f)] = sum;
      }
      for (int c = 0; c < dim; ++c) {
        const double grad = d_out(row, h, c);
        if (!mlp) {
          exact[out_at(c)] = pre[static_cast<size_t>(c)];
          d_pre[static_cast<size_t>(c)] = grad;
          continue;
        }
        double sum = b2[set * dim + c];
        b2.add(set * dim + c, grad);
        for (int64_t f = 0; f < hidden; ++f) {
          const int64_t at = (set * hidden + f) * dim + c;
          const double z = pre[static_cast<size_t>(f)];
          sum += silu(z) * w2[at];
          w2.add(at, silu(z) * grad);
          d_pre[static_cast<size_t>(f)] += silu_slope(z) * w2[at] * grad;
        }
        exact[out_at(c)] = sum;
      }
      for (int64_t f = 0; f < hidden; ++f) {
        b1.add(set * hidden + f, d_pre[static_cast<size_t>(f)]);
        for (int64_t e = 0; e < l * dim; ++e) {
          const int64_t at = (set * l * dim + e) * hidden + f;
          w1.add(at, in[static_cast<size_t>(e)] * d_pre[static_cast<size_t>(f)]);
          pe.add(set * l * dim + e, w1[at] * d_pre[static_cast<size_t>(f)]);
          exact_dx[dx_at(e)] += w1[at] * d_pre[static_cast<size_t>(f)];
        }
      }
    }
  });

  nsa::CompressBwdParams p{};
  nsa::CompressFwdParams& f = p.fwd;
  f.dtype = dtype_of<T>();
  f.kind = phi.kind;
  f.seqs = batch.params();
  f.blocks = {l, phi.stride};
  f.num_heads = heads;
  f.head_dim = dim;
  f.hidden_size = static_cast<int>(hidden);
  f.per_head = phi.per_head;
  f.x = x.view();
  f.pe = pe.data();
  f.w1 = w1.data();
  f.b1 = b1.data();
  f.w2 = w2.data();
  f.b2 = b2.data();
  Guarded<T> out(d_out.rows() * heads * dim);
  out.fill(0);
  f.out = out.data();
  nsa::Status status = nsa::cpu::compress_forward(f, threads(num_threads));
  if (!status.ok()) return status.message;
  std::string wrong = mismatch("out", out.values(), exact, bound<T, Acc<T>>());
  if (!out.intact()) wrong += "wrote in front of out";

  Guarded<Acc<T>> dx(x.rows() * heads * dim);
  dx.fill(0);
  f.out = nullptr;
  p.d_out = d_out.view();
  p.dx = dx.data();
  if (!only_dx) {
    p.d_pe = pe.grad_data();
    p.d_w1 = w1.grad_data();
    p.d_b1 = b1.grad_data();
    p.d_w2 = w2.grad_data();
    p.d_b2 = b2.grad_data();
  }
  status = nsa::cpu::compress_backward(p, threads(num_threads));
  if (!status.ok()) return status.message;
  const double allowed = bound<Acc<T>, Acc<T>>();
  wrong += mismatch("dx", dx.values(), exact_dx, allowed);
  if (!dx.intact()) wrong += "wrote in front of dx";
  if (only_dx) return wrong;
  const auto check = [&](const char* name, const Parameter<T>& parameter) {
    wrong += mismatch(name, parameter.grad.values(), parameter.exact_grad, allowed);
    if (!parameter.grad.intact()) wrong += std::string("wrote in front of ") + name;
  };
  check("d_pe", pe), check("d_w1", w1), check("d_b1", b1), check("d_w2", w2), check("d_b2", b2);
  return wrong;
}

using nsa::CompressKind;
const Phi kPhis[] = {{CompressKind::kMlp, 8, 4, 24, false, true, true},
                     {CompressKind::kMlp, 8, 4, 5, true, true, true},
                     {CompressKind::kMlp, 9, 3, 16, false, false, false},
                     {CompressKind::kMlp, 16, 16, 33, true, true, false},
                     {CompressKind::kLinear, 8, 4, 0, false, true, true},
                     {CompressKind::kLinear, 4, 1, 0, true, false, true},
                     {CompressKind::kMean, 8, 4, 0, false, false, false},
                     {CompressKind::kMean, 32, 16, 0, false, false, false},
                     {CompressKind::kMlp, 32, 16, 64, false, true, true}};

}  // namespace

TEMPLATE_TEST_CASE("compression equals the naive loops", "[compress]", float, double, BF16) {
  const Batch batches[] = {Batch({70}), Batch({33, 0, 5, 41}, {33, 0, 5, 41}, 0, 21),
                           Batch({50}, {50}, 0, 10, false), Batch({}), Batch({3})};
  for (const Batch& batch : batches) {
    for (const Phi& phi : kPhis) {
      for (const auto& [heads, dim] : {std::pair{1, 16}, {2, 20}, {3, 1}}) {
        CAPTURE(nsa::cpu::active_isa(), batch.count(), batch.total_k(), static_cast<int>(phi.kind),
                phi.length, phi.stride, phi.hidden, phi.per_head, heads, dim);
        CHECK(check_compress<TestType>(batch, heads, dim, phi, 1) == "");
        CHECK(check_compress<TestType>(batch, heads, dim, phi, 3, true) == "");
      }
    }
  }
}
