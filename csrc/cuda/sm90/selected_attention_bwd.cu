// The backward of selected attention on Hopper: chunk by chunk of the rows of q, first the keys, then the
// queries.
#include "cuda/host/launch_kernel.h"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/selected_attention_bwd.h"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {
namespace {

using Params = SelectedAttentionBwdParams;

// dS of a chunk stays below this, if a chunk of the smallest size does.
constexpr int64_t kScoreGradBytes = int64_t{1100} << 20;

constexpr int kStatsThreads = 256;
__global__ void __launch_bounds__(kStatsThreads)
    selected_attention_bwd_stats(const AttentionGrads grads, const int64_t total_q, const int group,
                                 const RowStats stats) {
  ptx::launch_dependents();
  const int64_t i = int64_t{blockIdx.x} * kStatsThreads + threadIdx.x;
  const int64_t of_token = int64_t{stats.heads_kv} * stats.token_rows;
  if (i >= (total_q + 1) * of_token) return;
  const int64_t token = i / of_token;
  const int in_token = static_cast<int>(i - token * of_token), head = in_token / stats.token_rows,
            member = in_token - head * stats.token_rows;
  float2 value = make_float2(-kNegInf, 0.f);
  if (token < total_q && member < group) {
    const int64_t row = (token * stats.heads_kv + head) * group + member;
    value.x = static_cast<const float*>(grads.lse)[row] * kLog2e;
    value.y = static_cast<const float*>(grads.delta)[row];
    if (grads.d_o_scale != nullptr) {
      const float g = static_cast<const float*>(grads.d_o_scale)[row];
      value.x -= log2f(g);
      value.y = g == 0.f ? 0.f : value.y / g;
    }
  }
  stats.data[i] = value;
}

struct Workspace {
  ScoreGrads ds;
  InvertPlan plan;
  int64_t bytes = 0;
  BlockLists lists;
  float* partials;
  RowStats stats;

  explicit Workspace(const Params& p)
      : ds{nullptr, p.shape.num_heads_kv, p.num_selected_blocks, static_cast<int>(p.block_size / kKeyTile),
           static_cast<int>(ceil_div(p.shape.group(), kSlabRows))},
        plan(p, kKeyTile, chunk_tokens()),
        lists(p, plan, &bytes),
        partials(carve<float>(
            p.workspace, plan.max_partials * kKeyTile * (p.shape.head_dim_qk + p.shape.head_dim_v), &bytes)),
        stats{nullptr, p.shape.num_heads_kv, ds.slabs * kSlabRows} {
    stats.data = carve<float2>(p.workspace, stats.index(p.seqs.total_q + 1, 0), &bytes);
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

Status make_stats(const Params& p, const RowStats& stats, const Stream& stream) {
  const int64_t blocks = ceil_div(stats.index(p.seqs.total_q + 1, 0), kStatsThreads);
  return launch("selected_attention_bwd_stats", selected_attention_bwd_stats,
                dim3(static_cast<unsigned>(blocks)), kStatsThreads, 0, stream, p.grads, p.seqs.total_q,
                p.shape.group(), stats);
}

}  // namespace

bool prepare_selected_backward(const Params& p, const Stream& stream, Status* status) {
  if (!has_kernel(p)) return false;
  const Workspace workspace(p);
  *status = invert_blocks(p, workspace.plan, workspace.lists, stream);
  return true;
}

bool selected_attention_backward(const Params& p, const Stream& stream, Status* status, Lists prepared,
                                 BandedBranchesBwdParams* next) {
  if (!has_kernel(p)) return false;
  if (prepared == Lists::kMissing) prepare_selected_backward(p, stream, status);
  if (!status->ok()) return true;
  const Workspace workspace(p);
  const InvertPlan& plan = workspace.plan;
  const BlockLists& lists = workspace.lists;
  *status = make_stats(p, workspace.stats, stream);
  for (int64_t i = 0; status->ok() && i < plan.num_chunks; ++i) {
    const int64_t first_row = i * plan.chunk_tokens;
    const SelectedBwdChunk chunk{lists.entries,       lists.items + i * plan.max_items,
                                 lists.num_items + i, lists.tickets + i,
                                 first_row,           min64(plan.chunk_tokens, p.seqs.total_q - first_row),
                                 plan.num_blocks,     workspace.partials,
                                 workspace.stats,     workspace.ds};
    // A tensor suits TMA in all chunks or in none, so nothing has been added where this returns false.
    if (!selected_attention_bwd_keys(p, chunk, stream, status)) return false;
    const bool between = i == 0 && next != nullptr && status->ok() && p.grads.dq.wanted() &&
                         begin_banded_branches_backward(*next, stream, status);
    if (between) next->first_made = true;
    if (status->ok()) *status = add_partials(p, plan, lists, i, workspace.partials, between, stream);
    if (!status->ok() || !p.grads.dq.wanted()) continue;
    if (!selected_attention_bwd_queries(p, chunk, stream, status)) return false;
  }
  if (next != nullptr) next->early = p.grads.dq.wanted();
  return true;
}

int64_t workspace_bytes(const Params& p) { return has_kernel(p) ? Workspace(p).bytes : 0; }

}  // namespace nsa::cuda::sm90
