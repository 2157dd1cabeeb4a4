// nsa::decode_attention: the three branches and the gate for a few tokens per sequence, over a cache.
#include "ops/autograd.h"
#include "ops/branches.h"
#include "ops/cache.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {
namespace {

constexpr const char* kOp = "decode_attention";

}  // namespace

namespace kernels {

Tensor3 decode_attention(const Tensor& q, const Tensor& k_cmp_cache, const Tensor& v_cmp_cache,
                         const Tensor& k_slc_cache, const Tensor& v_slc_cache, const OptTensor& k_swa_cache,
                         const OptTensor& v_swa_cache, const Tensor& gate_logits, const Tensor& cache_seqlens,
                         const OptTensor& block_table, const OptTensor& cu_seqlens_q, SymInt max_seqlen_q,
                         int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                         int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                         int64_t window_size, double softmax_scale) {
  const CacheArgs args{cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q};
  const CacheChecks cache(kOp, args);
  const Checks& checks = cache.checks();
  checks.compression("compress_block_size", compress_block_size, "compress_stride", compress_stride);
  checks.selection_block(block_size, compress_stride);
  checks.selection(num_selected_blocks, num_initial_blocks, num_local_blocks);
  checks.at_least("window_size", window_size, 1);
  checks.positive("softmax_scale", softmax_scale);
  const std::optional<int64_t> longest = max_seqlen_q.maybe_as_int();
  TORCH_CHECK_VALUE(!longest.has_value() || (*longest >= 0 && *longest <= kMaxDecodeTokens), "nsa::", kOp,
                    ": max_seqlen_q = ", max_seqlen_q, "; expected at most ", kMaxDecodeTokens,
                    " query tokens per sequence (longer steps go through the operators of prefill)");

  const Arg first{"q", q}, pages{"k_slc_cache", k_slc_cache};
  checks.dim(first, 3, "[T, Hq, Dk]");
  checks.dim({"v_slc_cache", v_slc_cache}, 4, "[pages, page_block_size, Hkv, Dv]");
  cache.sequences(first);
  // Pages hold whole selection blocks, so that a block lies in one.
  const int64_t page_block_size = block_table.has_value()
                                      ? cache.page_block_size(pages, "block_size", block_size)
                                      : cache.page_block_size(pages, "compress_stride", compress_stride);
  const auto concrete = [](const SymInt& size) {
    return static_cast<int>(size.guard_int(__FILE__, __LINE__));
  };
  const AttentionShape shape{concrete(q.sym_size(1)), concrete(k_slc_cache.sym_size(2)),
                             concrete(q.sym_size(2)), concrete(v_slc_cache.sym_size(3))};
  TORCH_CHECK_VALUE(shape.num_heads_q > 0 && shape.head_dim_qk > 0 && shape.head_dim_v > 0, "nsa::", kOp,
                    ": q has shape ", q.sym_sizes(),
                    "; the number of heads and the head dims must be at least 1");
  TORCH_CHECK_VALUE(shape.num_heads_kv > 0 && shape.num_heads_q % shape.num_heads_kv == 0, "nsa::", kOp,
                    ": k_slc_cache has ", shape.num_heads_kv, " heads; their number must divide the ",
                    shape.num_heads_q, " heads of q");
  checks.supported(first, &shape);
  const int64_t heads = shape.num_heads_kv, page_blocks = page_block_size / compress_stride;
  cache.pages(pages, first, page_block_size, heads, shape.head_dim_qk);
  cache.pages({"v_slc_cache", v_slc_cache}, first, page_block_size, heads, shape.head_dim_v);
  cache.pages({"k_cmp_cache", k_cmp_cache}, first, page_blocks, heads, shape.head_dim_qk);
  cache.pages({"v_cmp_cache", v_cmp_cache}, first, page_blocks, heads, shape.head_dim_v);
  const int64_t capacity = cache.capacity(pages);
  TORCH_CHECK_VALUE(k_swa_cache.has_value() == v_swa_cache.has_value(), "nsa::", kOp, ": ",
                    k_swa_cache.has_value() ? "v_swa_cache" : "k_swa_cache",
                    " is None; expected both k_swa_cache and v_swa_cache or neither");
  if (k_swa_cache.has_value()) {
    const int64_t least = min64(capacity, window_size - 1 + longest.value_or(1));
    cache.ring({"k_swa_cache", *k_swa_cache}, first, heads, shape.head_dim_qk, least);
    cache.ring({"v_swa_cache", *v_swa_cache}, first, heads, shape.head_dim_v, least);
    TORCH_CHECK_VALUE(k_swa_cache->sym_size(1) == v_swa_cache->sym_size(1), "nsa::", kOp,
                      ": v_swa_cache keeps ", v_swa_cache->sym_size(1), " tokens; expected the ",
                      k_swa_cache->sym_size(1), " of k_swa_cache");
  }
  checks.gate_logits({"gate_logits", gate_logits}, q);

  const Tensor block_indices = empty_block_indices(q, shape, num_selected_blocks);
  const Tensor lse = at::empty_symint({kNumBranches, q.sym_size(0), shape.num_heads_q},
                                      q.options().dtype(acc_dtype(q.scalar_type())));
  const Tensor o = at::empty_symint({q.sym_size(0), shape.num_heads_q, shape.head_dim_v}, q.options());
  if (q.is_meta()) return {o, block_indices, lse};
  cache.values(first, pages);

  const CacheStep step(q, args, capacity);
  // CUDA kernels write the padding themselves, but none runs without a sequence.
  if (q.is_cpu() || step.empty()) {
    const int64_t begin = step.empty() ? 0 : step.rows_q;
    const auto padding = [&](const Tensor& t, int64_t dim) {
      return t.narrow(dim, begin, q.size(0) - begin);
    };
    padding(o, 0).zero_();
    padding(block_indices, 0).fill_(-1);
    padding(lse, 1).fill_(-std::numeric_limits<double>::infinity());
  }
  if (step.empty()) return {o, block_indices, lse};
  const Tensor q_rows = as_rows(q), gates = gate_logits.contiguous();
  DecodeAttentionParams params{};
  params.dtype = dtype_of(q);
  params.gate_dtype = dtype_of(gates);
  params.seqs = step.seqs;
  params.shape = shape;
  params.compressed = {compress_block_size, compress_stride};
  params.block_size = block_size;
  params.num_selected_blocks = static_cast<int>(num_selected_blocks);
  params.num_initial_blocks = static_cast<int>(num_initial_blocks);
  params.num_local_blocks = static_cast<int>(num_local_blocks);
  params.window = window_size;
  params.softmax_scale = softmax_scale;
  params.q = rows_view(q_rows);
  params.gate_logits = gates.const_data_ptr();
  params.k_cmp = step.pages(k_cmp_cache);
  params.v_cmp = step.pages(v_cmp_cache);
  params.k_slc = step.pages(k_slc_cache);
  params.v_slc = step.pages(v_slc_cache);
  params.k_swa = k_swa_cache.has_value() ? step.ring(*k_swa_cache) : params.k_slc;
  params.v_swa = v_swa_cache.has_value() ? step.ring(*v_swa_cache) : params.v_slc;
  params.o = o.mutable_data_ptr();
  params.block_indices = block_indices.mutable_data_ptr<int32_t>();
  params.lse = lse.mutable_data_ptr();
  const Tensor workspace = allocate_workspace(q.device(), &params);
  launch(kOp, q.device(), params);
  return {o, block_indices, lse};
}

}  // namespace kernels

namespace autograd {

Tensor3 decode_attention(const Tensor& q, const Tensor& k_cmp_cache, const Tensor& v_cmp_cache,
                         const Tensor& k_slc_cache, const Tensor& v_slc_cache, const OptTensor& k_swa_cache,
                         const OptTensor& v_swa_cache, const Tensor& gate_logits, const Tensor& cache_seqlens,
                         const OptTensor& block_table, const OptTensor& cu_seqlens_q, SymInt max_seqlen_q,
                         int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                         int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                         int64_t window_size, double softmax_scale) {
  check_no_gradients(kOp, {q, k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, or_undefined(k_swa_cache),
                           or_undefined(v_swa_cache), gate_logits});
  return below_autograd(ops::decode_attention, q, k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache,
                        k_swa_cache, v_swa_cache, gate_logits, cache_seqlens, block_table, cu_seqlens_q,
                        max_seqlen_q, compress_block_size, compress_stride, block_size, num_selected_blocks,
                        num_initial_blocks, num_local_blocks, window_size, softmax_scale);
}

}  // namespace autograd
}  // namespace nsa::ops
