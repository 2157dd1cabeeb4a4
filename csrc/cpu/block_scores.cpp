// Importance of selection blocks, and the selection.
//
// Both walk the compressed keys of a query tile with the final lse, sum the probabilities over the heads of a
// group and spread them over the selection blocks by overlap. select_blocks keeps the scores of one query
// tile only.
#include "cpu/tiles.h"

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

// scores[j] += overlap(i, j) / stride * prob[i - first] for the compressed blocks first .. first + count - 1.
template <typename A>
inline void add_overlaps(const BlockScoresParams& p, A* scores, const A* prob, int64_t first, int64_t count) {
  const int64_t length = p.keys.block, stride = p.keys.stride, block_size = p.block_size;
  const A inverse_stride = A(1) / static_cast<A>(stride);
  int64_t begin = first * stride, j = begin / block_size;
  for (int64_t i = 0; i < count; ++i, begin += stride) {
    while ((j + 1) * block_size <= begin) ++j;
    const int64_t in_first = min64(length, (j + 1) * block_size - begin);
    const A unit = prob[i] * inverse_stride;
    scores[j] += unit * static_cast<A>(in_first);
    for (int64_t rest = length - in_first, next = j + 1; rest > 0; rest -= block_size, ++next) {
      scores[next] += unit * static_cast<A>(min64(rest, block_size));
    }
  }
}

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
            for (int64_t key = 0; key < computed.hi; key += kLanes<A>) {
              Vec<A> sum{};
              for (int g = 0; g < group; ++g) {
                sum += exp2<A>((load(&scratch.s[(i * group + g) * k.ld + key]) - lse[row + g]) *
                               static_cast<A>(kLog2e));
              }
              store(&scratch.p[key], sum);
            }
            add_overlaps(p, &scratch.scores[i * p.num_blocks], scratch.p.get(), j * kTileKeys, visible);
          }
        }
        for (int64_t i = 0; i < tile.count; ++i) {
          use(scratch, seq.q_begin + tile.begin + i, tile.head, seq.position(tile.begin + i),
              &scratch.scores[i * p.num_blocks]);
        }
      });
}

// The `count` highest of scores[begin, end) into block[]/score[], which hold them by falling score, ties by
// rising index.
template <typename A>
inline void top_scores(const A* scores, int64_t begin, int64_t end, int count, A* score, int32_t* block) {
  int held = 0;
  for (int64_t j = begin; j < end && count > 0; ++j) {
    const A x = scores[j];
    if (held == count && !(x > score[held - 1])) continue;
    int at = held < count ? held++ : held - 1;
    for (; at > 0 && x > score[at - 1]; --at) {
      score[at] = score[at - 1];
      block[at] = block[at - 1];
    }
    score[at] = x;
    block[at] = static_cast<int32_t>(j);
  }
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
        // Forced: [0, initial) and [local, own]; the candidates between compete for the other slots.
        const int64_t own = position / scoring.block_size;
        const int64_t initial = min64(p.num_initial_blocks, own + 1),
                      local = max64(initial, own + 1 - p.num_local_blocks);
        const int free_slots = static_cast<int>(min64(n - initial - (own + 1 - local), local - initial));
        top_scores(scores, initial, local, free_slots, scratch.best_score.get(), scratch.best_block.get());
        int32_t* chosen = scratch.best_block.get();
        for (int i = 1; i < free_slots; ++i) {  // ascending
          const int32_t x = chosen[i];
          int at = i;
          for (; at > 0 && chosen[at - 1] > x; --at) chosen[at] = chosen[at - 1];
          chosen[at] = x;
        }
        int at = 0;
        for (int64_t j = 0; j < initial; ++j) out[at++] = static_cast<int32_t>(j);
        for (int i = 0; i < free_slots; ++i) out[at++] = chosen[i];
        for (int64_t j = local; j <= own; ++j) out[at++] = static_cast<int32_t>(j);
        while (at < n) out[at++] = -1;
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
