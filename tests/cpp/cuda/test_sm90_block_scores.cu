// Hopper block scores against naive loops in double and against the portable kernel; the Hopper selection
// against a selection made one block at a time from the scores of the same kernel, which it must equal.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "catch2_bridge.h"
#include "cuda/host/launch_kernel.h"
#include "cuda/portable/launch.h"
#include "cuda/sm90/choose_from_sums.cuh"
#include "cuda/sm90/launch.h"
#include "device_memory.h"

namespace nsa::cuda {
namespace {

using nsa_test::DeviceArray;

struct Lengths {
  std::vector<int32_t> q, k;
  int pad_q = 0, pad_k = 0;  // rows behind the last sequence
  bool offsets = true;
  int64_t slack = 0;  // how much max_seqlen_k exceeds the longest sequence
};

struct Shape {
  int group, heads_kv, dim;
  int64_t l, d, block_size;
  bool equal_keys = false;
};

struct Choice {
  int n, num_initial, num_local;
};

constexpr float kUntouched = -7;

template <typename T>
std::vector<double> as_doubles(const std::vector<T>& values) {
  std::vector<double> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<double>(static_cast<float>(values[i]));
  return out;
}

// Random q and k_cmp, with NaN in all rows that no query sees.
template <typename T>
struct Problem {
  Lengths lengths;
  Shape shape;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  int64_t rows_q, rows_k, num_blocks;
  int heads_q;
  std::vector<double> q, k, lse, scores;  // scores: kUntouched where there is no candidate
  BlockScoresParams params{};

  Problem(const Lengths& lens, const Shape& s) : lengths(lens), shape(s), heads_q(s.group * s.heads_kv) {
    for (int32_t n : lens.q) cu_q.push_back(cu_q.back() + n);
    for (int32_t n : lens.k) cu_k.push_back(cu_k.back() + n);
    rows_q = cu_q.back() + lens.pad_q;
    rows_k = (cu_k.back() + lens.pad_k) / s.d;
    int64_t longest = 0;
    for (int32_t n : lens.k) longest = std::max<int64_t>(longest, n);
    num_blocks = ceil_div(longest + lens.slack, s.block_size);

    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    std::vector<T> q_stored(rows_q * heads_q * s.dim, static_cast<T>(NAN)),
        k_stored(rows_k * s.heads_kv * s.dim, static_cast<T>(NAN));
    std::fill_n(q_stored.begin(), static_cast<size_t>(cu_q.back()) * heads_q * s.dim, T());
    for (int64_t i = 0; i < static_cast<int64_t>(cu_q.back()) * heads_q * s.dim; ++i)
      q_stored[i] = static_cast<T>(2 * normal(generator));
    for (size_t b = 0; b < lens.k.size(); ++b) {
      if (lens.q[b] == 0) continue;
      const int64_t first = cu_k[b] / s.d, count = KeyBlocks{s.l, s.d}.count(lens.k[b]);
      for (int64_t i = first * s.heads_kv * s.dim; i < (first + count) * s.heads_kv * s.dim; ++i)
        k_stored[i] = static_cast<T>(s.equal_keys ? 0.f : normal(generator));
    }
    q = as_doubles(q_stored), k = as_doubles(k_stored);
    params.softmax_scale = 1 / std::sqrt(static_cast<double>(s.dim));
    solve();
    upload(q_stored, k_stored);
  }

  // Logits once, then lse and scores from them, by the definition.
  void solve() {
    lse.assign(rows_q * heads_q, NAN);
    scores.assign(rows_q * shape.heads_kv * num_blocks, kUntouched);
    for (size_t b = 0; b < lengths.k.size(); ++b) {
      const int64_t count = KeyBlocks{shape.l, shape.d}.count(lengths.k[b]);
      for (int64_t i = 0; i < lengths.q[b]; ++i) {
        const int64_t t = lengths.k[b] - lengths.q[b] + i, row = cu_q[b] + i;
        for (int g = 0; g < shape.heads_kv; ++g) {
          double* out = &scores[(row * shape.heads_kv + g) * num_blocks];
          std::fill_n(out, t / shape.block_size + 1, 0);
          for (int h = g * shape.group; h < (g + 1) * shape.group; ++h)
            solve_row(b, t, row, g, h, count, out);
        }
      }
    }
  }

  void solve_row(size_t b, int64_t t, int64_t row, int g, int h, int64_t count, double* out) {
    std::vector<double> logits;
    double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count && i * shape.d + shape.l - 1 <= t; ++i) {
      const double* key = &k[((cu_k[b] / shape.d + i) * shape.heads_kv + g) * shape.dim];
      const double* query = &q[(row * heads_q + h) * shape.dim];
      double dot = 0;
      for (int c = 0; c < shape.dim; ++c) dot += query[c] * key[c];
      logits.push_back(dot * params.softmax_scale);
      largest = std::max(largest, logits.back());
    }
    for (double x : logits) sum += std::exp(x - largest);
    lse[row * heads_q + h] = logits.empty() ? -INFINITY : largest + std::log(sum);
    for (size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(logits[i] - lse[row * heads_q + h]) / static_cast<double>(shape.d);
      for (int64_t s = i * shape.d; s < static_cast<int64_t>(i) * shape.d + shape.l; ++s) {
        // A straddling compressed block may reach into a selection block behind the query's own.
        if (s / shape.block_size <= t / shape.block_size) out[s / shape.block_size] += p;
      }
    }
  }

  std::unique_ptr<DeviceArray<T>> q_device, k_device;
  std::unique_ptr<DeviceArray<float>> lse_device;
  std::unique_ptr<DeviceArray<int32_t>> cu_q_device, cu_k_device;

  void upload(const std::vector<T>& q_stored, const std::vector<T>& k_stored) {
    q_device = std::make_unique<DeviceArray<T>>(q_stored);
    k_device = std::make_unique<DeviceArray<T>>(k_stored);
    lse_device = std::make_unique<DeviceArray<float>>(std::vector<float>(lse.begin(), lse.end()));
    cu_q_device = std::make_unique<DeviceArray<int32_t>>(cu_q);
    cu_k_device = std::make_unique<DeviceArray<int32_t>>(cu_k);
    params.dtype = std::is_same_v<T, __half> ? DType::kF16 : DType::kBF16;
    params.seqs.cu_seqlens_q = lengths.offsets ? cu_q_device->data : nullptr;
    params.seqs.cu_seqlens_k = lengths.offsets ? cu_k_device->data : nullptr;
    params.seqs.batch = static_cast<int64_t>(lengths.q.size());
    params.seqs.total_q = rows_q;
    for (int32_t n : lengths.q) params.seqs.max_seqlen_q = std::max<int64_t>(params.seqs.max_seqlen_q, n);
    for (int32_t n : lengths.k) params.seqs.max_seqlen_k = std::max<int64_t>(params.seqs.max_seqlen_k, n);
    params.seqs.max_seqlen_k += lengths.slack;
    params.seqs.key_rows = rows_k;
    params.shape = {heads_q, shape.heads_kv, shape.dim, shape.dim};
    params.keys = {shape.l, shape.d};
    params.block_size = shape.block_size;
    params.q = {q_device->data, static_cast<int64_t>(heads_q) * shape.dim, shape.dim};
    params.k_cmp = {k_device->data, static_cast<int64_t>(shape.heads_kv) * shape.dim, shape.dim};
    params.lse = lse_device->data;
    params.num_blocks = num_blocks;
  }

  std::vector<float> run_scores(bool portable) {
    DeviceArray<float> out(std::vector<float>(scores.size(), kUntouched));
    params.scores = out.data;
    Status status;
    if (portable) {
      status = portable::block_scores(params, {});
    } else {
      REQUIRE(sm90::block_scores(params, {}, &status));
    }
    REQUIRE(status.ok());
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    return out.host();
  }

  std::vector<int32_t> run_selection(const Choice& choice) {
    DeviceArray<int32_t> out(std::vector<int32_t>(rows_q * shape.heads_kv * choice.n, 77));
    SelectBlocksParams p{params, choice.n, choice.num_initial, choice.num_local, out.data, nullptr};
    const int64_t bytes = sm90::workspace_bytes(p);
    DeviceArray<unsigned char> workspace(static_cast<size_t>(bytes));
    cudaMemset(workspace.data, 0xff, static_cast<size_t>(bytes));
    p.workspace = workspace.data;
    Status status;
    REQUIRE(sm90::select_blocks(p, {}, &status));
    REQUIRE(status.ok());
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    return out.host();
  }
};

double worst_difference(const std::vector<float>& actual, const std::vector<double>& expected) {
  double worst = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double difference = std::abs(actual[i] - expected[i]) / std::max(1., std::abs(expected[i]));
    worst = difference <= worst ? worst : std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

// Takes one block at a time: forced ones first, then the best of the rest, the lower of two equal ones.
std::vector<int32_t> naive_selection(const float* scores, int64_t own, const Choice& choice) {
  std::vector<int32_t> chosen;
  std::vector<bool> taken(own + 1, false);
  const auto take = [&](int64_t j) {
    taken[j] = true;
    chosen.push_back(static_cast<int32_t>(j));
  };
  for (int64_t j = 0; j <= own; ++j) {
    if (j < choice.num_initial || j > own - choice.num_local) take(j);
  }
  while (static_cast<int>(chosen.size()) < choice.n) {
    int64_t best = -1;
    for (int64_t j = 0; j <= own; ++j) {
      if (!taken[j] && (best < 0 || scores[j] > scores[best])) best = j;
    }
    if (best < 0) break;
    take(best);
  }
  std::sort(chosen.begin(), chosen.end());
  chosen.resize(choice.n, -1);
  return chosen;
}

template <typename T>
int64_t wrong_rows(Problem<T>& problem, const std::vector<float>& scores, const Choice& choice) {
  const std::vector<int32_t> actual = problem.run_selection(choice);
  int64_t wrong = 0;
  const int heads = problem.shape.heads_kv;
  for (size_t b = 0; b < problem.lengths.q.size(); ++b) {
    for (int64_t i = 0; i < problem.lengths.q[b]; ++i) {
      const int64_t own = (problem.lengths.k[b] - problem.lengths.q[b] + i) / problem.shape.block_size;
      for (int g = 0; g < heads; ++g) {
        const int64_t row = (problem.cu_q[b] + i) * heads + g;
        const auto expected = naive_selection(&scores[row * problem.num_blocks], own, choice);
        wrong += !std::equal(expected.begin(), expected.end(), actual.begin() + row * choice.n);
      }
    }
  }
  for (size_t i = problem.cu_q.back() * static_cast<size_t>(heads) * choice.n; i < actual.size(); ++i)
    wrong += actual[i] != 77;
  return wrong;
}

template <typename T>
void check(const Lengths& lengths, const Shape& shape, const std::vector<Choice>& choices) {
  CAPTURE(shape.group, shape.heads_kv, shape.dim, shape.l, shape.d, shape.block_size, lengths.q, lengths.k);
  Problem<T> problem(lengths, shape);
  const std::vector<float> scores = problem.run_scores(false);
  CHECK(worst_difference(scores, problem.scores) < 2e-5);
  const std::vector<float> portable = problem.run_scores(true);
  CHECK(worst_difference(scores, {portable.begin(), portable.end()}) < 2e-5);
  CHECK(scores == problem.run_scores(false));
  for (const Choice& choice : choices) {
    CAPTURE(choice.n, choice.num_initial, choice.num_local);
    CHECK(wrong_rows(problem, scores, choice) == 0);
  }
}

const std::vector<Choice> kChoices = {{16, 1, 2}, {4, 1, 2}, {3, 0, 0}, {5, 2, 0}, {1, 0, 1}};
const Lengths kRagged = {{33, 0, 5, 161, 1}, {33, 0, 5, 161, 300}};
const Lengths kLong = {{40, 0, 7}, {2500, 80, 1300}, 6, 35};
const Lengths kRoomy = {{40, 0, 7}, {2500, 80, 1300}, 6, 35, true, 16000};  // one pipeline a block

// Compressed attention that chooses: o and lse against the portable kernel, the choice by the naive scores.
// Of two blocks whose scores differ by less than fp32 tells, either may win. pays: whether the trial must
// tell that the first items choose inside, too: then they are rounded otherwise than where nothing is chosen.
template <typename T>
void check_choosing_attention(int32_t queries, int32_t keys, int heads_kv, const Choice& choice,
                              int pad_k = 0, bool equal_keys = false, std::optional<bool> pays = {}) {
  CAPTURE(queries, keys, heads_kv, choice.n, choice.num_initial, choice.num_local);
  Problem<T> problem({{queries}, {keys}, 0, pad_k, false}, {16, heads_kv, 128, 32, 16, 64, equal_keys});
  const int64_t seen = KeyBlocks{32, 16}.count(keys) * heads_kv * 128;
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<T> v(problem.k.size(), static_cast<T>(NAN));
  for (int64_t i = 0; i < seen; ++i) v[i] = static_cast<T>(normal(generator));
  const DeviceArray<T> v_device(v);
  const size_t rows = static_cast<size_t>(queries) * problem.heads_q;
  DeviceArray<T> o(rows * 128), expected_o(rows * 128);
  DeviceArray<float> lse(rows), expected_lse(rows);
  DeviceArray<int32_t> indices(static_cast<size_t>(queries) * heads_kv * choice.n), zeroed(1);
  cudaMemset(zeroed.data, 0xff, sizeof(int32_t));

  const BlockScoresParams& scoring = problem.params;
  BandedAttentionFwdParams p{};
  p.dtype = scoring.dtype;
  p.seqs = scoring.seqs;
  p.shape = scoring.shape;
  p.keys = scoring.keys;
  p.softmax_scale = scoring.softmax_scale;
  p.q = scoring.q;
  p.k = p.v = scoring.k_cmp;
  p.v.data = v_device.data;
  p.o = expected_o.data;
  p.lse = expected_lse.data;
  REQUIRE(portable::banded_attention_forward(p, {}).ok());
  p.o = o.data;
  p.lse = lse.data;
  SelectBlocksParams select{scoring, choice.n, choice.num_initial, choice.num_local, indices.data, nullptr};
  const DeviceArray<unsigned char> scores(static_cast<size_t>(sm90::workspace_bytes(select)));
  select.workspace = scores.data;
  const DeviceArray<unsigned char> workspace(
      static_cast<size_t>(sm90::compressed_selection_workspace(p, select)));
  REQUIRE(workspace.size > 0);
  const auto run = [&] {
    cudaMemset(workspace.data, 0xff, workspace.size);
    cudaMemset(indices.data, 0x55, indices.size * sizeof(int32_t));
    Status status;
    REQUIRE(sm90::compressed_selection_forward(p, select, workspace.data, zeroed.data, {}, &status));
    REQUIRE(status.ok());
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    return indices.host();
  };
  const std::vector<int32_t> chosen = run();
  const std::vector<float> first_lse = lse.host();
  CHECK(zeroed.host()[0] == 0);
  CHECK(chosen == run());
  CHECK(first_lse == lse.host());
  const std::vector<float> expected = expected_lse.host();
  CHECK(worst_difference(first_lse, {expected.begin(), expected.end()}) < 1e-5);
  double worst = 0;
  const std::vector<T> actual_o = o.host(), portable_o = expected_o.host();
  for (size_t i = 0; i < actual_o.size(); ++i) {
    const double difference = std::abs(static_cast<double>(static_cast<float>(actual_o[i])) -
                                       static_cast<double>(static_cast<float>(portable_o[i])));
    worst = difference <= worst ? worst : std::isnan(difference) ? INFINITY : difference;
  }
  CHECK(worst < 0x1p-5);

  if (pays) {
    Status status;
    REQUIRE(sm90::banded_attention_forward(p, {}, &status));
    const std::vector<T> plain = o.host();
    const bool rounded_alike =
        std::memcmp(plain.data(), actual_o.data(), sizeof(T) * heads_kv * 16 * 128) == 0;
    CHECK(rounded_alike == !*pays);
  }

  constexpr double kTolerance = 1e-5;
  int64_t wrong = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t own = (keys - queries + i) / 64;
    for (int64_t row = i * heads_kv; row < (i + 1) * heads_kv; ++row) {
      const double* scores = &problem.scores[row * problem.num_blocks];
      const int32_t* blocks = &chosen[row * choice.n];
      std::vector<bool> taken(own + 1, false);
      bool right = true;
      for (int c = 0; c < choice.n; ++c) {
        right &= blocks[c] >= 0 && blocks[c] <= own && (c == 0 || blocks[c] > blocks[c - 1]);
        if (right) taken[blocks[c]] = true;
      }
      double worst_taken = INFINITY, best_left = 0;
      for (int64_t j = 0; j <= own; ++j) {
        if (j < choice.num_initial || j > own - choice.num_local) {
          right &= taken[j];
        } else if (taken[j]) {
          worst_taken = std::min(worst_taken, scores[j]);
        } else {
          best_left = std::max(best_left, scores[j]);
        }
      }
      wrong += !right || worst_taken < best_left * (1 - kTolerance);
    }
  }
  CHECK(wrong == 0);
  // Equal scores go to the lower block there as here.
  if (equal_keys) CHECK(chosen == problem.run_selection(choice));
}

TEST_CASE("Hopper compressed attention that chooses blocks", "[sm90][scores][choosing]") {
  if (!nsa_test::is_hopper()) return;
  check_choosing_attention<__nv_bfloat16>(60, 17001, 2, {16, 1, 2});
  check_choosing_attention<__half>(60, 17001, 1, {16, 1, 2}, 100);
  check_choosing_attention<__nv_bfloat16>(1, 16385, 4, {16, 1, 2}, 7);
  check_choosing_attention<__nv_bfloat16>(29, 24582, 1, {4, 0, 1});
  check_choosing_attention<__nv_bfloat16>(40, 18016, 1, {24, 2, 3}, 1000);
  check_choosing_attention<__nv_bfloat16>(40, 18016, 1, {24, 0, 1});
  check_choosing_attention<__half>(12, 17000, 1, {3, 1, 2});  // none to choose
  check_choosing_attention<__nv_bfloat16>(12, 17000, 1, {4, 0, 4});
  check_choosing_attention<__half>(500, 17000, 1, {17, 0, 1});
  check_choosing_attention<__nv_bfloat16>(12, 17000, 1, {16, 1, 2}, 0, true);  // ties
  // More than an item for each thread block: the choice goes on behind the trial, and does not.
  check_choosing_attention<__half>(1610, 40000, 1, {16, 1, 2}, 0, false, true);
  check_choosing_attention<__nv_bfloat16>(1610, 33000, 1, {16, 1, 2}, 0, true, false);
}

// The largest error of rounding to nearest, of all numbers in an octave.
template <typename T>
double rounding_error() {
  double worst = 0;
  for (int i = 0; i < 1 << 16; ++i) {
    const float x = 1 + static_cast<float>(i) / (1 << 16);
    worst = std::max(worst, std::abs(static_cast<double>(static_cast<float>(static_cast<T>(x))) - x) / x);
  }
  return worst;
}

TEST_CASE("the bound of the choice covers both roundings of a probability", "[choosing]") {
  const double kept = rounding_error<__half>();
  CHECK(sm90::SumsError<__nv_bfloat16>::kRelative >= rounding_error<__nv_bfloat16>() + kept);
  CHECK(sm90::SumsError<__half>::kRelative >= 2 * kept);
}

TEST_CASE("Hopper compressed attention leaves the choice where it would lose", "[sm90][scores][choosing]") {
  if (!nsa_test::is_hopper()) return;
  const auto bytes = [](int64_t queries, int64_t keys, int group, int n, int num_local, bool packed) {
    static int32_t offsets[2] = {0, 0};
    BandedAttentionFwdParams p{};
    p.seqs.total_q = queries;
    p.seqs.max_seqlen_k = keys;
    p.seqs.key_rows = keys / 16;
    if (packed) p.seqs.cu_seqlens_q = p.seqs.cu_seqlens_k = offsets;
    p.shape = {4 * group, 4, 128, 128};
    p.keys = {32, 16};
    SelectBlocksParams select{};
    select.scoring.seqs = p.seqs;
    select.scoring.shape = p.shape;
    select.scoring.keys = p.keys;
    select.scoring.block_size = 64;
    select.scoring.num_blocks = ceil_div(keys, 64);
    select.num_selected_blocks = n;
    select.num_local_blocks = num_local;
    return sm90::compressed_selection_workspace(p, select);
  };
  CHECK(bytes(32768, 32768, 16, 16, 2, false) > 0);
  CHECK(bytes(32000, 32000, 16, 16, 2, false) == 0);
  CHECK(bytes(3 * device_attribute(cudaDevAttrMultiProcessorCount), 17000, 16, 16, 2, false) > 0);
  CHECK(bytes(1600, 32000, 16, 16, 2, false) == 0);
  CHECK(bytes(1600, 33000, 16, 16, 2, false) > 0);
  CHECK(bytes(266240, 266240, 16, 16, 2, false) > 0);
  CHECK(bytes(1 << 23, 1 << 23, 16, 16, 2, false) == 0);  // more than 4 GB
  CHECK(bytes(32768, 32768, 8, 16, 2, false) == 0);
  CHECK(bytes(32768, 32768, 16, 32, 2, false) == 0);
  CHECK(bytes(32768, 32768, 16, 16, 0, false) == 0);
  CHECK(bytes(32768, 32768, 16, 16, 2, true) == 0);
}

TEST_CASE("Hopper scores and selection: one sequence", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  check<__nv_bfloat16>({{700}, {700}, 0, 0, false}, {16, 1, 128, 32, 16, 64}, kChoices);
  check<__half>({{300}, {300}}, {16, 2, 128, 32, 16, 64}, kChoices);
  check<__nv_bfloat16>({{13}, {1190}, 0, 11, false}, {16, 2, 64, 32, 16, 64}, kChoices);
  check<__nv_bfloat16>({{1}, {31}}, {16, 1, 128, 32, 16, 64}, kChoices);
}

TEST_CASE("Hopper scores and selection: every group size", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  for (const int group : {1, 2, 3, 4, 5, 6, 8, 12, 16, 17, 24, 32, 48, 64}) {
    check<__nv_bfloat16>(kLong, {group, 2, 128, 32, 16, 64}, {{16, 1, 2}, {4, 0, 1}});
    check<__half>(kRagged, {group, 1, 64, 32, 16, 64}, {{3, 1, 1}});
    if (group <= 32) check<__nv_bfloat16>(kRagged, {group, 1, 192, 32, 16, 64}, {{3, 1, 1}});
    if (group > 8 && group <= 16) check<__half>(kRoomy, {group, 2, 128, 32, 16, 64}, {{16, 1, 2}});
  }
}

TEST_CASE("Hopper scores and selection: block sizes and strides", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  for (const int64_t block_size : {32, 64, 128}) {
    for (const int64_t d : {8, 16, 32, 64}) {
      for (int64_t l = d; l <= 64; l += d) {
        if (block_size % d) continue;
        check<__nv_bfloat16>(kLong, {4, 1, 64, l, d, block_size}, {{9, 1, 2}});
        check<__nv_bfloat16>(kRagged, {16, 1, 128, l, d, block_size}, {{2, 1, 1}});
        if (l == 64) check<__half>(kLong, {24, 1, 64, l, d, block_size}, {{9, 1, 2}});
      }
    }
  }
}

TEST_CASE("Hopper selection: many blocks wanted, and ties", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  const Lengths lengths{{30, 9}, {9000, 4100}, 3, 0, true, 1000};
  check<__nv_bfloat16>(lengths, {2, 2, 64, 16, 8, 32},
                       {{64, 1, 2}, {33, 0, 0}, {24, 0, 0}, {25, 0, 1}, {64, 0, 0}});
  check<__nv_bfloat16>(lengths, {2, 1, 64, 16, 16, 32, true}, {{64, 1, 2}, {16, 1, 2}, {3, 0, 0}});
  check<__nv_bfloat16>(lengths, {16, 1, 128, 32, 16, 64, true}, {{64, 1, 2}, {16, 1, 2}, {3, 0, 0}});
}

TEST_CASE("Hopper selection: long rows, and neighbours with different blocks", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  const Lengths lengths{{9, 150}, {40001, 9003}, 3, 16};
  for (const int dim : {64, 128, 192})
    check<__nv_bfloat16>(lengths, {16, 1, dim, 32, 16, 64}, {{16, 1, 2}, {24, 0, 0}, {7, 5, 1}});
  check<__half>(lengths, {4, 2, 128, 32, 16, 64}, {{16, 1, 2}, {24, 0, 0}});
}

// The same on little work, which racecheck can follow: more items than pipelines, with one key tile or none.
// By the room for longer rows, first one pipeline a block, then two.
TEST_CASE("Hopper scores and selection: many short sequences", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  Lengths lengths{std::vector<int32_t>(150, 32), std::vector<int32_t>(150, 300), 2, 16, true, 16400};
  check<__nv_bfloat16>(lengths, {16, 1, 128, 32, 16, 64}, {{2, 1, 1}});
  lengths.slack = 0;
  check<__nv_bfloat16>(lengths, {16, 1, 128, 32, 16, 64}, {{2, 1, 1}, {4, 1, 2}});
  check<__half>(lengths, {9, 2, 64, 32, 16, 64}, {{3, 0, 1}});
}

TEST_CASE("Hopper selection: nothing to do", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  check<__nv_bfloat16>({{0, 0}, {0, 64}, 3, 64}, {16, 1, 128, 32, 16, 64}, {{4, 1, 2}});
}

// Scores need not be normalised, so any lse will do; a selection is checked against the scores of
// block_scores, those against the definition.
struct Unnormalised {
  int queries, keys, heads_q, heads_kv, dim;
  float lse;
  double scale;
  std::vector<__nv_bfloat16> q, k;

  void draw(int seed, float factor = 1.f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    q.resize(size_t(queries) * heads_q * dim), k.resize(size_t(keys) / 16 * heads_kv * dim);
    for (auto& x : q) x = static_cast<__nv_bfloat16>(factor * normal(generator));
    for (auto& x : k) x = static_cast<__nv_bfloat16>(normal(generator));
  }

  struct Results {
    std::vector<float> scores;
    std::vector<int32_t> indices;
  };
  Results run(const Choice& choice) const {
    const int blocks = keys / 64;
    const DeviceArray<__nv_bfloat16> q_device(q), k_device(k);
    const DeviceArray<float> lse_device(std::vector<float>(size_t(queries) * heads_q, lse));
    DeviceArray<float> scores(size_t(queries) * heads_kv * blocks);
    DeviceArray<int32_t> indices(size_t(queries) * heads_kv * choice.n);
    SelectBlocksParams p{};
    BlockScoresParams& s = p.scoring;
    s.dtype = DType::kBF16;
    s.seqs.total_q = s.seqs.max_seqlen_q = queries;
    s.seqs.max_seqlen_k = keys;
    s.seqs.key_rows = keys / 16;
    s.shape = {heads_q, heads_kv, dim, dim};
    s.keys = {32, 16};
    s.block_size = 64;
    s.softmax_scale = scale;
    s.q = {q_device.data, static_cast<int64_t>(heads_q) * dim, dim};
    s.k_cmp = {k_device.data, static_cast<int64_t>(heads_kv) * dim, dim};
    s.lse = lse_device.data;
    s.scores = scores.data;
    s.num_blocks = blocks;
    p.num_selected_blocks = choice.n, p.num_initial_blocks = choice.num_initial;
    p.num_local_blocks = choice.num_local;
    p.block_indices = indices.data;
    const int64_t bytes = sm90::workspace_bytes(p);
    DeviceArray<unsigned char> workspace(static_cast<size_t>(bytes));
    p.workspace = workspace.data;
    Status status;
    REQUIRE(sm90::block_scores(s, {}, &status));
    REQUIRE(sm90::select_blocks(p, {}, &status));
    REQUIRE(status.ok());
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    return {scores.host(), indices.host()};
  }

  // Of one query in `step`.
  int wrong_rows(const Results& results, const Choice& choice, int step) const {
    int wrong = 0;
    for (int query = 0; query < queries; query += step) {
      for (int64_t row = int64_t(query) * heads_kv; row < int64_t(query + 1) * heads_kv; ++row) {
        const auto expected =
            naive_selection(&results.scores[row * (keys / 64)], (keys - queries + query) / 64, choice);
        wrong += !std::equal(expected.begin(), expected.end(), results.indices.begin() + row * choice.n);
      }
    }
    return wrong;
  }
  int wrong_rows(const Choice& choice, int step) const { return wrong_rows(run(choice), choice, step); }

  // The largest relative error of the scores, of one query in `step` and all of its complete blocks.
  double worst_score(const Results& results, int step) const {
    const int group = heads_q / heads_kv, blocks = keys / 64;
    double worst = 0;
    for (int query = 0; query < queries; query += step) {
      const int t = keys - queries + query;
      for (int g = 0; g < heads_kv; ++g) {
        std::vector<double> expected(blocks + 1, 0.);
        for (int i = 0; i * 16 + 31 <= t; ++i) {
          double p = 0;
          for (int h = g * group; h < (g + 1) * group; ++h) {
            double dot = 0;
            for (int c = 0; c < dim; ++c) {
              dot += static_cast<double>(static_cast<float>(q[(size_t(query) * heads_q + h) * dim + c])) *
                     static_cast<float>(k[(size_t(i) * heads_kv + g) * dim + c]);
            }
            p += std::exp(dot * scale - lse);
          }
          // Of its two strides, one may be in the next block.
          expected[i / 4] += p, expected[(i + 1) / 4] += p;
        }
        const float* actual = &results.scores[(int64_t(query) * heads_kv + g) * blocks];
        for (int j = 0; j <= t / 64; ++j) {
          const double error = std::abs(actual[j] - expected[j]) / std::max(expected[j], 1e-30);
          worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
        }
      }
    }
    return worst;
  }
};

TEST_CASE("Hopper selection of many queries", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  Unnormalised problem{9000, 65536, 4, 4, 64, 9.f, 0.125, {}, {}};
  problem.draw(6);
  CHECK(problem.wrong_rows({16, 1, 2}, 15) == 0);
}

// More items than pipelines: a pipeline takes its next one while the other one of its block, or a warpgroup
// beside, is still at the one before. Rows of 256 blocks and more at dim 128 have one pipeline a block. With
// as many queries as keys the first items have no key tiles.
TEST_CASE("Hopper scores and selection: several items a pipeline", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  for (const Unnormalised& shape : std::vector<Unnormalised>{{9000, 20032, 16, 1, 128},
                                                             {9000, 12032, 16, 1, 128},
                                                             {17024, 17024, 12, 1, 128},
                                                             {4600, 16448, 18, 2, 128},
                                                             {9000, 9024, 9, 1, 128},
                                                             {9000, 12032, 12, 1, 128},
                                                             {9000, 20032, 16, 1, 64},
                                                             {9024, 9024, 9, 1, 192}}) {
    CAPTURE(shape.queries, shape.keys, shape.heads_q, shape.heads_kv, shape.dim);
    REQUIRE(shape.keys % 64 == 0);
    Unnormalised problem = shape;
    problem.scale = 1 / std::sqrt(static_cast<double>(shape.dim));
    problem.draw(8);
    const Choice choice{16, 1, 2};
    const Unnormalised::Results results = problem.run(choice);
    CHECK(problem.worst_score(results, 499) < 2e-5);
    CHECK(problem.wrong_rows(results, choice, 7) == 0);
  }
}

// Softmax that is nearly or quite one-hot: few scores are above zero, or none, and the others equal.
TEST_CASE("Hopper selection: scores of peaked attention", "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  for (const int heads_kv : {8, 4, 2, 1}) {
    for (const auto& [dim, keys] : {std::pair{64, 40000}, {128, 12032}}) {
      Unnormalised problem{701, keys, 8, heads_kv, dim, 0.f, 1 / std::sqrt(static_cast<double>(dim)), {}, {}};
      for (const float factor : {30.f, 60.f, 100.f, 300.f}) {
        problem.draw(9, factor);
        for (const float largest : {3.3f, 4.f, 10.f}) {
          CAPTURE(heads_kv, dim, factor, largest);
          problem.lse = largest * factor;
          for (const Choice& choice : std::vector<Choice>{{16, 1, 2}, {24, 0, 0}, {3, 0, 1}})
            CHECK(problem.wrong_rows(choice, 23) == 0);
        }
      }
    }
  }
}

// Logits are small whole numbers times the scale, so scores are equal or differ in their last bits, and one
// block in sixteen may be better than all others; lse moves the scores to where few or none of their bits
// count.
TEST_CASE("Hopper selection: scores of any size, close together, the best in one part of a row",
          "[sm90][scores]") {
  if (!nsa_test::is_hopper()) return;
  constexpr int kQueries = 333, kHeads = 16, kDim = 128;
  for (const auto& [keys, advantage] :
       {std::pair{40000, 0}, {40000, 3}, {40000, 200}, {9024, 0}, {9024, 3}}) {
    std::mt19937 generator(7);
    Unnormalised problem{kQueries, keys, kHeads, 1, kDim, 0.f, 0., {}, {}};
    problem.q.assign(size_t{kQueries} * kHeads * kDim, static_cast<__nv_bfloat16>(0.f));
    problem.k.assign(static_cast<size_t>(keys) / 16 * kDim, static_cast<__nv_bfloat16>(0.f));
    for (int i = 0; i < kQueries * kHeads; ++i) {
      problem.q[size_t(i) * kDim] = static_cast<__nv_bfloat16>(1.f);
      problem.q[size_t(i) * kDim + 1 + generator() % 40] = static_cast<__nv_bfloat16>(1.f);
    }
    for (int i = 0; i < keys / 16; ++i) {
      if (i / 4 % 16 == 3)
        problem.k[size_t(i) * kDim] = static_cast<__nv_bfloat16>(static_cast<float>(advantage));
      for (int c = 1; c <= 40; ++c)
        problem.k[size_t(i) * kDim + c] = static_cast<__nv_bfloat16>(static_cast<float>(generator() % 8));
    }
    for (const double scale : {1. / (1 << 20), 1. / (1 << 15), 1. / (1 << 10), 0.05}) {
      for (const float lse : {-3.f, 5.f, 21.f, 60.f}) {
        CAPTURE(problem.keys, advantage, scale, lse);
        problem.lse = lse, problem.scale = scale;
        for (const Choice& choice : std::vector<Choice>{{16, 1, 2}, {18, 1, 2}, {19, 1, 2}, {24, 0, 0}})
          CHECK(problem.wrong_rows(choice, 5) == 0);
      }
    }
  }
}

}  // namespace
}  // namespace nsa::cuda
