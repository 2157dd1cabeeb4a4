// Attention by its definition, in double: one query, one head, one key at a time, with nothing shared with
// the kernels.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "buffers.h"

namespace nsa_test {

struct Heads {
  int q, kv, dim_qk, dim_v;
  nsa::AttentionShape shape() const {
    nsa::AttentionShape s;
    s.num_heads_q = q;
    s.num_heads_kv = kv;
    s.head_dim_qk = dim_qk;
    s.head_dim_v = dim_v;
    return s;
  }
};

// The keys of sequence b: how many, and the row of the first one.
struct KeyRange {
  int64_t count, first_row;
};

// One query as the visibility rule sees it.
struct Query {
  int64_t sequence, row, position;
  int head_kv;
};

struct NaiveKeys {
  std::function<KeyRange(int64_t b)> range;
  std::function<bool(const Query&, int64_t key)> visible;
};

inline NaiveKeys token_window(const Batch& batch, int64_t window) {
  return {[&batch](int64_t b) {
            return KeyRange{batch.k_lens[b], batch.cu_k[b]};
          },
          [window](const Query& q, int64_t s) { return s <= q.position && s > q.position - window; }};
}

inline NaiveKeys compressed(const Batch& batch, int64_t length, int64_t stride) {
  return {[&batch, length, stride](int64_t b) {
            int64_t count = 0;
            while (count * stride + length <= batch.k_lens[b]) ++count;
            return KeyRange{count, batch.cu_k[b] / stride};
          },
          [length, stride](const Query& q, int64_t i) { return i * stride + length - 1 <= q.position; }};
}

inline NaiveKeys selected(const Batch& batch, const std::vector<int32_t>& indices, int heads_kv, int n,
                          int64_t block_size) {
  return {[&batch](int64_t b) {
            return KeyRange{batch.k_lens[b], batch.cu_k[b]};
          },
          [&indices, heads_kv, n, block_size](const Query& q, int64_t s) {
            if (s > q.position) return false;
            for (int slot = 0; slot < n; ++slot) {
              if (indices[(q.row * heads_kv + q.head_kv) * n + slot] == s / block_size) return true;
            }
            return false;
          }};
}

struct NaiveForward {
  std::vector<double> o, lse;
};
struct NaiveBackward {
  std::vector<double> dq, dk, dv;
};

template <typename Visit>
void for_each_query(const Batch& batch, const Heads& heads, const Visit& visit) {
  for (int64_t b = 0; b < batch.count(); ++b) {
    for (int64_t i = 0; i < batch.q_lens[b]; ++i) {
      for (int h = 0; h < heads.q; ++h) {
        visit(Query{b, batch.cu_q[b] + i, batch.k_lens[b] - batch.q_lens[b] + i, h / (heads.q / heads.kv)},
              h);
      }
    }
  }
}

template <typename T>
double dot(const Rows<T>& a, int64_t row_a, int head_a, const Rows<T>& b, int64_t row_b, int head_b) {
  double sum = 0;
  for (int c = 0; c < a.dim(); ++c) sum += a(row_a, head_a, c) * b(row_b, head_b, c);
  return sum;
}

// A key that a query sees: its row, and scale * q . k.
struct Seen {
  int64_t row;
  double logit;
};

template <typename T>
std::vector<Seen> seen_keys(const NaiveKeys& keys, const Query& query, int h, double scale, const Rows<T>& q,
                            const Rows<T>& k) {
  std::vector<Seen> seen;
  const KeyRange range = keys.range(query.sequence);
  for (int64_t i = 0; i < range.count; ++i) {
    if (!keys.visible(query, i)) continue;
    const int64_t row = range.first_row + i;
    seen.push_back({row, scale * dot(q, query.row, h, k, row, query.head_kv)});
  }
  return seen;
}

template <typename T>
NaiveForward naive_forward(const Batch& batch, const Heads& heads, const NaiveKeys& keys, double scale,
                           const Rows<T>& q, const Rows<T>& k, const Rows<T>& v) {
  const double inf = std::numeric_limits<double>::infinity();
  NaiveForward out{std::vector<double>(batch.total_q() * heads.q * heads.dim_v, 0),
                   std::vector<double>(batch.total_q() * heads.q, -inf)};
  for_each_query(batch, heads, [&](const Query& query, int h) {
    const std::vector<Seen> seen = seen_keys(keys, query, h, scale, q, k);
    if (seen.empty()) return;
    double largest = -inf, sum = 0;
    for (const Seen& key : seen) largest = std::max(largest, key.logit);
    double* o = &out.o[(query.row * heads.q + h) * heads.dim_v];
    for (const Seen& key : seen) {
      const double p = std::exp(key.logit - largest);
      sum += p;
      for (int c = 0; c < heads.dim_v; ++c) o[c] += p * v(key.row, query.head_kv, c);
    }
    for (int c = 0; c < heads.dim_v; ++c) o[c] /= sum;
    out.lse[query.row * heads.q + h] = largest + std::log(sum);
  });
  return out;
}

// d_o_scale: empty, or one factor per query and head.
template <typename T>
NaiveBackward naive_backward(const Batch& batch, const Heads& heads, const NaiveKeys& keys, double scale,
                             const Rows<T>& q, const Rows<T>& k, const Rows<T>& v, const Rows<T>& d_o,
                             const std::vector<double>& d_o_scale, const NaiveForward& forward) {
  NaiveBackward grads{std::vector<double>(batch.total_q() * heads.q * heads.dim_qk, 0),
                      std::vector<double>(k.rows() * heads.kv * heads.dim_qk, 0),
                      std::vector<double>(v.rows() * heads.kv * heads.dim_v, 0)};
  for_each_query(batch, heads, [&](const Query& query, int h) {
    const int64_t row_q = query.row * heads.q + h;
    const double factor = d_o_scale.empty() ? 1 : d_o_scale[row_q];
    double delta = 0;
    for (int c = 0; c < heads.dim_v; ++c) {
      delta += factor * d_o(query.row, h, c) * forward.o[row_q * heads.dim_v + c];
    }
    for (const Seen& key : seen_keys(keys, query, h, scale, q, k)) {
      const int64_t row_k = key.row * heads.kv + query.head_kv;
      const double p = std::exp(key.logit - forward.lse[row_q]);
      double dp = 0;
      for (int c = 0; c < heads.dim_v; ++c) {
        const double grad = factor * d_o(query.row, h, c);
        dp += grad * v(key.row, query.head_kv, c);
        grads.dv[row_k * heads.dim_v + c] += p * grad;
      }
      const double ds = scale * p * (dp - delta);
      for (int c = 0; c < heads.dim_qk; ++c) {
        grads.dq[row_q * heads.dim_qk + c] += ds * k(key.row, query.head_kv, c);
        grads.dk[row_k * heads.dim_qk + c] += ds * q(query.row, h, c);
      }
    }
  });
  return grads;
}

}  // namespace nsa_test
