// nsa::append_kv: a step's keys and values into a cache, with the compressed blocks that they complete.
#include "ops/autograd.h"
#include "ops/cache.h"
#include "ops/compress.h"
#include "ops/launch_device.h"

namespace nsa::ops {
namespace {

constexpr const char* kOp = "append_kv";

// K or V: where it goes, what comes, and its phi.
struct StreamTensors {
  const char *cmp_cache_name, *slc_cache_name, *swa_cache_name, *tail_name, *cmp_name, *slc_name, *swa_name;
  const Tensor &cmp_cache, &slc_cache;
  const OptTensor& swa_cache;
  const Tensor &tail, &cmp, &slc;
  const OptTensor& swa;
  PhiParameters phi;
};

Phi check(const CacheChecks& cache, Arg first, const StreamTensors& in, const SymInt& max_seqlen,
          int64_t page_block_size, int64_t capacity, int64_t block_size, int64_t stride,
          std::string_view kind) {
  const Checks& checks = cache.checks();
  const Arg cmp{in.cmp_name, in.cmp};
  checks.alike(first, {cmp});
  const Phi phi = check_phi(checks, in.cmp, in.phi, std::nullopt, max_seqlen, block_size, stride, kind);
  const auto token_rows = [&](Arg rows) {
    checks.shape(rows, {first.tensor.sym_size(0), phi.num_heads, phi.head_dim}, "[T, Hkv, D]");
    checks.alike(first, {rows});
  };
  token_rows(cmp);
  token_rows({in.slc_name, in.slc});
  cache.pages({in.slc_cache_name, in.slc_cache}, first, page_block_size, phi.num_heads, phi.head_dim);
  cache.pages({in.cmp_cache_name, in.cmp_cache}, first, page_block_size / stride, phi.num_heads,
              phi.head_dim);
  cache.ring({in.tail_name, in.tail}, first, phi.num_heads, phi.head_dim, min64(capacity, block_size - 1));
  TORCH_CHECK_VALUE(in.swa.has_value() == in.swa_cache.has_value(), "nsa::", kOp, ": ",
                    in.swa.has_value() ? in.swa_cache_name : in.swa_name, " is None but ",
                    in.swa.has_value() ? in.swa_name : in.swa_cache_name,
                    " is not; expected both or neither");
  if (in.swa.has_value()) {
    token_rows({in.swa_name, *in.swa});
    cache.ring({in.swa_cache_name, *in.swa_cache}, first, phi.num_heads, phi.head_dim, 1);
  }
  return phi;
}

void check_rotary(const Checks& checks, const OptTensor& cos, const OptTensor& sin, const Tensor& k,
                  const Phi& phi, int64_t capacity) {
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "nsa::", kOp, ": ",
                    cos.has_value() ? "rotary_sin" : "rotary_cos", " is None; expected both or neither");
  if (!cos.has_value()) return;
  TORCH_CHECK_VALUE(phi.head_dim % 2 == 0, "nsa::", kOp, ": k_cmp has ", phi.head_dim,
                    " channels; a rotary embedding needs an even number");
  for (const Arg& table : {Arg{"rotary_cos", *cos}, Arg{"rotary_sin", *sin}}) {
    checks.shape(table, {cos->sym_size(0), phi.head_dim}, "[positions, Dk]");
    checks.dtype(table, acc_dtype(k.scalar_type()));
    checks.device(table, k.device());
    const int64_t rows = table.tensor.sym_size(0).guard_int(__FILE__, __LINE__);
    const int64_t needed = phi.blocks.count(capacity) > 0 ? capacity - phi.blocks.block + 1 : 0;
    TORCH_CHECK_VALUE(rows >= needed, "nsa::", kOp, ": ", table.name, " has ", rows, " rows; a cache of ",
                      capacity, " tokens per sequence needs ", needed);
  }
}

// The Params of one stream, with the tensors behind its pointers.
struct Prepared {
  Tensor cmp, slc, swa;
  PhiParameters parameters;
  AppendKvParams::Stream stream{};

  Prepared(const CacheStep& step, const StreamTensors& in, const Phi& phi)
      : cmp(as_rows(in.cmp)), slc(as_rows(in.slc)) {
    parameters = set_phi(phi, in.phi, dtype_of(cmp), &stream.phi);
    stream.cmp = rows_view(cmp);
    stream.slc = rows_view(slc);
    stream.cmp_cache = step.pages(in.cmp_cache);
    stream.slc_cache = step.pages(in.slc_cache);
    stream.tail = step.ring(in.tail);
    if (!in.swa.has_value()) return;
    swa = as_rows(*in.swa);
    stream.swa = rows_view(swa);
    stream.swa_cache = step.ring(*in.swa_cache);
  }
};

}  // namespace

namespace kernels {

void append_kv(const Tensor& k_cmp_cache, const Tensor& v_cmp_cache, const Tensor& k_slc_cache,
               const Tensor& v_slc_cache, const OptTensor& k_swa_cache, const OptTensor& v_swa_cache,
               const Tensor& k_tail, const Tensor& v_tail, const Tensor& k_cmp, const Tensor& v_cmp,
               const Tensor& k_slc, const Tensor& v_slc, const OptTensor& k_swa, const OptTensor& v_swa,
               const OptTensor& k_pe, const OptTensor& k_w1, const OptTensor& k_b1, const OptTensor& k_w2,
               const OptTensor& k_b2, const OptTensor& v_pe, const OptTensor& v_w1, const OptTensor& v_b1,
               const OptTensor& v_w2, const OptTensor& v_b2, const OptTensor& rotary_cos,
               const OptTensor& rotary_sin, const Tensor& cache_seqlens, const OptTensor& block_table,
               const OptTensor& cu_seqlens_q, SymInt max_seqlen_q, int64_t compress_block_size,
               int64_t compress_stride, std::string_view compress_kind) {
  const auto phi_of = [](const OptTensor& pe, const OptTensor& w1, const OptTensor& b1, const OptTensor& w2,
                         const OptTensor& b2) {
    return PhiParameters{or_undefined(pe), or_undefined(w1), or_undefined(b1), or_undefined(w2),
                         or_undefined(b2)};
  };
  const StreamTensors k_in{
      "k_cmp_cache", "k_slc_cache", "k_swa_cache", "k_tail",    "k_cmp",
      "k_slc",       "k_swa",       k_cmp_cache,   k_slc_cache, k_swa_cache,
      k_tail,        k_cmp,         k_slc,         k_swa,       phi_of(k_pe, k_w1, k_b1, k_w2, k_b2)};
  const StreamTensors v_in{
      "v_cmp_cache", "v_slc_cache", "v_swa_cache", "v_tail",    "v_cmp",
      "v_slc",       "v_swa",       v_cmp_cache,   v_slc_cache, v_swa_cache,
      v_tail,        v_cmp,         v_slc,         v_swa,       phi_of(v_pe, v_w1, v_b1, v_w2, v_b2)};
  const CacheArgs args{cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q};
  const CacheChecks cache(kOp, args);
  const Arg first{"k_cmp", k_cmp}, pages{"k_slc_cache", k_slc_cache};
  cache.checks().compression("compress_block_size", compress_block_size, "compress_stride", compress_stride);
  cache.sequences(first);
  const int64_t page_block_size = cache.page_block_size(pages, "compress_stride", compress_stride);
  const int64_t capacity = cache.capacity(pages);
  const Phi k_phi = check(cache, first, k_in, k_cmp.sym_size(0), page_block_size, capacity,
                          compress_block_size, compress_stride, compress_kind);
  const Phi v_phi = check(cache, first, v_in, k_cmp.sym_size(0), page_block_size, capacity,
                          compress_block_size, compress_stride, compress_kind);
  TORCH_CHECK_VALUE(k_phi.num_heads == v_phi.num_heads, "nsa::", kOp, ": v_cmp has ", v_phi.num_heads,
                    " heads; expected the ", k_phi.num_heads, " of k_cmp");
  TORCH_CHECK_VALUE(k_swa.has_value() == v_swa.has_value(), "nsa::", kOp, ": ",
                    k_swa.has_value() ? "v_swa" : "k_swa",
                    " is None; expected both k_swa and v_swa or neither");
  check_rotary(cache.checks(), rotary_cos, rotary_sin, k_cmp, k_phi, capacity);
  if (k_cmp.is_meta()) return;
  cache.values(first, pages);

  const CacheStep step(k_cmp, args, capacity);
  if (step.empty()) return;
  const Prepared k(step, k_in, k_phi), v(step, v_in, v_phi);
  const Tensor cos = or_undefined(rotary_cos), sin = or_undefined(rotary_sin);
  AppendKvParams params{};
  params.seqs = step.seqs;
  params.k = k.stream;
  params.v = v.stream;
  const Tensor cos_rows = cos.defined() ? as_block(cos) : cos, sin_rows = sin.defined() ? as_block(sin) : sin;
  params.rotary_cos = const_pointer(cos_rows);
  params.rotary_sin = const_pointer(sin_rows);
  params.rotary_rows = cos.defined() ? cos.size(0) : 0;
  const Tensor workspace = allocate_workspace(k_cmp.device(), &params);
  launch(kOp, k_cmp.device(), params);
}

}  // namespace kernels

namespace autograd {

void append_kv(const Tensor& k_cmp_cache, const Tensor& v_cmp_cache, const Tensor& k_slc_cache,
               const Tensor& v_slc_cache, const OptTensor& k_swa_cache, const OptTensor& v_swa_cache,
               const Tensor& k_tail, const Tensor& v_tail, const Tensor& k_cmp, const Tensor& v_cmp,
               const Tensor& k_slc, const Tensor& v_slc, const OptTensor& k_swa, const OptTensor& v_swa,
               const OptTensor& k_pe, const OptTensor& k_w1, const OptTensor& k_b1, const OptTensor& k_w2,
               const OptTensor& k_b2, const OptTensor& v_pe, const OptTensor& v_w1, const OptTensor& v_b1,
               const OptTensor& v_w2, const OptTensor& v_b2, const OptTensor& rotary_cos,
               const OptTensor& rotary_sin, const Tensor& cache_seqlens, const OptTensor& block_table,
               const OptTensor& cu_seqlens_q, SymInt max_seqlen_q, int64_t compress_block_size,
               int64_t compress_stride, std::string_view compress_kind) {
  check_no_gradients(kOp, {k_cmp_cache,
                           v_cmp_cache,
                           k_slc_cache,
                           v_slc_cache,
                           k_tail,
                           v_tail,
                           k_cmp,
                           v_cmp,
                           k_slc,
                           v_slc,
                           or_undefined(k_swa),
                           or_undefined(v_swa),
                           or_undefined(k_pe),
                           or_undefined(k_w1),
                           or_undefined(k_b1),
                           or_undefined(k_w2),
                           or_undefined(k_b2),
                           or_undefined(v_pe),
                           or_undefined(v_w1),
                           or_undefined(v_b1),
                           or_undefined(v_w2),
                           or_undefined(v_b2)});
  for (const Tensor& cache : {k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, or_undefined(k_swa_cache),
                              or_undefined(v_swa_cache), k_tail, v_tail}) {
    if (cache.defined() && !cache.is_inference()) torch::autograd::impl::bump_version(cache);
  }
  below_autograd(ops::append_kv, k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, k_swa_cache, v_swa_cache,
                 k_tail, v_tail, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, k_pe, k_w1, k_b1, k_w2, k_b2, v_pe,
                 v_w1, v_b1, v_w2, v_b2, rotary_cos, rotary_sin, cache_seqlens, block_table, cu_seqlens_q,
                 max_seqlen_q, compress_block_size, compress_stride, compress_kind);
}

}  // namespace autograd
}  // namespace nsa::ops
