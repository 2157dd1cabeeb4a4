// Selected attention: the kernels against naive loops, for rows of block_indices that hold any integers.
#include "attention_check.h"
#include "catch2_bridge.h"
#include "random_indices.h"

using namespace nsa_test;

namespace {

template <typename T>
std::string check_selected(const Batch& batch, const Heads& heads, int64_t block_size, int n, int num_threads,
                           unsigned wanted = 7, bool scaled = false) {
  const std::vector<int32_t> indices = random_indices(batch, heads.kv, n, block_size, 5);
  Guarded<int32_t> guarded(static_cast<int64_t>(indices.size()));
  for (size_t i = 0; i < indices.size(); ++i) guarded.data()[i] = indices[i];
  AttentionProblem<T> problem(batch, heads, selected(batch, indices, heads.kv, n, block_size),
                              batch.total_k(), 23);
  auto with_blocks = [&](auto p, auto kernel) {
    p.block_size = block_size;
    p.num_selected_blocks = n;
    p.block_indices = guarded.data();
    return kernel(p, threads(num_threads));
  };
  std::string wrong = problem.template check_forward<nsa::SelectedAttentionFwdParams>(
      [&](const auto& p) { return with_blocks(p, nsa::cpu::selected_attention_forward); });
  if (!wrong.empty()) return wrong;
  return problem.template check_backward<nsa::SelectedAttentionBwdParams>(
      [&](const auto& p) { return with_blocks(p, nsa::cpu::selected_attention_backward); }, wanted, scaled);
}

}  // namespace

TEMPLATE_TEST_CASE("selected attention equals the naive loops", "[attention]", float, double, BF16) {
  const Batch batches[] = {Batch({70}),
                           Batch({33, 0, 5, 61}),
                           Batch({20, 1, 0}, {75, 40, 12}, 6, 9),
                           Batch({13}, {90}, 0, 11, false),
                           Batch({}),
                           Batch({0}, {0}, 3, 18)};
  const Heads all_heads[] = {{4, 1, 64, 64}, {6, 2, 40, 20}, {3, 3, 1, 3}, {8, 1, 17, 33}, {16, 1, 32, 32}};
  for (const Batch& batch : batches) {
    for (const Heads& heads : all_heads) {
      for (int64_t block_size : {1, 7, 16, 32, 96}) {
        for (int n : {1, 4}) {
          CAPTURE(nsa::cpu::active_isa(), batch.count(), batch.total_k(), heads.q, heads.kv, heads.dim_qk,
                  heads.dim_v, block_size, n);
          CHECK(check_selected<TestType>(batch, heads, block_size, n, 1) == "");
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("selected attention over many tiles, on several threads", "[attention]", float, double,
                   BF16) {
  const Batch batch({301, 150}, {301, 202});
  for (int num_threads : {1, 3}) {
    for (int64_t block_size : {16, 64}) {
      CAPTURE(nsa::cpu::active_isa(), num_threads, block_size);
      CHECK(check_selected<TestType>(batch, {4, 2, 32, 48}, block_size, 6, num_threads) == "");
    }
  }
}

// The backward keeps dS of a bounded chunk of queries: 16 heads x 16 blocks of 64 keys fill several of them
// here.
TEST_CASE("selected attention over several chunks of queries", "[attention]") {
  CHECK(check_selected<float>(Batch({700, 3, 150}), {16, 1, 4, 4}, 64, 16, 2) == "");
}

TEST_CASE("selected attention computes each subset of gradients, with dO scaled or not", "[attention]") {
  for (unsigned wanted = 0; wanted < 8; ++wanted) {
    for (bool scaled : {false, true}) {
      CAPTURE(wanted, scaled);
      CHECK(check_selected<float>(Batch({40, 31}), {4, 2, 24, 16}, 8, 3, 1, wanted, scaled) == "");
    }
  }
}
