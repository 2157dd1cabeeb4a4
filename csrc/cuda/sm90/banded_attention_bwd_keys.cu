// Compressed attention and the sliding window, backward, dK and dV by TMA and wgmma.
// docs/kernels/banded_attention_backward.md tells the dataflow.
//
// A block owns 128 keys of one KV head, 64 per consumer warpgroup, and walks the query rows that see them,
// all heads of the group packed as rows: row r of a step is token r / G, head r % G. S^T = K Q^T and dP^T = V
// dO^T leave P^T and dS^T as A fragments in registers of dV += P^T dO and dK += dS^T Q. The producer warp
// brings Q, dO and what belongs to the rows. Where key tiles are few, several blocks share the walk of one
// and leave their parts in the workspace.
#include "cuda/sm90/banded_attention_bwd.h"
#include "cuda/sm90/launch.h"

namespace nsa::cuda::sm90 {
namespace {

// What a query row brings beside q and dO. With g the factor of its dO, P g = exp2(scale s - lse): lse in
// base 2 less the logarithm of g, delta divided by g. Rows of no query have P = 0 and no position.
template <int kRows>
struct RowStats {
  float lse[kRows], delta[kRows];
  int position[kRows];
};

// The steps of a block: step i covers the tokens [first + i * tokens, + tokens) of the sequence. It stays in
// shared memory, since the consumers have no registers for it.
struct Walk {
  KeyTile tile;
  int64_t first;                           // query
  int number, split, head, tokens, steps;  // number: of the key tile
  // The step that comes first; the walk goes on from the last step to the first. A window's walks are alike,
  // so blocks of adjacent tiles that begin at multiples of their length read the same rows at the same time.
  int rotation;
  // The steps that see something of a warpgroup's keys, and those whose rows all see all of them. They are
  // intervals, since positions grow with the steps.
  struct Part {
    int seen_from, seen_to, whole_from, whole_to;
  } part[kConsumers];
};

__device__ inline Walk describe_walk(const BandedAttentionBwdParams& p, const KeyParts& parts, int rows) {
  Walk walk;
  walk.head = blockIdx.y;
  if (parts.chunk == 0) {
    walk.number = static_cast<int>(blockIdx.x) / parts.splits;
    walk.split = static_cast<int>(blockIdx.x) % parts.splits;
  } else {
    // Whole chunks first, side by side those of the same rows; then what each tile has of its first chunk,
    // where more comes first.
    const int block = static_cast<int>(blockIdx.x) / parts.heads,
              whole = (parts.splits - 1) * parts.num_tiles;
    walk.head = static_cast<int>(blockIdx.x) % parts.heads;
    walk.split = block < whole ? parts.splits - 1 - block / parts.num_tiles : -1;
    const int in_period = static_cast<int>(ceil_div(parts.num_tiles, parts.period)), i = block - whole;
    walk.number = block < whole ? block % parts.num_tiles : i / in_period + i % in_period * parts.period;
  }
  walk.tile = find_key_tile(p.seqs, p.keys, p.window, walk.number, parts.tile_keys);
  walk.tokens = rows / p.shape.group();
  if (parts.chunk == 0) {
    const int64_t steps = ceil_div(walk.tile.query_hi - walk.tile.query_lo, walk.tokens);
    const int64_t first = steps * walk.split / parts.splits;
    walk.steps = static_cast<int>(steps * (walk.split + 1) / parts.splits - first);
    walk.first = walk.tile.query_lo + first * walk.tokens;
  } else {  // chunks are whole steps, and steps begin at multiples of their length
    const int first_split = parts.first_split(walk.tile);
    const bool first = walk.split < 0;
    if (first) walk.split = first_split;
    const int64_t begin = int64_t{parts.chunk} * walk.split;
    const int64_t end = min64(begin + parts.chunk, walk.tile.query_hi);
    walk.first = max64(begin, walk.tile.query_lo / walk.tokens * walk.tokens);
    walk.steps = first || walk.split > first_split
                     ? static_cast<int>(max64(0, ceil_div(end - walk.first, walk.tokens)))
                     : 0;
  }
  walk.rotation = 0;
  if (p.window > 0 && walk.steps > 0) {
    const int64_t at = walk.first / walk.tokens % walk.steps;
    walk.rotation = static_cast<int>(at == 0 ? 0 : walk.steps - at);
  }

  const Sequence& seq = walk.tile.seq;
  const Visibility visible(p.keys, p.window);
  const int64_t oldest = seq.position(walk.first);
  const auto first_step_from = [&](int64_t position) {  // whose first token stands there or later
    return static_cast<int>(max64(0, min64(walk.steps, ceil_div(max64(0, position - oldest), walk.tokens))));
  };
  for (int w = 0; w < kConsumers; ++w) {
    const int begin = walk.tile.begin + w * kWarpgroupRows;
    const int lo = max(walk.tile.seen.lo, begin), hi = min(walk.tile.seen.hi, begin + kWarpgroupRows);
    const int64_t first_end = visible.end_of(lo), last_end = visible.end_of(hi - 1);
    const int64_t whole_end = min64(first_end + visible.span, seq.k_len) - walk.tokens + 1;
    walk.part[w] = {first_step_from(first_end - walk.tokens + 1),
                    lo < hi ? first_step_from(last_end + visible.span) : 0, first_step_from(last_end),
                    hi - lo == kWarpgroupRows ? first_step_from(whole_end) : 0};
  }
  return walk;
}

template <int kDimQK, int kDimV>
struct KeysLayout : BandedBwdConfig<kDimQK, kDimV> {
  using Config = BandedBwdConfig<kDimQK, kDimV>;
  static constexpr int kKeys = kConsumers * kWarpgroupRows;
  static constexpr int kRows = Config::kQueryRows, kStages = Config::kQueryStages;
  static constexpr int kFull = 0;
  static constexpr int kEmpty = kFull + 8 * kStages;
  static constexpr int kFullKeys = kEmpty + 8 * kStages;
  static constexpr int kLanded = kFullKeys + 8;  // of a step that the producer still has to work on
  static constexpr int kWalk = kLanded + 8;
  static constexpr int kStats = 256;
  static constexpr int kK =
      (kStats + kStages * static_cast<int>(sizeof(RowStats<kRows>)) + 1023) / 1024 * 1024;
  static constexpr int kV = kK + swizzled_tile_bytes<kDimQK>(kKeys);
  static constexpr int kQ = kV + swizzled_tile_bytes<kDimV>(kKeys);
  static constexpr int kO = kQ + kStages * swizzled_tile_bytes<kDimQK>(kRows);
  static constexpr int kBytes = 1024 + kO + kStages * swizzled_tile_bytes<kDimV>(kRows);
  static_assert(kWalk % 8 == 0 && kWalk + static_cast<int>(sizeof(Walk)) <= kStats && kBytes <= 232448);
};

template <int kDimQK, int kDimV>
__device__ __forceinline__ void produce(const BandedAttentionBwdParams& p, const QueryMaps& maps,
                                        const KeyMaps& key_maps, const Walk& walk, const uint32_t base,
                                        unsigned char* shared) {
  using Layout = KeysLayout<kDimQK, kDimV>;
  constexpr int kRows = Layout::kRows, kStages = Layout::kStages, kRounds = kRows / 32;
  constexpr int kBytesQ = swizzled_tile_bytes<kDimQK>(kRows), kBytesO = swizzled_tile_bytes<kDimV>(kRows);
  const int lane = threadIdx.x & 31, group = p.shape.group(), rows = walk.tokens * group;
  const KeyTile& tile = walk.tile;
  RowStats<kRows>* const stats = reinterpret_cast<RowStats<kRows>*>(shared + Layout::kStats);
  if (lane == 0) {
    const uint32_t full = base + Layout::kFullKeys;
    const int row = static_cast<int>(tile.first_row) + tile.begin;
    ptx::barrier_arrive_expect(full, swizzled_tile_bytes<kDimQK + kDimV>(Layout::kKeys));
    load_panels<kDimQK>(base + Layout::kK, Layout::kKeys, key_maps.k, full, walk.head, row);
    load_panels<kDimV>(base + Layout::kV, Layout::kKeys, key_maps.v, full, walk.head, row);
  }

  // This lane's rows of a step: on their way one step ahead, all at once, for what is read is not looked at
  // before it is needed. A row of no query reads the first one of the walk, for nothing.
  const GroupRows group_rows(group);
  float lse[kRounds], delta[kRounds], factor[kRounds];
  int position[kRounds];
  const auto read_stats = [&](int step) {
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int row = lane + 32 * j, token = group_rows.token(row);
      const int64_t query = walk.first + int64_t{step} * walk.tokens + token;
      const bool valid = row < rows && query < tile.seq.q_len;
      position[j] = valid ? position_of(tile.seq, query) : kNoPosition;
      const int64_t at =
          valid ? (tile.seq.q_begin + query) * p.shape.num_heads_q + walk.head * group + row - token * group
                : (tile.seq.q_begin + walk.first) * p.shape.num_heads_q;
      lse[j] = static_cast<const float*>(p.grads.lse)[at];
      delta[j] = static_cast<const float*>(p.grads.delta)[at];
      factor[j] = p.grads.d_o_scale != nullptr ? static_cast<const float*>(p.grads.d_o_scale)[at] : 1.f;
    }
  };
  if (walk.steps == 0) return;
  RingPosition<kStages> ring;
  int step = walk.rotation;
  read_stats(step);
#pragma unroll 1
  for (int count = 0; count < walk.steps; ++count) {
    const int next = step + 1 < walk.steps ? step + 1 : 0;
    const int64_t query = walk.first + int64_t{step} * walk.tokens;
    const uint32_t full = base + Layout::kFull + 8 * ring.slot;
    const uint32_t q = base + Layout::kQ + ring.slot * kBytesQ, d_o = base + Layout::kO + ring.slot * kBytesO;
    // Behind the sequence, which is the last step at most, lie rows of others.
    const bool partial = query + walk.tokens > tile.seq.q_len;
    const uint32_t landed = partial ? base + Layout::kLanded : full;
    ptx::barrier_wait(base + Layout::kEmpty + 8 * ring.slot, ring.parity ^ 1);
    if (lane == 0) {
      const int row = static_cast<int>(tile.seq.q_begin + query);
      ptx::barrier_arrive_expect(landed, rows * (kDimQK + kDimV) * 2);
      load_panels<kDimQK>(q, kRows, maps.q, landed, walk.head * group, row);
      load_panels<kDimV>(d_o, kRows, maps.d_o, landed, walk.head * group, row);
    }
    RowStats<kRows>& s = stats[ring.slot];
#pragma unroll
    for (int j = 0; j < kRounds; ++j) {
      const int row = lane + 32 * j;
      const bool valid = row < rows && query + group_rows.token(row) < tile.seq.q_len;
      s.lse[row] = valid ? lse[j] * kLog2e - __log2f(factor[j]) : -kNegInf;
      s.delta[row] = valid && factor[j] > 0.f ? __fdividef(delta[j], factor[j]) : 0.f;
      s.position[row] = position[j];
    }
    if (partial) {
      const int begin = static_cast<int>(tile.seq.q_len - query) * group;
      ptx::barrier_wait(landed, 0);
      clear_rows<kDimQK>(q, kRows, begin, rows, lane);
      clear_rows<kDimV>(d_o, kRows, begin, rows, lane);
      ptx::async_proxy_fence();
    }
    __syncwarp();
    if (lane == 0) {
      ptx::barrier_arrive(full);
      if (partial) ptx::barrier_arrive(full);
    }
    read_stats(next);
    step = next;
    ring.advance();
  }
}

// P^T and dS^T of one step, from S^T and dP^T: rows are keys, columns query rows.
template <typename T, bool kMasked, int kRows>
struct StepGradients {
  const RowStats<kRows>& stats;
  const Visibility& visible;
  const int (&ends)[2];
  float scale;
  int lane;

  // s becomes P.
  __device__ __forceinline__ void probabilities(float (&s)[kRows / 2]) const {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const int row = n * 8 + (lane & 3) * 2;
      const float2 lse = *reinterpret_cast<const float2*>(&stats.lse[row]);
      int2 position;
      if constexpr (kMasked) position = *reinterpret_cast<const int2*>(&stats.position[row]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float &x = s[4 * n + 2 * h], &y = s[4 * n + 2 * h + 1];
        x = ptx::exp2_approx(fmaf(x, scale, -lse.x));
        y = ptx::exp2_approx(fmaf(y, scale, -lse.y));
        if constexpr (kMasked) {
          x = visible(position.x, ends[h]) ? x : 0.f;
          y = visible(position.y, ends[h]) ? y : 0.f;
        }
      }
    }
  }
  // prob: P, what multiplies dO. ds: P (dP - delta).
  __device__ __forceinline__ void gradients(uint32_t (&prob)[kRows / 16][4], uint32_t (&ds)[kRows / 16][4],
                                            const float (&p)[kRows / 2], const float (&dp)[kRows / 2]) const {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
      const int row = n * 8 + (lane & 3) * 2;
      const float2 delta = *reinterpret_cast<const float2*>(&stats.delta[row]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float p0 = p[4 * n + 2 * h], p1 = p[4 * n + 2 * h + 1];
        float ds0 = p0 * (dp[4 * n + 2 * h] - delta.x);
        float ds1 = p1 * (dp[4 * n + 2 * h + 1] - delta.y);
        if constexpr (kMasked) {  // whatever dP is there
          ds0 = p0 == 0.f ? 0.f : ds0;
          ds1 = p1 == 0.f ? 0.f : ds1;
        }
        prob[n / 2][n % 2 * 2 + h] = ptx::pack2<T>(p0, p1);
        ds[n / 2][n % 2 * 2 + h] = ptx::pack2<T>(ds0, ds1);
      }
    }
  }
};

template <typename T, int kDimQK, int kDimV>
__device__ __forceinline__ void consume(const BandedAttentionBwdParams& p, const volatile Walk& walk,
                                        const KeyParts& parts, const uint32_t base,
                                        const unsigned char* shared, const int consumer) {
  using Layout = KeysLayout<kDimQK, kDimV>;
  constexpr int kRows = Layout::kRows, kStages = Layout::kStages;
  const int lane = threadIdx.x & 31, row0 = (threadIdx.x & 127) / 32 * 16 + lane / 4;
  const Visibility visible(p.keys, p.window);
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const int begin = walk.tile.begin + consumer * kWarpgroupRows;
  const int lo = max(walk.tile.seen.lo, begin), hi = min(walk.tile.seen.hi, begin + kWarpgroupRows);
  int ends[2];  // of this thread's keys
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = begin + row0 + 8 * h;
    ends[h] = key >= lo && key < hi ? visible.end_of(key) : kNoKey;
  }
  const RowStats<kRows>* const stats = reinterpret_cast<const RowStats<kRows>*>(shared + Layout::kStats);
  // Within panels of 128 rows, this warpgroup's half.
  const uint32_t k = base + Layout::kK + consumer * kWarpgroupRows * kPanelPitch,
                 v = base + Layout::kV + consumer * kWarpgroupRows * kPanelPitch;

  float dk[kDimQK / 2] = {}, dv[kDimV / 2] = {};
  const auto run_step = [&]<bool kMasked>(int slot) {
    const uint32_t q = base + Layout::kQ + slot * swizzled_tile_bytes<kDimQK>(kRows),
                   d_o = base + Layout::kO + slot * swizzled_tile_bytes<kDimV>(kRows);
    const StepGradients<T, kMasked, kRows> step{stats[slot], visible, ends, scale, lane};
    float s[kRows / 2], dp[kRows / 2];
    uint32_t prob[kRows / 16][4], ds[kRows / 16][4];
    ptx::wgmma_fence();
    multiply_rows<T, kDimQK, kRows>(s, k, Layout::kKeys, q);
    multiply_rows<T, kDimV, kRows>(dp, v, Layout::kKeys, d_o);
    ptx::wgmma_wait<1>();
    ptx::pin_registers(s);
    step.probabilities(s);
    ptx::pin_registers(s);  // while dP is multiplied, not behind it
    ptx::wgmma_wait<0>();
    ptx::pin_registers(dp);
    step.gradients(prob, ds, s, dp);
    ptx::wgmma_fence();
    multiply_fragments<T, kDimV, kRows>(dv, prob, d_o);
    multiply_fragments<T, kDimQK, kRows>(dk, ds, q);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(dv);
    ptx::pin_registers(dk);
  };

  ptx::barrier_wait(base + Layout::kFullKeys, 0);
  const volatile Walk::Part& part = walk.part[consumer];
#pragma unroll 1
  for (int i = 0; i < walk.steps; ++i) {
    const int slot = i % kStages;  // a ring position would be two registers more, and spill
    ptx::barrier_wait(base + Layout::kFull + 8 * slot, i / kStages & 1);
    int at = i + walk.rotation;
    at = at < walk.steps ? at : at - walk.steps;
    if (at >= part.whole_from && at < part.whole_to) {
      run_step.template operator()<false>(slot);
    } else if (at >= part.seen_from && at < part.seen_to) {
      run_step.template operator()<true>(slot);
    }
    ptx::barrier_arrive_if(base + Layout::kEmpty + 8 * (i % kStages), lane == 0);
  }

  const bool add = parts.splits == 1;
  if (add && p.grads.key_results) {
    const int rows = walk.tile.rows - consumer * kWarpgroupRows;
    const auto store = [&]<int kDim>(void* gradient, float factor, float(&acc)[kDim / 2]) {
      if (gradient == nullptr) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t key = walk.tile.first_row + walk.tile.begin + consumer * kWarpgroupRows + row0 + 8 * h;
        T* const row = row0 + 8 * h < rows
                           ? static_cast<T*>(gradient) + (key * parts.heads + walk.head) * kDim
                           : nullptr;
        store_row(row, reinterpret_cast<const float(&)[kDim / 8][4]>(acc), h, factor, lane);
      }
    };
    store.template operator()<kDimQK>(p.grads.dk, static_cast<float>(p.softmax_scale), dk);
    store.template operator()<kDimV>(p.grads.dv, 1.f, dv);
    return;
  }
  const auto row_of = [&](void* gradient, int dim, int offset, int h) -> float* {
    const int row = consumer * kWarpgroupRows + row0 + 8 * h, key = walk.tile.begin + row;
    if (gradient == nullptr || ends[h] == kNoKey) return nullptr;
    return add ? static_cast<float*>(gradient) + ((walk.tile.first_row + key) * parts.heads + walk.head) * dim
               : parts.tile(walk.split, walk.number, walk.head) + row * (kDimQK + kDimV) + offset;
  };
  write_accumulator(dk, static_cast<float>(p.softmax_scale), add, row_of(p.grads.dk, kDimQK, 0, 0),
                    row_of(p.grads.dk, kDimQK, 0, 1), lane);
  write_accumulator(dv, 1.f, add, row_of(p.grads.dv, kDimV, kDimQK, 0), row_of(p.grads.dv, kDimV, kDimQK, 1),
                    lane);
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(KeysLayout<kDimQK, kDimV>::kThreads, 1)
    banded_attention_bwd_keys_sm90(const __grid_constant__ BandedAttentionBwdParams p,
                                   const __grid_constant__ QueryMaps maps,
                                   const __grid_constant__ KeyMaps key_maps, const KeyParts parts,
                                   const bool early, int* const ticket) {
  if (!early) ptx::wait_for_dependency();
  using Layout = KeysLayout<kDimQK, kDimV>;
  extern __shared__ unsigned char unaligned[];
  const uint32_t unaligned_address = ptx::shared_address(unaligned);
  const uint32_t base = (unaligned_address + 1023) / 1024 * 1024;
  unsigned char* const shared = unaligned + (base - unaligned_address);
  Walk& walk = *reinterpret_cast<Walk*>(shared + Layout::kWalk);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::barrier_init(base + Layout::kFull + 8 * i, 2);
      ptx::barrier_init(base + Layout::kEmpty + 8 * i, Layout::kConsumerWarps);
    }
    ptx::barrier_init(base + Layout::kFullKeys, 1);
    ptx::barrier_init(base + Layout::kLanded, 1);
    ptx::barrier_init_fence();
    walk = describe_walk(p, parts, Layout::kRows);
  }
  // Rows behind the last token of a step are multiplied too.
  const int rows = Layout::kRows / p.shape.group() * p.shape.group();
  if (rows < Layout::kRows) {
    for (int stage = threadIdx.x / 32; stage < Layout::kStages; stage += Layout::kThreads / 32) {
      clear_rows<kDimQK>(base + Layout::kQ + stage * swizzled_tile_bytes<kDimQK>(Layout::kRows),
                         Layout::kRows, rows, Layout::kRows, threadIdx.x & 31);
      clear_rows<kDimV>(base + Layout::kO + stage * swizzled_tile_bytes<kDimV>(Layout::kRows), Layout::kRows,
                        rows, Layout::kRows, threadIdx.x & 31);
    }
    ptx::async_proxy_fence();
  }
  __syncthreads();
  const bool seen = walk.tile.seen.lo < walk.tile.seen.hi;
  const auto let_next_begin = [&] {  // one warp
    ptx::wait_for_dependency();
    if (ticket != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x % 32 == 0) *ticket = 0;
    __threadfence();
    __syncwarp();
    ptx::launch_dependents();
  };
  if (!seen || (parts.chunk > 0 && walk.steps == 0)) {  // nobody reads its part
    if (threadIdx.x < 32) let_next_begin();
    if (parts.splits == 1 && p.grads.key_results)
      clear_key_results<T>(p.grads, walk.tile, parts.heads, walk.head, kDimQK, kDimV, threadIdx.x,
                           Layout::kThreads);
    return;
  }
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == kConsumers) {
    ptx::release_registers<Layout::kProducerRegisters>();
    // The same number in all lanes, which the compiler cannot know: else the producer spills.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    if (warp == 0) {
      produce<kDimQK, kDimV>(p, maps, key_maps, walk, base, shared);
    } else if (warp == 1) {
      let_next_begin();
    }
  } else {
    ptx::claim_registers<Layout::kConsumerRegisters>();
    consume<T, kDimQK, kDimV>(p, walk, parts, base, shared, warpgroup);
  }
}

// Walks of compressed keys are the longer the earlier the key is; chunk by chunk of the queries they are
// alike. How many chunks make two rounds of blocks at most, the last of them full, where that costs less than
// even splits: else 0. Costs are in steps, with what a block does before and behind its walk, what its part
// costs, and how far from balanced many splits of different length are. A function of shapes alone: kDevice
// is what an H100 has, on any device.
constexpr int kDevice = 132;
int count_chunks(const KeyParts& even, int64_t queries, int64_t first_end, int64_t tile_tokens, int tokens) {
  constexpr double kPerBlock = 2.2, kPerPart = 1. / 32, kUneven = 1.08;
  const int64_t most =
      min64(min64(32, ceil_div(queries, 16 * tokens)), KeyParts::kMaxBytes / (4 * even.split_floats()));
  const auto per_blocks = [](int64_t rounds, int64_t blocks) {
    return static_cast<double>(rounds) * kPerBlock + static_cast<double>(blocks) * kPerPart;
  };
  int64_t steps = 0;
  for (int tile = 0; tile < even.num_tiles; ++tile)
    steps += max64(0, queries - max64(0, first_end + tile * tile_tokens)) / tokens;
  const int64_t blocks = int64_t{even.num_tiles} * even.splits * even.heads;
  double best_cost = kUneven * static_cast<double>(steps * even.heads) / kDevice +
                     per_blocks(ceil_div(blocks, kDevice), blocks);
  int best = 0;
  for (int chunks = 1; chunks <= most; ++chunks) {
    const int64_t chunk = ceil_div(queries, int64_t{chunks} * tokens) * tokens;
    int64_t parts = 0;
    for (int tile = 0; tile < even.num_tiles; ++tile)
      parts += chunks - min64(max64(first_end + tile * tile_tokens, 0) / chunk, chunks - 1);
    const int64_t rounds = ceil_div(parts * even.heads, kDevice);
    if (rounds > 2) continue;
    const double cost = static_cast<double>(rounds * chunk / tokens) + per_blocks(rounds, parts * even.heads);
    if (cost < best_cost) {
      best = chunks;
      best_cost = cost;
    }
  }
  return best;
}

// Walks of a window are alike, and are split only where they would not fill a device.
KeyParts describe_parts(const BandedAttentionBwdParams& p) {
  constexpr int kTileKeys = kConsumers * kWarpgroupRows;
  KeyParts parts = describe_key_parts(p, kTileKeys, p.window > 0 ? 128 : 1024, 16 * kWarpgroupRows);
  // Of packed sequences only the device knows where they begin.
  if (p.window > 0 || parts.splits == 1 || p.seqs.cu_seqlens_q != nullptr) return parts;
  const int tokens = max(1, (p.shape.head_dim_qk > 128 ? 32 : 64) / p.shape.group());
  const int64_t queries = p.seqs.total_q, tile_tokens = kTileKeys * p.keys.stride;
  const int64_t first_end = p.keys.block - 1 - (p.seqs.max_seqlen_k - queries);
  if (parts.num_tiles * parts.heads < kDevice - 4) {
    const int chunks = count_chunks(parts, queries, first_end, tile_tokens, tokens);
    if (chunks == 0) return parts;
    parts.chunk = static_cast<int>(ceil_div(queries, int64_t{chunks} * tokens) * tokens);
  } else if (tile_tokens % tokens == 0) {
    parts.period = static_cast<int>(ceil_div(queries, parts.splits * tile_tokens));
    parts.chunk = static_cast<int>(parts.period * tile_tokens);
  }
  if (parts.chunk > 0) parts.splits = static_cast<int>(ceil_div(queries, parts.chunk));
  return parts;
}

}  // namespace

int64_t workspace_bytes(const BandedAttentionBwdParams& p) { return describe_parts(p).bytes(); }

Status banded_attention_bwd_key_sums(const BandedAttentionBwdParams& p, Begin begin, const Stream& stream) {
  return dispatch_half(p.dtype, [&]<typename T>() {
    return launch_sum<T>(p, describe_parts(p), stream, begin == Begin::kEarly);
  });
}

Status banded_attention_bwd_keys(const BandedAttentionBwdParams& p, Begin begin, int* ticket,
                                 const Stream& stream) {
  return run_kernels(p, [&]<typename T, int kDimQK, int kDimV>(Status* status) {
    using Layout = KeysLayout<kDimQK, kDimV>;
    QueryMaps maps;
    KeyMaps key_maps;
    if (!make_maps<kDimQK, kDimV>(&maps, p, Layout::kRows / p.shape.group())) return false;
    if (!make_maps<kDimQK, kDimV>(&key_maps, p, Layout::kKeys)) return false;
    const KeyParts parts = describe_parts(p);
    *status = launch_chained(
        "banded_attention_bwd_keys_sm90", banded_attention_bwd_keys_sm90<T, kDimQK, kDimV>,
        parts.chunk == 0
            ? dim3(static_cast<unsigned>(parts.num_tiles * parts.splits), static_cast<unsigned>(parts.heads))
            : dim3(static_cast<unsigned>(((parts.splits - 1) * parts.num_tiles +
                                          ceil_div(parts.num_tiles, parts.period) * parts.period) *
                                         parts.heads)),
        Layout::kThreads, Layout::kBytes, stream, p, maps, key_maps, parts, begin == Begin::kEarly, ticket);
    return true;
  });
}

}  // namespace nsa::cuda::sm90
