// Runs one attention kernel forward and backward on hostile memory and compares it with the naive loops.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "buffers.h"
#include "naive.h"

namespace nsa_test {

template <typename T>
struct AttentionProblem {
  const Batch& batch;
  Heads heads;
  NaiveKeys keys;
  double scale;
  Rows<T> q, k, v, d_o;

  // gap: the gaps between heads and rows are multiples of it; a device wants 16-byte alignment.
  AttentionProblem(const Batch& b, const Heads& h, NaiveKeys naive_keys, int64_t key_rows, uint32_t seed,
                   int gap = 1)
      : batch(b),
        heads(h),
        keys(std::move(naive_keys)),
        scale(1 / std::sqrt(static_cast<double>(h.dim_qk))),
        q(b.total_q(), h.q, h.dim_qk, 3 * gap, 5 * gap),
        k(key_rows, h.kv, h.dim_qk, gap, 0),
        v(key_rows, h.kv, h.dim_v, 0, 7 * gap),
        d_o(b.total_q(), h.q, h.dim_v, 2 * gap, gap) {
    q.randomize(seed);
    k.randomize(seed + 1);
    v.randomize(seed + 2);
    d_o.randomize(seed + 3);
    poison_unseen();
  }

  // NaN in every row of q and d_o of no query, and of k and v that no query sees.
  void poison_unseen() {
    std::vector<bool> seen(static_cast<size_t>(k.rows()), false);
    for_each_query(batch, heads, [&](const Query& query, int) {
      const KeyRange range = keys.range(query.sequence);
      for (int64_t i = 0; i < range.count; ++i) {
        if (keys.visible(query, i)) seen[static_cast<size_t>(range.first_row + i)] = true;
      }
    });
    for (int64_t r = 0; r < k.rows(); ++r) {
      if (seen[static_cast<size_t>(r)]) continue;
      k.poison_row(r);
      v.poison_row(r);
    }
    for (int64_t r = batch.cu_q.back(); r < batch.total_q(); ++r) {
      q.poison_row(r);
      d_o.poison_row(r);
    }
  }

  // What the caller of a launcher does for the padding behind the last sequence; every other element starts
  // as NaN.
  template <typename U>
  void fill_rows_of_no_query(Guarded<U>& out, int dim, double x) const {
    for (int64_t i = int64_t{batch.cu_q.back()} * heads.q * dim; i < out.size(); ++i) out.set(i, x);
  }

  template <typename Params>
  Params common() const {
    Params p{};
    p.dtype = dtype_of<T>();
    p.seqs = batch.params();
    p.shape = heads.shape();
    p.softmax_scale = scale;
    p.q = q.view();
    p.k = k.view();
    p.v = v.view();
    return p;
  }

  // launch(params, o, lse) and launch(params) set the rest of the parameters and call the kernel.
  template <typename FwdParams, typename Launch>
  std::string check_forward(const Launch& launch) const {
    const NaiveForward exact = naive_forward(batch, heads, keys, scale, q, k, v);
    Guarded<T> o(batch.total_q() * heads.q * heads.dim_v);
    Guarded<Acc<T>> lse(batch.total_q() * heads.q);
    fill_rows_of_no_query(o, heads.dim_v, 0);
    fill_rows_of_no_query(lse, 1, -std::numeric_limits<double>::infinity());
    FwdParams p = common<FwdParams>();
    p.o = o.data();
    p.lse = lse.data();
    const nsa::Status status = launch(p);
    if (!status.ok()) return status.message;
    if (!o.intact() || !lse.intact()) return "wrote in front of an output";
    std::string wrong = mismatch("o", o.values(), exact.o, bound<T, Acc<T>>());
    return wrong.empty() ? mismatch("lse", lse.values(), exact.lse, bound<Acc<T>, Acc<T>>()) : wrong;
  }

  // wanted: bits of dq, dk, dv. scaled: dO comes with a factor per query and head, as the gate gives it.
  // allowed: the error, relative to the largest gradient.
  template <typename BwdParams, typename Launch>
  std::string check_backward(const Launch& launch, unsigned wanted = 7, bool scaled = false,
                             double allowed = bound<Acc<T>, Acc<T>>()) const {
    const NaiveForward forward = naive_forward(batch, heads, keys, scale, q, k, v);
    const int64_t rows = batch.total_q() * heads.q;
    std::vector<double> factors;
    Guarded<Acc<T>> factor(rows), delta(rows), lse(rows);
    for (int64_t r = 0; r < rows; ++r) {
      if (scaled) factors.push_back(0.25 + 0.5 * static_cast<double>(r % 3));
      if (scaled) factor.set(r, factors.back());
      lse.set(r, forward.lse[static_cast<size_t>(r)]);
      double sum = 0;
      for (int c = 0; c < heads.dim_v; ++c) {
        sum += d_o(r / heads.q, static_cast<int>(r % heads.q), c) *
               forward.o[static_cast<size_t>(r * heads.dim_v + c)];
      }
      delta.set(r, scaled ? factors.back() * sum : sum);  // NaN behind the last sequence, as d_o is there
    }
    const NaiveBackward exact = naive_backward(batch, heads, keys, scale, q, k, v, d_o, factors, forward);

    Guarded<T> dq(rows * heads.dim_qk);
    Guarded<Acc<T>> dk(k.rows() * heads.kv * heads.dim_qk), dv(v.rows() * heads.kv * heads.dim_v);
    fill_rows_of_no_query(dq, heads.dim_qk, 0);
    dk.fill(0);
    dv.fill(0);
    BwdParams p = common<BwdParams>();
    p.grads.d_o = d_o.view();
    p.grads.d_o_scale = scaled ? factor.data() : nullptr;
    p.grads.delta = delta.data();
    p.grads.lse = lse.data();
    if (wanted & 1) p.grads.dq.result = dq.data();
    p.grads.dk = wanted & 2 ? dk.data() : nullptr;
    p.grads.dv = wanted & 4 ? dv.data() : nullptr;
    const nsa::Status status = launch(p);
    if (!status.ok()) return status.message;
    if (!dq.intact() || !dk.intact() || !dv.intact()) return "wrote in front of a gradient";
    std::string wrong;
    const double allowed_rounded = std::max(allowed, bound<T, Acc<T>>());
    if (wanted & 1) wrong += mismatch("dq", dq.values(), exact.dq, allowed_rounded);
    if (wanted & 2) wrong += mismatch("dk", dk.values(), exact.dk, allowed);
    if (wanted & 4) wrong += mismatch("dv", dv.values(), exact.dv, allowed);
    if (!wrong.empty() || wanted != 7) return wrong;

    // Once per case, dQ as that of three branches that add to one sum in turn.
    p.grads.dk = p.grads.dv = nullptr;
    Guarded<Acc<T>> sum(dq.size());
    fill_rows_of_no_query(sum, heads.dim_qk, 0);
    const auto times = [&](double n) {
      std::vector<double> values = exact.dq;
      for (double& x : values) x *= n;
      return values;
    };
    p.grads.dq = {sum.data(), nullptr, false};
    if (!launch(p).ok()) return "no dq of the first branch";
    wrong += mismatch("dq of the first branch", sum.values(), exact.dq, allowed);
    p.grads.dq.begun = true;
    if (!launch(p).ok()) return "no dq of a second branch";
    wrong += mismatch("dq of two branches", sum.values(), times(2), allowed);
    if constexpr (std::is_same_v<T, Acc<T>>) {
      p.grads.dq.result = sum.data();
    } else {
      dq.fill(std::numeric_limits<double>::quiet_NaN());
      fill_rows_of_no_query(dq, heads.dim_qk, 0);
      p.grads.dq.result = dq.data();
    }
    if (!launch(p).ok()) return "no dq of the last branch";
    if (!sum.intact() || !dq.intact()) return "wrote in front of a gradient";
    const std::vector<double> last = std::is_same_v<T, Acc<T>> ? sum.values() : dq.values();
    return wrong + mismatch("dq of three branches", last, times(3), allowed_rounded);
  }
};

}  // namespace nsa_test
