// Compressed attention and the sliding window: the banded kernels against naive loops.
#include "attention_check.h"
#include "catch2_bridge.h"

using namespace nsa_test;

namespace {

struct Band {
  nsa::KeyBlocks keys;
  int64_t window;
};

template <typename T>
std::string check_band(const Batch& batch, const Heads& heads, const Band& band, int num_threads,
                       unsigned wanted = 7, bool scaled = false) {
  const bool tokens = band.keys.stride == 1 && band.keys.block == 1;
  AttentionProblem<T> problem(
      batch, heads,
      tokens ? token_window(batch, band.window) : compressed(batch, band.keys.block, band.keys.stride),
      tokens ? batch.total_k() : batch.total_k() / band.keys.stride, 11);
  auto with_band = [&](auto p, auto kernel) {
    p.keys = band.keys;
    p.window = band.window;
    return kernel(p, threads(num_threads));
  };
  std::string wrong = problem.template check_forward<nsa::BandedAttentionFwdParams>(
      [&](const auto& p) { return with_band(p, nsa::cpu::banded_attention_forward); });
  if (!wrong.empty()) return wrong;
  return problem.template check_backward<nsa::BandedAttentionBwdParams>(
      [&](const auto& p) { return with_band(p, nsa::cpu::banded_attention_backward); }, wanted, scaled);
}

const Heads kHeads[] = {{4, 1, 64, 64}, {6, 2, 40, 20}, {3, 3, 1, 3}, {8, 1, 17, 33}, {5, 1, 128, 96}};
const Band kBands[] = {{{1, 1}, 1},   {{1, 1}, 37}, {{1, 1}, 1000}, {{32, 16}, 0},
                       {{16, 16}, 0}, {{9, 3}, 0},  {{4, 1}, 0}};

}  // namespace

TEMPLATE_TEST_CASE("banded attention equals the naive loops", "[attention]", float, double, BF16) {
  const Batch batches[] = {Batch({70}),
                           Batch({33, 0, 5, 61}),
                           Batch({20, 1, 0}, {75, 40, 12}, 6, 9),
                           Batch({13}, {90}, 0, 11, false),
                           Batch({}),
                           Batch({0}, {0}, 3, 18)};
  for (const Batch& batch : batches) {
    for (const Heads& heads : kHeads) {
      for (const Band& band : kBands) {
        CAPTURE(nsa::cpu::active_isa(), batch.count(), batch.total_k(), heads.q, heads.kv, heads.dim_qk,
                heads.dim_v, band.keys.block, band.keys.stride, band.window);
        CHECK(check_band<TestType>(batch, heads, band, 1) == "");
      }
    }
  }
}

TEMPLATE_TEST_CASE("banded attention over many tiles, on several threads", "[attention]", float, double,
                   BF16) {
  const Batch batch({301, 150}, {301, 202});
  for (const Band& band : {Band{{1, 1}, 129}, Band{{32, 16}, 0}, Band{{2, 1}, 0}}) {
    for (int num_threads : {1, 3}) {
      CAPTURE(nsa::cpu::active_isa(), band.keys.block, band.window, num_threads);
      CHECK(check_band<TestType>(batch, {4, 2, 32, 48}, band, num_threads) == "");
    }
  }
}

TEST_CASE("banded attention computes each subset of gradients, with dO scaled or not", "[attention]") {
  const Batch batch({40, 31});
  for (unsigned wanted = 0; wanted < 8; ++wanted) {
    for (bool scaled : {false, true}) {
      CAPTURE(wanted, scaled);
      CHECK(check_band<float>(batch, {4, 2, 24, 16}, {{1, 1}, 9}, 1, wanted, scaled) == "");
      CHECK(check_band<float>(batch, {4, 2, 24, 16}, {{8, 4}, 0}, 1, wanted, scaled) == "");
    }
  }
}
