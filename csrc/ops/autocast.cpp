// Autocast of the forward operators, by the lower-precision policy of scaled_dot_product_attention: every
// floating argument but float64 ones is cast to the autocast dtype. lse is no input of the user's model but
// an fp32 result, so it stays; integer tensors stay anyway.
#include <ATen/autocast_mode.h>

#include "ops/ops.h"

namespace nsa::ops {
namespace {

struct Lower {
  c10::DeviceType device;
  at::ScalarType dtype;

  explicit Lower(const Tensor& first)
      : device(first.device().type()), dtype(at::autocast::get_lower_precision_fp_from_device_type(device)) {}

  Tensor operator()(const Tensor& t) const { return at::autocast::cached_cast(dtype, t, device); }
  OptTensor operator()(const OptTensor& t) const { return at::autocast::cached_cast(dtype, t, device); }
  template <typename T>
  const T& operator()(const T& other) const {
    return other;
  }
};

template <typename Operator, typename... Rest>
auto call_lowered(const Operator& op, const Tensor& first, const Rest&... rest) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Lower lower(first);
  return op(lower(first), lower(rest)...);
}

}  // namespace

namespace autocast {

Tensor compress(const Tensor& x, const OptTensor& pe, const OptTensor& w1, const OptTensor& b1,
                const OptTensor& w2, const OptTensor& b2, const OptTensor& cu_seqlens, SymInt max_seqlen,
                int64_t block_size, int64_t stride, std::string_view kind) {
  return call_lowered(ops::compress, x, pe, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, stride, kind);
}

Tensor2 compressed_attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                             const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                             SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                             int64_t compress_stride, double softmax_scale) {
  return call_lowered(ops::compressed_attention, q, k_cmp, v_cmp, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                      max_seqlen_k, compress_block_size, compress_stride, softmax_scale);
}

Tensor block_scores(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                    int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                    double softmax_scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Lower lower(q);
  return ops::block_scores(lower(q), lower(k_cmp), lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, compress_block_size, compress_stride, block_size, softmax_scale);
}

Tensor select_blocks(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                     const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                     int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                     int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                     double softmax_scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Lower lower(q);
  return ops::select_blocks(lower(q), lower(k_cmp), lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                            max_seqlen_k, compress_block_size, compress_stride, block_size,
                            num_selected_blocks, num_initial_blocks, num_local_blocks, softmax_scale);
}

Tensor2 selected_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_indices,
                           const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                           SymInt max_seqlen_k, int64_t block_size, double softmax_scale) {
  return call_lowered(ops::selected_attention, q, k, v, block_indices, cu_seqlens_q, cu_seqlens_k,
                      max_seqlen_q, max_seqlen_k, block_size, softmax_scale);
}

Tensor2 sliding_window_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                 SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                 double softmax_scale) {
  return call_lowered(ops::sliding_window_attention, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                      max_seqlen_k, window_size, softmax_scale);
}

Tensor gated_combine(const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
                     const Tensor& gate_logits) {
  return call_lowered(ops::gated_combine, o_cmp, o_slc, o_swa, gate_logits);
}

Tensor2 attention(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                  const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa, const Tensor& gate_logits,
                  const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                  SymInt max_seqlen_k, int64_t compress_block_size, int64_t compress_stride,
                  int64_t block_size, int64_t num_selected_blocks, int64_t num_initial_blocks,
                  int64_t num_local_blocks, int64_t window_size, double softmax_scale) {
  return call_lowered(ops::attention, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, cu_seqlens_q,
                      cu_seqlens_k, max_seqlen_q, max_seqlen_k, compress_block_size, compress_stride,
                      block_size, num_selected_blocks, num_initial_blocks, num_local_blocks, window_size,
                      softmax_scale);
}

Tensor8 attention_forward(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                          const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                          const Tensor& gate_logits, const OptTensor& cu_seqlens_q,
                          const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                          int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                          int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                          int64_t window_size, double softmax_scale) {
  return call_lowered(ops::attention_forward, q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits,
                      cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, compress_block_size,
                      compress_stride, block_size, num_selected_blocks, num_initial_blocks, num_local_blocks,
                      window_size, softmax_scale);
}

// The caches stay as they are: a copy would be written instead.
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
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Lower lower(k_cmp);
  ops::append_kv(k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, k_swa_cache, v_swa_cache, k_tail, v_tail,
                 lower(k_cmp), lower(v_cmp), lower(k_slc), lower(v_slc), lower(k_swa), lower(v_swa),
                 lower(k_pe), lower(k_w1), lower(k_b1), lower(k_w2), lower(k_b2), lower(v_pe), lower(v_w1),
                 lower(v_b1), lower(v_w2), lower(v_b2), rotary_cos, rotary_sin, cache_seqlens, block_table,
                 cu_seqlens_q, max_seqlen_q, compress_block_size, compress_stride, compress_kind);
}

Tensor3 decode_attention(const Tensor& q, const Tensor& k_cmp_cache, const Tensor& v_cmp_cache,
                         const Tensor& k_slc_cache, const Tensor& v_slc_cache, const OptTensor& k_swa_cache,
                         const OptTensor& v_swa_cache, const Tensor& gate_logits, const Tensor& cache_seqlens,
                         const OptTensor& block_table, const OptTensor& cu_seqlens_q, SymInt max_seqlen_q,
                         int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                         int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                         int64_t window_size, double softmax_scale) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Lower lower(q);
  return ops::decode_attention(lower(q), k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, k_swa_cache,
                               v_swa_cache, lower(gate_logits), cache_seqlens, block_table, cu_seqlens_q,
                               max_seqlen_q, compress_block_size, compress_stride, block_size,
                               num_selected_blocks, num_initial_blocks, num_local_blocks, window_size,
                               softmax_scale);
}

}  // namespace autocast
}  // namespace nsa::ops
