// Compressed attention and the sliding window, backward, by mma.sync (sm_80 and newer).
//
// dK and dV by key tile: a block of warps owns 16 keys a warp of one KV head and walks the query rows that
// see them, all heads of the group packed as rows. S^T = K Q^T and dP^T = V dO^T leave P^T and dS^T as A
// fragments of dV += P^T dO and dK += dS^T Q. Where key tiles are few, the walk is split over blocks, which
// leave their parts in the workspace; a second kernel adds them in order. dQ by query tile, as the forward.
// Nothing is added by atomics, so results are bitwise repeatable.
#include "cuda/common/key_parts.cuh"
#include "cuda/portable/config.h"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/gradient_store.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::portable {
namespace {

// What a query row brings beside q and dO, for rows of a tile in shared memory.
template <int kRows>
struct RowStats {
  float lse[kRows], delta[kRows], factor[kRows];  // factor: d_o_scale
  int position[kRows];
};

template <int kDimQK, int kDimV>
struct KeysLayout : BandedBwdConfig<kDimQK, kDimV> {
  using Config = BandedBwdConfig<kDimQK, kDimV>;
  static constexpr int kThreads = Config::kWarps * 32, kKeys = Config::kWarps * 16;
  static constexpr int kRows = Config::kQueryRows;
  static constexpr int kK = 0;
  static constexpr int kV = kK + tile_bytes<kDimQK>(kKeys);
  static constexpr int kQ = kV + tile_bytes<kDimV>(kKeys);
  static constexpr int kO = kQ + Config::kStages * tile_bytes<kDimQK>(kRows);
  static constexpr int kStats = kO + Config::kStages * tile_bytes<kDimV>(kRows);
  static constexpr int kBytes = kStats + Config::kStages * sizeof(RowStats<kRows>);
};

template <int kDimQK, int kDimV>
struct QueriesLayout : BandedBwdConfig<kDimQK, kDimV> {
  using Config = BandedBwdConfig<kDimQK, kDimV>;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kRows = Config::kWarps * Config::kSlabs * 16, kKeys = Config::kWalkedKeys;
  static constexpr int kQ = 0;
  static constexpr int kO = kQ + tile_bytes<kDimQK>(kRows);
  static constexpr int kK = kO + tile_bytes<kDimV>(kRows);
  static constexpr int kV = kK + Config::kStages * tile_bytes<kDimQK>(kKeys);
  static constexpr int kBytes = kV + Config::kStages * tile_bytes<kDimV>(kKeys);
};

// A product of accumulators into rows of fp32: row lane / 4 (+ 8) of the slab, where `rows` returns a
// pointer.
template <int kTiles, typename RowPointer>
__device__ __forceinline__ void write_rows(const float (&acc)[kTiles][4], float factor, bool add, int lane,
                                           const RowPointer& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* row = rows(lane / 4 + 8 * h);
    if (row == nullptr) continue;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float2* at = reinterpret_cast<float2*>(row + n * 8 + (lane & 3) * 2);
      float2 value = make_float2(acc[n][2 * h] * factor, acc[n][2 * h + 1] * factor);
      if (add) {
        const float2 before = *at;
        value.x += before.x;
        value.y += before.y;
      }
      *at = value;
    }
  }
}

// dK and dV, or one of them, of one key tile and head: of all queries, or of those of one split.
template <typename T, int kDimQK, int kDimV, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(KeysLayout<kDimQK, kDimV>::kThreads)
    banded_attention_bwd_keys_portable(const BandedAttentionBwdParams p, const KeyParts parts) {
  using Layout = KeysLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys, kRows = Layout::kRows, kStages = Layout::kStages;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  RowStats<kRows>* const stats = reinterpret_cast<RowStats<kRows>*>(shared + Layout::kStats);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int tile_number = static_cast<int>(blockIdx.x) / parts.splits;
  const int split = static_cast<int>(blockIdx.x) % parts.splits;
  const KeyTile tile = find_key_tile(p.seqs, p.keys, p.window, tile_number, kKeys);
  const bool write = parts.splits == 1 && p.grads.key_results;
  if (tile.seen.lo == tile.seen.hi) {
    AttentionGrads own = p.grads;
    if (!kWantK) own.dk = nullptr;
    if (!kWantV) own.dv = nullptr;
    if (write) clear_key_results<T>(own, tile, gridDim.y, head, kDimQK, kDimV, threadIdx.x, Layout::kThreads);
    return;
  }
  const Visibility visible(p.keys, p.window);
  const GroupRows rows(p.shape.group());
  const int group = rows.group;

  // The rows of this split: [first, end), counted from query_lo.
  const int64_t all_rows = (tile.query_hi - tile.query_lo) * group, steps = ceil_div(all_rows, kRows);
  const int64_t step_begin = steps * split / parts.splits, step_end = steps * (split + 1) / parts.splits;
  const int64_t first_token = tile.seq.q_begin + tile.query_lo;

  const auto key_row = [&](const RowsView& view, int row) -> const T* {
    const int key = tile.begin + row;
    if (key < tile.seen.lo || key >= tile.seen.hi) return nullptr;
    return static_cast<const T*>(view.data) + (tile.first_row + key) * view.stride_row +
           head * view.stride_head;
  };
  // Where a step begins: its first token, counted from query_lo, and the head of the group.
  int64_t load_token = step_begin * kRows / group;
  int load_member = static_cast<int>(step_begin * kRows % group);
  const auto load_queries = [&](int64_t step) {
    const int stage = kStages == 1 ? 0 : static_cast<int>((step - step_begin) & 1);
    const int count = static_cast<int>(min64(kRows, all_rows - step * kRows));
    const auto query_row = [&](const RowsView& view, int row) -> const T* {
      if (row >= count) return nullptr;
      const int token = rows.token(load_member + row), member = load_member + row - token * group;
      return static_cast<const T*>(view.data) + (first_token + load_token + token) * view.stride_row +
             (head * group + member) * view.stride_head;
    };
    load_tile<kDimQK, kRows, Layout::kThreads>(
        base + Layout::kQ + stage * tile_bytes<kDimQK>(kRows), [&](int row) { return query_row(p.q, row); },
        threadIdx.x);
    load_tile<kDimV, kRows, Layout::kThreads>(
        base + Layout::kO + stage * tile_bytes<kDimV>(kRows),
        [&](int row) { return query_row(p.grads.d_o, row); }, threadIdx.x);
    if (threadIdx.x < kRows) {
      const int row = threadIdx.x;
      RowStats<kRows>& s = stats[stage];
      const bool valid = row < count;
      const int token = rows.token(load_member + row);
      const int64_t at = (first_token + load_token + token) * p.shape.num_heads_q + head * group +
                         load_member + row - token * group;
      const auto copy = [&](float* target, const void* source) {
        ptx::async_copy_4(ptx::shared_address(target), static_cast<const float*>(source) + (valid ? at : 0),
                          valid);
      };
      copy(&s.lse[row], p.grads.lse);
      copy(&s.delta[row], p.grads.delta);
      if (p.grads.d_o_scale != nullptr) {
        copy(&s.factor[row], p.grads.d_o_scale);
      } else {
        s.factor[row] = 1.f;
      }
      s.position[row] = valid ? position_of(tile.seq, tile.query_lo + load_token + token) : kNoPosition;
    }
    load_token += kRows / group;
    load_member += kRows % group;
    if (load_member >= group) {
      load_member -= group;
      ++load_token;
    }
  };

  int ends[2];  // of this thread's keys
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = tile.begin + warp * 16 + lane / 4 + 8 * h;
    ends[h] = key >= tile.seen.lo && key < tile.seen.hi ? visible.end_of(key) : kNoKey;
  }
  const bool whole_keys = tile.seen.hi - tile.seen.lo == kKeys;
  const int first_end = visible.end_of(tile.seen.lo), last_end = visible.end_of(tile.seen.hi - 1);

  float dk[1][kWantK ? kDimQK / 8 : 1][4] = {}, dv[1][kWantV ? kDimV / 8 : 1][4] = {};
  const float scale = static_cast<float>(p.softmax_scale);
  load_tile<kDimQK, kKeys, Layout::kThreads>(
      base + Layout::kK, [&](int row) { return key_row(p.k, row); }, threadIdx.x);
  if constexpr (kWantK)
    load_tile<kDimV, kKeys, Layout::kThreads>(
        base + Layout::kV, [&](int row) { return key_row(p.v, row); }, threadIdx.x);
  if (kStages == 2 && step_begin < step_end) load_queries(step_begin);
  ptx::async_commit();
  for (int64_t step = step_begin; step < step_end; ++step) {
    if (kStages == 1 || step + 1 < step_end) load_queries(kStages == 1 ? step : step + 1);
    ptx::async_commit();
    ptx::async_wait<kStages - 1>();
    __syncthreads();
    const int stage = kStages == 1 ? 0 : static_cast<int>((step - step_begin) & 1);
    const uint32_t q = base + Layout::kQ + stage * tile_bytes<kDimQK>(kRows),
                   d_o = base + Layout::kO + stage * tile_bytes<kDimV>(kRows);
    const RowStats<kRows>& s = stats[stage];
    float prob[1][kRows / 8][4] = {}, ds[1][kRows / 8][4] = {};
    multiply_transposed<T, kDimQK, kRows, 1>(prob, base + Layout::kK + tile_bytes<kDimQK>(warp * 16), q,
                                             lane);
    if constexpr (kWantK)
      multiply_transposed<T, kDimV, kRows, 1>(ds, base + Layout::kV + tile_bytes<kDimV>(warp * 16), d_o,
                                              lane);
    const bool whole =
        whole_keys && visible(s.position[0], last_end) && visible(s.position[kRows - 1], first_end);
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = n * 8 + (lane & 3) * 2 + c;
        const float lse = s.lse[row], delta = s.delta[row], factor = s.factor[row];
        const int position = s.position[row];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& score = prob[0][n][2 * h + c];
          float& grad = ds[0][n][2 * h + c];
          const bool seen = whole || visible(position, ends[h]);
          const float probability = seen ? ptx::exp2_approx((score * scale - lse) * kLog2e) : 0.f;
          grad = seen ? probability * (factor * grad - delta) : 0.f;
          score = probability * factor;
        }
      }
    }
    if constexpr (kWantV) multiply_probabilities<T, kDimV, kRows, 1>(dv, prob, d_o, lane);
    if constexpr (kWantK) multiply_probabilities<T, kDimQK, kRows, 1>(dk, ds, q, lane);
    __syncthreads();
  }

  if (write) {
    const auto store = [&]<int kTiles>(void* gradient, float factor, const float(&acc)[kTiles][4]) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp * 16 + lane / 4 + 8 * h;
        T* const target = static_cast<T*>(gradient) +
                          ((tile.first_row + tile.begin + row) * gridDim.y + head) * (kTiles * 8);
        store_row(row < tile.rows ? target : nullptr, acc, h, factor, lane);
      }
    };
    if constexpr (kWantK) store(p.grads.dk, scale, dk[0]);
    if constexpr (kWantV) store(p.grads.dv, 1.f, dv[0]);
    return;
  }
  const bool add = parts.splits == 1;
  float* const part = parts.tile(split, tile_number, head);
  const auto target = [&](void* gradient, int dim, int offset) {
    return [=](int slab_row) -> float* {
      const int row = warp * 16 + slab_row, key = tile.begin + row;
      if (key < tile.seen.lo || key >= tile.seen.hi) return nullptr;
      return add ? static_cast<float*>(gradient) + ((tile.first_row + key) * gridDim.y + head) * dim
                 : part + row * (kDimQK + kDimV) + offset;
    };
  };
  if constexpr (kWantK) write_rows(dk[0], scale, add, lane, target(p.grads.dk, kDimQK, 0));
  if constexpr (kWantV) write_rows(dv[0], 1.f, add, lane, target(p.grads.dv, kDimV, kDimQK));
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(QueriesLayout<kDimQK, kDimV>::kThreads)
    banded_attention_bwd_queries_portable(const BandedAttentionBwdParams p, const int64_t num_tiles) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  constexpr int kKeys = Layout::kKeys, kSlabs = Layout::kSlabs, kRows = Layout::kRows,
                kStages = Layout::kStages;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.y;
  const int group = p.shape.group(), tokens = kRows / group;
  // Late tiles see the most keys: they go first.
  const SequenceTile tile = find_sequence_tile(p.seqs, num_tiles - 1 - blockIdx.x, tokens);
  if (tile.count == 0) return;
  const Visibility visible(p.keys, p.window);
  const int64_t first_key_row = p.keys.first_row(tile.seq.k_begin);
  const int64_t num_keys = count_keys(p.seqs, tile.seq, p.keys);
  const int first_position = position_of(tile.seq, tile.begin),
            last_position = position_of(tile.seq, tile.begin + tile.count - 1);
  const int lo = static_cast<int>(min64(p.keys.begin_visible(first_position, p.window), num_keys));
  const int hi = static_cast<int>(min64(p.keys.end_visible(last_position), num_keys));

  const auto query_row = [&](const RowsView& view, int row) -> const T* {
    const int token = row / group;
    if (token >= tile.count) return nullptr;
    return static_cast<const T*>(view.data) + (tile.seq.q_begin + tile.begin + token) * view.stride_row +
           (head * group + row - token * group) * view.stride_head;
  };
  const auto key_row = [&](const RowsView& view, int key) -> const T* {
    if (key < lo || key >= hi) return nullptr;
    return static_cast<const T*>(view.data) + (first_key_row + key) * view.stride_row +
           head * view.stride_head;
  };
  const auto load_keys = [&](int index) {
    const int stage = kStages == 1 ? 0 : index & 1, begin = index * kKeys;
    load_tile<kDimQK, kKeys, Layout::kThreads>(
        base + Layout::kK + stage * tile_bytes<kDimQK>(kKeys),
        [&](int row) { return key_row(p.k, begin + row); }, threadIdx.x);
    load_tile<kDimV, kKeys, Layout::kThreads>(
        base + Layout::kV + stage * tile_bytes<kDimV>(kKeys),
        [&](int row) { return key_row(p.v, begin + row); }, threadIdx.x);
  };

  // Of this thread's rows.
  int64_t row_number[kSlabs][2];  // in [T, Hq]; -1: of no query
  float lse[kSlabs][2], delta[kSlabs][2], factor[kSlabs][2];
  int position[kSlabs][2];
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = (warp * kSlabs + s) * 16 + lane / 4 + 8 * h, token = row / group;
      const bool valid = token < tile.count;
      const int64_t at =
          (tile.seq.q_begin + tile.begin + token) * p.shape.num_heads_q + head * group + row - token * group;
      row_number[s][h] = valid ? at : -1;
      lse[s][h] = valid ? static_cast<const float*>(p.grads.lse)[at] : 0.f;
      delta[s][h] = valid ? static_cast<const float*>(p.grads.delta)[at] : 0.f;
      factor[s][h] =
          valid && p.grads.d_o_scale != nullptr ? static_cast<const float*>(p.grads.d_o_scale)[at] : 1.f;
      position[s][h] = valid ? position_of(tile.seq, tile.begin + token) : kNoPosition;
    }
  }
  const bool whole_rows = tile.count * group == kRows;

  float dq[kSlabs][kDimQK / 8][4] = {};
  const float scale = static_cast<float>(p.softmax_scale);
  const int first_tile = lo / kKeys, end_tile = (hi + kKeys - 1) / kKeys;
  load_tile<kDimQK, kRows, Layout::kThreads>(
      base + Layout::kQ, [&](int row) { return query_row(p.q, row); }, threadIdx.x);
  load_tile<kDimV, kRows, Layout::kThreads>(
      base + Layout::kO, [&](int row) { return query_row(p.grads.d_o, row); }, threadIdx.x);
  if (kStages == 2) load_keys(first_tile);
  ptx::async_commit();
  for (int index = first_tile; index < end_tile; ++index) {
    if (kStages == 1 || index + 1 < end_tile) load_keys(kStages == 1 ? index : index + 1);
    ptx::async_commit();
    ptx::async_wait<kStages - 1>();
    __syncthreads();
    const int stage = kStages == 1 ? 0 : index & 1, begin = index * kKeys;
    const uint32_t k = base + Layout::kK + stage * tile_bytes<kDimQK>(kKeys),
                   v = base + Layout::kV + stage * tile_bytes<kDimV>(kKeys);
    float prob[kSlabs][kKeys / 8][4] = {}, ds[kSlabs][kKeys / 8][4] = {};
    multiply_transposed<T, kDimQK, kKeys, kSlabs>(
        prob, base + Layout::kQ + tile_bytes<kDimQK>(warp * kSlabs * 16), k, lane);
    multiply_transposed<T, kDimV, kKeys, kSlabs>(
        ds, base + Layout::kO + tile_bytes<kDimV>(warp * kSlabs * 16), v, lane);
    const bool whole = whole_rows && begin >= lo && begin + kKeys <= hi &&
                       visible(first_position, visible.end_of(begin + kKeys - 1)) &&
                       visible(last_position, visible.end_of(begin));
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = begin + n * 8 + (lane & 3) * 2 + c;
        const int end = key >= lo && key < hi ? visible.end_of(key) : kNoKey;
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& grad = ds[s][n][2 * h + c];
            const bool seen = whole || visible(position[s][h], end);
            const float probability = ptx::exp2_approx((prob[s][n][2 * h + c] * scale - lse[s][h]) * kLog2e);
            grad = seen ? probability * (factor[s][h] * grad - delta[s][h]) : 0.f;
          }
        }
      }
    }
    multiply_probabilities<T, kDimQK, kKeys, kSlabs>(dq, ds, k, lane);
    __syncthreads();
  }
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    int64_t at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) at[h] = row_number[s][h] < 0 ? -1 : row_number[s][h] * kDimQK;
    put_query_grads<T, false, 32>(p.grads.dq, reinterpret_cast<float(&)[kDimQK / 2]>(dq[s]), scale, at, lane);
  }
}

template <typename Config>
KeyParts describe_parts(const BandedAttentionBwdParams& p) {
  return describe_key_parts(p, Config::kWarps * 16,
                            p.window > 0 ? kBandedBwdBlocksWindow : kBandedBwdBlocksCompressed,
                            Config::kQueryRows * 16);
}

template <typename T, int kDimQK, int kDimV, bool kWantK, bool kWantV>
Status launch_keys(const BandedAttentionBwdParams& p, const KeyParts& parts, const Stream& stream) {
  using Layout = KeysLayout<kDimQK, kDimV>;
  return launch(
      "banded_attention_bwd_keys_portable",
      banded_attention_bwd_keys_portable<T, kDimQK, kDimV, kWantK, kWantV>,
      dim3(static_cast<unsigned>(parts.num_tiles * parts.splits), static_cast<unsigned>(parts.heads)),
      Layout::kThreads, Layout::kBytes, stream, p, parts);
}

template <typename T, int kDimQK, int kDimV>
Status launch_backward(const BandedAttentionBwdParams& p, const Stream& stream) {
  using Layout = QueriesLayout<kDimQK, kDimV>;
  const bool want_k = p.grads.dk != nullptr, want_v = p.grads.dv != nullptr;
  const int group = p.shape.group();
  if (group > Layout::kRows)
    return Status::error(StatusCode::kUnsupported, "G = num_heads_q / num_heads_kv = %d; at most %d on CUDA",
                         group, Layout::kRows);
  Status status;
  const KeyParts parts = describe_parts<BandedBwdConfig<kDimQK, kDimV>>(p);
  if (BandedBwdConfig<kDimQK, kDimV>::kTogether && want_k && want_v) {
    if constexpr (BandedBwdConfig<kDimQK, kDimV>::kTogether)
      status = launch_keys<T, kDimQK, kDimV, true, true>(p, parts, stream);
  } else {
    if (want_k) status = launch_keys<T, kDimQK, kDimV, true, false>(p, parts, stream);
    if (want_v && status.ok()) status = launch_keys<T, kDimQK, kDimV, false, true>(p, parts, stream);
  }
  if (status.ok() && (want_k || want_v)) status = launch_sum<T>(p, parts, stream);
  if (!status.ok() || !p.grads.dq.wanted()) return status;
  const int64_t num_tiles = num_sequence_tiles(p.seqs, Layout::kRows / group);
  return launch("banded_attention_bwd_queries_portable",
                banded_attention_bwd_queries_portable<T, kDimQK, kDimV>,
                dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(p.shape.num_heads_kv)),
                Layout::kThreads, Layout::kBytes, stream, p, num_tiles);
}

}  // namespace

int64_t workspace_bytes(const BandedAttentionBwdParams& p) {
  int64_t bytes = 0;
  dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
    bytes = describe_parts<BandedBwdConfig<kDimQK, kDimV>>(p).bytes();
    return Status();
  });
  return bytes;
}

Status banded_attention_backward(const BandedAttentionBwdParams& p, const Stream& stream) {
  return dispatch_half(p.dtype, [&]<typename T>() {
    return dispatch_head_dims(p.shape.head_dim_qk, p.shape.head_dim_v, [&]<int kDimQK, int kDimV>() {
      return launch_backward<T, kDimQK, kDimV>(p, stream);
    });
  });
}

}  // namespace nsa::cuda::portable
