// Importance of selection blocks, and the selection.
//
// Both walk the compressed keys of a query tile with the final lse, sum the probabilities over the heads of a
// group and spread them over the selection blocks by overlap. select_blocks keeps the scores of one query
// tile only.
#include "cpu/selection.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

constexpr int64_t kScoreRows = 64;  // query rows of a tile

template <typename A>
struct ScoreScratch {
  Buffer<A> q, s, p, scores, best_score;
  Buffer<int32_t> best_block;

  ScoreScratch(int64_t tokens, int group, int dim, int64_t ld, int64_t num_blocks, int num_best)
      : q(tokens * group * dim),
        s(tokens * group * ld),
        p(ld),
        scores(tokens * num_blocks),
        best_score(num_best),
        best_block(num_best) {}
  explicit operator bool() const { return q && s && p && scores && best_score && best_block; }
};

// scores[token][0 .. own] of the tile's tokens; use(token, position, scores) for each.
template <typename T, typename Use>
Status for_each_score_row(const BlockScoresParams& p, int num_best, const Parallel& parallel,
                          const Use& use) {
  using A = Acc<T>;
  const int group = p.shape.group(), dim = p.shape.head_dim_qk, heads_q = p.shape.num_heads_q,
            heads_kv = p.shape.num_heads_kv;
  const int64_t tokens = max64(1, kScoreRows / group);
  const KeyTiles tiles(p.seqs, p.keys, kTileKeys);
  const Buffer<QueryTile> work = list_query_tiles(p.seqs, heads_kv, tokens);
  if (!tiles || !work) return out_of_memory();
  const PackedKeys<A> k(tiles, heads_kv, dim, true);
  if (!k) return out_of_memory();
  const Status status = pack_keys<A, T>(
      k, tiles, p.seqs, p.keys, p.k_cmp, heads_kv, dim, true, parallel, [&](int64_t, int64_t tile) {
        return p.seqs.sequence(tiles.sequence_of(tile, p.seqs.batch)).q_len > 0;
      });
  if (!status.ok()) return status;

  const A scale = static_cast<A>(p.softmax_scale);
  const A* lse = static_cast<const A*>(p.lse);
  const int64_t num_work = count_query_tiles(p.seqs, tokens) * heads_kv;
  return parallel_tasks(
      parallel, num_work, [&] { return ScoreScratch<A>(tokens, group, dim, k.ld, p.num_blocks, num_best); },
      [&](ScoreScratch<A>& scratch, int64_t task) {
        const QueryTile tile = work[task];
        const Sequence seq = p.seqs.sequence(tile.b);
        for (int64_t i = 0; i < tile.count; ++i) {
          load_heads<A, T>(&scratch.q[i * group * dim], dim, p.q, seq.q_begin + tile.begin + i,
                           tile.head * group, group, dim, [&](int) { return scale; });
        }
        scratch.scores.zero(tile.count * p.num_blocks);
        const int64_t end = p.keys.end_visible(seq.position(tile.begin + tile.count - 1));
        for (int64_t j = 0; j * kTileKeys < end; ++j) {
          const KeyRange computed = widen<A>({0, min64(kTileKeys, end - j * kTileKeys)});
          gemm<A>(tile.count * group, computed.hi, dim,
                  {scratch.q.get(), dim, 1, k.tile(tile.head, tiles.first(tile.b) + j), k.ld, scratch.s.get(),
                   k.ld},
                  false);
          for (int64_t i = 0; i < tile.count; ++i) {
            const int64_t visible =
                min64(kTileKeys, p.keys.end_visible(seq.position(tile.begin + i)) - j * kTileKeys);
            if (visible <= 0) continue;
            const int64_t row = (seq.q_begin + tile.begin + i) * heads_q + tile.head * group;
            add_tile_scores(&scratch.s[i * group * k.ld], k.ld, group, lse + row, visible, scratch.p.get(),
                            p.keys, j * kTileKeys, p.block_size, &scratch.scores[i * p.num_blocks]);
          }
        }
        for (int64_t i = 0; i < tile.count; ++i) {
          use(scratch, seq.q_begin + tile.begin + i, tile.head, seq.position(tile.begin + i),
              &scratch.scores[i * p.num_blocks]);
        }
      });
}

template <typename T>
Status select(const SelectBlocksParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const BlockScoresParams& scoring = p.scoring;
  const int n = p.num_selected_blocks;
  return for_each_score_row<T>(
      scoring, n, parallel,
      [&](ScoreScratch<A>& scratch, int64_t row, int64_t head, int64_t position, const A* scores) {
        int32_t* out = p.block_indices + (row * scoring.shape.num_heads_kv + head) * n;
        choose_blocks(scores, position / scoring.block_size, n, p.num_initial_blocks, p.num_local_blocks,
                      scratch.best_score.get(), scratch.best_block.get(), out);
      });
}

}  // namespace

Status block_scores(const BlockScoresParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    return for_each_score_row<T>(
        p, 0, parallel, [&](ScoreScratch<A>&, int64_t row, int64_t head, int64_t, const A* scores) {
          std::memcpy(static_cast<A*>(p.scores) + (row * p.shape.num_heads_kv + head) * p.num_blocks, scores,
                      static_cast<size_t>(p.num_blocks) * sizeof(A));
        });
  });
}

Status select_blocks(const SelectBlocksParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.scoring.dtype, [&]<typename T>() { return select<T>(p, parallel); });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
