// Block scores and the selection against naive loops.
#include <algorithm>

#include "buffers.h"
#include "catch2_bridge.h"
#include "naive.h"

using namespace nsa_test;

namespace {

struct Blocks {
  nsa::KeyBlocks compressed;
  int64_t block_size;
};

// score[row, g, j], by the definition: heads of the group, visible compressed blocks, shared tokens.
template <typename T>
std::vector<double> naive_scores(const Batch& batch, const Heads& heads, const Blocks& blocks,
                                 int64_t num_blocks, double scale, const Rows<T>& q, const Rows<T>& k,
                                 const std::vector<double>& lse) {
  std::vector<double> scores(static_cast<size_t>(batch.total_q() * heads.kv * num_blocks), 0);
  const NaiveKeys keys = compressed(batch, blocks.compressed.block, blocks.compressed.stride);
  for_each_query(batch, heads, [&](const Query& query, int h) {
    const KeyRange range = keys.range(query.sequence);
    for (int64_t i = 0; i < range.count; ++i) {
      if (!keys.visible(query, i)) continue;
      const double p = std::exp(scale * dot(q, query.row, h, k, range.first_row + i, query.head_kv) -
                                lse[static_cast<size_t>(query.row * heads.q + h)]);
      const int64_t begin = i * blocks.compressed.stride;
      for (int64_t s = begin; s < begin + blocks.compressed.block; ++s) {
        const int64_t at = (query.row * heads.kv + query.head_kv) * num_blocks + s / blocks.block_size;
        scores[static_cast<size_t>(at)] += p / static_cast<double>(blocks.compressed.stride);
      }
    }
  });
  return scores;
}

// Takes one block at a time: forced ones first, then the best of the rest, the lower of two equal ones.
std::vector<int32_t> naive_selection(const double* scores, int64_t own, int n, int num_initial,
                                     int num_local) {
  std::vector<int32_t> chosen;
  std::vector<bool> taken(static_cast<size_t>(own + 1), false);
  const auto take = [&](int64_t j) {
    taken[static_cast<size_t>(j)] = true;
    chosen.push_back(static_cast<int32_t>(j));
  };
  for (int64_t j = 0; j <= own; ++j) {
    if (j < num_initial || j > own - num_local) take(j);
  }
  while (static_cast<int>(chosen.size()) < n) {
    int64_t best = -1;
    for (int64_t j = 0; j <= own; ++j) {
      if (!taken[static_cast<size_t>(j)] && (best < 0 || scores[j] > scores[best])) best = j;
    }
    if (best < 0) break;
    take(best);
  }
  std::sort(chosen.begin(), chosen.end());
  chosen.resize(static_cast<size_t>(n), -1);
  return chosen;
}

template <typename T>
struct Selection {
  const Batch& batch;
  Heads heads;
  Blocks blocks;
  int64_t num_blocks;
  double scale;
  Rows<T> q, k;
  std::vector<double> exact_lse;
  Guarded<Acc<T>> lse;
  nsa::BlockScoresParams params{};
  std::vector<double> exact;  // scores

  Selection(const Batch& b, const Heads& h, const Blocks& bl, int64_t slack, double q_size)
      : batch(b),
        heads(h),
        blocks(bl),
        num_blocks(0),
        scale(1 / std::sqrt(static_cast<double>(h.dim_qk))),
        q(b.total_q(), h.q, h.dim_qk, 1, 2),
        k(b.total_k() / bl.compressed.stride, h.kv, h.dim_qk, 3, 0),
        lse(b.total_q() * h.q) {
    q.randomize(3, q_size);
    k.randomize(4);
    const NaiveKeys keys = compressed(b, bl.compressed.block, bl.compressed.stride);
    for (int64_t r = b.cu_q.back(); r < b.total_q(); ++r) q.poison_row(r);
    std::vector<bool> is_block(static_cast<size_t>(k.rows()), false);
    for (int64_t s = 0; s < b.count(); ++s) {
      const KeyRange range = keys.range(s);
      if (b.q_lens[static_cast<size_t>(s)] == 0) continue;
      for (int64_t i = 0; i < range.count; ++i) is_block[static_cast<size_t>(range.first_row + i)] = true;
    }
    for (int64_t r = 0; r < k.rows(); ++r) {
      if (!is_block[static_cast<size_t>(r)]) k.poison_row(r);
    }
    Rows<T> v(k.rows(), h.kv, 1);
    v.randomize(5);
    exact_lse = naive_forward(b, {h.q, h.kv, h.dim_qk, 1}, keys, scale, q, k, v).lse;
    for (int64_t i = 0; i < lse.size(); ++i) lse.set(i, exact_lse[static_cast<size_t>(i)]);

    params.dtype = dtype_of<T>();
    params.seqs = b.params();
    if (b.offsets) params.seqs.max_seqlen_k += slack;  // without offsets it is the length itself
    num_blocks = (params.seqs.max_seqlen_k + bl.block_size - 1) / bl.block_size;
    params.shape = h.shape();
    params.keys = bl.compressed;
    params.block_size = bl.block_size;
    params.softmax_scale = scale;
    params.q = q.view();
    params.k_cmp = k.view();
    params.lse = lse.data();
    params.num_blocks = num_blocks;
    exact = naive_scores(batch, heads, blocks, num_blocks, scale, q, k, exact_lse);
  }

  std::string check_scores(int num_threads) {
    Guarded<Acc<T>> scores(batch.total_q() * heads.kv * num_blocks);
    for (int64_t i = batch.cu_q.back() * heads.kv * num_blocks; i < scores.size(); ++i) scores.set(i, 0);
    params.scores = scores.data();
    const nsa::Status status = nsa::cpu::block_scores(params, threads(num_threads));
    if (!status.ok()) return status.message;
    return !scores.intact() ? "wrote in front of the scores"
                            : mismatch("scores", scores.values(), exact, bound<Acc<T>, Acc<T>>());
  }

  // The chosen set may differ from the exact one only among blocks whose scores the arithmetic cannot tell
  // apart.
  std::string check_selection(int n, int num_initial, int num_local, int num_threads) {
    Guarded<int32_t> indices(batch.total_q() * heads.kv * n);
    for (int64_t i = 0; i < indices.size(); ++i)
      indices.data()[i] = i < batch.cu_q.back() * heads.kv * n ? 77 : -1;
    nsa::SelectBlocksParams p{};
    p.scoring = params;
    p.num_selected_blocks = n;
    p.num_initial_blocks = num_initial;
    p.num_local_blocks = num_local;
    p.block_indices = indices.data();
    const nsa::Status status = nsa::cpu::select_blocks(p, threads(num_threads));
    if (!status.ok()) return status.message;
    if (!indices.intact()) return "wrote in front of the indices";

    const double tolerance = std::is_same_v<T, double> ? 1e-13 : 1e-4;
    std::string wrong;
    for_each_query(batch, {heads.kv, heads.kv, 1, 1}, [&](const Query& query, int g) {
      const int64_t row = query.row * heads.kv + g;
      const double* row_scores = &exact[static_cast<size_t>(row * num_blocks)];
      const std::vector<int32_t> expected =
          naive_selection(row_scores, query.position / blocks.block_size, n, num_initial, num_local);
      const std::vector<int32_t> actual(indices.data() + row * n, indices.data() + (row + 1) * n);
      if (actual == expected) return;
      const auto sorted_scores = [&](const std::vector<int32_t>& set) {
        std::vector<double> out;
        for (int32_t j : set) out.push_back(j < 0 || j >= num_blocks ? -1 : row_scores[j]);
        std::sort(out.begin(), out.end());
        return out;
      };
      const bool tidy = std::is_sorted(actual.begin(), std::find(actual.begin(), actual.end(), -1)) &&
                        std::adjacent_find(actual.begin(), std::find(actual.begin(), actual.end(), -1)) ==
                            std::find(actual.begin(), actual.end(), -1);
      if (!tidy || !mismatch("", sorted_scores(actual), sorted_scores(expected), tolerance).empty()) {
        wrong = "query row " + std::to_string(query.row) + ", head " + std::to_string(g) + ":";
        for (int32_t j : actual) wrong += " " + std::to_string(j);
        wrong += ", expected";
        for (int32_t j : expected) wrong += " " + std::to_string(j);
      }
    });
    for (int64_t i = batch.cu_q.back() * heads.kv * n; i < indices.size(); ++i) {
      if (indices.data()[i] != -1) wrong = "wrote to a row of no query";
    }
    return wrong;
  }
};

const Blocks kBlocks[] = {{{32, 16}, 64}, {{16, 16}, 32}, {{9, 3}, 15},
                          {{64, 16}, 32}, {{4, 1}, 3},    {{8, 8}, 96}};
const Heads kHeads[] = {{4, 1, 32, 1}, {6, 2, 20, 1}, {3, 3, 1, 1}, {16, 1, 64, 1}};

std::vector<Batch> batches() {
  return {Batch({130}),
          Batch({33, 0, 5, 161}),
          Batch({20, 1, 0}, {175, 40, 64}, 6, 35),
          Batch({13}, {190}, 0, 11, false),
          Batch({}),
          Batch({0}, {0}, 3, 64)};
}

}  // namespace

TEMPLATE_TEST_CASE("block scores equal the naive loops", "[selection]", float, double, BF16) {
  for (const Batch& batch : batches()) {
    for (const Heads& heads : kHeads) {
      for (const Blocks& blocks : kBlocks) {
        CAPTURE(nsa::cpu::active_isa(), batch.count(), batch.total_k(), heads.q, heads.kv, heads.dim_qk,
                blocks.compressed.block, blocks.compressed.stride, blocks.block_size);
        CHECK(Selection<TestType>(batch, heads, blocks, 0, 1).check_scores(1) == "");
        CHECK(Selection<TestType>(batch, heads, blocks, 200, 3).check_scores(2) == "");
      }
    }
  }
}

TEMPLATE_TEST_CASE("the selection takes the forced and the best blocks", "[selection]", float, double, BF16) {
  struct Counts {
    int n, num_initial, num_local;
  };
  for (const Batch& batch : batches()) {
    for (const Heads& heads : kHeads) {
      for (const Blocks& blocks : kBlocks) {
        Selection<TestType> selection(batch, heads, blocks, 0, 2);
        for (const Counts& c :
             {Counts{4, 1, 2}, Counts{3, 1, 2}, Counts{2, 0, 0}, Counts{1, 0, 1}, Counts{20, 2, 0}}) {
          CAPTURE(nsa::cpu::active_isa(), batch.count(), batch.total_k(), heads.q, heads.kv, heads.dim_qk,
                  blocks.compressed.block, blocks.compressed.stride, blocks.block_size, c.n, c.num_initial,
                  c.num_local);
          CHECK(selection.check_selection(c.n, c.num_initial, c.num_local, 1) == "");
          CHECK(selection.check_selection(c.n, c.num_initial, c.num_local, 3) == "");
        }
      }
    }
  }
}

TEST_CASE("equal scores go to the lower block, and zero still qualifies", "[selection]") {
  // Equal keys give equal probabilities, so that every block of four whole strides scores the same.
  const Batch batch({160});
  const Heads heads{2, 1, 8, 1};
  Selection<double> selection(batch, heads, {{8, 8}, 16}, 0, 1);
  for (int64_t r = 0; r < selection.k.rows(); ++r) {
    for (int c = 0; c < 8; ++c) selection.k.memory().set(r * (8 + 3) + c, 0);
  }
  for (int64_t t = 0; t < 160; ++t) {
    for (int h = 0; h < 2; ++h) selection.lse.set(t * 2 + h, t < 7 ? -INFINITY : std::log((t + 1) / 8));
  }
  Guarded<int32_t> indices(160 * 3);
  nsa::SelectBlocksParams p{};
  p.scoring = selection.params;
  p.num_selected_blocks = 3;
  p.block_indices = indices.data();
  REQUIRE(nsa::cpu::select_blocks(p, threads(1)).ok());
  const auto row = [&](int64_t t) {
    return std::vector<int32_t>(indices.data() + t * 3, indices.data() + t * 3 + 3);
  };
  CHECK(row(159) == std::vector<int32_t>{0, 1, 2});
  CHECK(row(100) == std::vector<int32_t>{0, 1, 2});
  CHECK(row(20) ==
        std::vector<int32_t>{0, 1, -1});  // block 1 has no visible compressed block: its score is zero
  CHECK(row(3) == std::vector<int32_t>{0, -1, -1});
}
