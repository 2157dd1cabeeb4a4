// Attention of a few tokens per sequence over a cache: a task is a sequence and KV head. It walks the
// compressed rows with a running softmax, walks them again for the block scores, chooses, and attends the
// chosen blocks and the window. Keys are packed a tile at a time, so no more than what a query sees is ever
// read.
#include "cpu/selection.h"

namespace nsa::cpu::NSA_CPU_ISA {
namespace {

enum Branch { kCmp, kSlc, kSwa };

template <typename A>
struct Scratch {
  int64_t ld_v;
  Buffer<A> q, s, k, v, o, max, sum, lse, prob, scores, best_score;
  Buffer<int32_t> best_block;

  Scratch(const DecodeAttentionParams& p, int64_t rows, int64_t num_blocks)
      : ld_v(pad_lanes<A>(p.shape.head_dim_v)),
        q(rows * p.shape.head_dim_qk),
        s(rows * kTileKeys),
        k(p.shape.head_dim_qk * kTileKeys),
        v(kTileKeys * ld_v),
        o(kNumBranches * rows * ld_v),
        max(rows),
        sum(rows * kLanes<A>),
        lse(kNumBranches * rows),
        prob(kTileKeys),
        scores(num_blocks),
        best_score(p.num_selected_blocks),
        best_block(p.num_selected_blocks) {}
  explicit operator bool() const {
    return q && s && k && v && o && max && sum && lse && prob && scores && best_score && best_block;
  }
};

// Rows begin .. begin + count - 1 of a sequence as a tile of tiles.h, zeros behind them.
template <typename A, typename T>
void pack_cached(A* dst, const CachedRows& rows, int64_t b, int64_t head, int64_t begin, int64_t count,
                 int dim, bool transposed) {
  constexpr int64_t kBlock = 16;  // a block of both sides stays in the first-level cache
  const int64_t ld = transposed ? kTileKeys : pad_lanes<A>(dim);
  for (int64_t n0 = 0; n0 < kTileKeys; n0 += kBlock) {
    const T* src[kBlock];
    const int64_t filled = max64(0, min64(kBlock, count - n0));
    for (int64_t n = 0; n < filled; ++n)
      src[n] = static_cast<const T*>(rows.data) + rows.offset(b, begin + n0 + n, head);
    if (transposed) {
      for (int d = 0; d < dim; ++d) {
        A* row = dst + d * ld + n0;
        for (int64_t n = 0; n < filled; ++n) row[n] = convert<A>(src[n][d]);
        for (int64_t n = filled; n < kBlock; ++n) row[n] = 0;
      }
    } else {
      for (int64_t n = 0; n < filled; ++n) load_row(dst + (n0 + n) * ld, src[n], dim, ld);
      std::memset(dst + (n0 + filled) * ld, 0, static_cast<size_t>((kBlock - filled) * ld) * sizeof(A));
    }
  }
}

// The step's tokens of one sequence and KV head.
template <typename T>
class Decode {
  using A = Acc<T>;

 public:
  Decode(const DecodeAttentionParams& p, Scratch<A>& scratch, int64_t b, int64_t head)
      : p_(p),
        scratch_(scratch),
        seq_(p.seqs.sequence(b)),
        b_(b),
        head_(head),
        group_(p.shape.group()),
        rows_(seq_.q_len * group_) {}

  void run() {
    const int dim = p_.shape.head_dim_qk;
    const A scale = static_cast<A>(p_.softmax_scale);
    for (int64_t i = 0; i < seq_.q_len; ++i) {
      load_heads<A, T>(&scratch_.q[i * group_ * dim], dim, p_.q, seq_.q_begin + i, head_ * group_, group_,
                       dim, [&](int) { return scale; });
    }
    banded(kCmp, p_.k_cmp, p_.v_cmp, p_.compressed, 0, p_.compressed.cached_row(0));
    banded(kSwa, p_.k_swa, p_.v_swa, KeyBlocks{}, p_.window, 0);
    begin();
    for (int64_t i = 0; i < seq_.q_len; ++i) {
      const int32_t* chosen = select(i);
      for (int slot = 0; slot < p_.num_selected_blocks && chosen[slot] >= 0; ++slot)
        attend_block(i, chosen[slot]);
    }
    finish(kSlc);
    for (int64_t i = 0; i < seq_.q_len; ++i) combine(i);
  }

 private:
  A* o(Branch branch) const { return &scratch_.o[branch * rows_ * scratch_.ld_v]; }
  SoftmaxRow<A> state(Branch branch, int64_t r) const {
    return {&scratch_.max[r], &scratch_.sum[r * kLanes<A>], o(branch) + r * scratch_.ld_v, scratch_.ld_v};
  }

  void begin() {
    scratch_.sum.zero(rows_ * kLanes<A>);
    for (int64_t r = 0; r < rows_; ++r) scratch_.max[r] = kNegInf<A>;
  }
  void finish(Branch branch) {
    for (int64_t r = 0; r < rows_; ++r) {
      const SoftmaxRow<A> row = state(branch, r);
      finish_row(row, p_.shape.head_dim_v, row.o, &scratch_.lse[branch * rows_ + r]);
    }
  }

  // s[token * group ..] = logits of the packed keys, for tokens first .. last - 1.
  void logits(int64_t first, int64_t last, int64_t num_keys) {
    const int dim = p_.shape.head_dim_qk;
    gemm<A>((last - first) * group_, pad_lanes<A>(num_keys), dim,
            {&scratch_.q[first * group_ * dim], dim, 1, scratch_.k.get(), kTileKeys,
             &scratch_.s[first * group_ * kTileKeys], kTileKeys},
            false);
  }

  // Tokens first .. last - 1 attend the packed keys, num_keys of them, as far as visible(token) says.
  template <typename Visible>
  void attend_tile(Branch branch, int64_t first, int64_t last, int64_t num_keys, const Visible& visible) {
    logits(first, last, num_keys);
    const KeyRange computed{0, pad_lanes<A>(num_keys)};
    for (int64_t r = first * group_; r < last * group_; ++r)
      softmax_row(&scratch_.s[r * kTileKeys], visible(r / group_), computed, state(branch, r));
    gemm<A>((last - first) * group_, scratch_.ld_v, num_keys,
            {&scratch_.s[first * group_ * kTileKeys], kTileKeys, 1, scratch_.v.get(), scratch_.ld_v,
             o(branch) + first * group_ * scratch_.ld_v, scratch_.ld_v},
            true);
  }

  // Key i of the sequence is cached row i + first_row.
  void banded(Branch branch, const CachedRows& k, const CachedRows& v, KeyBlocks keys, int64_t window,
              int64_t first_row) {
    begin();
    std::memset(o(branch), 0, static_cast<size_t>(rows_ * scratch_.ld_v) * sizeof(A));
    const int64_t end = keys.end_visible(seq_.position(seq_.q_len - 1));
    for (int64_t key = keys.begin_visible(seq_.position(0), window); key < end; key += kTileKeys) {
      const int64_t count = min64(kTileKeys, end - key);
      pack_cached<A, T>(scratch_.k.get(), k, b_, head_, key + first_row, count, p_.shape.head_dim_qk, true);
      pack_cached<A, T>(scratch_.v.get(), v, b_, head_, key + first_row, count, p_.shape.head_dim_v, false);
      attend_tile(branch, 0, seq_.q_len, count, [&](int64_t i) {
        const int64_t t = seq_.position(i);
        return KeyRange{max64(0, keys.begin_visible(t, window) - key),
                        min64(count, keys.end_visible(t) - key)};
      });
    }
    finish(branch);
  }

  // The chosen blocks of token i, in block_indices.
  const int32_t* select(int64_t i) {
    const int64_t t = seq_.position(i), own = t / p_.block_size, end = p_.compressed.end_visible(t);
    scratch_.scores.zero(own + 1);
    for (int64_t key = 0; key < end; key += kTileKeys) {
      const int64_t count = min64(kTileKeys, end - key);
      pack_cached<A, T>(scratch_.k.get(), p_.k_cmp, b_, head_, key + p_.compressed.cached_row(0), count,
                        p_.shape.head_dim_qk, true);
      logits(i, i + 1, count);
      add_tile_scores(&scratch_.s[i * group_ * kTileKeys], kTileKeys, group_,
                      &scratch_.lse[kCmp * rows_ + i * group_], count, scratch_.prob.get(), p_.compressed,
                      key, p_.block_size, scratch_.scores.get());
    }
    int32_t* out =
        p_.block_indices + ((seq_.q_begin + i) * p_.shape.num_heads_kv + head_) * p_.num_selected_blocks;
    choose_blocks(scratch_.scores.get(), own, p_.num_selected_blocks, p_.num_initial_blocks,
                  p_.num_local_blocks, scratch_.best_score.get(), scratch_.best_block.get(), out);
    std::memset(o(kSlc) + i * group_ * scratch_.ld_v, 0,
                static_cast<size_t>(group_ * scratch_.ld_v) * sizeof(A));
    return out;
  }

  void attend_block(int64_t i, int64_t block) {
    const int64_t end = min64((block + 1) * p_.block_size, seq_.position(i) + 1);
    for (int64_t key = block * p_.block_size; key < end; key += kTileKeys) {
      const int64_t count = min64(kTileKeys, end - key);
      pack_cached<A, T>(scratch_.k.get(), p_.k_slc, b_, head_, key, count, p_.shape.head_dim_qk, true);
      pack_cached<A, T>(scratch_.v.get(), p_.v_slc, b_, head_, key, count, p_.shape.head_dim_v, false);
      attend_tile(kSlc, i, i + 1, count, [&](int64_t) { return KeyRange{0, count}; });
    }
  }

  A gate(int64_t row, int branch) const {
    const int64_t at = row * kNumBranches + branch;
    A logit;
    if (p_.gate_dtype == p_.dtype) {
      logit = convert<A>(static_cast<const T*>(p_.gate_logits)[at]);
    } else {
      logit = static_cast<const A*>(p_.gate_logits)[at];
    }
    return A(1) / (A(1) + static_cast<A>(__builtin_exp(-logit)));
  }

  void combine(int64_t i) {
    const int dim_v = p_.shape.head_dim_v;
    const int64_t total = p_.seqs.total_q * p_.shape.num_heads_q;
    for (int g = 0; g < group_; ++g) {
      const int64_t row = (seq_.q_begin + i) * p_.shape.num_heads_q + head_ * group_ + g, r = i * group_ + g;
      T* out = static_cast<T*>(p_.o) + row * dim_v;
      A gates[kNumBranches];
      for (int branch = 0; branch < kNumBranches; ++branch) {
        gates[branch] = gate(row, branch);
        static_cast<A*>(p_.lse)[branch * total + row] = scratch_.lse[branch * rows_ + r];
      }
      for (int d = 0; d < dim_v; ++d) {
        const int64_t at = r * scratch_.ld_v + d;
        out[d] =
            convert<T>(gates[kCmp] * o(kCmp)[at] + gates[kSlc] * o(kSlc)[at] + gates[kSwa] * o(kSwa)[at]);
      }
    }
  }

  const DecodeAttentionParams& p_;
  Scratch<A>& scratch_;
  Sequence seq_;
  int64_t b_, head_;
  int group_;
  int64_t rows_;
};

}  // namespace

Status decode_attention(const DecodeAttentionParams& p, const Parallel& parallel) {
  return dispatch_storage("dtype", p.dtype, [&]<typename T>() {
    int64_t longest_q = 0, longest_k = 0;
    for (int64_t b = 0; b < p.seqs.batch; ++b) {
      const Sequence seq = p.seqs.sequence(b);
      longest_q = max64(longest_q, seq.q_len);
      if (seq.q_len > 0) longest_k = max64(longest_k, seq.k_len);
    }
    const int64_t heads = p.shape.num_heads_kv;
    return parallel_tasks(
        parallel, p.seqs.batch * heads,
        [&] { return Scratch<Acc<T>>(p, longest_q * p.shape.group(), ceil_div(longest_k, p.block_size)); },
        [&](Scratch<Acc<T>>& scratch, int64_t task) {
          if (p.seqs.sequence(task / heads).q_len > 0)
            Decode<T>(p, scratch, task / heads, task % heads).run();
        });
  });
}

}  // namespace nsa::cpu::NSA_CPU_ISA
