// From the scores of compressed keys to selected blocks, a query token at a time.
#pragma once

#include "cpu/tiles.h"

namespace nsa::cpu::NSA_CPU_ISA {

// scores[j] += overlap(i, j) / stride * prob[i - first] for the compressed blocks first .. first + count - 1.
template <typename A>
inline void add_overlaps(KeyBlocks keys, int64_t block_size, A* scores, const A* prob, int64_t first,
                         int64_t count) {
  const int64_t length = keys.block, stride = keys.stride;
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

// The share of a tile of keys, first .. first + visible - 1, in a token's block scores. s[group][ld] holds
// the logits of its heads, lse[group] their final lse; prob[ld] is scratch.
template <typename A>
inline void add_tile_scores(const A* s, int64_t ld, int group, const A* lse, int64_t visible, A* prob,
                            KeyBlocks keys, int64_t first, int64_t block_size, A* scores) {
  for (int64_t key = 0; key < visible; key += kLanes<A>) {
    Vec<A> sum{};
    for (int g = 0; g < group; ++g)
      sum += exp2<A>((load(s + g * ld + key) - lse[g]) * static_cast<A>(kLog2e));
    store(prob + key, sum);
  }
  add_overlaps(keys, block_size, scores, prob, first, visible);
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

// The selection of a token whose own block is `own`: out[n] ascending, -1 at the end. best_score[n] and
// best_block[n] are scratch.
template <typename A>
inline void choose_blocks(const A* scores, int64_t own, int n, int num_initial, int num_local, A* best_score,
                          int32_t* best_block, int32_t* out) {
  // Forced: [0, initial) and [local, own]; the candidates between compete for the other slots.
  const int64_t initial = min64(num_initial, own + 1), local = max64(initial, own + 1 - num_local);
  const int free_slots = static_cast<int>(min64(n - initial - (own + 1 - local), local - initial));
  top_scores(scores, initial, local, free_slots, best_score, best_block);
  for (int i = 1; i < free_slots; ++i) {  // ascending
    const int32_t x = best_block[i];
    int at = i;
    for (; at > 0 && best_block[at - 1] > x; --at) best_block[at] = best_block[at - 1];
    best_block[at] = x;
  }
  int at = 0;
  for (int64_t j = 0; j < initial; ++j) out[at++] = static_cast<int32_t>(j);
  for (int i = 0; i < free_slots; ++i) out[at++] = best_block[i];
  for (int64_t j = local; j <= own; ++j) out[at++] = static_cast<int32_t>(j);
  while (at < n) out[at++] = -1;
}

}  // namespace nsa::cpu::NSA_CPU_ISA
