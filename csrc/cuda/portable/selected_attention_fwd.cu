// Attention over chosen blocks, forward, by mma.sync (sm_80 and newer).
//
// A thread block owns a few adjacent tokens of one KV head and walks the sorted union of the blocks that they
// chose, with a mask of who chose each. Producer warps bring every block's K and V once into a ring of tiles;
// a consumer warp owns 16 query rows (the heads of one token, or of a few) and skips blocks that none of its
// tokens chose. So loads are shared and products exact.
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/selected_tile.cuh"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {
namespace {

template <int kDimQK, int kDimV, int kKeys>
struct SelectedLayout : SelectedConfig<kDimQK, kDimV> {
  using Config = SelectedConfig<kDimQK, kDimV>;
  static constexpr int kRows = Config::kConsumers * 16;
  static constexpr int kThreads = (Config::kConsumers + Config::kProducers) * 32;
  static constexpr int kBarriers = 0;  // full[kMaxStages], empty[kMaxStages]
  static constexpr int kQ = 2 * Config::kMaxStages * 8 + 32;
  static constexpr int kRing = kQ + tile_bytes<kDimQK>(kRows);
  static constexpr int kStageBytes = tile_bytes<kDimQK>(kKeys) + tile_bytes<kDimV>(kKeys);
};

template <typename T, int kDimQK, int kDimV, int kKeys>
__global__ void __launch_bounds__(SelectedLayout<kDimQK, kDimV, kKeys>::kThreads)
    selected_attention_fwd_portable(const SelectedAttentionFwdParams p, const int stages, const int words) {
  using Layout = SelectedLayout<kDimQK, kDimV, kKeys>;
  constexpr int kConsumers = Layout::kConsumers, kRows = Layout::kRows;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int group = p.shape.group();
  const RowPlan plan(group, kConsumers, Layout::kMaxTokens);
  const SequenceTile tile = find_sequence_tile(p.seqs, blockIdx.x, plan.tokens);
  if (tile.count == 0) return;
  const int64_t num_keys = count_keys(p.seqs, tile.seq, KeyBlocks{});
  const int num_blocks = static_cast<int>(min64(ceil_div(num_keys, p.block_size), int64_t{32} * words));
  const int parts = static_cast<int>(p.block_size / kKeys);
  const Union chosen(shared + Layout::kRing + stages * Layout::kStageBytes, words,
                     plan.tokens * p.num_selected_blocks);

  const auto full = [&](int stage) { return base + Layout::kBarriers + stage * 8; };
  const auto empty = [&](int stage) { return base + Layout::kBarriers + (Layout::kMaxStages + stage) * 8; };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      ptx::barrier_init(full(stage), Layout::kProducers * 32);
      ptx::barrier_init(empty(stage), kConsumers);
    }
  }
  load_tile<kDimQK, kRows, Layout::kThreads>(
      base + Layout::kQ,
      [&](int row) -> const T* {
        const int token = row / plan.padded, member = row - token * plan.padded;
        if (token >= tile.count || token >= plan.tokens || member >= group) return nullptr;
        return static_cast<const T*>(p.q.data) + (tile.seq.q_begin + tile.begin + token) * p.q.stride_row +
               (head * group + member) * p.q.stride_head;
      },
      threadIdx.x);
  ptx::async_commit();
  build_union(p, tile, head, num_blocks, chosen);
  ptx::async_wait<0>();
  __syncthreads();
  const int num_tiles = *chosen.count * parts;

  if (warp >= kConsumers) {
    bring_keys<T, kDimQK, kDimV, kKeys, Layout>(p, tile, chosen, head, num_keys, num_tiles, parts, stages,
                                                base, full, empty, threadIdx.x - kConsumers * 32);
    return;
  }

  // Rows lane / 4 and lane / 4 + 8 of this warp's slab.
  const int first_token = warp * plan.tokens_per_slab / plan.slabs_per_token;
  const uint32_t slab_tokens = first_token < 32 ? ((1ull << plan.tokens_per_slab) - 1) << first_token : 0;
  const bool active = first_token < tile.count && first_token < plan.tokens;
  int token[2], position[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    token[h] = (warp * 16 + lane / 4 + 8 * h) / plan.padded;
    position[h] = token[h] < tile.count ? static_cast<int>(tile.seq.position(tile.begin + token[h])) : -1;
  }
  const int lowest_position = static_cast<int>(tile.seq.position(tile.begin + first_token));
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  float out[1][kDimV / 8][4] = {};
  SlabSoftmax softmax;
  for (int index = 0; index < num_tiles; ++index) {
    const int stage = index % stages, entry = index / parts;
    ptx::barrier_wait(full(stage), index / stages & 1);
    const uint32_t mask = chosen.mask[entry];
    if (active && (mask & slab_tokens)) {
      const uint32_t k = base + Layout::kRing + stage * Layout::kStageBytes,
                     v = k + tile_bytes<kDimQK>(kKeys);
      const int begin = static_cast<int>(chosen.block[entry] * p.block_size) + index % parts * kKeys;
      float score[1][kKeys / 8][4] = {};
      multiply_transposed<T, kDimQK, kKeys, 1>(score, base + Layout::kQ + tile_bytes<kDimQK>(warp * 16), k,
                                               lane);
      if ((mask & slab_tokens) != slab_tokens || begin + kKeys > lowest_position + 1) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int end = (mask >> (token[h] & 31)) & 1 ? position[h] + 1 - begin - (lane & 3) * 2 : 0;
#pragma unroll
          for (int i = 0; i < kKeys / 4; ++i) {
            if (i / 2 * 8 + i % 2 >= end) score[0][i / 2][2 * h + i % 2] = kNegInf;
          }
        }
      }
      softmax.update(score[0], out[0], scale);
      multiply_probabilities<T, kDimV, kKeys, 1>(out, score, v, lane);
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty(stage));
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int member = warp * 16 + lane / 4 + 8 * h - token[h] * plan.padded;
    const int64_t row =
        (tile.seq.q_begin + tile.begin + token[h]) * p.shape.num_heads_q + head * group + member;
    const float sum = quad_sum(softmax.sum[h]);
    const bool valid = active && token[h] < tile.count && token[h] < plan.tokens && member < group;
    store_row<T>(valid ? static_cast<T*>(p.o) + row * kDimV : nullptr, out[0], h,
                 sum == 0.f ? 0.f : 1.f / sum, lane);
    if (valid && (lane & 3) == 0) {
      static_cast<float*>(p.lse)[row] =
          softmax.max[h] == kNegInf ? kNegInf : (softmax.max[h] * scale + log2f(sum)) * kLn2;
    }
  }
}

template <typename T, int kDimQK, int kDimV, int kKeys>
Status launch_selected(const SelectedAttentionFwdParams& p, const Stream& stream) {
  using Layout = SelectedLayout<kDimQK, kDimV, kKeys>;
  const RowPlan plan(p.shape.group(), Layout::kConsumers, Layout::kMaxTokens);
  if (plan.tokens == 0)
    return Status::error(StatusCode::kUnsupported, "G = num_heads_q / num_heads_kv = %d; at most 64 on CUDA",
                         p.shape.group());
  const int64_t words = ceil_div(ceil_div(p.seqs.max_seqlen_k, p.block_size), 32);
  const int64_t fixed = Layout::kRing + Union::bytes(words, plan.tokens * p.num_selected_blocks);
  int device = 0, available = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t stages = min64(Layout::kMaxStages, (available - fixed) / Layout::kStageBytes);
  if (stages < 1) {
    return Status::error(StatusCode::kUnsupported,
                         "selected attention over %lld keys with num_selected_blocks = %d needs more than %d "
                         "bytes of shared memory",
                         static_cast<long long>(p.seqs.max_seqlen_k), p.num_selected_blocks, available);
  }
  return launch("selected_attention_fwd_portable", selected_attention_fwd_portable<T, kDimQK, kDimV, kKeys>,
                dim3(static_cast<unsigned>(num_sequence_tiles(p.seqs, plan.tokens)),
                     static_cast<unsigned>(p.shape.num_heads_kv)),
                Layout::kThreads, static_cast<size_t>(fixed + stages * Layout::kStageBytes), stream, p,
                static_cast<int>(stages), static_cast<int>(words));
}

}  // namespace

Status selected_attention_forward(const SelectedAttentionFwdParams& p, const Stream& stream) {
  if (p.block_size != 32 && p.block_size != 64 && p.block_size != 128) {
    return Status::error(StatusCode::kUnsupported,
                         "block_size = %lld has no CUDA kernel; there are 32, 64 and 128",
                         static_cast<long long>(p.block_size));
  }
  if (p.num_selected_blocks > 64)
    return Status::error(StatusCode::kUnsupported, "num_selected_blocks = %d; at most 64 on CUDA",
                         p.num_selected_blocks);
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
      if constexpr (kDimQK <= 128) {
        if (p.block_size >= 64) return launch_selected<T, kDimQK, kDimV, 64>(p, stream);
      }
      return launch_selected<T, kDimQK, kDimV, 32>(p, stream);
    });
  });
}

}  // namespace nsa::cuda::portable
