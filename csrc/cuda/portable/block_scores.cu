// Importance of selection blocks by mma.sync, and the choice of the best, for sm_80 and newer.
//
// Scores: a block of 4 warps takes kRows query rows. The heads of a token fill `padded group` rows (a power
// of two, or whole slabs of 16), so that their sum is a sum over lanes. Per key tile: Q K^T, 2^(score - lse),
// sum over the heads, and the weighted sums of neighbouring compressed blocks that make a selection block;
// the last few columns are kept for the next tile. Choice: one warp per query and KV head.
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/top_k.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kHalo = 8;      // kept columns: at least l / d - 1
constexpr int kMaxTaps = 24;  // compressed blocks that touch a selection block: l' / d + l / d - 1

template <int kDim>
struct ScoresLayout : ScoresConfig<kDim> {
  using Config = ScoresConfig<kDim>;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kSumPitch = kHalo + Config::kKeys;
  static constexpr int kQ = 0;
  static constexpr int kK = kQ + tile_bytes<kDim>(Config::kRows);
  static constexpr int kSums =
      kK + Config::kStages * tile_bytes<kDim>(Config::kKeys);                   // [warp][16][kSumPitch]
  static constexpr int kHistory = kSums + Config::kWarps * 16 * kSumPitch * 4;  // [token][kHalo]
  static constexpr int kLse = kHistory + Config::kRows * kHalo * 4;             // [row], in base 2
  static constexpr int kEnd = kLse + Config::kRows * 4;                         // [row], keys that it sees
  static constexpr int kOwn = kEnd + Config::kRows * 4;  // [token], its last block, -1 for none
  static constexpr int kTaps = kOwn + Config::kRows * 4;
  static constexpr int kBytes = kTaps + kMaxTaps * 4;
};

// Rows that the heads of one token take.
__host__ __device__ inline int padded_group(int group, int slabs) {
  if (group > 16) return static_cast<int>(round_up(group, 16 * slabs));
  int padded = 1;
  while (padded < group) padded *= 2;
  return padded;
}

// Sums 16 values over 2^kLevels neighbouring row groups of a warp (lanes that differ in bits 2 .. 2 + kLevels
// - 1). Each step hands over half of the values, so that the lanes end with different sums: v[i], i < 16 >>
// kLevels, is value first + i.
template <int kLevels>
__device__ __forceinline__ int sum_rows(float (&v)[16], int lane) {
  int first = 0;
#pragma unroll
  for (int level = kLevels - 1, half = 8; level >= 0; --level, half /= 2) {
    const bool upper = lane & (4 << level);
    first += upper ? half : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= half) break;
      const float keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(~0u, give, 4 << level);
    }
  }
  return first;
}

template <int kLevels>
__device__ __forceinline__ void write_sums(float (&v)[16], float* row, int lane) {
  const int first = sum_rows<kLevels>(v, lane);
#pragma unroll
  for (int i = 0; i < (16 >> kLevels); ++i) {
    const int value = first + i;  // n * 2 + c
    row[(value >> 1) * 8 + (lane & 3) * 2 + (value & 1)] = v[i];
  }
}

struct ScoresOutput {
  float* scores;       // [row, Hkv, num_blocks]
  int64_t first_tile;  // of this launch
  bool by_tile;        // rows are counted from first_tile on (a workspace), else by token
};

__device__ __forceinline__ int64_t output_row(const ScoresOutput& out, const SequenceTile& tile, int tokens,
                                              int token) {
  return out.by_tile ? static_cast<int64_t>(blockIdx.x) * tokens + token
                     : tile.seq.q_begin + tile.begin + token;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(ScoresLayout<kDim>::kThreads)
    block_scores_portable(const BlockScoresParams p, const ScoresOutput output) {
  using Layout = ScoresLayout<kDim>;
  constexpr int kKeys = Layout::kKeys, kSlabs = Layout::kSlabs, kRows = Layout::kRows;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = p.shape.group(), padded = padded_group(group, kSlabs), tokens = kRows / padded;
  const int head = blockIdx.y;
  const SequenceTile tile = find_sequence_tile(p.seqs, output.first_tile + blockIdx.x, tokens);
  if (tile.count == 0) return;
  const int num_keys = static_cast<int>(count_keys(p.seqs, tile.seq, p.keys));
  const int64_t first_key_row = p.keys.first_row(tile.seq.k_begin);
  const int64_t last_position = tile.seq.position(tile.begin + tile.count - 1);
  if (last_position < 0) return;
  const int end = static_cast<int>(min64(p.keys.end_visible(last_position), num_keys));
  const int per_block =
      static_cast<int>(p.block_size / p.keys.stride);  // compressed blocks that begin in a selection block
  const int before = static_cast<int>(p.keys.block / p.keys.stride) - 1;
  const int blocks = static_cast<int>(min64(last_position / p.block_size + 1, p.num_blocks));
  const int num_tiles = (blocks * per_block + kKeys - 1) / kKeys;

  float* history = reinterpret_cast<float*>(shared + Layout::kHistory);
  float* lse_log2 = reinterpret_cast<float*>(shared + Layout::kLse);
  int* row_end = reinterpret_cast<int*>(shared + Layout::kEnd);
  int* own_block = reinterpret_cast<int*>(shared + Layout::kOwn);
  float* taps = reinterpret_cast<float*>(shared + Layout::kTaps);
  float* sums = reinterpret_cast<float*>(shared + Layout::kSums) + warp * 16 * Layout::kSumPitch;

  const auto q_row = [&](int row) -> const T* {
    const int token = row / padded, member = row - token * padded;
    if (token >= tile.count || member >= group) return nullptr;
    return static_cast<const T*>(p.q.data) + (tile.seq.q_begin + tile.begin + token) * p.q.stride_row +
           (head * group + member) * p.q.stride_head;
  };
  const auto load_keys = [&](int index) {
    load_tile<kDim, kKeys, Layout::kThreads>(
        base + Layout::kK + index % Layout::kStages * tile_bytes<kDim>(kKeys),
        [&](int row) -> const T* {
          const int key = index * kKeys + row;
          if (key >= end) return nullptr;
          return static_cast<const T*>(p.k_cmp.data) + (first_key_row + key) * p.k_cmp.stride_row +
                 head * p.k_cmp.stride_head;
        },
        threadIdx.x);
  };

  load_tile<kDim, kRows, Layout::kThreads>(base + Layout::kQ, q_row, threadIdx.x);
  load_keys(0);
  ptx::async_commit();
  for (int i = threadIdx.x; i < kRows * kHalo; i += Layout::kThreads) history[i] = 0.f;
  for (int row = threadIdx.x; row < kRows; row += Layout::kThreads) {
    const int token = row / padded, member = row - token * padded;
    const bool valid = token < tile.count && member < group;
    const int64_t t = tile.seq.position(tile.begin + token);
    const float lse =
        valid
            ? static_cast<const float*>(p.lse)[(tile.seq.q_begin + tile.begin + token) * p.shape.num_heads_q +
                                               head * group + member]
            : 0.f;
    lse_log2[row] = lse * kLog2e;
    row_end[row] = valid ? static_cast<int>(min64(p.keys.end_visible(t), num_keys)) : 0;
  }
  for (int token = threadIdx.x; token < tokens; token += Layout::kThreads) {
    const int64_t t = tile.seq.position(tile.begin + token);
    own_block[token] =
        token < tile.count && t >= 0 ? static_cast<int>(min64(t / p.block_size, p.num_blocks - 1)) : -1;
  }
  if (threadIdx.x < kMaxTaps) {
    // Tap x of selection block j is compressed block j * per_block + x - before; the weights do not depend on
    // j.
    const int64_t j = kHalo;
    taps[threadIdx.x] =
        static_cast<float>(overlap(j * per_block + threadIdx.x - before, j, p.keys, p.block_size)) /
        static_cast<float>(p.keys.stride);
  }

  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const bool many_heads = padded > 16;
  const bool joint = kSlabs * 16 / padded <= 16;  // the tokens of all slabs of a warp fit `sums`
  const int passes = many_heads ? padded / (16 * kSlabs) : 1;
  const bool active = many_heads ? warp < tile.count : warp * kSlabs * 16 / padded < tile.count;

  // The sums of `count` tokens are in `sums`: add the kept columns, write the scores of the selection blocks
  // that end in this tile, and keep the last columns.
  const int per_tile = kKeys / per_block, per_tile_log2 = 31 - __clz(per_tile);
  const auto finish_tokens = [&](int index, int first_token, int count) {
    for (int i = lane; i < count * kHalo; i += 32)
      sums[i / kHalo * Layout::kSumPitch + i % kHalo] = history[first_token * kHalo + i];
    __syncwarp();
    for (int i = lane; i < count << per_tile_log2; i += 32) {
      const int token = i >> per_tile_log2, in_tile = i & (per_tile - 1),
                j = (index << per_tile_log2) + in_tile;
      const float* r = sums + token * Layout::kSumPitch + kHalo + in_tile * per_block - before;
      float score = 0.f;
      for (int x = 0; x < per_block + before; ++x) score += taps[x] * r[x];
      if (j <= own_block[first_token + token]) {
        output.scores[(output_row(output, tile, tokens, first_token + token) * p.shape.num_heads_kv + head) *
                          p.num_blocks +
                      j] = score;
      }
    }
    for (int i = lane; i < count * kHalo; i += 32)
      history[first_token * kHalo + i] = sums[i / kHalo * Layout::kSumPitch + kKeys + i % kHalo];
    __syncwarp();
  };

  for (int index = 0; index < num_tiles; ++index) {
    const int begin = index * kKeys;
    if (Layout::kStages > 1) {
      if (index + 1 < num_tiles) load_keys(index + 1);
      ptx::async_commit();
      ptx::async_wait<1>();
    } else {
      if (index > 0) load_keys(index);
      ptx::async_commit();
      ptx::async_wait<0>();
    }
    __syncthreads();
    if (active) {
      float total[16] = {};  // many_heads: over the slabs of the token
      for (int pass = 0; pass < passes; ++pass) {
        const int first_row = many_heads ? warp * padded + pass * kSlabs * 16 : warp * kSlabs * 16;
        float score[kSlabs][kKeys / 8][4] = {};
        multiply_transposed<T, kDim, kKeys, kSlabs>(
            score, base + Layout::kQ + tile_bytes<kDim>(first_row),
            base + Layout::kK + index % Layout::kStages * tile_bytes<kDim>(kKeys), lane);
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          const int row = first_row + s * 16 + lane / 4;
          const float lse0 = lse_log2[row], lse1 = lse_log2[row + 8];
          const int end0 = row_end[row] - begin - (lane & 3) * 2,
                    end1 = row_end[row + 8] - begin - (lane & 3) * 2;
          float upper[16], lower[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const int column = i / 2 * 8 + i % 2;
            upper[i] = column < end0 ? ptx::exp2_approx(fmaf(score[s][i / 2][i % 2], scale, -lse0)) : 0.f;
            lower[i] = column < end1 ? ptx::exp2_approx(fmaf(score[s][i / 2][i % 2 + 2], scale, -lse1)) : 0.f;
          }
          if (many_heads) {
#pragma unroll
            for (int i = 0; i < 16; ++i) total[i] += upper[i] + lower[i];
            continue;
          }
          float* row0 = sums + kHalo +
                        (joint ? s * (16 / padded) : 0) * Layout::kSumPitch;  // of the slab's first token
          switch (padded) {
            case 16:
#pragma unroll
              for (int i = 0; i < 16; ++i) upper[i] += lower[i];
              write_sums<3>(upper, row0, lane);
              break;
            case 8:
              write_sums<3>(upper, row0, lane);
              write_sums<3>(lower, row0 + Layout::kSumPitch, lane);
              break;
            case 4:
              write_sums<2>(upper, row0 + (lane >> 4) * Layout::kSumPitch, lane);
              write_sums<2>(lower, row0 + (2 + (lane >> 4)) * Layout::kSumPitch, lane);
              break;
            case 2:
              write_sums<1>(upper, row0 + (lane >> 3) * Layout::kSumPitch, lane);
              write_sums<1>(lower, row0 + (4 + (lane >> 3)) * Layout::kSumPitch, lane);
              break;
            default:
              write_sums<0>(upper, row0 + (lane >> 2) * Layout::kSumPitch, lane);
              write_sums<0>(lower, row0 + (8 + (lane >> 2)) * Layout::kSumPitch, lane);
          }
          if (!joint || s == kSlabs - 1) {
            __syncwarp();
            if (joint) {
              finish_tokens(index, first_row / padded, kSlabs * 16 / padded);
            } else {
              finish_tokens(index, (first_row + s * 16) / padded, 16 / padded);
            }
          }
        }
      }
      if (many_heads) {
        write_sums<3>(total, sums + kHalo, lane);
        __syncwarp();
        finish_tokens(index, warp, 1);
      }
    }
    __syncthreads();
  }
}

constexpr int kChoiceWarps = 4;

__global__ void __launch_bounds__(kChoiceWarps * 32)
    select_blocks_portable(const SelectBlocksParams p, const ScoresOutput scores, const int tokens) {
  __shared__ int candidate_key[kChoiceWarps][kMaxCandidates];
  __shared__ int candidate_index[kChoiceWarps][kMaxCandidates];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const SequenceTile tile = find_sequence_tile(p.scoring.seqs, scores.first_tile + blockIdx.x, tokens);
  const int n = p.num_selected_blocks;
  for (int token = warp; token < tile.count; token += kChoiceWarps) {
    const int64_t t = tile.seq.position(tile.begin + token);
    int32_t* out =
        p.block_indices + ((tile.seq.q_begin + tile.begin + token) * p.scoring.shape.num_heads_kv + head) * n;
    const float* row =
        scores.scores + (output_row(scores, tile, tokens, token) * p.scoring.shape.num_heads_kv + head) *
                            p.scoring.num_blocks;
    const int own = t < 0 ? -1 : static_cast<int>(min64(t / p.scoring.block_size, p.scoring.num_blocks - 1));
    choose_blocks(out, row, own, n, p.num_initial_blocks, p.num_local_blocks, candidate_key[warp],
                  candidate_index[warp], lane);
    __syncwarp();
  }
}

template <typename F>
Status dispatch_scores(const BlockScoresParams& p, F&& f) {
  if (p.keys.stride % 8 || p.keys.block % 8 || p.keys.block > 64 ||
      (p.block_size != 32 && p.block_size != 64 && p.block_size != 128)) {
    return Status::error(StatusCode::kUnsupported,
                         "compress_block_size = %lld, compress_stride = %lld, block_size = %lld have no CUDA "
                         "kernel: the first two must be "
                         "multiples of 8 up to 64, the last 32, 64 or 128",
                         static_cast<long long>(p.keys.block), static_cast<long long>(p.keys.stride),
                         static_cast<long long>(p.block_size));
  }
  if (p.shape.group() > 64)
    return Status::error(StatusCode::kUnsupported, "G = num_heads_q / num_heads_kv = %d; at most 64 on CUDA",
                         p.shape.group());
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch<64, 96, 128, 192, 256>("head_dim", p.shape.head_dim_qk,
                                           [&]<int kDim>() { return f.template operator()<T, kDim>(); });
  });
}

template <typename T, int kDim>
Status launch_scores(const BlockScoresParams& p, const ScoresOutput& output, int64_t num_tiles,
                     const Stream& stream) {
  using Layout = ScoresLayout<kDim>;
  return launch("block_scores_portable", block_scores_portable<T, kDim>,
                dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(p.shape.num_heads_kv)),
                Layout::kThreads, Layout::kBytes, stream, p, output);
}

int tokens_per_tile(const BlockScoresParams& p) {
  const bool small = p.shape.head_dim_qk <= 128;
  return (small ? ScoresConfig<128>::kRows : ScoresConfig<256>::kRows) /
         padded_group(p.shape.group(), small ? ScoresConfig<128>::kSlabs : ScoresConfig<256>::kSlabs);
}

// Tiles of queries that select_blocks works on at a time.
int64_t tiles_per_chunk(const SelectBlocksParams& p, int64_t tile_bytes) {
  return max64(1, min64(kSelectWorkspaceBytes / tile_bytes,
                        num_sequence_tiles(p.scoring.seqs, tokens_per_tile(p.scoring))));
}

int64_t scores_tile_bytes(const SelectBlocksParams& p) {
  return max64(1, tokens_per_tile(p.scoring) * p.scoring.shape.num_heads_kv * p.scoring.num_blocks) *
         static_cast<int64_t>(sizeof(float));
}

}  // namespace

Status block_scores(const BlockScoresParams& p, const Stream& stream) {
  return dispatch_scores(p, [&]<typename T, int kDim>() {
    return launch_scores<T, kDim>(p, {static_cast<float*>(p.scores), 0, false},
                                  num_sequence_tiles(p.seqs, tokens_per_tile(p)), stream);
  });
}

int64_t workspace_bytes(const SelectBlocksParams& p) {
  return tiles_per_chunk(p, scores_tile_bytes(p)) * scores_tile_bytes(p);
}

Status select_blocks(const SelectBlocksParams& p, const Stream& stream) {
  if (p.num_selected_blocks > 64) {
    return Status::error(StatusCode::kUnsupported, "num_selected_blocks = %d; at most 64 on CUDA",
                         p.num_selected_blocks);
  }
  return dispatch_scores(p.scoring, [&]<typename T, int kDim>() {
    const int tokens = tokens_per_tile(p.scoring);
    const int64_t num_tiles = num_sequence_tiles(p.scoring.seqs, tokens),
                  chunk = tiles_per_chunk(p, scores_tile_bytes(p));
    for (int64_t begin = 0; begin < num_tiles; begin += chunk) {
      const int64_t count = min64(chunk, num_tiles - begin);
      const ScoresOutput output{static_cast<float*>(p.workspace), begin, true};
      Status status = launch_scores<T, kDim>(p.scoring, output, count, stream);
      if (!status.ok()) return status;
      status = launch("select_blocks_portable", select_blocks_portable,
                      dim3(static_cast<unsigned>(count), static_cast<unsigned>(p.scoring.shape.num_heads_kv)),
                      kChoiceWarps * 32, 0, stream, p, output, tokens);
      if (!status.ok()) return status;
    }
    return Status{};
  });
}

}  // namespace nsa::cuda::portable
