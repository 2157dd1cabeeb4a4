// The backward of selected attention on Hopper: chunk by chunk of the rows of q, first the keys, then the
// queries.
#include "cuda/host/launch_kernel.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/selected_attention_bwd.h"

namespace nsa::cuda::sm90 {
namespace {

using Params = SelectedAttentionBwdParams;

// dS of a chunk stays below this, if a chunk of the smallest size does.
constexpr int64_t kScoreGradBytes = int64_t{1100} << 20;

struct Workspace {
  ScoreGrads ds;
  InvertPlan plan;
  int64_t bytes = 0;
  BlockLists lists;
  float* partials;

  explicit Workspace(const Params& p)
      : ds{nullptr, p.shape.num_heads_kv, p.num_selected_blocks, static_cast<int>(p.block_size / kKeyTile),
           static_cast<int>(ceil_div(p.shape.group(), kSlabRows))},
        plan(p, kKeyTile, chunk_tokens()),
        lists(p, plan, &bytes),
        partials(carve<float>(
            p.workspace, plan.max_partials * kKeyTile * (p.shape.head_dim_qk + p.shape.head_dim_v), &bytes)) {
    if (!p.grads.dq.wanted()) return;
    const int64_t tokens = min64(plan.chunk_tokens, p.seqs.total_q);
    ds.data = carve<uint4>(p.workspace, ds.tokens_to_slabs(tokens) * ScoreGrads::kVectors, &bytes);
  }
  int chunk_tokens() const {
    int64_t tokens = kBackwardChunkTokens;
    while (tokens > 256 && ds.tokens_to_slabs(tokens) * ScoreGrads::kVectors * 16 > kScoreGradBytes)
      tokens /= 2;
    return static_cast<int>(tokens);
  }
};

bool has_kernel(const Params& p) {
  const int dim = p.shape.head_dim_qk;
  return dim == p.shape.head_dim_v && (dim == 64 || dim == 128) && p.shape.group() <= 64 &&
         (p.block_size == kKeyTile || p.block_size == 2 * kKeyTile) && p.num_selected_blocks <= 64;
}

}  // namespace

bool selected_attention_backward(const Params& p, const Stream& stream, Status* status) {
  if (!has_kernel(p)) return false;
  const Workspace workspace(p);
  const InvertPlan& plan = workspace.plan;
  const BlockLists& lists = workspace.lists;
  *status = invert_blocks(p, plan, lists, stream);
  for (int64_t i = 0; status->ok() && i < plan.num_chunks; ++i) {
    const int64_t first_row = i * plan.chunk_tokens;
    const SelectedBwdChunk chunk{lists.entries,       lists.items + i * plan.max_items,
                                 lists.num_items + i, lists.tickets + i,
                                 first_row,           min64(plan.chunk_tokens, p.seqs.total_q - first_row),
                                 plan.num_blocks,     workspace.partials,
                                 workspace.ds};
    // A tensor suits TMA in all chunks or in none, so nothing has been added where this returns false.
    if (!selected_attention_bwd_keys(p, chunk, stream, status)) return false;
    if (status->ok()) *status = add_partials(p, plan, lists, i, workspace.partials, stream);
    if (!status->ok() || !p.grads.dq.wanted()) continue;
    if (!selected_attention_bwd_queries(p, chunk, stream, status)) return false;
  }
  return true;
}

int64_t workspace_bytes(const Params& p) { return has_kernel(p) ? Workspace(p).bytes : 0; }

}  // namespace nsa::cuda::sm90
