// phi on Hopper against naive loops, and against the portable kernel.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "catch2_bridge.h"
#include "cuda/ptx/wgmma.cuh"
#include "device_memory.h"
#include "nsa/launch.h"

namespace nsa::cuda {
namespace {

struct Phi {
  CompressKind kind;
  int length, stride, heads, dim, hidden;
  bool per_head, with_bias;
};

struct Lengths {
  std::vector<int> of;  // sequences
  int padding;          // tokens behind the last
  bool offsets;

  std::vector<int32_t> begins() const {
    std::vector<int32_t> cu{0};
    for (int length : of) cu.push_back(cu.back() + length);
    return cu;
  }
};

template <typename T>
std::vector<T> normal(size_t size, double scale, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.f, static_cast<float>(scale));
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

// x, the parameters and the output of one phi, on the host and on the device. x has a gap behind every token,
// as in a split of qkv, and NaN in tokens of no block.
template <typename T>
struct Problem {
  Phi phi;
  std::vector<int32_t> cu;
  int num_tokens, num_rows, sets, row_stride;
  std::vector<T> x_host, pe_host, w1_host, b1_host, w2_host, b2_host;
  std::vector<int> token_of_row;  // -1: a row of no block
  nsa_test::DeviceArray<T> x, pe, w1, b1, w2, b2;
  nsa_test::DeviceArray<int32_t> cu_device;
  nsa_test::DeviceArray<float> workspace;
  CompressFwdParams params{};

  static std::vector<T> with_holes(std::vector<T> x, const std::vector<int>& token_of_row, int length,
                                   int row_stride) {
    std::vector<bool> used(x.size() / row_stride, false);
    for (int token : token_of_row) {
      for (int i = 0; token >= 0 && i < length; ++i) used[token + i] = true;
    }
    for (size_t i = 0; i < x.size(); ++i) {
      if (!used[i / row_stride]) x[i] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    }
    return x;
  }
  static std::vector<int> rows(const Phi& phi, const std::vector<int32_t>& cu, int num_rows) {
    std::vector<int> tokens(num_rows, -1);
    for (size_t b = 0; b + 1 < cu.size(); ++b) {
      for (int i = 0; cu[b] + i * phi.stride + phi.length <= cu[b + 1]; ++i)
        tokens[cu[b] / phi.stride + i] = cu[b] + i * phi.stride;
    }
    return tokens;
  }

  Problem(const Phi& phi, const Lengths& lengths)
      : phi(phi),
        cu(lengths.begins()),
        num_tokens(cu.back() + lengths.padding),
        num_rows(num_tokens / phi.stride),
        sets(phi.per_head ? phi.heads : 1),
        row_stride(phi.heads * phi.dim + 24),
        pe_host(normal<T>(sets * phi.length * phi.dim, 0.5, 2)),
        w1_host(normal<T>(static_cast<size_t>(sets) * phi.length * phi.dim * phi.hidden,
                          1 / std::sqrt(phi.length * phi.dim), 3)),
        b1_host(normal<T>(sets * phi.hidden, 0.5, 4)),
        w2_host(normal<T>(sets * phi.hidden * phi.dim, 1 / std::sqrt(phi.hidden), 5)),
        b2_host(normal<T>(sets * phi.dim, 0.5, 6)),
        token_of_row(rows(phi, cu, num_rows)),
        x((x_host = with_holes(normal<T>(static_cast<size_t>(num_tokens) * row_stride, 1, 1), token_of_row,
                               phi.length, row_stride))),
        pe(pe_host),
        w1(w1_host),
        b1(b1_host),
        w2(w2_host),
        b2(b2_host),
        cu_device(cu),
        workspace(sets * kCompressBiasParts * phi.hidden) {
    params.dtype = ptx::kIsHalf<T> ? DType::kF16 : DType::kBF16;
    params.kind = phi.kind;
    params.seqs.batch = static_cast<int64_t>(lengths.of.size());
    if (lengths.offsets) params.seqs.cu_seqlens_q = params.seqs.cu_seqlens_k = cu_device.data;
    params.seqs.total_q = params.seqs.key_rows = num_tokens;
    params.seqs.max_seqlen_q = params.seqs.max_seqlen_k = lengths.offsets ? num_tokens : cu.back();
    params.blocks = {phi.length, phi.stride};
    params.num_heads = phi.heads;
    params.head_dim = phi.dim;
    params.hidden_size = phi.hidden;
    params.per_head = phi.per_head;
    params.x = {x.data, row_stride, phi.dim};
    params.pe = phi.with_bias ? pe.data : nullptr;
    params.w1 = w1.data;
    params.b1 = phi.with_bias ? b1.data : nullptr;
    params.w2 = w2.data;
    params.b2 = phi.with_bias ? b2.data : nullptr;
    params.num_rows = num_rows;
    params.workspace = workspace.data;
  }

  double at(const std::vector<T>& values, size_t i) const { return static_cast<float>(values[i]); }

  std::vector<double> expected_row(int row, int head) const {
    const int width = phi.kind == CompressKind::kMlp ? phi.dim : phi.hidden;
    if (token_of_row[row] < 0) return std::vector<double>(width, 0.0);
    const int depth = phi.length * phi.dim, set = phi.per_head ? head : 0;
    std::vector<double> hidden(phi.hidden, 0.0);
    for (int f = 0; f < phi.hidden; ++f) hidden[f] = phi.with_bias ? at(b1_host, set * phi.hidden + f) : 0;
    for (int k = 0; k < depth; ++k) {
      const double in = at(x_host, static_cast<size_t>(token_of_row[row] + k / phi.dim) * row_stride +
                                       head * phi.dim + k % phi.dim) +
                        (phi.with_bias ? at(pe_host, set * depth + k) : 0);
      const size_t w = (static_cast<size_t>(set) * depth + k) * phi.hidden;
      for (int f = 0; f < phi.hidden; ++f) hidden[f] += in * at(w1_host, w + f);
    }
    if (phi.kind == CompressKind::kLinear) return hidden;
    std::vector<double> out(phi.dim, 0.0);
    for (int c = 0; c < phi.dim; ++c) out[c] = phi.with_bias ? at(b2_host, set * phi.dim + c) : 0;
    for (int f = 0; f < phi.hidden; ++f) {
      for (int c = 0; c < phi.dim; ++c)
        out[c] += silu(hidden[f]) * at(w2_host, (static_cast<size_t>(set) * phi.hidden + f) * phi.dim + c);
    }
    return out;
  }

  std::vector<T> run(bool portable) {
    const int width = phi.kind == CompressKind::kMlp ? phi.dim : phi.hidden;
    nsa_test::DeviceArray<T> out(static_cast<size_t>(num_rows) * phi.heads * width);
    params.out = out.data;
    if (portable) setenv("NSA_CUDA_PATH", "portable", 1);
    const Status status = compress_forward(params, {});
    unsetenv("NSA_CUDA_PATH");
    if (!status.ok()) FAIL(status.message);
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    return out.host();
  }

  // The worst error over every `step`-th row, relative to the largest value.
  double error(const std::vector<T>& actual, int step) const {
    const int width = phi.kind == CompressKind::kMlp ? phi.dim : phi.hidden;
    double worst = 0, largest = 1;
    for (int row = 0; row < num_rows; row += step) {
      for (int head = 0; head < phi.heads; ++head) {
        const auto expected = expected_row(row, head);
        for (int c = 0; c < width; ++c) {
          const double x = at(actual, (static_cast<size_t>(row) * phi.heads + head) * width + c);
          if (std::isnan(x) || (token_of_row[row] < 0 && x != 0)) return 1e30;
          worst = std::max(worst, std::abs(x - expected[c]));
          largest = std::max(largest, std::abs(expected[c]));
        }
      }
    }
    return worst / largest;
  }
};

const Phi kPhis[] = {{CompressKind::kMlp, 32, 16, 2, 64, 64, false, true},
                     {CompressKind::kMlp, 32, 16, 2, 128, 128, true, true},
                     {CompressKind::kMlp, 16, 16, 1, 128, 256, false, false},
                     {CompressKind::kMlp, 64, 8, 2, 64, 40, true, true},
                     {CompressKind::kMlp, 32, 16, 1, 192, 200, false, true},
                     {CompressKind::kMlp, 8, 8, 2, 256, 136, false, true},
                     {CompressKind::kLinear, 32, 16, 2, 128, 128, false, true},
                     {CompressKind::kLinear, 16, 8, 2, 64, 64, true, false},
                     {CompressKind::kLinear, 32, 16, 2, 64, 200, false, true}};
const Lengths kLengths[] = {{{300}, 0, false},
                            {{270}, 21, false},
                            {{130, 0, 77, 211}, 23, true},
                            {{5, 31, 32, 33, 1, 17}, 0, true},
                            {{3}, 0, true}};

template <typename T>
void check_table() {
  const double bound = ptx::kIsHalf<T> ? 1.0 / 1024 : 1.0 / 128;
  for (const Phi& phi : kPhis) {
    for (const Lengths& lengths : kLengths) {
      Problem<T> problem(phi, lengths);
      CAPTURE(static_cast<int>(phi.kind), phi.length, phi.stride, phi.dim, phi.hidden, phi.per_head,
              problem.num_tokens, lengths.of.size());
      CHECK(problem.error(problem.run(false), 1) < bound);
      CHECK(problem.error(problem.run(true), 1) < bound);
    }
  }
}

TEST_CASE("phi equals the naive loops", "[sm90][compress]") {
  if (!nsa_test::is_hopper()) return;
  check_table<__nv_bfloat16>();
  check_table<__half>();
}

// Every number of thread blocks in a cluster, at lengths where the summed dimension is split differently.
TEST_CASE("phi equals the naive loops at every length, and repeats bitwise", "[sm90][compress]") {
  if (!nsa_test::is_hopper()) return;
  for (const int tokens : {4096, 8200, 16384, 32768, 65536, 131104}) {
    const Phi phi{CompressKind::kMlp, 32, 16, 4, 128, 256, false, true};
    Problem<__nv_bfloat16> problem(phi, {{tokens / 2 + 5, tokens - tokens / 2 - 5}, 0, true});
    const auto out = problem.run(false), portable = problem.run(true);
    CAPTURE(tokens);
    CHECK(problem.error(out, problem.num_rows / 23) < 1.0 / 128);
    double worst = 0;
    for (size_t i = 0; i < out.size(); ++i)
      worst = std::max(worst, std::abs(problem.at(out, i) - problem.at(portable, i)));
    CHECK(worst < 1.0 / 32);
    const auto again = problem.run(false);
    CHECK(std::equal(out.begin(), out.end(), again.begin(),
                     [](auto a, auto b) { return static_cast<float>(a) == static_cast<float>(b); }));
  }
}

}  // namespace
}  // namespace nsa::cuda
