// Every operator of torch.ops.nsa: its signature, and what is registered for it. The schemas are in
// library.cpp.
//
// For each operator `name` there is
//   nsa::ops::name            the operator itself, to call from C++
//   nsa::ops::kernels::name   its kernel on every device and on Meta: checks, output allocation, launch
//   nsa::ops::autograd::name  its differentiation
// and, for all but backward operators, nsa::ops::autocast::name.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "ops/operator.h"

namespace nsa::ops {

using at::Tensor;
using c10::SymInt;
using OptTensor = std::optional<Tensor>;

template <size_t N>
using GradMask = std::array<bool, N>;

using Tensor2 = std::tuple<Tensor, Tensor>;
using Tensor3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensor4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensor6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using CompressFn = Tensor(const Tensor& x, const OptTensor& pe, const OptTensor& w1, const OptTensor& b1,
                          const OptTensor& w2, const OptTensor& b2, const OptTensor& cu_seqlens,
                          SymInt max_seqlen, int64_t block_size, int64_t stride, std::string_view kind);
using CompressBackwardFn = Tensor6(const Tensor& d_out, const Tensor& x, const OptTensor& pe,
                                   const OptTensor& w1, const OptTensor& b1, const OptTensor& w2,
                                   const OptTensor& b2, const OptTensor& cu_seqlens, SymInt max_seqlen,
                                   int64_t block_size, int64_t stride, std::string_view kind,
                                   GradMask<6> grad_mask);

using CompressedAttentionFn = Tensor2(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                                      const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                      SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                                      int64_t compress_stride, double softmax_scale);
using CompressedAttentionBackwardFn = Tensor3(const Tensor& d_o, const Tensor& q, const Tensor& k_cmp,
                                              const Tensor& v_cmp, const Tensor& o, const Tensor& lse,
                                              const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                              SymInt max_seqlen_q, SymInt max_seqlen_k,
                                              int64_t compress_block_size, int64_t compress_stride,
                                              double softmax_scale, GradMask<3> grad_mask);

using SlidingWindowAttentionFn = Tensor2(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                         SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t window_size,
                                         double softmax_scale);
using SlidingWindowAttentionBackwardFn = Tensor3(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                                 const Tensor& v, const Tensor& o, const Tensor& lse,
                                                 const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                                 SymInt max_seqlen_q, SymInt max_seqlen_k,
                                                 int64_t window_size, double softmax_scale,
                                                 GradMask<3> grad_mask);

using BlockScoresFn = Tensor(const Tensor& q, const Tensor& k_cmp, const Tensor& lse,
                             const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                             SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                             int64_t compress_stride, int64_t block_size, double softmax_scale);
using SelectBlocksFn = Tensor(const Tensor& q, const Tensor& k_cmp, const Tensor& lse,
                              const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                              SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                              int64_t compress_stride, int64_t block_size, int64_t num_selected_blocks,
                              int64_t num_initial_blocks, int64_t num_local_blocks, double softmax_scale);

using SelectedAttentionFn = Tensor2(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& block_indices, const OptTensor& cu_seqlens_q,
                                    const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                                    int64_t block_size, double softmax_scale);
using SelectedAttentionBackwardFn = Tensor3(const Tensor& d_o, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& o, const Tensor& lse,
                                            const Tensor& block_indices, const OptTensor& cu_seqlens_q,
                                            const OptTensor& cu_seqlens_k, SymInt max_seqlen_q,
                                            SymInt max_seqlen_k, int64_t block_size, double softmax_scale,
                                            GradMask<3> grad_mask);

using GatedCombineFn = Tensor(const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
                              const Tensor& gate_logits);
using GatedCombineBackwardFn = Tensor4(const Tensor& d_o, const Tensor& o_cmp, const Tensor& o_slc,
                                       const Tensor& o_swa, const Tensor& gate_logits, GradMask<4> grad_mask);

using AttentionFn = Tensor2(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                            const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa,
                            const Tensor& gate_logits, const OptTensor& cu_seqlens_q,
                            const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                            int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                            int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                            int64_t window_size, double softmax_scale);
// (o, block_indices, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa)
using AttentionForwardFn = Tensor8(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp,
                                   const Tensor& k_slc, const Tensor& v_slc, const Tensor& k_swa,
                                   const Tensor& v_swa, const Tensor& gate_logits,
                                   const OptTensor& cu_seqlens_q, const OptTensor& cu_seqlens_k,
                                   SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
                                   int64_t compress_stride, int64_t block_size, int64_t num_selected_blocks,
                                   int64_t num_initial_blocks, int64_t num_local_blocks, int64_t window_size,
                                   double softmax_scale);
// (dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_swa, dv_swa, d_gate_logits)
using AttentionBackwardFn = Tensor8(
    const Tensor& d_o, const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
    const Tensor& v_slc, const Tensor& k_swa, const Tensor& v_swa, const Tensor& gate_logits,
    const Tensor& block_indices, const Tensor& o_cmp, const Tensor& o_slc, const Tensor& o_swa,
    const Tensor& lse_cmp, const Tensor& lse_slc, const Tensor& lse_swa, const OptTensor& cu_seqlens_q,
    const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int64_t compress_block_size,
    int64_t compress_stride, int64_t block_size, int64_t num_selected_blocks, int64_t num_initial_blocks,
    int64_t num_local_blocks, int64_t window_size, double softmax_scale, GradMask<8> grad_mask);

// The *_cache and *_tail tensors are written in place.
using AppendKvFn = void(const Tensor& k_cmp_cache, const Tensor& v_cmp_cache, const Tensor& k_slc_cache,
                        const Tensor& v_slc_cache, const OptTensor& k_swa_cache, const OptTensor& v_swa_cache,
                        const Tensor& k_tail, const Tensor& v_tail, const Tensor& k_cmp, const Tensor& v_cmp,
                        const Tensor& k_slc, const Tensor& v_slc, const OptTensor& k_swa,
                        const OptTensor& v_swa, const OptTensor& k_pe, const OptTensor& k_w1,
                        const OptTensor& k_b1, const OptTensor& k_w2, const OptTensor& k_b2,
                        const OptTensor& v_pe, const OptTensor& v_w1, const OptTensor& v_b1,
                        const OptTensor& v_w2, const OptTensor& v_b2, const OptTensor& rotary_cos,
                        const OptTensor& rotary_sin, const Tensor& cache_seqlens,
                        const OptTensor& block_table, const OptTensor& cu_seqlens_q, SymInt max_seqlen_q,
                        int64_t compress_block_size, int64_t compress_stride, std::string_view compress_kind);
// (o, block_indices, lse of cmp, slc, swa)
using DecodeAttentionFn = Tensor3(const Tensor& q, const Tensor& k_cmp_cache, const Tensor& v_cmp_cache,
                                  const Tensor& k_slc_cache, const Tensor& v_slc_cache,
                                  const OptTensor& k_swa_cache, const OptTensor& v_swa_cache,
                                  const Tensor& gate_logits, const Tensor& cache_seqlens,
                                  const OptTensor& block_table, const OptTensor& cu_seqlens_q,
                                  SymInt max_seqlen_q, int64_t compress_block_size, int64_t compress_stride,
                                  int64_t block_size, int64_t num_selected_blocks, int64_t num_initial_blocks,
                                  int64_t num_local_blocks, int64_t window_size, double softmax_scale);

#define NSA_FOR_EACH_FORWARD_OPERATOR(X)                \
  X(compress, CompressFn)                               \
  X(compressed_attention, CompressedAttentionFn)        \
  X(block_scores, BlockScoresFn)                        \
  X(select_blocks, SelectBlocksFn)                      \
  X(selected_attention, SelectedAttentionFn)            \
  X(sliding_window_attention, SlidingWindowAttentionFn) \
  X(gated_combine, GatedCombineFn)                      \
  X(attention, AttentionFn)                             \
  X(attention_forward, AttentionForwardFn)

#define NSA_FOR_EACH_BACKWARD_OPERATOR(X)                                \
  X(compress_backward, CompressBackwardFn)                               \
  X(compressed_attention_backward, CompressedAttentionBackwardFn)        \
  X(selected_attention_backward, SelectedAttentionBackwardFn)            \
  X(sliding_window_attention_backward, SlidingWindowAttentionBackwardFn) \
  X(gated_combine_backward, GatedCombineBackwardFn)                      \
  X(attention_backward, AttentionBackwardFn)

// On an inference cache; not differentiable.
#define NSA_FOR_EACH_CACHE_OPERATOR(X) \
  X(append_kv, AppendKvFn)             \
  X(decode_attention, DecodeAttentionFn)

#define NSA_FOR_EACH_OPERATOR(X)    \
  NSA_FOR_EACH_FORWARD_OPERATOR(X)  \
  NSA_FOR_EACH_BACKWARD_OPERATOR(X) \
  NSA_FOR_EACH_CACHE_OPERATOR(X)

#define NSA_DECLARE_OPERATOR(name, Fn)                  \
  struct name##_tag {                                   \
    static constexpr const char* kName = "nsa::" #name; \
  };                                                    \
  inline constexpr Operator<name##_tag, Fn> name;       \
  namespace kernels {                                   \
  Fn name;                                              \
  }                                                     \
  namespace autograd {                                  \
  Fn name;                                              \
  }
NSA_FOR_EACH_OPERATOR(NSA_DECLARE_OPERATOR)
#undef NSA_DECLARE_OPERATOR

#define NSA_DECLARE_AUTOCAST(name, Fn) \
  namespace autocast {                 \
  Fn name;                             \
  }
NSA_FOR_EACH_FORWARD_OPERATOR(NSA_DECLARE_AUTOCAST)
NSA_FOR_EACH_CACHE_OPERATOR(NSA_DECLARE_AUTOCAST)
#undef NSA_DECLARE_AUTOCAST

}  // namespace nsa::ops
