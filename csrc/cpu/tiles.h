// What the attention kernels share: keys packed into tiles, query tiles, and the softmax of a tile.
#pragma once

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileRows = 128;  // query rows (tokens x heads of a group) of a banded tile

template <typename A>
constexpr int64_t pad_lanes(int64_t n) {
  return round_up(n, kLanes<A>);
}

// The sequences of a batch, cut into tiles of `width` keys that never straddle two sequences.
class KeyTiles {
 public:
  KeyTiles(const SequenceBatch& seqs, KeyBlocks keys, int64_t width) : width_(width), first_(seqs.batch + 1) {
    if (!first_) return;
    first_[0] = 0;
    for (int64_t b = 0; b < seqs.batch; ++b)
      first_[b + 1] = first_[b] + ceil_div(keys.count(seqs.sequence(b).k_len), width);
    total_ = first_[seqs.batch];
  }
  explicit operator bool() const { return static_cast<bool>(first_); }
  int64_t width() const { return width_; }
  int64_t total() const { return total_; }
  int64_t first(int64_t b) const { return first_[b]; }
  // The sequence that holds a tile.
  int64_t sequence_of(int64_t tile, int64_t batch) const {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= tile ? low : high) = middle;
    }
    return low;  // the last one that begins at or before the tile: empty sequences have none
  }

 private:
  int64_t width_ = 0, total_ = 0;
  Buffer<int64_t> first_;
};

// One operand (k or v) of all tiles, as accumulators: zeros behind the last key of a sequence, so that
// nothing outside of a sequence is ever multiplied.
//   transposed: [Hkv][tile][dim][width padded]   lanes along the keys, for scores and dP
//   natural:    [Hkv][tile][width][dim padded]   lanes along the channels, for outputs and dQ
template <typename A>
struct PackedKeys {
  Buffer<A> data;
  int64_t tile_size = 0, num_tiles = 0;
  int64_t ld = 0;

  PackedKeys() = default;
  PackedKeys(const KeyTiles& tiles, int num_heads, int dim, bool transposed)
      : tile_size(transposed ? dim * pad_lanes<A>(tiles.width()) : tiles.width() * pad_lanes<A>(dim)),
        num_tiles(tiles.total()),
        ld(transposed ? pad_lanes<A>(tiles.width()) : pad_lanes<A>(dim)) {
    data = Buffer<A>(num_heads * num_tiles * tile_size);
  }
  explicit operator bool() const { return static_cast<bool>(data); }
  A* tile(int64_t head, int64_t index) const { return data.get() + (head * num_tiles + index) * tile_size; }
};

template <typename A, typename T>
inline void pack_natural(A* dst, int64_t ld, const T* src, int64_t stride, int64_t count, int64_t width,
                         int dim) {
  for (int64_t n = 0; n < count; ++n) load_row(dst + n * ld, src + n * stride, dim, ld);
  std::memset(dst + count * ld, 0, static_cast<size_t>((width - count) * ld) * sizeof(A));
}

template <typename A, typename T>
inline void pack_transposed(A* dst, int64_t ld, const T* src, int64_t stride, int64_t count, int dim) {
  constexpr int64_t kBlock = 16;  // a block of both sides stays in the first-level cache
  for (int64_t n0 = 0; n0 < ld; n0 += kBlock) {
    const int64_t n1 = min64(n0 + kBlock, ld), filled = max64(n0, min64(n1, count));
    for (int d = 0; d < dim; ++d) {
      A* row = dst + d * ld;
      for (int64_t n = n0; n < filled; ++n) row[n] = convert<A>(src[n * stride + d]);
      for (int64_t n = filled; n < n1; ++n) row[n] = 0;
    }
  }
}

// Packs one operand: every tile for which wanted(head, tile of the whole batch) holds.
template <typename A, typename T, typename Wanted>
Status pack_keys(const PackedKeys<A>& packed, const KeyTiles& tiles, const SequenceBatch& seqs,
                 KeyBlocks keys, RowsView view, int num_heads, int dim, bool transposed,
                 const Parallel& parallel, const Wanted& wanted) {
  return parallel_tasks(parallel, num_heads * tiles.total(), [&](int64_t task) {
    const int64_t head = task / tiles.total(), tile = task % tiles.total();
    if (!wanted(head, tile)) return;
    const int64_t b = tiles.sequence_of(tile, seqs.batch);
    const Sequence seq = seqs.sequence(b);
    const int64_t begin = (tile - tiles.first(b)) * tiles.width();
    const int64_t count = min64(tiles.width(), keys.count(seq.k_len) - begin);
    const T* src = static_cast<const T*>(view.data) +
                   (keys.first_row(seq.k_begin) + begin) * view.stride_row + head * view.stride_head;
    if (transposed) {
      pack_transposed(packed.tile(head, tile), packed.ld, src, view.stride_row, count, dim);
    } else {
      pack_natural(packed.tile(head, tile), packed.ld, src, view.stride_row, count, tiles.width(), dim);
    }
  });
}

// Tokens of one sequence that are worked on together, and the list of all such tiles of a batch.
struct QueryTile {
  int64_t b;      // sequence
  int64_t head;   // KV head
  int64_t begin;  // first query of the sequence
  int64_t count;  // queries
};

inline int64_t count_query_tiles(const SequenceBatch& seqs, int64_t tokens) {
  int64_t n = 0;
  for (int64_t b = 0; b < seqs.batch; ++b) n += ceil_div(seqs.sequence(b).q_len, tokens);
  return n;
}

// Head by head, so that the keys of one head stay in the cache; late tiles, which see the most keys, first.
inline Buffer<QueryTile> list_query_tiles(const SequenceBatch& seqs, int num_heads_kv, int64_t tokens) {
  Buffer<QueryTile> list(count_query_tiles(seqs, tokens) * num_heads_kv);
  if (!list) return list;
  int64_t n = 0;
  for (int64_t head = 0; head < num_heads_kv; ++head) {
    for (int64_t b = 0; b < seqs.batch; ++b) {
      const int64_t q_len = seqs.sequence(b).q_len;
      for (int64_t i = ceil_div(q_len, tokens) - 1; i >= 0; --i) {
        list[n++] = {b, head, i * tokens, min64(tokens, q_len - i * tokens)};
      }
    }
  }
  return list;
}

// Rows of one token and KV group: dst[g][0 .. ld) = factor_g * src[head * group + g][:], zero padded.
template <typename A, typename T, typename Factor>
inline void load_heads(A* dst, int64_t ld, RowsView view, int64_t token, int64_t first_head, int group,
                       int dim, const Factor& factor) {
  for (int g = 0; g < group; ++g) {
    const T* src =
        static_cast<const T*>(view.data) + token * view.stride_row + (first_head + g) * view.stride_head;
    A* row = dst + g * ld;
    const A f = factor(g);
    for (int d = 0; d < dim; ++d) row[d] = f * convert<A>(src[d]);
    for (int64_t d = dim; d < ld; ++d) row[d] = 0;
  }
}

// Keys [lo, hi) of a tile, seen by a row.
struct KeyRange {
  int64_t lo, hi;
  bool empty() const { return lo >= hi; }
};

inline KeyRange unite(KeyRange a, KeyRange b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {min64(a.lo, b.lo), max64(a.hi, b.hi)};
}

// Whole vectors around a range.
template <typename A>
inline KeyRange widen(KeyRange r) {
  return {r.lo / kLanes<A> * kLanes<A>, pad_lanes<A>(r.hi)};
}

template <typename A>
inline void mask_row(A* s, KeyRange visible, KeyRange computed, A value) {
  for (int64_t n = computed.lo; n < visible.lo; ++n) s[n] = value;
  for (int64_t n = max64(visible.hi, computed.lo); n < computed.hi; ++n) s[n] = value;
}

// Running softmax of one row: the largest score so far, the sum of exp(score - max) (lane by lane) and the
// unnormalised output. Scores come with the softmax scale in them (q is scaled when it is loaded), so that
// score - max and score - lse are taken before anything else is rounded: what is left of a difference of two
// large numbers is exact.
template <typename A>
struct SoftmaxRow {
  A* max;  // one
  A* sum;  // kLanes
  A* o;    // [dim padded]
  int64_t o_ld;
};

// s[computed] holds scores; they become unnormalised probabilities, and the row's state follows.
template <typename A>
inline void softmax_row(A* s, KeyRange visible, KeyRange computed, SoftmaxRow<A> row) {
  constexpr int kL = kLanes<A>;
  if (visible.empty()) {
    for (int64_t n = computed.lo; n < computed.hi; n += kL) store(s + n, Vec<A>{});
    return;
  }
  mask_row(s, visible, computed, kNegInf<A>);
  Vec<A> high = load(s + computed.lo);
  for (int64_t n = computed.lo + kL; n < computed.hi; n += kL) high = vmax(load(s + n), high);
  const A old_max = *row.max;
  const A tile_max = reduce_max<A>(high);
  Vec<A> sum = load(row.sum);
  A max = old_max;
  if (!(tile_max <= old_max)) {  // a NaN goes on as one
    max = tile_max;
    if (old_max > kNegInf<A>) {
      const Vec<A> shrink = exp2<A>(broadcast((old_max - max) * static_cast<A>(kLog2e)));
      sum *= shrink;
      for (int64_t d = 0; d < row.o_ld; d += kL) store(row.o + d, load(row.o + d) * shrink);
    }
    *row.max = max;
  }
  for (int64_t n = computed.lo; n < computed.hi; n += kL) {
    const Vec<A> p = exp2<A>((load(s + n) - max) * static_cast<A>(kLog2e));
    sum += p;
    store(s + n, p);
  }
  store(row.sum, sum);
}

// The end of a row: out = o / sum as storage, lse in natural units. A row that saw nothing has o = 0 and lse
// = -inf.
template <typename A, typename T>
inline void finish_row(SoftmaxRow<A> row, int dim, T* out, A* lse) {
  if (*row.max == kNegInf<A>) {
    for (int d = 0; d < dim; ++d) out[d] = convert<T>(A(0));
    *lse = kNegInf<A>;
    return;
  }
  const A sum = reduce_sum<A>(load(row.sum));
  const A inverse = 1 / sum;
  for (int d = 0; d < dim; ++d) out[d] = convert<T>(row.o[d] * inverse);
  *lse = *row.max + static_cast<A>(__builtin_log(static_cast<double>(sum)));
}

// s[computed] holds scores; they become probabilities under the final lse. Masked keys get
// zero.
template <typename A>
inline void probability_row(A* s, KeyRange visible, KeyRange computed, A lse) {
  constexpr int kL = kLanes<A>;
  if (visible.empty()) {
    for (int64_t n = computed.lo; n < computed.hi; n += kL) store(s + n, Vec<A>{});
    return;
  }
  mask_row(s, visible, computed, kNegInf<A>);
  for (int64_t n = computed.lo; n < computed.hi; n += kL)
    store(s + n, exp2<A>((load(s + n) - lse) * static_cast<A>(kLog2e)));
}

// dp[computed] becomes the gradient of the scores, p * (dP - delta); exactly zero where masked, whatever dP
// holds there.
template <typename A>
inline void score_grad_row(A* dp, const A* p, KeyRange visible, KeyRange computed, A delta) {
  constexpr int kL = kLanes<A>;
  if (!visible.empty()) {
    for (int64_t n = computed.lo; n < computed.hi; n += kL)
      store(dp + n, load(p + n) * (load(dp + n) - delta));
  }
  mask_row(dp, visible.empty() ? KeyRange{computed.hi, computed.hi} : visible, computed, A(0));
}

// factor * own as this branch's dQ of one row of [T, Hq].
template <typename A, typename T>
inline void put_query_grads(const QueryGrads& grads, int64_t row, int dim, A factor, const A* own) {
  A* sum = static_cast<A*>(grads.sum) + (grads.sum ? row * dim : 0);
  T* result = static_cast<T*>(grads.result) + (grads.result ? row * dim : 0);
  for (int d = 0; d < dim; ++d) {
    const A x = grads.begun ? sum[d] + factor * own[d] : factor * own[d];
    if (grads.result) {
      result[d] = convert<T>(x);
    } else {
      sum[d] = x;
    }
  }
}

}  // namespace nsa::cpu::NSA_CPU_ISA
