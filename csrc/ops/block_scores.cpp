// nsa::block_scores and nsa::select_blocks: from compressed attention to the blocks that each query reads.
// Neither is differentiable: gradients flow through the output of the compressed branch.
#include "ops/autograd.h"
#include "ops/branches.h"
#include "ops/checks.h"
#include "ops/launch_device.h"
#include "ops/ops.h"

namespace nsa::ops {
namespace {

// What both score with, the tensors kept until the launch is over.
struct Scoring {
  at::Tensor k_cmp, lse;
  BlockScoresParams params;

  Scoring(const AttentionCall& call, const at::Tensor& k_cmp, const at::Tensor& lse, KeyBlocks keys,
          int64_t block_size)
      : k_cmp(as_rows(k_cmp)), lse(lse.contiguous()), params(call.params<BlockScoresParams>()) {
    params.seqs.key_rows = k_cmp.size(0);
    params.keys = keys;
    params.block_size = block_size;
    params.k_cmp = rows_view(this->k_cmp);
    params.lse = this->lse.const_data_ptr();
    params.num_blocks = ceil_div(call.batch.seqs.max_seqlen_k, block_size);
  }
};

AttentionShape check(const Checks& checks, const Tensor& q, const Tensor& k_cmp, const Tensor& lse,
                     const SequenceArgs& sequences, KeyBlocks keys, int64_t block_size,
                     double softmax_scale) {
  checks.compression("compress_block_size", keys.block, "compress_stride", keys.stride);
  checks.selection_block(block_size, keys.stride);
  checks.positive("softmax_scale", softmax_scale);
  const AttentionShape shape = checks.attention({"q", q}, {"k_cmp", k_cmp});
  checks.lse({"lse", lse}, q);
  checks.sequences(q, sequences);
  checks.key_rows({"k_cmp", k_cmp}, sequences, keys);
  return shape;
}

}  // namespace

SelectForward::SelectForward(const AttentionCall& call, const at::Tensor& k_cmp, const at::Tensor& lse,
                             KeyBlocks keys, const Selection& selection, const at::Tensor& block_indices)
    : params{} {
  const Scoring scoring(call, k_cmp, lse, keys, selection.block_size);
  this->k_cmp = scoring.k_cmp;
  this->lse = scoring.lse;
  params.scoring = scoring.params;
  params.num_selected_blocks = static_cast<int>(selection.num_selected_blocks);
  params.num_initial_blocks = static_cast<int>(selection.num_initial_blocks);
  params.num_local_blocks = static_cast<int>(selection.num_local_blocks);
  params.block_indices = block_indices.mutable_data_ptr<int32_t>();
  workspace = allocate_workspace(k_cmp.device(), &params);
}

void select(const AttentionCall& call, const at::Tensor& k_cmp, const at::Tensor& lse, KeyBlocks keys,
            const Selection& selection, const at::Tensor& block_indices) {
  fill_padding({{block_indices, -1}}, call.batch);
  if (call.batch.empty()) return;
  launch(call.op, k_cmp.device(), SelectForward(call, k_cmp, lse, keys, selection, block_indices).params);
}

namespace kernels {

Tensor block_scores(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                    int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                    double softmax_scale) {
  constexpr const char* kOp = "block_scores";
  const SequenceArgs sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const KeyBlocks keys{compress_block_size, compress_stride};
  const AttentionShape shape =
      check(Checks(kOp, kOp), q, k_cmp, lse, sequences, keys, block_size, softmax_scale);
  const Tensor scores =
      at::empty_symint({q.sym_size(0), shape.num_heads_kv, (max_seqlen_k + (block_size - 1)) / block_size},
                       q.options().dtype(acc_dtype(q.scalar_type())));
  if (q.is_meta()) return scores;
  const AttentionCall call(kOp, shape, softmax_scale, q, sequences);
  if (scores.is_cpu()) {
    fill_padding({{scores, 0}}, call.batch);
  } else {
    scores.zero_();  // kernels write the candidates alone
  }
  if (call.batch.empty() || scores.numel() == 0) return scores;
  Scoring scoring(call, k_cmp, lse, keys, block_size);
  scoring.params.scores = scores.mutable_data_ptr();
  scoring.params.num_blocks = scores.size(2);
  launch(kOp, q.device(), scoring.params);
  return scores;
}

Tensor select_blocks(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                     const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                     int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                     int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                     double softmax_scale) {
  constexpr const char* kOp = "select_blocks";
  const SequenceArgs sequences{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const KeyBlocks keys{compress_block_size, compress_stride};
  const Checks checks(kOp, kOp);
  checks.selection(num_selected_blocks, num_initial_blocks, num_local_blocks);
  const AttentionShape shape = check(checks, q, k_cmp, lse, sequences, keys, block_size, softmax_scale);
  const Tensor block_indices = empty_block_indices(q, shape, num_selected_blocks);
  if (!q.is_meta()) {
    select({kOp, shape, softmax_scale, q, sequences}, k_cmp, lse, keys,
           {block_size, num_selected_blocks, num_initial_blocks, num_local_blocks}, block_indices);
  }
  return block_indices;
}

}  // namespace kernels

namespace autograd {

Tensor block_scores(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                    const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                    int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                    double softmax_scale) {
  return below_autograd(ops::block_scores, q, k_cmp, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, compress_block_size, compress_stride, block_size, softmax_scale);
}

Tensor select_blocks(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const OptTensor& cu_seqlens_q,
                     const OptTensor& cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
                     int64_t compress_block_size, int64_t compress_stride, int64_t block_size,
                     int64_t num_selected_blocks, int64_t num_initial_blocks, int64_t num_local_blocks,
                     double softmax_scale) {
  return below_autograd(ops::select_blocks, q, k_cmp, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, compress_block_size, compress_stride, block_size, num_selected_blocks,
                        num_initial_blocks, num_local_blocks, softmax_scale);
}

}  // namespace autograd
}  // namespace nsa::ops
