// The Hopper launchers of block scores and the selection: which kernel, which chunk of queries.
#include "cuda/sm90/block_scores.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {
namespace {

// Blocks of a launch at most: the SMs of a GPU. The selection keeps the scores of one item of each.
constexpr int64_t kMaxBlocks = 132;

int log2_of(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

int padded_heads(int group, int dim) {
  if (group > 8) return 16;
  if (group > 4) return 8;
  return group > 2 || dim == 192 ? 4 : 2;
}

// f<T, Tile>() -> bool.
template <typename F>
bool dispatch_tiles(const BlockScoresParams& p, F&& f) {
  const auto with_dtype = [&]<typename Tile>() {
    if (p.dtype == DType::kBF16) return f.template operator()<__nv_bfloat16, Tile>();
    if (p.dtype == DType::kF16) return f.template operator()<__half, Tile>();
    return false;
  };
  const auto with_dim = [&]<int kDim>() {
    switch (padded_heads(p.shape.group(), kDim)) {
      case 16:
        return with_dtype.template operator()<ScoresTile<kDim, 16>>();
      case 8:
        return with_dtype.template operator()<ScoresTile<kDim, 8>>();
      case 4:
        return with_dtype.template operator()<ScoresTile<kDim, 4>>();
      default:
        if constexpr (kDim < 192) return with_dtype.template operator()<ScoresTile<kDim, 2>>();
        return false;
    }
  };
  if (p.shape.head_dim_qk == 64) return with_dim.template operator()<64>();
  if (p.shape.head_dim_qk == 128) return with_dim.template operator()<128>();
  if (p.shape.head_dim_qk == 192) return with_dim.template operator()<192>();
  return false;
}

// What the shapes say of a task, f<T, Tile>(task) -> bool; false where there is no kernel.
template <typename F>
bool with_task(const BlockScoresParams& p, F&& f) {
  const int64_t l = p.keys.block, d = p.keys.stride, group = p.shape.group();
  if (d % 8 || (d & (d - 1)) || l % d || l > 64 || p.block_size % d || p.seqs.total_q == 0) return false;
  if ((p.block_size != 32 && p.block_size != 64 && p.block_size != 128) || group > 64) return false;
  return dispatch_tiles(p, [&]<typename T, typename Tile>() {
    ScoresTask task{};
    task.params = p;
    task.passes = group <= 16 ? 1 : group <= 32 ? 2 : 4;
    if (task.passes > Tile::kConsumers) return false;
    task.tokens = Tile::kConsumers / task.passes * Tile::kTokens;
    task.block_log2 = log2_of(p.block_size);
    task.stride_log2 = log2_of(d);
    task.per_block_log2 = task.block_log2 - task.stride_log2;
    task.before = static_cast<int>(l / d) - 1;
    task.common_weights = task.before == 1 && task.per_block_log2 == 2;
    task.num_tiles = static_cast<int>(num_sequence_tiles(p.seqs, task.tokens));
    return f.template operator()<T, Tile>(task);
  });
}

struct TensorMaps {
  CUtensorMap q, k;
};

template <typename Tile>
bool make_maps(const BlockScoresParams& p, TensorMaps* maps) {
  return make_group_by_head_tensor_map(&maps->q, p.dtype, p.q, p.seqs.total_q, p.shape.num_heads_kv,
                                       p.shape.group(), Tile::kDim, Tile::kTokens, Tile::kHeads) &&
         make_tensor_map(&maps->k, p.dtype, p.k_cmp, p.seqs.key_rows, p.shape.num_heads_kv, Tile::kDim,
                         kScoresKeys, 1);
}

int64_t num_blocks(const ScoresTask& task) {
  return min64(static_cast<int64_t>(task.num_tiles) * task.params.shape.num_heads_kv, kMaxBlocks);
}

template <typename T, typename Tile>
Status launch_scores(const ScoresTask& task, const TensorMaps& maps, const Stream& stream) {
  const int64_t blocks = min64(num_blocks(task), device_attribute(cudaDevAttrMultiProcessorCount));
  return launch_chained("block_scores_sm90", block_scores_sm90<T, Tile>, dim3(static_cast<unsigned>(blocks)),
                        Tile::kThreads, Tile::kSharedBytes, stream, task, maps.q, maps.k);
}

// Rows of scores in the workspace begin at a multiple of 16 bytes.
int64_t scores_pitch(const SelectBlocksParams& p) { return round_up(max64(p.scoring.num_blocks, 1), 4); }

}  // namespace

bool block_scores(const BlockScoresParams& p, const Stream& stream, Status* status) {
  return with_task(p, [&]<typename T, typename Tile>(ScoresTask task) {
    TensorMaps maps;
    if (!make_maps<Tile>(p, &maps)) return false;
    task.scores = static_cast<float*>(p.scores);
    task.pitch = p.num_blocks;
    *status = launch_scores<T, Tile>(task, maps, stream);
    return true;
  });
}

int64_t workspace_bytes(const SelectBlocksParams& p) {
  int64_t bytes = 0;
  with_task(p.scoring, [&]<typename T, typename Tile>(const ScoresTask& task) {
    bytes = num_blocks(task) * task.tokens * scores_pitch(p) * static_cast<int64_t>(sizeof(float));
    return true;
  });
  return bytes;
}

bool select_blocks(const SelectBlocksParams& p, const Stream& stream, Status* status, Begin begin) {
  if (p.num_selected_blocks > 64) return false;
  return with_task(p.scoring, [&]<typename T, typename Tile>(ScoresTask task) {
    TensorMaps maps;
    if (!make_maps<Tile>(p.scoring, &maps)) return false;
    task.scores = static_cast<float*>(p.workspace);
    task.pitch = scores_pitch(p);
    task.block_indices = p.block_indices;
    task.num_selected = p.num_selected_blocks;
    task.num_initial = p.num_initial_blocks;
    task.num_local = p.num_local_blocks;
    task.early = begin == Begin::kEarly;
    *status = launch_scores<T, Tile>(task, maps, stream);
    return true;
  });
}

}  // namespace nsa::cuda::sm90
