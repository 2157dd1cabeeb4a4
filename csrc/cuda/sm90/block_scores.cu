// The Hopper launchers of block scores and the selection: which kernel, which chunk of queries.
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/select_blocks.cuh"
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

// f<T, kDim, kHeads>() -> bool.
template <typename F>
bool dispatch_shapes(const BlockScoresParams& p, F&& f) {
  const auto with_heads = [&]<int kDim, int kHeads>() {
    if (p.dtype == DType::kBF16) return f.template operator()<__nv_bfloat16, kDim, kHeads>();
    if (p.dtype == DType::kF16) return f.template operator()<__half, kDim, kHeads>();
    return false;
  };
  const auto with_dim = [&]<int kDim>() {
    switch (padded_heads(p.shape.group(), kDim)) {
      case 16:
        return with_heads.template operator()<kDim, 16>();
      case 8:
        return with_heads.template operator()<kDim, 8>();
      case 4:
        return with_heads.template operator()<kDim, 4>();
      default:
        if constexpr (kDim < 192) return with_heads.template operator()<kDim, 2>();
        return false;
    }
  };
  if (p.shape.head_dim_qk == 64) return with_dim.template operator()<64>();
  if (p.shape.head_dim_qk == 128) return with_dim.template operator()<128>();
  if (p.shape.head_dim_qk == 192) return with_dim.template operator()<192>();
  return false;
}

// The tile of select_blocks_sm90: two pipelines where warpgroups and stages can be shared out.
template <int kDim, int kHeads, typename One = ScoresConfig<kDim, kHeads, 1>>
using SelectTile = ScoresTile<kDim, kHeads, (One::kWarpgroups % 2 == 0 && One::kStages % 2 == 0 ? 2 : 1)>;

// Two pipelines hide what an item costs beside its key tiles, and read each tile twice as often: they are for
// items of few tiles.
constexpr int64_t kLongRow = 256;

// What the shapes say of a task, f<T, Tile, kSelect>(task) -> bool; false where there is no kernel. kSelect:
// the scores are only wanted for a choice that select_blocks_sm90 makes.
template <typename F>
bool with_task(const BlockScoresParams& p, bool choosing, F&& f) {
  const int64_t l = p.keys.block, d = p.keys.stride, group = p.shape.group();
  if (d % 8 || (d & (d - 1)) || l % d || l > 64 || p.block_size % d || p.seqs.total_q == 0) return false;
  if ((p.block_size != 32 && p.block_size != 64 && p.block_size != 128) || group > 64) return false;
  const bool common_weights = l == 2 * d && p.block_size == 4 * d;
  return dispatch_shapes(p, [&]<typename T, int kDim, int kHeads>() {
    const auto with_tile = [&]<typename Tile, bool kSelect>() {
      ScoresTask task{};
      task.params = p;
      task.scale = static_cast<float>(p.softmax_scale * 1.4426950408889634);
      task.passes = group <= 16 ? 1 : group <= 32 ? 2 : 4;
      if (task.passes > Tile::kConsumers) return false;
      task.tokens = Tile::kConsumers / task.passes * Tile::kTokens;
      task.block_log2 = log2_of(p.block_size);
      task.stride_log2 = log2_of(d);
      task.per_block_log2 = task.block_log2 - task.stride_log2;
      task.before = static_cast<int>(l / d) - 1;
      task.common_weights = common_weights;
      task.num_tiles = static_cast<int>(num_sequence_tiles(p.seqs, task.tokens));
      return f.template operator()<T, Tile, kSelect>(task);
    };
    // Four warpgroups of 16 tokens have no registers for it.
    if constexpr (kHeads != 8 || kDim == 192) {
      if (choosing && common_weights && group <= 16) {
        if constexpr (kDim == 128 && kHeads == 16) {
          if (p.num_blocks >= kLongRow)
            return with_tile.template operator()<ScoresTile<kDim, kHeads, 1>, true>();
        }
        return with_tile.template operator()<SelectTile<kDim, kHeads>, true>();
      }
    }
    return with_tile.template operator()<ScoresTile<kDim, kHeads, 1>, false>();
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

template <typename Tile>
int64_t num_blocks(const ScoresTask& task) {
  const int64_t items = static_cast<int64_t>(task.num_tiles) * task.params.shape.num_heads_kv;
  return min64(ceil_div(items, Tile::kPipelines), kMaxBlocks);
}

template <typename T, typename Tile, bool kSelect>
Status launch_scores(const ScoresTask& task, const TensorMaps& maps, const Stream& stream) {
  const int64_t blocks = min64(num_blocks<Tile>(task), device_attribute(cudaDevAttrMultiProcessorCount));
  const auto launch_kernel = [&](const char* name, auto kernel) {
    return launch_chained(name, kernel, dim3(static_cast<unsigned>(blocks)), Tile::kThreads,
                          Tile::kSharedBytes, stream, task, maps.q, maps.k);
  };
  if constexpr (kSelect) {
    return launch_kernel("select_blocks_sm90", select_blocks_sm90<T, Tile>);
  } else {
    return launch_kernel("block_scores_sm90", block_scores_sm90<T, Tile>);
  }
}

// Rows of scores in the workspace begin at a multiple of 16 bytes, and hold what whole key tiles score.
int64_t scores_pitch(const SelectBlocksParams& p) { return round_up(max64(p.scoring.num_blocks, 1), 16); }

}  // namespace

bool block_scores(const BlockScoresParams& p, const Stream& stream, Status* status) {
  return with_task(p, false, [&]<typename T, typename Tile, bool kSelect>(ScoresTask task) {
    TensorMaps maps;
    if (!make_maps<Tile>(p, &maps)) return false;
    task.scores = static_cast<float*>(p.scores);
    task.pitch = p.num_blocks;
    *status = launch_scores<T, Tile, kSelect>(task, maps, stream);
    return true;
  });
}

int64_t workspace_bytes(const SelectBlocksParams& p) {
  int64_t bytes = 0;
  with_task(p.scoring, true, [&]<typename T, typename Tile, bool kSelect>(const ScoresTask& task) {
    bytes = num_blocks<Tile>(task) * Tile::kPipelines * task.tokens * scores_pitch(p) *
            static_cast<int64_t>(sizeof(float));
    return true;
  });
  return bytes;
}

bool select_blocks(const SelectBlocksParams& p, const Stream& stream, Status* status, Begin begin,
                   const Unfinished& unfinished) {
  if (p.num_selected_blocks > 64) return false;
  return with_task(p.scoring, true, [&]<typename T, typename Tile, bool kSelect>(ScoresTask task) {
    TensorMaps maps;
    if (!make_maps<Tile>(p.scoring, &maps)) return false;
    task.scores = static_cast<float*>(p.workspace);
    task.pitch = scores_pitch(p);
    task.block_indices = p.block_indices;
    task.num_selected = p.num_selected_blocks;
    task.num_initial = p.num_initial_blocks;
    task.num_local = p.num_local_blocks;
    task.early = begin == Begin::kEarly;
    task.unfinished = unfinished;
    *status = launch_scores<T, Tile, kSelect>(task, maps, stream);
    return true;
  });
}

}  // namespace nsa::cuda::sm90
