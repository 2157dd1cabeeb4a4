// Compressed attention and the sliding window: keys are visible in one contiguous band per query.
//
// Forward: a tile of tokens x the heads of a KV group walks the key tiles of its band with a running softmax.
// Backward: the same walk with five products per tile. dQ belongs to the query tile; dK and dV go to a buffer
// of the unit that the tile is part of, and units are summed in a fixed order afterwards, whatever the number
// of threads.
#include "cpu/tiles.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

// Where a tile's queries stand and what they see.
struct Band {
  KeyBlocks keys;
  int64_t window, num_keys;
  Sequence seq;

  KeyRange of(int64_t query) const {
    const int64_t t = seq.position(query);
    return {keys.begin_visible(t, window), keys.end_visible(t)};
  }
  KeyRange of(const QueryTile& tile) const { return {of(tile.begin).lo, of(tile.begin + tile.count - 1).hi}; }
};

// The part of a query tile that sees something of a key tile.
struct TileView {
  int64_t first, last;  // tokens [first, last) of the query tile
  KeyRange keys;        // their union, within the key tile
};

inline KeyRange within(KeyRange r, int64_t begin, int64_t width) {
  return {max64(r.lo - begin, 0), min64(r.hi - begin, width)};
}

inline TileView view_of(const Band& band, const QueryTile& tile, int64_t key_begin, int64_t width) {
  TileView view{tile.count, 0, {0, 0}};
  for (int64_t i = 0; i < tile.count; ++i) {
    const KeyRange r = within(band.of(tile.begin + i), key_begin, width);
    if (r.empty()) continue;
    if (view.first > i) view.first = i;
    view.last = i + 1;
    view.keys = unite(view.keys, r);
  }
  return view;
}

inline int64_t tokens_per_tile(int group) { return max64(1, kTileRows / group); }

// The key tiles that some query of the batch sees: the others are never packed, so memory that nobody sees is
// not read.
inline bool tile_wanted(const SequenceBatch& seqs, const KeyTiles& tiles, KeyBlocks keys, int64_t window,
                        int64_t tile) {
  const int64_t b = tiles.sequence_of(tile, seqs.batch);
  const Sequence seq = seqs.sequence(b);
  if (seq.q_len == 0) return false;
  const int64_t begin = (tile - tiles.first(b)) * tiles.width();
  return begin + tiles.width() > keys.begin_visible(seq.position(0), window) &&
         begin < keys.end_visible(seq.k_len - 1);
}

template <typename A>
struct FwdScratch {
  Buffer<A> q, s, o, max, sum;

  FwdScratch(int64_t rows, int dim_qk, int64_t width_padded, int64_t dim_v_padded)
      : q(rows * dim_qk), s(rows * width_padded), o(rows * dim_v_padded), max(rows), sum(rows * kLanes<A>) {}
  explicit operator bool() const { return q && s && o && max && sum; }
};

template <typename T>
Status forward(const BandedAttentionFwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const int group = p.shape.group(), dim_qk = p.shape.head_dim_qk, dim_v = p.shape.head_dim_v;
  const int64_t tokens = tokens_per_tile(group), rows = tokens * group;
  const KeyTiles tiles(p.seqs, p.keys, kTileKeys);
  const Buffer<QueryTile> work = list_query_tiles(p.seqs, p.shape.num_heads_kv, tokens);
  if (!tiles || !work) return out_of_memory();
  const PackedKeys<A> k(tiles, p.shape.num_heads_kv, dim_qk, true),
      v(tiles, p.shape.num_heads_kv, dim_v, false);
  if (!k || !v) return out_of_memory();
  const auto wanted = [&](int64_t, int64_t tile) {
    return tile_wanted(p.seqs, tiles, p.keys, p.window, tile);
  };
  Status status =
      pack_keys<A, T>(k, tiles, p.seqs, p.keys, p.k, p.shape.num_heads_kv, dim_qk, true, parallel, wanted);
  if (!status.ok()) return status;
  status =
      pack_keys<A, T>(v, tiles, p.seqs, p.keys, p.v, p.shape.num_heads_kv, dim_v, false, parallel, wanted);
  if (!status.ok()) return status;

  const A scale = static_cast<A>(p.softmax_scale);
  const int64_t num_work = count_query_tiles(p.seqs, tokens) * p.shape.num_heads_kv;
  return parallel_tasks(
      parallel, num_work, [&] { return FwdScratch<A>(rows, dim_qk, k.ld, v.ld); },
      [&](FwdScratch<A>& scratch, int64_t task) {
        const QueryTile tile = work[task];
        const Sequence seq = p.seqs.sequence(tile.b);
        const Band band{p.keys, p.window, p.keys.count(seq.k_len), seq};
        const int64_t num_rows = tile.count * group;
        for (int64_t i = 0; i < tile.count; ++i) {
          load_heads<A, T>(scratch.q.get() + i * group * dim_qk, dim_qk, p.q, seq.q_begin + tile.begin + i,
                           tile.head * group, group, dim_qk, [&](int) { return scale; });
        }
        scratch.o.zero(num_rows * v.ld);
        scratch.sum.zero(num_rows * kLanes<A>);
        for (int64_t r = 0; r < num_rows; ++r) scratch.max[r] = kNegInf<A>;
        const auto softmax_state = [&](int64_t r) {
          return SoftmaxRow<A>{&scratch.max[r], &scratch.sum[r * kLanes<A>], &scratch.o[r * v.ld], v.ld};
        };

        const KeyRange all = band.of(tile);
        for (int64_t j = all.lo / kTileKeys; j * kTileKeys < all.hi; ++j) {
          const TileView view = view_of(band, tile, j * kTileKeys, kTileKeys);
          if (view.keys.empty()) continue;
          const KeyRange computed = widen<A>(view.keys);
          const int64_t r0 = view.first * group, m = (view.last - view.first) * group;
          A* s = scratch.s.get();
          gemm<A>(m, computed.hi - computed.lo, dim_qk,
                  {&scratch.q[r0 * dim_qk], dim_qk, 1,
                   k.tile(tile.head, tiles.first(tile.b) + j) + computed.lo, k.ld, s + computed.lo, k.ld},
                  false);
          for (int64_t i = view.first; i < view.last; ++i) {
            const KeyRange visible = within(band.of(tile.begin + i), j * kTileKeys, kTileKeys);
            for (int64_t r = i * group; r < (i + 1) * group; ++r) {
              softmax_row(s + (r - r0) * k.ld, visible, computed, softmax_state(r));
            }
          }
          gemm<A>(
              m, v.ld, view.keys.hi - view.keys.lo,
              {s + view.keys.lo, k.ld, 1, v.tile(tile.head, tiles.first(tile.b) + j) + view.keys.lo * v.ld,
               v.ld, &scratch.o[r0 * v.ld], v.ld},
              true);
        }
        for (int64_t r = 0; r < num_rows; ++r) {
          const int64_t row =
              (seq.q_begin + tile.begin + r / group) * p.shape.num_heads_q + tile.head * group + r % group;
          finish_row(softmax_state(r), dim_v, static_cast<T*>(p.o) + row * dim_v,
                     static_cast<A*>(p.lse) + row);
        }
      });
}

// Query tiles first_tile, first_tile + step, ... < last_tile of one sequence and head, with dK and dV of keys
// [begin, end).
struct Unit {
  int64_t b, head;
  int64_t first_tile, last_tile, step;
  int64_t key_begin, key_end;
  int64_t offset;  // rows before it in the buffers of all units
};

// With a window, a unit is a run of queries, whose keys are few. Without one every query may see all keys:
// the units deal the tiles out among them, so that all have the same work. Either way the buffers grow
// linearly with the sequence.
inline Buffer<Unit> list_units(const BandedAttentionBwdParams& p, int64_t tokens, int64_t* num_units,
                               int64_t* num_rows) {
  const int64_t spread = max64(4, min64(16, p.keys.stride));
  const int64_t run = max64(1, max64(256, p.window) / tokens);  // tiles
  const auto units_of = [&](const Sequence& seq) {
    const int64_t num_tiles = ceil_div(seq.q_len, tokens);
    return p.window > 0 ? ceil_div(num_tiles, run) : min64(num_tiles, spread);
  };
  *num_units = *num_rows = 0;
  for (int64_t b = 0; b < p.seqs.batch; ++b)
    *num_units += units_of(p.seqs.sequence(b)) * p.shape.num_heads_kv;
  Buffer<Unit> units(*num_units);
  if (!units) return units;
  int64_t n = 0;
  for (int64_t b = 0; b < p.seqs.batch; ++b) {
    const Sequence seq = p.seqs.sequence(b);
    const Band band{p.keys, p.window, p.keys.count(seq.k_len), seq};
    const int64_t count = units_of(seq), num_tiles = ceil_div(seq.q_len, tokens);
    for (int64_t head = 0; head < p.shape.num_heads_kv; ++head) {
      for (int64_t u = 0; u < count; ++u) {
        Unit unit{b, head, u, num_tiles, count, 0, 0, *num_rows};
        if (p.window > 0) {
          unit.first_tile = u * run;
          unit.last_tile = min64((u + 1) * run, num_tiles);
          unit.step = 1;
        }
        const int64_t last_query =
            min64(seq.q_len,
                  ((unit.last_tile - 1 - unit.first_tile) / unit.step * unit.step + unit.first_tile + 1) *
                      tokens) -
            1;
        unit.key_begin = band.of(unit.first_tile * tokens).lo;
        unit.key_end = max64(unit.key_begin, band.of(last_query).hi);
        *num_rows += unit.key_end - unit.key_begin;
        units[n++] = unit;
      }
    }
  }
  return units;
}

template <typename A>
struct BwdScratch {
  Buffer<A> q, d_o, p, ds, lse, delta, dq;

  BwdScratch(int64_t rows, int64_t width_padded, int64_t dim_qk_padded, int64_t dim_v_padded)
      : q(rows * dim_qk_padded),
        d_o(rows * dim_v_padded),
        p(rows * width_padded),
        ds(rows * width_padded),
        lse(rows),
        delta(rows),
        dq(rows * dim_qk_padded) {}
  explicit operator bool() const { return q && d_o && p && ds && lse && delta && dq; }
};

template <typename T>
Status backward(const BandedAttentionBwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const AttentionGrads& grads = p.grads;
  const int group = p.shape.group(), dim_qk = p.shape.head_dim_qk, dim_v = p.shape.head_dim_v;
  const int heads_kv = p.shape.num_heads_kv, heads_q = p.shape.num_heads_q;
  const int64_t tokens = tokens_per_tile(group), rows = tokens * group;
  const bool want_scores = grads.dq.wanted() || grads.dk != nullptr;

  const KeyTiles tiles(p.seqs, p.keys, kTileKeys);
  int64_t num_units = 0, num_rows = 0;
  const Buffer<Unit> units = list_units(p, tokens, &num_units, &num_rows);
  if (!tiles || !units) return out_of_memory();
  const auto wanted = [&](int64_t, int64_t tile) {
    return tile_wanted(p.seqs, tiles, p.keys, p.window, tile);
  };
  const PackedKeys<A> k_t(tiles, heads_kv, dim_qk, true);
  Status status =
      k_t ? pack_keys<A, T>(k_t, tiles, p.seqs, p.keys, p.k, heads_kv, dim_qk, true, parallel, wanted)
          : out_of_memory();
  if (!status.ok()) return status;
  PackedKeys<A> v_t, k;
  if (want_scores) {
    v_t = PackedKeys<A>(tiles, heads_kv, dim_v, true);
    status = v_t ? pack_keys<A, T>(v_t, tiles, p.seqs, p.keys, p.v, heads_kv, dim_v, true, parallel, wanted)
                 : out_of_memory();
    if (!status.ok()) return status;
  }
  if (grads.dq.wanted()) {
    k = PackedKeys<A>(tiles, heads_kv, dim_qk, false);
    status = k ? pack_keys<A, T>(k, tiles, p.seqs, p.keys, p.k, heads_kv, dim_qk, false, parallel, wanted)
               : out_of_memory();
    if (!status.ok()) return status;
  }
  const int64_t ld = k_t.ld, ld_qk = pad_lanes<A>(dim_qk), ld_v = pad_lanes<A>(dim_v);
  const Buffer<A> unit_dk(grads.dk ? num_rows * ld_qk : 0), unit_dv(grads.dv ? num_rows * ld_v : 0);
  if (!unit_dk || !unit_dv) return out_of_memory();

  const A scale = static_cast<A>(p.softmax_scale);
  const A* lse = static_cast<const A*>(grads.lse);
  const A* delta = static_cast<const A*>(grads.delta);
  const A* d_o_scale = static_cast<const A*>(grads.d_o_scale);
  status = parallel_tasks(
      parallel, num_units, [&] { return BwdScratch<A>(rows, ld, ld_qk, ld_v); },
      [&](BwdScratch<A>& scratch, int64_t task) {
        const Unit unit = units[task];
        const Sequence seq = p.seqs.sequence(unit.b);
        const Band band{p.keys, p.window, p.keys.count(seq.k_len), seq};
        A* dk = grads.dk ? unit_dk.get() + unit.offset * ld_qk : nullptr;
        A* dv = grads.dv ? unit_dv.get() + unit.offset * ld_v : nullptr;
        const size_t unit_keys = static_cast<size_t>(unit.key_end - unit.key_begin);
        if (dk) std::memset(dk, 0, unit_keys * ld_qk * sizeof(A));
        if (dv) std::memset(dv, 0, unit_keys * ld_v * sizeof(A));

        for (int64_t index = unit.first_tile; index < unit.last_tile; index += unit.step) {
          const QueryTile tile{unit.b, unit.head, index * tokens, min64(tokens, seq.q_len - index * tokens)};
          const KeyRange all = band.of(tile);
          if (all.empty() && !grads.dq.wanted()) continue;
          for (int64_t i = 0; i < tile.count; ++i) {
            const int64_t token = seq.q_begin + tile.begin + i, row = token * heads_q + unit.head * group;
            load_heads<A, T>(&scratch.q[i * group * ld_qk], ld_qk, p.q, token, unit.head * group, group,
                             dim_qk, [&](int) { return scale; });
            load_heads<A, T>(&scratch.d_o[i * group * ld_v], ld_v, grads.d_o, token, unit.head * group, group,
                             dim_v, [&](int g) { return d_o_scale ? d_o_scale[row + g] : A(1); });
            for (int g = 0; g < group; ++g) {
              scratch.lse[i * group + g] = lse[row + g];
              scratch.delta[i * group + g] = delta[row + g];
            }
          }
          if (grads.dq.wanted()) scratch.dq.zero(tile.count * group * ld_qk);

          for (int64_t j = all.lo / kTileKeys; j * kTileKeys < all.hi; ++j) {
            const TileView view = view_of(band, tile, j * kTileKeys, kTileKeys);
            if (view.keys.empty()) continue;
            const KeyRange computed = widen<A>(view.keys);
            const int64_t r0 = view.first * group, m = (view.last - view.first) * group,
                          n = computed.hi - computed.lo;
            const int64_t key_tile = tiles.first(unit.b) + j, num_keys = view.keys.hi - view.keys.lo;
            A *prob = scratch.p.get(), *ds = scratch.ds.get();
            const A *q = &scratch.q[r0 * ld_qk], *d_o = &scratch.d_o[r0 * ld_v];
            gemm<A>(m, n, dim_qk,
                    {q, ld_qk, 1, k_t.tile(unit.head, key_tile) + computed.lo, ld, prob + computed.lo, ld},
                    false);
            if (want_scores) {
              gemm<A>(m, n, dim_v,
                      {d_o, ld_v, 1, v_t.tile(unit.head, key_tile) + computed.lo, ld, ds + computed.lo, ld},
                      false);
            }
            for (int64_t i = view.first; i < view.last; ++i) {
              const KeyRange visible = within(band.of(tile.begin + i), j * kTileKeys, kTileKeys);
              for (int64_t r = i * group; r < (i + 1) * group; ++r) {
                A *prob_row = prob + (r - r0) * ld, *ds_row = ds + (r - r0) * ld;
                probability_row(prob_row, visible, computed, scratch.lse[r]);
                if (want_scores) score_grad_row(ds_row, prob_row, visible, computed, scratch.delta[r]);
              }
            }
            const int64_t unit_row = j * kTileKeys + view.keys.lo - unit.key_begin;
            if (dv)
              gemm<A>(num_keys, ld_v, m, {prob + view.keys.lo, 1, ld, d_o, ld_v, dv + unit_row * ld_v, ld_v},
                      true);
            if (dk)
              gemm<A>(num_keys, ld_qk, m, {ds + view.keys.lo, 1, ld, q, ld_qk, dk + unit_row * ld_qk, ld_qk},
                      true);
            if (grads.dq.wanted()) {
              gemm<A>(m, ld_qk, num_keys,
                      {ds + view.keys.lo, ld, 1, k.tile(unit.head, key_tile) + view.keys.lo * ld_qk, ld_qk,
                       &scratch.dq[r0 * ld_qk], ld_qk},
                      true);
            }
          }
          if (grads.dq.wanted()) {
            for (int64_t r = 0; r < tile.count * group; ++r) {
              const int64_t row =
                  (seq.q_begin + tile.begin + r / group) * heads_q + unit.head * group + r % group;
              put_query_grads<A, T>(grads.dq, row, dim_qk, scale, &scratch.dq[r * ld_qk]);
            }
          }
        }
      });
  if (!status.ok() || (!grads.dk && !grads.dv)) return status;

  // Sum the units' parts, key tile by key tile, in the order of the units.
  Buffer<int64_t> first_unit(p.seqs.batch * heads_kv + 1);
  if (!first_unit) return out_of_memory();
  for (int64_t i = 0, u = 0; i <= p.seqs.batch * heads_kv; ++i) {
    first_unit[i] = u;
    while (u < num_units && units[u].b * heads_kv + units[u].head == i) ++u;
  }
  return parallel_tasks(parallel, heads_kv * tiles.total(), [&](int64_t task) {
    const int64_t head = task / tiles.total(), tile = task % tiles.total();
    const int64_t b = tiles.sequence_of(tile, p.seqs.batch);
    const Sequence seq = p.seqs.sequence(b);
    const int64_t begin = (tile - tiles.first(b)) * kTileKeys,
                  end = min64(begin + kTileKeys, p.keys.count(seq.k_len));
    const auto add = [&](A* dst, const A* src, int64_t dst_row, int64_t src_row, int dim, int64_t src_ld) {
      for (int d = 0; d < dim; ++d) dst[(dst_row * heads_kv + head) * dim + d] += src[src_row * src_ld + d];
    };
    for (int64_t u = first_unit[b * heads_kv + head]; u < first_unit[b * heads_kv + head + 1]; ++u) {
      const Unit& unit = units[u];
      for (int64_t key = max64(begin, unit.key_begin); key < min64(end, unit.key_end); ++key) {
        const int64_t dst_row = p.keys.first_row(seq.k_begin) + key,
                      src_row = unit.offset + key - unit.key_begin;
        if (grads.dk) add(static_cast<A*>(grads.dk), unit_dk.get(), dst_row, src_row, dim_qk, ld_qk);
        if (grads.dv) add(static_cast<A*>(grads.dv), unit_dv.get(), dst_row, src_row, dim_v, ld_v);
      }
    }
  });
}

}  // namespace

Status banded_attention_forward(const BandedAttentionFwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() { return forward<T>(p, parallel); });
}

Status banded_attention_backward(const BandedAttentionBwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() { return backward<T>(p, parallel); });
}

Status banded_branches_backward(const BandedBranchesBwdParams& p, const Parallel& parallel) {
  Status status;
  for (const BandedAttentionBwdParams& branch : p.branch) {
    if (status.ok()) status = NSA_CPU_ISA::banded_attention_backward(branch, parallel);
  }
  return status;
}

}  // namespace nsa::cpu::NSA_CPU_ISA
