// Every schema and every registration of torch.ops.nsa, and nothing else.
#include <torch/library.h>

#include "ops/ops.h"

#define CU "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define BRANCHES                                                                                   \
  "Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_swa, Tensor v_swa, " \
  "Tensor gate_logits, "
#define CONFIG                                                                              \
  "int compress_block_size, int compress_stride, int block_size, int num_selected_blocks, " \
  "int num_initial_blocks, int num_local_blocks, int window_size, float softmax_scale"
#define PHI                                                                                    \
  "Tensor x, Tensor? pe, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? cu_seqlens, " \
  "SymInt max_seqlen, int block_size, int stride, str kind"

#define CACHE_STEP "Tensor cache_seqlens, Tensor? block_table, Tensor? cu_seqlens_q, SymInt max_seqlen_q, "

TORCH_LIBRARY(nsa, m) {
  const auto define = [&m](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };

  define("compress(" PHI ") -> Tensor");
  define("compressed_attention(Tensor q, Tensor k_cmp, Tensor v_cmp, " CU
         "int compress_block_size, int compress_stride, float softmax_scale) -> (Tensor o, Tensor lse)");
  define("block_scores(Tensor q, Tensor k_cmp, Tensor lse, " CU
         "int compress_block_size, int compress_stride, int block_size, float softmax_scale) -> Tensor");
  define("select_blocks(Tensor q, Tensor k_cmp, Tensor lse, " CU
         "int compress_block_size, int compress_stride, int block_size, int num_selected_blocks, "
         "int num_initial_blocks, int num_local_blocks, float softmax_scale) -> Tensor");
  define("selected_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, " CU
         "int block_size, float softmax_scale) -> (Tensor o, Tensor lse)");
  define("sliding_window_attention(Tensor q, Tensor k, Tensor v, " CU
         "int window_size, float softmax_scale) -> (Tensor o, Tensor lse)");
  define("gated_combine(Tensor o_cmp, Tensor o_slc, Tensor o_swa, Tensor gate_logits) -> Tensor");
  define("attention(" BRANCHES CU CONFIG ") -> (Tensor o, Tensor block_indices)");
  define("attention_forward(" BRANCHES CU CONFIG
         ") -> (Tensor o, Tensor block_indices, Tensor o_cmp, Tensor o_slc, Tensor o_swa, "
         "Tensor lse_cmp, Tensor lse_slc, Tensor lse_swa)");

  define(
      "append_kv(Tensor(a!) k_cmp_cache, Tensor(b!) v_cmp_cache, Tensor(c!) k_slc_cache, "
      "Tensor(d!) v_slc_cache, Tensor(e!)? k_swa_cache, Tensor(f!)? v_swa_cache, Tensor(g!) k_tail, "
      "Tensor(h!) v_tail, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor? k_swa, "
      "Tensor? v_swa, Tensor? k_pe, Tensor? k_w1, Tensor? k_b1, Tensor? k_w2, Tensor? k_b2, Tensor? v_pe, "
      "Tensor? v_w1, Tensor? v_b1, Tensor? v_w2, Tensor? v_b2, Tensor? rotary_cos, Tensor? "
      "rotary_sin, " CACHE_STEP "int compress_block_size, int compress_stride, str compress_kind) -> ()");
  define(
      "decode_attention(Tensor q, Tensor k_cmp_cache, Tensor v_cmp_cache, Tensor k_slc_cache, "
      "Tensor v_slc_cache, Tensor? k_swa_cache, Tensor? v_swa_cache, Tensor gate_logits, " CACHE_STEP CONFIG
      ") -> (Tensor o, Tensor block_indices, Tensor lse)");

  // An unwanted gradient comes back as an empty tensor of shape [0].
  define("compress_backward(Tensor d_out, " PHI
         ", bool[6] grad_mask) -> (Tensor dx, Tensor dpe, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
  define(
      "compressed_attention_backward(Tensor d_o, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor o, Tensor "
      "lse, " CU
      "int compress_block_size, int compress_stride, float softmax_scale, bool[3] grad_mask) "
      "-> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp)");
  define(
      "selected_attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "Tensor block_indices, " CU
      "int block_size, float softmax_scale, bool[3] grad_mask) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
  define(
      "sliding_window_attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, " CU
      "int window_size, float softmax_scale, bool[3] grad_mask) -> (Tensor dq, Tensor dk, Tensor dv)");
  define(
      "gated_combine_backward(Tensor d_o, Tensor o_cmp, Tensor o_slc, Tensor o_swa, Tensor gate_logits, "
      "bool[4] grad_mask) -> (Tensor d_o_cmp, Tensor d_o_slc, Tensor d_o_swa, Tensor d_gate_logits)");
  define("attention_backward(Tensor d_o, " BRANCHES
         "Tensor block_indices, Tensor o_cmp, Tensor o_slc, Tensor o_swa, Tensor lse_cmp, Tensor lse_slc, "
         "Tensor lse_swa, " CU CONFIG
         ", bool[8] grad_mask) "
         "-> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp, Tensor dk_slc, Tensor dv_slc, Tensor dk_swa, "
         "Tensor dv_swa, Tensor d_gate_logits)");
}

// A kernel's checks and allocations see only shapes, so it is its own Meta kernel; launch_device.h tells
// devices apart.
#define IMPL_KERNEL(name, Fn) m.impl(#name, &nsa::ops::kernels::name);
TORCH_LIBRARY_IMPL(nsa, CPU, m){NSA_FOR_EACH_OPERATOR(IMPL_KERNEL)} TORCH_LIBRARY_IMPL(nsa, CUDA, m){
    NSA_FOR_EACH_OPERATOR(IMPL_KERNEL)} TORCH_LIBRARY_IMPL(nsa, Meta, m){NSA_FOR_EACH_OPERATOR(IMPL_KERNEL)}
#define IMPL_AUTOGRAD(name, Fn) m.impl(#name, &nsa::ops::autograd::name);
TORCH_LIBRARY_IMPL(nsa, Autograd, m){NSA_FOR_EACH_OPERATOR(IMPL_AUTOGRAD)}

#define IMPL_AUTOCAST(name, Fn) m.impl(#name, &nsa::ops::autocast::name);
#define IMPL_AUTOCAST_ALL                      \
  NSA_FOR_EACH_FORWARD_OPERATOR(IMPL_AUTOCAST) \
  NSA_FOR_EACH_CACHE_OPERATOR(IMPL_AUTOCAST)
TORCH_LIBRARY_IMPL(nsa, AutocastCPU, m){IMPL_AUTOCAST_ALL} TORCH_LIBRARY_IMPL(nsa, AutocastCUDA, m) {
  IMPL_AUTOCAST_ALL
}
