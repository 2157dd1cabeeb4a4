// Attention over the blocks that each query and KV head chose.
//
// Forward: query by query, the heads of a group against one block after the other.
// Backward: a chunk of queries at a time. First block by block over the queries that chose it (dK, dV, and dS
// kept for the chunk), then query by query (dQ from dS). Nobody shares an accumulator, so the order of every
// sum is fixed.
#include "cpu/tiles.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

constexpr int64_t kGroupRows = 64;  // query rows that meet a block together in the backward
constexpr int64_t kScoreGradBytes = int64_t{32} << 20;  // dS of a chunk of queries
constexpr int64_t kMaxChunkTokens = 4096;

// Selection blocks as key tiles. Blocks longer than kTileKeys are cut into `parts` tiles of equal width.
struct BlockTiling {
  int64_t block_size, parts, width;

  explicit BlockTiling(int64_t block_size)
      : block_size(block_size), parts(ceil_div(block_size, kTileKeys)), width(ceil_div(block_size, parts)) {}
};

// The row of block_indices as a set: ascending, without repeats and numbers outside 0 .. own. Returns its
// size.
inline int normalise_row(const int32_t* row, int n, int64_t own, int32_t* out) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t j = row[i];
    if (j < 0 || j > own) continue;
    int at = count;
    while (at > 0 && out[at - 1] > j) --at;
    if (at > 0 && out[at - 1] == j) continue;
    for (int k = count; k > at; --k) out[k] = out[k - 1];
    out[at] = j;
    ++count;
  }
  return count;
}

// All that is known of one query token.
struct Token {
  int64_t row;       // of q
  int64_t position;  // in its sequence
  int64_t sequence;
  int64_t own;  // its block
};

struct Batch {
  SequenceBatch seqs;
  int64_t block_size;
  Buffer<int64_t> first_block;  // [batch + 1], over the whole batch
  Buffer<int64_t> first_query;  // [batch + 1], counting only rows inside sequences

  Batch(const SequenceBatch& seqs, int64_t block_size)
      : seqs(seqs), block_size(block_size), first_block(seqs.batch + 1), first_query(seqs.batch + 1) {
    if (!*this) return;
    first_block[0] = first_query[0] = 0;
    for (int64_t b = 0; b < seqs.batch; ++b) {
      const Sequence seq = seqs.sequence(b);
      first_block[b + 1] = first_block[b] + ceil_div(seq.k_len, block_size);
      first_query[b + 1] = first_query[b] + seq.q_len;
    }
  }
  explicit operator bool() const { return first_block && first_query; }
  int64_t num_blocks() const { return first_block[seqs.batch]; }
  int64_t num_queries() const { return first_query[seqs.batch]; }

  static int64_t find(const Buffer<int64_t>& first, int64_t batch, int64_t index) {
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= index ? low : high) = middle;
    }
    return low;
  }
  Token token(int64_t query) const {
    const int64_t b = find(first_query, seqs.batch, query);
    const Sequence seq = seqs.sequence(b);
    const int64_t i = query - first_query[b], t = seq.position(i);
    return {seq.q_begin + i, t, b, t / block_size};
  }
  int64_t sequence_of_block(int64_t block) const { return find(first_block, seqs.batch, block); }
  // Keys of block j of a sequence that the query at position t may see.
  int64_t visible(int64_t j, int64_t t) const { return min64(block_size, t + 1 - j * block_size); }
};

// k and v of whole blocks, packed as tiles.h describes, a block being `parts` tiles one after the other. Only
// blocks that some query chose are packed; the others may be uninitialised memory.
template <typename A>
struct PackedBlocks {
  BlockTiling tiling;
  int64_t num_blocks, ld, tile_size;
  Buffer<A> data;

  PackedBlocks(const BlockTiling& tiling, int64_t num_blocks, int num_heads, int dim, bool transposed)
      : tiling(tiling),
        num_blocks(num_blocks),
        ld(pad_lanes<A>(transposed ? tiling.width : dim)),
        tile_size(ld * (transposed ? dim : tiling.width)),
        data(num_heads * num_blocks * tiling.parts * tile_size) {}
  A* tile(int64_t head, int64_t block, int64_t part) const {
    return data.get() + ((head * num_blocks + block) * tiling.parts + part) * tile_size;
  }
};

template <typename A, typename T>
Status pack_blocks(const PackedBlocks<A>& packed, const Batch& batch, const Buffer<uint8_t>& chosen,
                   RowsView view, int num_heads, int dim, bool transposed, const Parallel& parallel) {
  if (!packed.data) return out_of_memory();
  return parallel_tasks(parallel, num_heads * packed.num_blocks, [&](int64_t task) {
    if (!chosen[task]) return;
    const int64_t head = task / packed.num_blocks, block = task % packed.num_blocks;
    const int64_t b = batch.sequence_of_block(block);
    const Sequence seq = batch.seqs.sequence(b);
    for (int64_t part = 0; part < packed.tiling.parts; ++part) {
      const int64_t in_block = part * packed.tiling.width;
      const int64_t begin = (block - batch.first_block[b]) * batch.block_size + in_block;
      const int64_t width = min64(packed.tiling.width, batch.block_size - in_block);
      const int64_t count = max64(0, min64(width, seq.k_len - begin));
      const T* src = static_cast<const T*>(view.data) + (seq.k_begin + begin) * view.stride_row +
                     head * view.stride_head;
      if (transposed) {
        pack_transposed(packed.tile(head, block, part), packed.ld, src, view.stride_row, count, dim);
      } else {
        pack_natural(packed.tile(head, block, part), packed.ld, src, view.stride_row, count,
                     packed.tiling.width, dim);
      }
    }
  });
}

// Marks every (KV head, block) that a query chose: [Hkv][num_blocks].
inline Buffer<uint8_t> mark_chosen(const Batch& batch, const int32_t* block_indices, int num_heads_kv,
                                   int n) {
  const int64_t num_blocks = batch.num_blocks();
  Buffer<uint8_t> chosen(num_heads_kv * num_blocks);
  if (!chosen) return chosen;
  chosen.zero(num_heads_kv * num_blocks);
  for (int64_t b = 0; b < batch.seqs.batch; ++b) {
    const Sequence seq = batch.seqs.sequence(b);
    for (int64_t i = 0; i < seq.q_len; ++i) {
      const int64_t own = seq.position(i) / batch.block_size;
      const int32_t* row = block_indices + (seq.q_begin + i) * num_heads_kv * n;
      for (int64_t head = 0; head < num_heads_kv; ++head, row += n) {
        for (int slot = 0; slot < n; ++slot) {
          if (row[slot] >= 0 && row[slot] <= own)
            chosen[head * num_blocks + batch.first_block[b] + row[slot]] = 1;
        }
      }
    }
  }
  return chosen;
}

template <typename A>
struct FwdScratch {
  Buffer<A> q, s, o, max, sum;
  Buffer<int32_t> blocks;

  FwdScratch(int group, int dim_qk, int64_t ld, int64_t ld_v, int n)
      : q(group * dim_qk), s(group * ld), o(group * ld_v), max(group), sum(group * kLanes<A>), blocks(n) {}
  explicit operator bool() const { return q && s && o && max && sum && blocks; }
};

template <typename T>
Status forward(const SelectedAttentionFwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const int group = p.shape.group(), dim_qk = p.shape.head_dim_qk, dim_v = p.shape.head_dim_v,
            n = p.num_selected_blocks;
  const int heads_kv = p.shape.num_heads_kv;
  const Batch batch(p.seqs, p.block_size);
  if (!batch) return out_of_memory();
  const Buffer<uint8_t> chosen = mark_chosen(batch, p.block_indices, heads_kv, n);
  if (!chosen) return out_of_memory();
  const BlockTiling tiling(p.block_size);
  const PackedBlocks<A> k(tiling, batch.num_blocks(), heads_kv, dim_qk, true),
      v(tiling, batch.num_blocks(), heads_kv, dim_v, false);
  Status status = pack_blocks<A, T>(k, batch, chosen, p.k, heads_kv, dim_qk, true, parallel);
  if (!status.ok()) return status;
  status = pack_blocks<A, T>(v, batch, chosen, p.v, heads_kv, dim_v, false, parallel);
  if (!status.ok()) return status;

  constexpr int64_t kTokensPerTask = 16;
  const A scale = static_cast<A>(p.softmax_scale);
  const int64_t tasks_per_head = ceil_div(batch.num_queries(), kTokensPerTask);
  return parallel_tasks(
      parallel, heads_kv * tasks_per_head, [&] { return FwdScratch<A>(group, dim_qk, k.ld, v.ld, n); },
      [&](FwdScratch<A>& scratch, int64_t task) {
        const int64_t head = task / tasks_per_head, begin = task % tasks_per_head * kTokensPerTask;
        for (int64_t query = begin; query < min64(begin + kTokensPerTask, batch.num_queries()); ++query) {
          const Token token = batch.token(query);
          const int count = normalise_row(p.block_indices + (token.row * heads_kv + head) * n, n, token.own,
                                          scratch.blocks.get());
          load_heads<A, T>(scratch.q.get(), dim_qk, p.q, token.row, head * group, group, dim_qk,
                           [&](int) { return scale; });
          scratch.o.zero(group * v.ld);
          scratch.sum.zero(group * kLanes<A>);
          for (int g = 0; g < group; ++g) scratch.max[g] = kNegInf<A>;
          const auto softmax_state = [&](int g) {
            return SoftmaxRow<A>{&scratch.max[g], &scratch.sum[g * kLanes<A>], &scratch.o[g * v.ld], v.ld};
          };
          for (int slot = 0; slot < count; ++slot) {
            const int64_t j = scratch.blocks[slot], block = batch.first_block[token.sequence] + j;
            for (int64_t part = 0; part < tiling.parts; ++part) {
              const KeyRange visible{
                  0, min64(tiling.width, batch.visible(j, token.position) - part * tiling.width)};
              if (visible.empty()) break;
              const KeyRange computed = widen<A>(visible);
              gemm<A>(group, computed.hi, dim_qk,
                      {scratch.q.get(), dim_qk, 1, k.tile(head, block, part), k.ld, scratch.s.get(), k.ld},
                      false);
              for (int g = 0; g < group; ++g)
                softmax_row(&scratch.s[g * k.ld], visible, computed, softmax_state(g));
              gemm<A>(group, v.ld, visible.hi,
                      {scratch.s.get(), k.ld, 1, v.tile(head, block, part), v.ld, scratch.o.get(), v.ld},
                      true);
            }
          }
          for (int g = 0; g < group; ++g) {
            const int64_t row = token.row * p.shape.num_heads_q + head * group + g;
            finish_row(softmax_state(g), dim_v, static_cast<T*>(p.o) + row * dim_v,
                       static_cast<A*>(p.lse) + row);
          }
        }
      });
}

// Who chose which block, for a chunk of queries: compressed rows over (KV head, block of the whole batch).
struct Choices {
  struct Entry {
    int32_t query;  // within the chunk
    int32_t slot;   // of the query's normalised row
  };
  int64_t num_blocks;
  int heads_kv, n;
  Buffer<int32_t> blocks;  // [chunk, Hkv, n], normalised
  Buffer<int32_t> count;   // [chunk, Hkv]
  Buffer<int64_t> first;   // [Hkv * num_blocks + 1]
  Buffer<Entry> entries;   // [chunk * Hkv * n]
  Buffer<int64_t> work;    // [Hkv * num_blocks], those with an entry, the longest first
  int64_t num_work = 0;

  Choices(int64_t chunk, int64_t num_blocks, int heads_kv, int n)
      : num_blocks(num_blocks),
        heads_kv(heads_kv),
        n(n),
        blocks(chunk * heads_kv * n),
        count(chunk * heads_kv),
        first(heads_kv * num_blocks + 2),
        entries(chunk * heads_kv * n),
        work(heads_kv * num_blocks) {}
  explicit operator bool() const { return blocks && count && first && entries && work; }

  // A stable counting sort: the entries of a block are in the order of the queries.
  void build(const Batch& batch, const int32_t* block_indices, int64_t begin, int64_t end) {
    const int64_t num_lists = heads_kv * num_blocks;
    first.zero(num_lists + 2);
    int64_t* start =
        first.get() + 1;  // shifted by one, so that filling the lists leaves `first` as it should be
    for (int64_t query = begin; query < end; ++query) {
      const Token token = batch.token(query);
      for (int64_t head = 0; head < heads_kv; ++head) {
        const int64_t at = (query - begin) * heads_kv + head;
        int32_t* row = &blocks[at * n];
        count[at] = normalise_row(block_indices + (token.row * heads_kv + head) * n, n, token.own, row);
        for (int slot = 0; slot < count[at]; ++slot)
          ++start[head * num_blocks + batch.first_block[token.sequence] + row[slot] + 1];
      }
    }
    for (int64_t i = 0; i < num_lists; ++i) start[i + 1] += start[i];
    for (int64_t query = begin; query < end; ++query) {
      const int64_t base = batch.first_block[batch.token(query).sequence];
      for (int64_t head = 0; head < heads_kv; ++head) {
        const int64_t at = (query - begin) * heads_kv + head;
        for (int slot = 0; slot < count[at]; ++slot) {
          entries[start[head * num_blocks + base + blocks[at * n + slot]]++] = {
              static_cast<int32_t>(query - begin), slot};
        }
      }
    }
    order_work(num_lists);
  }

 private:
  // Longest lists first, by powers of two: near enough for balance, and linear.
  void order_work(int64_t num_lists) {
    num_work = 0;
    for (int level = 62; level >= 0; --level) {
      if ((entries_of_all(num_lists) >> level) == 0) continue;
      for (int64_t i = 0; i < num_lists; ++i) {
        const int64_t length = first[i + 1] - first[i];
        if (length >> level == 1) work[num_work++] = i;
      }
    }
  }
  int64_t entries_of_all(int64_t num_lists) const { return first[num_lists]; }
};

template <typename A>
struct BlockScratch {
  Buffer<A> q, d_o, p, ds, dk, dv;

  BlockScratch(int64_t rows, int64_t ld, int64_t ld_qk, int64_t ld_v, int64_t width)
      : q(rows * ld_qk), d_o(rows * ld_v), p(rows * ld), ds(rows * ld), dk(width * ld_qk), dv(width * ld_v) {}
  explicit operator bool() const { return q && d_o && p && ds && dk && dv; }
};

template <typename T>
Status backward(const SelectedAttentionBwdParams& p, const Parallel& parallel) {
  using A = Acc<T>;
  const AttentionGrads& grads = p.grads;
  const int group = p.shape.group(), dim_qk = p.shape.head_dim_qk, dim_v = p.shape.head_dim_v,
            n = p.num_selected_blocks;
  const int heads_kv = p.shape.num_heads_kv, heads_q = p.shape.num_heads_q;
  const bool want_scores = grads.dq.wanted() || grads.dk != nullptr;
  const Batch batch(p.seqs, p.block_size);
  if (!batch) return out_of_memory();
  const Buffer<uint8_t> chosen = mark_chosen(batch, p.block_indices, heads_kv, n);
  if (!chosen) return out_of_memory();

  const BlockTiling tiling(p.block_size);
  const int64_t num_blocks = batch.num_blocks();
  const PackedBlocks<A> k_t(tiling, num_blocks, heads_kv, dim_qk, true),
      v_t(tiling, want_scores ? num_blocks : 0, heads_kv, dim_v, true),
      k(tiling, grads.dq.wanted() ? num_blocks : 0, heads_kv, dim_qk, false);
  Status status = pack_blocks<A, T>(k_t, batch, chosen, p.k, heads_kv, dim_qk, true, parallel);
  if (status.ok()) status = pack_blocks<A, T>(v_t, batch, chosen, p.v, heads_kv, dim_v, true, parallel);
  if (status.ok()) status = pack_blocks<A, T>(k, batch, chosen, p.k, heads_kv, dim_qk, false, parallel);
  if (!status.ok()) return status;

  const int64_t ld = k_t.ld, ld_qk = pad_lanes<A>(dim_qk), ld_v = pad_lanes<A>(dim_v);
  const int64_t slot_size = group * tiling.parts * ld;  // dS of a (query, KV head, slot): [part][group][ld]
  const int64_t token_bytes = heads_kv * n * slot_size * static_cast<int64_t>(sizeof(A));
  const int64_t chunk =
      max64(1, min64(min64(kMaxChunkTokens, batch.num_queries()), kScoreGradBytes / max64(1, token_bytes)));
  Choices choices(chunk, num_blocks, heads_kv, n);
  const Buffer<A> chunk_ds(grads.dq.wanted() ? chunk * heads_kv * n * slot_size : 0);
  if (!choices || !chunk_ds) return out_of_memory();
  const auto ds_of = [&](int64_t query, int64_t head, int64_t slot) {
    return &chunk_ds[((query * heads_kv + head) * n + slot) * slot_size];
  };

  const A scale = static_cast<A>(p.softmax_scale);
  const A* lse = static_cast<const A*>(grads.lse);
  const A* delta = static_cast<const A*>(grads.delta);
  const A* d_o_scale = static_cast<const A*>(grads.d_o_scale);
  const int64_t tokens = max64(1, kGroupRows / group);

  for (int64_t chunk_begin = 0; chunk_begin < batch.num_queries(); chunk_begin += chunk) {
    const int64_t chunk_end = min64(chunk_begin + chunk, batch.num_queries());
    choices.build(batch, p.block_indices, chunk_begin, chunk_end);

    status = parallel_tasks(
        parallel, choices.num_work,
        [&] { return BlockScratch<A>(tokens * group, ld, ld_qk, ld_v, tiling.width); },
        [&](BlockScratch<A>& scratch, int64_t task) {
          const int64_t list = choices.work[task], head = list / num_blocks, block = list % num_blocks;
          const int64_t b = batch.sequence_of_block(block), j = block - batch.first_block[b];
          const Sequence seq = p.seqs.sequence(b);
          for (int64_t part = 0; part < tiling.parts; ++part) {
            const int64_t key_begin = part * tiling.width;
            const int64_t num_keys = min64(min64(tiling.width, p.block_size - key_begin),
                                           seq.k_len - j * p.block_size - key_begin);
            if (num_keys <= 0) break;
            if (grads.dk) scratch.dk.zero(num_keys * ld_qk);
            if (grads.dv) scratch.dv.zero(num_keys * ld_v);
            for (int64_t first = choices.first[list]; first < choices.first[list + 1]; first += tokens) {
              const int64_t count = min64(tokens, choices.first[list + 1] - first), rows = count * group;
              KeyRange seen{0, 0};
              for (int64_t i = 0; i < count; ++i) {
                const Token token = batch.token(chunk_begin + choices.entries[first + i].query);
                const int64_t row = token.row * heads_q + head * group;
                seen.hi = max64(seen.hi, min64(num_keys, batch.visible(j, token.position) - key_begin));
                load_heads<A, T>(&scratch.q[i * group * ld_qk], ld_qk, p.q, token.row, head * group, group,
                                 dim_qk, [&](int) { return scale; });
                load_heads<A, T>(&scratch.d_o[i * group * ld_v], ld_v, grads.d_o, token.row, head * group,
                                 group, dim_v, [&](int g) { return d_o_scale ? d_o_scale[row + g] : A(1); });
              }
              const KeyRange computed = widen<A>(seen);
              A *prob = scratch.p.get(), *ds = scratch.ds.get();
              if (!seen.empty()) {
                gemm<A>(rows, computed.hi, dim_qk,
                        {scratch.q.get(), ld_qk, 1, k_t.tile(head, block, part), ld, prob, ld}, false);
                if (want_scores) {
                  gemm<A>(rows, computed.hi, dim_v,
                          {scratch.d_o.get(), ld_v, 1, v_t.tile(head, block, part), ld, ds, ld}, false);
                }
              }
              for (int64_t i = 0; i < count; ++i) {
                const Choices::Entry entry = choices.entries[first + i];
                const Token token = batch.token(chunk_begin + entry.query);
                const KeyRange visible{0, min64(num_keys, batch.visible(j, token.position) - key_begin)};
                for (int g = 0; g < group; ++g) {
                  const int64_t r = i * group + g, row = token.row * heads_q + head * group + g;
                  probability_row(prob + r * ld, visible, computed, lse[row]);
                  if (want_scores) score_grad_row(ds + r * ld, prob + r * ld, visible, computed, delta[row]);
                }
                if (grads.dq.wanted() && !visible.empty()) {
                  A* kept = ds_of(entry.query, head, entry.slot) + part * group * ld;
                  for (int g = 0; g < group; ++g)
                    std::memcpy(kept + g * ld, ds + (i * group + g) * ld,
                                static_cast<size_t>(visible.hi) * sizeof(A));
                }
              }
              if (grads.dv)
                gemm<A>(seen.hi, ld_v, rows, {prob, 1, ld, scratch.d_o.get(), ld_v, scratch.dv.get(), ld_v},
                        true);
              if (grads.dk)
                gemm<A>(seen.hi, ld_qk, rows, {ds, 1, ld, scratch.q.get(), ld_qk, scratch.dk.get(), ld_qk},
                        true);
            }
            for (int64_t key = 0; key < num_keys; ++key) {
              const int64_t row = (seq.k_begin + j * p.block_size + key_begin + key) * heads_kv + head;
              if (A* dk = static_cast<A*>(grads.dk)) {
                for (int d = 0; d < dim_qk; ++d) dk[row * dim_qk + d] += scratch.dk[key * ld_qk + d];
              }
              if (A* dv = static_cast<A*>(grads.dv)) {
                for (int d = 0; d < dim_v; ++d) dv[row * dim_v + d] += scratch.dv[key * ld_v + d];
              }
            }
          }
        });
    if (!status.ok()) return status;
    if (!grads.dq.wanted()) continue;

    status = parallel_tasks(
        parallel, chunk_end - chunk_begin, [&] { return Buffer<A>(group * ld_qk); },
        [&](Buffer<A>& dq, int64_t query) {
          const Token token = batch.token(chunk_begin + query);
          for (int64_t head = 0; head < heads_kv; ++head) {
            dq.zero(group * ld_qk);
            const int64_t at = query * heads_kv + head;
            for (int slot = 0; slot < choices.count[at]; ++slot) {
              const int64_t j = choices.blocks[at * n + slot], block = batch.first_block[token.sequence] + j;
              for (int64_t part = 0; part < tiling.parts; ++part) {
                const int64_t num_keys =
                    min64(tiling.width, batch.visible(j, token.position) - part * tiling.width);
                if (num_keys <= 0) break;
                const A* ds = ds_of(query, head, slot) + part * group * ld;
                gemm<A>(group, ld_qk, num_keys,
                        {ds, ld, 1, k.tile(head, block, part), ld_qk, dq.get(), ld_qk}, true);
              }
            }
            for (int g = 0; g < group; ++g) {
              put_query_grads<A, T>(grads.dq, token.row * heads_q + head * group + g, dim_qk, scale,
                                    &dq[g * ld_qk]);
            }
          }
        });
    if (!status.ok()) return status;
  }
  return status;
}

}  // namespace

Status selected_attention_forward(const SelectedAttentionFwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() { return forward<T>(p, parallel); });
}

Status selected_attention_backward(const SelectedAttentionBwdParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() { return backward<T>(p, parallel); });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
