// Attention over chosen blocks, backward, by mma.sync (sm_80 and newer).
//
// dK and dV block by block: a thread block keeps K and V of a tile of keys, gathers the rows of the queries
// that chose it (invert_blocks.h) through a ring, and keeps the sums in registers. Scores are computed
// transposed (keys as rows), so that P^T and dS^T are the left operands of dV += P^T dO and dK += dS^T Q as
// they are. Long lists are split; their parts are added in order by a second kernel. dQ query by query, as
// the forward, with scores and dP computed again. The factor of dO (the gate) goes into P and dP.
#include "cuda/common/invert_blocks.h"
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/selected_tile.cuh"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/tile/gradient_store.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {
namespace {

using Params = SelectedAttentionBwdParams;

template <int kDimQK, int kDimV, int kKeys>
struct KeysLayout : SelectedKeysConfig<kDimQK, kDimV> {
  using Config = SelectedKeysConfig<kDimQK, kDimV>;
  static constexpr int kThreads = kKeys / 16 * 32;
  static constexpr int kStages = 2;
  static constexpr int kK = 0;
  static constexpr int kV = kK + tile_bytes<kDimQK>(kKeys);
  static constexpr int kRing = kV + tile_bytes<kDimV>(kKeys);
  // Of a stage: Q, dO, then per row lse, delta, the factor of dO, and how many keys it sees.
  static constexpr int kDO = tile_bytes<kDimQK>(Config::kRows);
  static constexpr int kScalars = kDO + tile_bytes<kDimV>(Config::kRows);
  static constexpr int kStageBytes = kScalars + 4 * Config::kRows * 4;
  static constexpr int kEntries = kRing + kStages * kStageBytes;
  static constexpr int kBytes = kEntries + kMaxItemTokens * 4;
};

// What the lists of one chunk are worked on with.
struct KeysWork {
  const uint32_t* entries;
  const WorkItem* items;
  const int* num_items;
  int* ticket;
  int64_t first_row;  // of the chunk
  float* partials;    // [max_partials, key_tile, kDimQK + kDimV]
};

// Adds a tile of sums to its rows of a gradient, or stores it where a split list keeps them.
template <int kTiles>
__device__ __forceinline__ void put_sums(const float (&sum)[1][kTiles][4], float factor, float* first,
                                         int64_t stride, int rows, bool add, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (row >= rows) continue;
    float* target = first + row * stride + (lane & 3) * 2;
#pragma unroll
    for (int d = 0; d < kTiles; ++d) {
      float2* at = reinterpret_cast<float2*>(target + d * 8);
      float2 value = make_float2(sum[0][d][2 * h] * factor, sum[0][d][2 * h + 1] * factor);
      if (add) {
        const float2 old = *at;
        value.x += old.x;
        value.y += old.y;
      }
      *at = value;
    }
  }
}

// kWantK, kWantV: what this pass sums. The other gradient is left alone.
template <typename T, int kDimQK, int kDimV, int kKeys, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(KeysLayout<kDimQK, kDimV, kKeys>::kThreads)
    selected_attention_bwd_keys_portable(const Params p, const KeysWork work) {
  using Layout = KeysLayout<kDimQK, kDimV, kKeys>;
  constexpr int kRows = Layout::kRows, kThreads = Layout::kThreads;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int ticket;
  const uint32_t base = ptx::shared_address(shared);
  uint32_t* entries = reinterpret_cast<uint32_t*>(shared + Layout::kEntries);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = p.shape.group(), heads_kv = p.shape.num_heads_kv;
  const float inverse_group = 1.f / static_cast<float>(group);
  const float scale = static_cast<float>(p.softmax_scale);
  const int num_items = *work.num_items;

  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(work.ticket, 1);
    __syncthreads();
    if (ticket >= num_items) return;
    const WorkItem item = work.items[ticket];
    const uint32_t* list = work.entries + item.head * p.seqs.total_q * p.num_selected_blocks + item.first;
    for (int i = threadIdx.x; i < item.count; i += kThreads) entries[i] = list[i] & kEntryTokenMask;
    const auto key_tile = [&]<int kDim>(uint32_t tile, const RowsView& view) {
      load_strided_tile<kDim, kKeys, kThreads>(
          tile,
          static_cast<const T*>(view.data) + item.key_row * view.stride_row + item.head * view.stride_head,
          view.stride_row, item.num_keys, threadIdx.x);
    };
    key_tile.template operator()<kDimQK>(base + Layout::kK, p.k);
    if (kWantK) key_tile.template operator()<kDimV>(base + Layout::kV, p.v);
    __syncthreads();

    // Row r of the item is head r % G of its entry r / G.
    const int num_rows = item.count * group, steps = (num_rows + kRows - 1) / kRows;
    const auto token_of = [&](int row) {
      return static_cast<int>((static_cast<float>(row) + 0.5f) * inverse_group);
    };
    const auto load_stage = [&](int step) {
      const uint32_t stage = base + Layout::kRing + step % Layout::kStages * Layout::kStageBytes;
      const auto rows_of = [&](const RowsView& view) {
        return [&, view](int r) -> const T* {
          const int row = step * kRows + r;
          if (row >= num_rows) return nullptr;
          const int index = token_of(row);
          return static_cast<const T*>(view.data) + (work.first_row + entries[index]) * view.stride_row +
                 (item.head * group + row - index * group) * view.stride_head;
        };
      };
      load_tile<kDimQK, kRows, kThreads>(stage, rows_of(p.q), threadIdx.x);
      load_tile<kDimV, kRows, kThreads>(stage + Layout::kDO, rows_of(p.grads.d_o), threadIdx.x);
      if (threadIdx.x < kRows) {
        const int row = step * kRows + threadIdx.x;
        const bool valid = row < num_rows;
        const int index = token_of(row);
        const int64_t token = work.first_row + (valid ? entries[index] : 0);
        const int64_t at = token * p.shape.num_heads_q + item.head * group + row - index * group;
        const uint32_t scalars = stage + Layout::kScalars + threadIdx.x * 4;
        const auto copy = [&](int array, const void* data) {
          ptx::async_copy_4(scalars + array * kRows * 4, static_cast<const float*>(data) + (valid ? at : 0),
                            valid);
        };
        copy(0, p.grads.lse);
        copy(1, p.grads.delta);
        if (p.grads.d_o_scale != nullptr) copy(2, p.grads.d_o_scale);
        *reinterpret_cast<int*>(shared + (scalars + 3 * kRows * 4 - base)) =
            valid ? static_cast<int>(min64(kKeys, token + item.shift)) : 0;
      }
    };

    float dk[1][kWantK ? kDimQK / 8 : 1][4] = {}, dv[1][kWantV ? kDimV / 8 : 1][4] = {};
    load_stage(0);
    ptx::async_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) load_stage(step + 1);
      ptx::async_commit();
      ptx::async_wait<1>();
      __syncthreads();
      const int offset = Layout::kRing + step % Layout::kStages * Layout::kStageBytes;
      const uint32_t q = base + offset, d_o = q + Layout::kDO;
      const float* scalars = reinterpret_cast<const float*>(shared + offset + Layout::kScalars);
      const int* seen = reinterpret_cast<const int*>(scalars + 3 * kRows);

      float prob[1][kRows / 8][4] = {}, ds[1][kRows / 8][4] = {};
      multiply_transposed<T, kDimQK, kRows, 1>(prob, base + Layout::kK + tile_bytes<kDimQK>(warp * 16), q,
                                               lane);
      if constexpr (kWantK)
        multiply_transposed<T, kDimV, kRows, 1>(ds, base + Layout::kV + tile_bytes<kDimV>(warp * 16), d_o,
                                                lane);
      if (__any_sync(~0u, seen[lane % kRows] < kKeys)) {
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = warp * 16 + lane / 4 + 8 * (i / 2);
            if (key >= seen[n * 8 + (lane & 3) * 2 + i % 2]) prob[0][n][i] = kNegInf, ds[0][n][i] = 0.f;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = n * 8 + (lane & 3) * 2 + c;
          const float lse = scalars[row] * kLog2e, delta = scalars[kRows + row];
          const float factor = p.grads.d_o_scale != nullptr ? scalars[2 * kRows + row] : 1.f;
#pragma unroll
          for (int i = c; i < 4; i += 2) {
            const float weight = ptx::exp2_approx(fmaf(prob[0][n][i], scale * kLog2e, -lse));
            if (kWantK) ds[0][n][i] = weight * fmaf(factor, ds[0][n][i], -delta);
            prob[0][n][i] = weight * factor;
          }
        }
      }
      if constexpr (kWantV) multiply_probabilities<T, kDimV, kRows, 1>(dv, prob, d_o, lane);
      if constexpr (kWantK) multiply_probabilities<T, kDimQK, kRows, 1>(dk, ds, q, lane);
      __syncthreads();
    }

    const bool whole = item.partial < 0;
    float* partial = work.partials + (int64_t{item.partial} * kKeys + warp * 16) * (kDimQK + kDimV);
    const int rows = whole ? item.num_keys - warp * 16 : kKeys;
    const int64_t row = (int64_t{item.key_row} + warp * 16) * heads_kv + item.head;
    if constexpr (kWantK) {
      if (p.grads.dk != nullptr || !whole) {
        put_sums(dk, scale, whole ? static_cast<float*>(p.grads.dk) + row * kDimQK : partial,
                 whole ? heads_kv * kDimQK : kDimQK + kDimV, rows, whole, lane);
      }
    }
    if constexpr (kWantV) {
      if (p.grads.dv != nullptr || !whole) {
        put_sums(dv, 1.f, whole ? static_cast<float*>(p.grads.dv) + row * kDimV : partial + kDimQK,
                 whole ? heads_kv * kDimV : kDimQK + kDimV, rows, whole, lane);
      }
    }
  }
}

template <int kDimQK, int kDimV, int kKeys>
struct QueriesLayout : SelectedQueriesConfig<kDimQK, kDimV> {
  using Config = SelectedQueriesConfig<kDimQK, kDimV>;
  static constexpr int kRows = Config::kConsumers * 16;
  static constexpr int kThreads = (Config::kConsumers + Config::kProducers) * 32;
  static constexpr int kBarriers = 0;  // full[kMaxStages], empty[kMaxStages]
  static constexpr int kQ = 2 * Config::kMaxStages * 8 + 32;
  static constexpr int kDO = kQ + tile_bytes<kDimQK>(kRows);
  static constexpr int kRing = kDO + tile_bytes<kDimV>(kRows);
  static constexpr int kStageBytes = tile_bytes<kDimQK>(kKeys) + tile_bytes<kDimV>(kKeys);
};

template <typename T, int kDimQK, int kDimV, int kKeys>
__global__ void __launch_bounds__(QueriesLayout<kDimQK, kDimV, kKeys>::kThreads)
    selected_attention_bwd_queries_portable(const Params p, const int stages, const int words,
                                            const int max_tokens) {
  using Layout = QueriesLayout<kDimQK, kDimV, kKeys>;
  constexpr int kConsumers = Layout::kConsumers, kRows = Layout::kRows;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int group = p.shape.group();
  const RowPlan plan(group, kConsumers, max_tokens);
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
  const auto rows_of = [&](const RowsView& view) {
    return [&, view](int row) -> const T* {
      const int token = row / plan.padded, member = row - token * plan.padded;
      if (token >= tile.count || token >= plan.tokens || member >= group) return nullptr;
      return static_cast<const T*>(view.data) + (tile.seq.q_begin + tile.begin + token) * view.stride_row +
             (head * group + member) * view.stride_head;
    };
  };
  load_tile<kDimQK, kRows, Layout::kThreads>(base + Layout::kQ, rows_of(p.q), threadIdx.x);
  load_tile<kDimV, kRows, Layout::kThreads>(base + Layout::kDO, rows_of(p.grads.d_o), threadIdx.x);
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
  const float scale = static_cast<float>(p.softmax_scale);
  int token[2], position[2];
  int64_t out_row[2];
  float lse[2], delta[2], factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + 8 * h;
    token[h] = row / plan.padded;
    position[h] = token[h] < tile.count ? static_cast<int>(tile.seq.position(tile.begin + token[h])) : -1;
    const int member = row - token[h] * plan.padded;
    const bool valid = active && token[h] < tile.count && token[h] < plan.tokens && member < group;
    out_row[h] =
        valid ? (tile.seq.q_begin + tile.begin + token[h]) * p.shape.num_heads_q + head * group + member : -1;
    lse[h] = valid ? static_cast<const float*>(p.grads.lse)[out_row[h]] * kLog2e : 0.f;
    delta[h] = valid ? static_cast<const float*>(p.grads.delta)[out_row[h]] : 0.f;
    factor[h] = valid && p.grads.d_o_scale != nullptr
                    ? static_cast<const float*>(p.grads.d_o_scale)[out_row[h]]
                    : 1.f;
    if (lse[h] == kNegInf) lse[h] = 0.f;  // sees nothing: all its scores are masked
  }
  const int lowest_position = static_cast<int>(tile.seq.position(tile.begin + first_token));
  float dq[1][kDimQK / 8][4] = {};
  for (int index = 0; index < num_tiles; ++index) {
    const int stage = index % stages, entry = index / parts;
    ptx::barrier_wait(full(stage), index / stages & 1);
    const uint32_t mask = chosen.mask[entry];
    if (active && (mask & slab_tokens)) {
      const uint32_t k = base + Layout::kRing + stage * Layout::kStageBytes,
                     v = k + tile_bytes<kDimQK>(kKeys);
      const int begin = static_cast<int>(chosen.block[entry] * p.block_size) + index % parts * kKeys;
      float score[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};
      multiply_transposed<T, kDimQK, kKeys, 1>(score, base + Layout::kQ + tile_bytes<kDimQK>(warp * 16), k,
                                               lane);
      multiply_transposed<T, kDimV, kKeys, 1>(ds, base + Layout::kDO + tile_bytes<kDimV>(warp * 16), v, lane);
      const bool masked = (mask & slab_tokens) != slab_tokens || begin + kKeys > lowest_position + 1;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int end = (mask >> (token[h] & 31)) & 1 ? position[h] + 1 - begin - (lane & 3) * 2 : 0;
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) {
          float& s = score[0][i / 2][2 * h + i % 2];
          float& d = ds[0][i / 2][2 * h + i % 2];
          if (masked && i / 2 * 8 + i % 2 >= end) s = kNegInf, d = 0.f;
          d = ptx::exp2_approx(fmaf(s, scale * kLog2e, -lse[h])) * fmaf(factor[h], d, -delta[h]);
        }
      }
      multiply_probabilities<T, kDimQK, kKeys, 1>(dq, ds, k, lane);
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty(stage));
  }

  int64_t at[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) at[h] = out_row[h] < 0 ? -1 : out_row[h] * kDimQK;
  put_query_grads<T, false, 32>(p.grads.dq, reinterpret_cast<float(&)[kDimQK / 2]>(dq[0]), scale, at, lane);
}

template <int kDimQK, int kDimV>
int key_tile_of(int64_t block_size) {
  return static_cast<int>(min64(block_size, SelectedKeysConfig<kDimQK, kDimV>::kMaxKeys));
}

template <typename T, int kDimQK, int kDimV, int kKeys, bool kWantK, bool kWantV>
Status launch_keys_pass(const Params& p, const KeysWork& work, const Stream& stream) {
  using Layout = KeysLayout<kDimQK, kDimV, kKeys>;
  const auto kernel = selected_attention_bwd_keys_portable<T, kDimQK, kDimV, kKeys, kWantK, kWantV>;
  // As many thread blocks as there is room for; those that find no work leave at once.
  const int per_sm = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (Layout::kBytes + 1024);
  const int grid = device_attribute(cudaDevAttrMultiProcessorCount) * static_cast<int>(max64(1, per_sm));
  return launch("selected_attention_bwd_keys_portable", kernel, dim3(static_cast<unsigned>(grid)),
                Layout::kThreads, Layout::kBytes, stream, p, work);
}

template <typename T, int kDimQK, int kDimV, int kKeys>
Status launch_keys(const Params& p, const Stream& stream) {
  using Layout = KeysLayout<kDimQK, kDimV, kKeys>;
  const InvertPlan plan(p, kKeys);
  int64_t bytes = 0;
  const BlockLists lists(p, plan, &bytes);
  float* partials = carve<float>(p.workspace, 0, &bytes);
  Status status = invert_blocks(p, plan, lists, stream);
  for (int64_t chunk = 0; status.ok() && chunk < plan.num_chunks; ++chunk) {
    KeysWork work{lists.entries,
                  lists.items + chunk * plan.max_items,
                  lists.num_items + chunk,
                  lists.tickets + chunk,
                  chunk * plan.chunk_tokens,
                  partials};
    if constexpr (Layout::kOnePass) {
      status = launch_keys_pass<T, kDimQK, kDimV, kKeys, true, true>(p, work, stream);
    } else {
      if (p.grads.dv != nullptr)
        status = launch_keys_pass<T, kDimQK, kDimV, kKeys, false, true>(p, work, stream);
      work.ticket += plan.num_chunks;
      if (status.ok() && p.grads.dk != nullptr)
        status = launch_keys_pass<T, kDimQK, kDimV, kKeys, true, false>(p, work, stream);
    }
    if (status.ok()) status = add_partials(p, plan, lists, chunk, partials, /*early=*/false, stream);
  }
  return status;
}

template <typename T, int kDimQK, int kDimV, int kKeys>
Status launch_queries(const Params& p, const Stream& stream) {
  using Layout = QueriesLayout<kDimQK, kDimV, kKeys>;
  const int64_t words = ceil_div(ceil_div(p.seqs.max_seqlen_k, p.block_size), 32);
  const int available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  // Small groups have many tokens in a tile, and a union to match: fewer, where that leaves no room for a
  // stage.
  for (int max_tokens = Layout::kMaxTokens; max_tokens > 0; max_tokens /= 2) {
    const RowPlan plan(p.shape.group(), Layout::kConsumers, max_tokens);
    const int64_t fixed = Layout::kRing + Union::bytes(words, plan.tokens * p.num_selected_blocks);
    const int64_t stages = min64(Layout::kMaxStages, (available - fixed) / Layout::kStageBytes);
    if (stages < 1) continue;
    return launch("selected_attention_bwd_queries_portable",
                  selected_attention_bwd_queries_portable<T, kDimQK, kDimV, kKeys>,
                  dim3(static_cast<unsigned>(num_sequence_tiles(p.seqs, plan.tokens)),
                       static_cast<unsigned>(p.shape.num_heads_kv)),
                  Layout::kThreads, static_cast<size_t>(fixed + stages * Layout::kStageBytes), stream, p,
                  static_cast<int>(stages), static_cast<int>(words), max_tokens);
  }
  return Status::error(
      StatusCode::kUnsupported,
      "selected attention over %lld keys with num_selected_blocks = %d needs more than %d bytes "
      "of shared memory",
      static_cast<long long>(p.seqs.max_seqlen_k), p.num_selected_blocks, available);
}

template <typename T, int kDimQK, int kDimV>
Status launch_backward(const Params& p, const Stream& stream) {
  Status status;
  if (p.grads.dk != nullptr || p.grads.dv != nullptr) {
    if constexpr (SelectedKeysConfig<kDimQK, kDimV>::kMaxKeys == 64) {
      status = p.block_size >= 64 ? launch_keys<T, kDimQK, kDimV, 64>(p, stream)
                                  : launch_keys<T, kDimQK, kDimV, 32>(p, stream);
    } else {
      status = launch_keys<T, kDimQK, kDimV, 32>(p, stream);
    }
  }
  if (!status.ok() || !p.grads.dq.wanted()) return status;
  constexpr int kKeys = SelectedQueriesConfig<kDimQK, kDimV>::kKeys;
  if constexpr (kKeys == 64) {
    if (p.block_size < 64) return launch_queries<T, kDimQK, kDimV, 32>(p, stream);
  }
  return launch_queries<T, kDimQK, kDimV, kKeys>(p, stream);
}

}  // namespace

Status selected_attention_backward(const Params& p, const Stream& stream) {
  if (p.block_size != 32 && p.block_size != 64 && p.block_size != 128) {
    return Status::error(StatusCode::kUnsupported,
                         "block_size = %lld has no CUDA kernel; there are 32, 64 and 128",
                         static_cast<long long>(p.block_size));
  }
  if (p.num_selected_blocks > 64)
    return Status::error(StatusCode::kUnsupported, "num_selected_blocks = %d; at most 64 on CUDA",
                         p.num_selected_blocks);
  if (p.shape.group() > 64)
    return Status::error(StatusCode::kUnsupported, "G = num_heads_q / num_heads_kv = %d; at most 64 on CUDA",
                         p.shape.group());
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
      return launch_backward<T, kDimQK, kDimV>(p, stream);
    });
  });
}

int64_t workspace_bytes(const Params& p) {
  int64_t bytes = 0;
  // What has no kernel needs none: the launcher will say so.
  (void)dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
    const int key_tile = key_tile_of<kDimQK, kDimV>(p.block_size);
    if (p.block_size % key_tile != 0) return Status{};
    const InvertPlan plan(p, key_tile);
    BlockLists(p, plan, &bytes);
    carve<float>(p.workspace, plan.max_partials * key_tile * (kDimQK + kDimV), &bytes);
    return Status{};
  });
  return bytes;
}

}  // namespace nsa::cuda::portable
