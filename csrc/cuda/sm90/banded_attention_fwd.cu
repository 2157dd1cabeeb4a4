// Compressed attention and the sliding window, forward, by TMA and wgmma. docs/kernels/banded_attention.md
// tells the dataflow.
//
// Persistent blocks. The producer (one thread of a warpgroup) walks the work items, a tile of adjacent tokens
// of one KV head each, mostly longest first, and brings Q, K and V. Two or three consumer warpgroups own 64
// rows each, the heads of the group packed as rows: row r is token r / G, head r % G. Key tiles go from the
// newest to the oldest. While the tensor cores multiply P V of one tile, the next tile's scores go through
// the softmax; over the end of an item, the first scores of the next item are multiplied together with the
// last P V. Compressed attention that chooses blocks (choose_from_sums.cuh) has no registers for that: it
// chooses first.
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/banded_pipeline.cuh"
#include "cuda/sm90/choose_from_sums.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warpgroup_softmax.cuh"

namespace nsa::cuda::sm90 {
namespace {

// The tokens of a thread's two rows, counted from the first of the warpgroup.
struct TokenPair {
  short first, second;
};

// Among columns [kBegin, kEnd), the scores of those from bound[h] on (kUpper), or before it, become -inf in
// row h of the pair.
template <bool kUpper, int kBegin, int kEnd, int kCount>
__device__ __forceinline__ void mask_columns(float (&s)[kCount], const int (&bound)[2]) {
#pragma unroll
  for (int i = kBegin / 2; i < kEnd / 2; ++i) {
    const int column = 8 * (i / 4) + i % 2;
    if ((column >= bound[i / 2 % 2]) == kUpper) s[i] = kNegInf;
  }
}

// A tile in shared memory: its address, and the rows that its panels lie apart.
struct TileAddress {
  uint32_t begin;
  int rows;
};

template <typename T, int kDimQK, int kKeys>
__device__ __forceinline__ void multiply_scores(float (&s)[kKeys / 2], uint32_t q, TileAddress k) {
#pragma unroll
  for (int d = 0; d < kDimQK; d += 16) {
    ptx::wgmma_shared<T, kKeys>(s, k_major_descriptor(q, kWarpgroupRows, d),
                                k_major_descriptor(k.begin, k.rows, d), d > 0);
  }
  ptx::wgmma_commit();
}

template <typename T, int kColumns, int kKeys>
__device__ __forceinline__ void multiply_values(float (&o)[kColumns / 2], const uint32_t (&p)[kKeys / 16][4],
                                                TileAddress v, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kKeys; k += 16) {
    ptx::wgmma_registers<T, kColumns>(o, p[k / 16], mn_major_descriptor(v.begin, v.rows, k),
                                      accumulate || k > 0);
  }
  ptx::wgmma_commit();
}

// Values that no query sees are multiplied by P = 0, so they must be numbers.
template <int kDimV, int kKeys>
__device__ __forceinline__ void clear_unseen_values(TileAddress v, int begin, int seen_lo, int seen_hi,
                                                    int thread, int barrier) {
  for (int i = thread; i < kKeys * kDimV / 8; i += 128) {
    const int key = begin + i / (kDimV / 8);
    if (key < seen_lo || key >= seen_hi) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                       v.begin + swizzled_offset(v.rows, i / (kDimV / 8), i % (kDimV / 8))),
                   "r"(0)
                   : "memory");
    }
  }
  ptx::async_proxy_fence();
  ptx::named_barrier_sync(barrier, 128);
}

// Rows of Q behind the whole tokens are never loaded. What an earlier kernel left there must not vote on when
// the others are rescaled, or two runs would round differently.
template <int kDimQK, typename Layout>
__device__ __forceinline__ void clear_idle_rows(uint32_t base, int used, int thread, int consumer) {
  constexpr int kChunks = kDimQK / 8;
#pragma unroll 1
  for (int slot = 0; slot < Layout::kStagesQ; ++slot) {
    const uint32_t q = base + Layout::kQ + (slot * Layout::kConsumers + consumer) * Layout::kBytesQ;
#pragma unroll 1
    for (int i = used * kChunks + thread; i < kWarpgroupRows * kChunks; i += 128)
      ptx::store_shared_16(q + swizzled_offset(kWarpgroupRows, i / kChunks, i % kChunks), 0, 0, 0, 0);
  }
  ptx::async_proxy_fence();
  ptx::named_barrier_sync(1 + consumer, 128);
}

template <typename T, int kDimV, bool kStreaming>
__device__ __forceinline__ void store_rows(const BandedAttentionFwdParams& p, int group,
                                           const volatile BandedItem& item, const float (&o)[kDimV / 2],
                                           const RowPair& rows, TokenPair tokens, int row0, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = h == 0 ? tokens.first : tokens.second, member = row0 + 8 * h - token * group;
    const bool valid = token < item.tokens;
    const float sum = quad_sum(rows.sum[h]);
    const int64_t row = (item.row + token) * p.shape.num_heads_q + item.head * group + member;
    store_row<T, kStreaming>(valid ? static_cast<T*>(p.o) + row * kDimV : nullptr,
                             reinterpret_cast<const float(&)[kDimV / 8][4]>(o), h,
                             sum == 0.f ? 0.f : __fdividef(1.f, sum), lane);
    if (valid && (lane & 3) == 0) {
      static_cast<float*>(p.lse)[row] = rows.max[h] == kNegInf ? kNegInf : (rows.max[h] + log2f(sum)) * kLn2;
    }
  }
}

// kWindow: keys have a lower bound.
template <typename T, int kDimQK, int kDimV, bool kWindow, typename Layout>
__device__ __forceinline__ void consume(const BandedAttentionFwdParams& p, const BandedPlan& plan,
                                        const uint32_t base, unsigned char* shared, const int consumer) {
  constexpr int kKeys = Layout::kKeys;
  const int thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int row0 = thread / 32 * 16 + lane / 4;
  constexpr bool kChoosing = Layout::kChoosing;
  const int group = kChoosing ? kSumsGroup : plan.group;
  const TokenPair tokens{static_cast<short>(row0 / group), static_cast<short>((row0 + 8) / group)};
  using Ring = TileInRing<Layout::kStages>;
  const auto release = [&](int barriers, Ring ring) {
    ptx::barrier_arrive_if(base + barriers + 8 * ring.slot, lane == 0);
  };
  // The same in all lanes, and known to be: descriptors are then made in uniform registers.
  const auto uniform = [](uint32_t x) { return __shfl_sync(~0u, x, 0); };
  const auto tile_at = [&](typename Layout::Panels panels) {
    return TileAddress{base + panels.begin, static_cast<int>(panels.pitch) / kPanelPitch};
  };
  const auto k_tile = [&](Ring ring) { return tile_at(Layout::k_panels(uniform(ring.slot))); };
  const auto v_tile = [&](Ring ring) { return tile_at(Layout::v_panels(uniform(ring.slot))); };

  // A choice makes sums over selection blocks beside the outputs.
  constexpr int kColumns = kDimV + (kChoosing ? kBlockSums : 0);
  float s[kKeys / 2], o[kColumns / 2];
  uint32_t probabilities[kKeys / 16][4];
  RowPair rows;
  uint32_t count = 0;  // items so far
  uint32_t tiles = 0;  // key tiles so far: the scores of the latest are in s, its values come next

  const auto item_of = [&](uint32_t which) -> const volatile BandedItem& {
    return item_slot<Layout>(shared, which % Layout::kItemSlots)[consumer];
  };
  // Where the Q of the item with this number lies among all Q and their barriers.
  const auto q_slot = [&](uint32_t which) {
    return TileInRing<Layout::kStagesQ>(which).slot * Layout::kConsumers + consumer;
  };
  const auto q_tile = [&](uint32_t which) {
    return base + Layout::kQ + uniform(q_slot(which)) * Layout::kBytesQ;
  };
  const auto wait_for_queries = [&](uint32_t which) {
    ptx::barrier_wait(base + Layout::kFullQ + 8 * q_slot(which), TileInRing<Layout::kStagesQ>(which).parity);
  };
  const auto release_queries = [&](uint32_t item, bool last) {
    ptx::barrier_arrive_if(base + Layout::kEmptyQ + 8 * q_slot(item), last && lane == 0);
  };
  // Keys that a token sees end there.
  const auto end_of = [&](int position) {
    return kChoosing ? sum_keys_seen(position) : plan.visible.end(position);
  };
  // Key tiles of an item are numbered from the oldest, 0, to the newest, where the work begins.
  const auto mask = [&](int key_tile) {
    const volatile BandedItem& item = item_of(count);
    const int begin = item.bottom + key_tile * kKeys;
    const int first = begin + 2 * (lane & 3);  // the key of this thread's first column
    const int t[2] = {item.position + tokens.first, item.position + tokens.second};
    constexpr int kEdge = 32;  // windows are cut within so many columns of a tile's end
    if (begin + kKeys > item.safe_hi) {
      const int end[2] = {min(end_of(t[0]), item.num_keys) - first, min(end_of(t[1]), item.num_keys) - first};
      mask_columns<true, kKeys - kEdge, kKeys>(s, end);
      if (begin + kKeys - kEdge > item.safe_hi) mask_columns<true, 0, kKeys - kEdge>(s, end);
    }
    if (kWindow && begin < item.safe_lo) {
      const int lo[2] = {plan.visible.begin(t[0]) - first, plan.visible.begin(t[1]) - first};
      mask_columns<false, 0, kEdge>(s, lo);
      if (begin + kEdge < item.safe_lo) mask_columns<false, kEdge, kKeys>(s, lo);
    }
  };
  const auto wait_for_keys = [&](Ring ring) {
    ptx::barrier_wait(base + Layout::kFullK + 8 * ring.slot, ring.parity);
  };
  const auto wait_for_values = [&](Ring ring, int key_tile) {
    const volatile BandedItem& item = item_of(count);
    const int begin = item.bottom + key_tile * kKeys;
    ptx::barrier_wait(base + Layout::kFullV + 8 * ring.slot, ring.parity);
    if ((kWindow && begin < item.seen_lo) || begin + kKeys > item.seen_hi) {
      clear_unseen_values<kDimV, kKeys>(v_tile(ring), begin, item.seen_lo, item.seen_hi, thread,
                                        1 + consumer);
    }
  };

  // In a window, products are issued in turn, so that one warpgroup multiplies while another is in its
  // softmax; all have the same tiles. The last one begins by giving the first its turn, and ends by giving it
  // none.
  constexpr int kTurns = 1 + Layout::kConsumers;  // the first of the named barriers
  const bool last = consumer + 1 == Layout::kConsumers;
  const auto wait_for_turn = [&] {
    if (kWindow) ptx::named_barrier_sync(kTurns + consumer, 256);
  };
  const auto pass_turn = [&](bool condition) {
    if (kWindow) ptx::named_barrier_arrive_if(kTurns + (last ? 0 : consumer + 1), 256, condition);
  };
  // What a choice adds to the end of a product with V, and of an item.
  constexpr uint32_t kRecord = sizeof(SumsRecord);
  const uint32_t records =
      kChoosing ? (blockIdx.x * Layout::kConsumers * 4 + threadIdx.x / 32) * plan.sums.max_tiles * kRecord
                : 0;
  const auto epochs = [&]() -> SumsEpochs& {
    return reinterpret_cast<SumsEpochs*>(shared + Layout::kEpochs)[threadIdx.x / 32];
  };
  // Then they are zero, for the next tile.
  const auto keep_for_choice = [&](int key_tile) {
    if constexpr (kChoosing) {
      keep_sums<T>(reinterpret_cast<SumsRecord*>(plan.sums.records + (records + key_tile * kRecord)),
                   o + kDimV / 2, probabilities[kKeys / 16 - 1], lane);
#pragma unroll
      for (int i = kDimV / 2; i < kColumns / 2; ++i) o[i] = 0.f;
      ptx::pin_registers(o);
    }
  };
  // The end of an item: outputs, and the choice, by warps that have a token.
  const auto store = [&](const volatile BandedItem& item) {
    store_rows<T, kDimV, kChoosing>(p, group, item, reinterpret_cast<const float(&)[kDimV / 2]>(o), rows,
                                    tokens, row0, lane);
  };
  const auto store_and_choose = [&](const volatile BandedItem& item) {
    // Not known before, or what depends on it alone would be computed in front of all loops, and kept.
    const int here = ptx::keep(threadIdx.x), warp = here / 32, token = warp % 4;
    if (token >= item.tokens) return;
    const int of_grid = blockIdx.x * Layout::kConsumers * 4 + warp, position = item.position + token;
    __syncwarp();
    SumsReader reader(reinterpret_cast<const SumsRecord*>(plan.sums.records + records),
                      own_block(plan.sums, position) + 1 - plan.sums.counts.num_local, here % 32);
    store(item);
    SumsEpochs& epochs = reinterpret_cast<SumsEpochs*>(shared + Layout::kEpochs)[warp];
    keep_lse(epochs, rows, here % 32);
    const int64_t row = (item.row + token) * p.shape.num_heads_kv + item.head;
    const auto find_token = [&] {
      return TokenScores{q_tile(count - 1) + token * kSumsGroup * kPanelPitch,
                         static_cast<const char*>(p.k.data) +
                             (item.first_row * p.k.stride_row + item.head * p.k.stride_head) * 2,
                         static_cast<uint32_t>(p.k.stride_row * 2), min(end_of(position), item.num_keys),
                         plan.scale};
    };
    const int exact_scores = choose_from_sums<T>(
        plan.sums, reader, epochs, reinterpret_cast<Candidates*>(shared + Layout::kCandidates)[warp], of_grid,
        row, position, find_token);
    if (here % 32 == 0) {
      plan.sums.unfinished[row] = exact_scores == kLeftOver;
      if (exact_scores == kLeftOver) plan.sums.any_unfinished[of_grid] = 1;
      if (plan.sums.trial == Trial::kMade)
        plan.sums.gain[of_grid] = gain_of_choice(reader.tiles, exact_scores);
    }
  };
  clear_idle_rows<kDimQK, Layout>(base, plan.part * plan.group, thread, consumer);
  if (kChoosing && plan.sums.trial == Trial::kMade && lane == 0) {
    const int of_grid = blockIdx.x * Layout::kConsumers * 4 + threadIdx.x / 32;
    plan.sums.any_unfinished[of_grid] = plan.sums.gain[of_grid] = 0;
  }
  wait_for_queries(0);
  bool stop = item_of(0).stop;
  pass_turn(last && !stop);
  if (!stop) {
    wait_for_keys(Ring(0));
    ptx::wgmma_fence();
    multiply_scores<T, kDimQK, kKeys>(s, q_tile(0), k_tile(Ring(0)));
    ptx::wgmma_wait<0>();
    ptx::pin_registers(s);
  }
#pragma unroll 1
  while (!stop) {
    // The scores of the newest tile are in s.
    release(Layout::kEmptyK, Ring(tiles));
    int left = item_of(count).num_tiles - 1;
    bool started = false;       // o holds something
    if constexpr (kChoosing) {  // defined here, so that the choice before has their registers
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o[i] = 0.f;
      ptx::pin_registers(o);
    }
    release_queries(count, left == 0 && !kChoosing);
    rows.clear();
    mask(left);
    softmax_update(s, rows, plan.scale);
    if constexpr (kChoosing) {
      begin_epoch(epochs(), left, rows, true, lane);
      clear_records_behind(reinterpret_cast<SumsRecord*>(plan.sums.records + (records + left * kRecord)),
                           left, lane);
    }
    pack_fragments<T>(probabilities, s);
#pragma unroll 1
    for (; left > 0; ++tiles) {
      wait_for_values(Ring(tiles), left);
      wait_for_keys(Ring(tiles + 1));
      --left;
      wait_for_turn();
      ptx::wgmma_fence();
      multiply_scores<T, kDimQK, kKeys>(s, q_tile(count), k_tile(Ring(tiles + 1)));
      multiply_values<T, kColumns, kKeys>(o, probabilities, v_tile(Ring(tiles)), kChoosing || started);
      pass_turn(true);
      started = true;
      ptx::wgmma_wait<1>();
      ptx::pin_registers(s);
      release(Layout::kEmptyK, Ring(tiles + 1));
      release_queries(count, left == 0 && !kChoosing);
      mask(left);
      const bool rescale = softmax_update(s, rows, plan.scale);
      if (left > 0 && rows.sum[0] + rows.sum[1] >= 0.f) wait_for_keys(Ring(tiles + 2));
      ptx::wgmma_wait<0>();
      ptx::pin_registers(o);
      release(Layout::kEmptyV, Ring(tiles));
      keep_for_choice(left + 1);
      if (rescale) {
#pragma unroll
        for (int i = 0; i < kDimV / 2; ++i) o[i] *= rows.shrink[i / 2 % 2];
        if constexpr (kChoosing) begin_epoch(epochs(), left, rows, false, lane);
      }
      pack_fragments<T>(probabilities, s);
    }

    wait_for_values(Ring(tiles), 0);
    wait_for_turn();
    ptx::wgmma_fence();
    multiply_values<T, kColumns, kKeys>(o, probabilities, v_tile(Ring(tiles)), kChoosing || started);
    const auto finish_item = [&] {
      ptx::pin_registers(o);
      release(Layout::kEmptyV, Ring(tiles));
      keep_for_choice(0);
      ++tiles;
      if constexpr (kChoosing) {
        store_and_choose(item_of(count - 1));
        __syncwarp();
        release_queries(count - 1, true);  // a choice may need them
      } else {
        store(item_of(count - 1));
      }
    };
    ++count;
    if constexpr (kChoosing) {  // no registers for the next scores meanwhile
      ptx::wgmma_wait<0>();
      finish_item();
    }
    wait_for_queries(count);
    stop = item_of(count).stop;
    const Ring next(kChoosing ? tiles : tiles + 1);
    if (!stop) wait_for_keys(next);
    // Behind the last item, these scores are of stale keys, and nobody reads them.
    ptx::wgmma_fence();
    multiply_scores<T, kDimQK, kKeys>(s, q_tile(count), k_tile(next));
    pass_turn(!(last && stop));
    if constexpr (!kChoosing) {
      ptx::wgmma_wait<1>();
      finish_item();
    }
    ptx::wgmma_wait<0>();
    ptx::pin_registers(s);
  }
}

// All threads: whether this launch is the one that the trial is in favour of. The first of the two tells the
// other one, and who chooses behind it.
template <typename Layout>
__device__ __forceinline__ bool goes_on(const SumsPlan& plan, unsigned char* shared) {
  if (!Layout::kChoosing) return __ldcg(plan.any_unfinished) == Unfinished::kAll;
  int* const sum = reinterpret_cast<int*>(shared + Layout::kItems);
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  int gain = 0;
  for (int i = threadIdx.x; i < plan.num_gains; i += Layout::kThreads) gain += __ldcg(&plan.gain[i]);
  gain = __reduce_add_sync(~0u, gain);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, gain);
  __syncthreads();
  const bool pays = *sum >= 0;
  if (!pays && blockIdx.x == 0 && threadIdx.x == 0) plan.any_unfinished[0] = Unfinished::kAll;
  __syncthreads();
  return pays;
}

template <typename T, int kDimQK, int kDimV, int kKeys, bool kWindow, bool kChoosing>
__global__ void __launch_bounds__(BandedLayout<kDimQK, kDimV, kKeys, kChoosing>::kThreads, 1)
    banded_attention_fwd_sm90(const __grid_constant__ BandedAttentionFwdParams p,
                              const __grid_constant__ BandedPlan plan) {
  using Layout = BandedLayout<kDimQK, kDimV, kKeys, kChoosing>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    constexpr int kWarps = Layout::kConsumers * 4;
    for (int i = 0; i < Layout::kStages; ++i) {
      ptx::barrier_init(base + Layout::kFullK + 8 * i, 1);
      ptx::barrier_init(base + Layout::kFullV + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyK + 8 * i, kWarps);
      ptx::barrier_init(base + Layout::kEmptyV + 8 * i, kWarps);
    }
    for (int i = 0; i < Layout::kStagesQ * Layout::kConsumers; ++i) {
      ptx::barrier_init(base + Layout::kFullQ + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyQ + 8 * i, 4);
    }
    for (int i = 0; i < Layout::kItemSlots; ++i) {
      ptx::barrier_init(base + Layout::kFullItem + 8 * i, 1);
      ptx::barrier_init(base + Layout::kEmptyItem + 8 * i, 1);
    }
    ptx::barrier_init_fence();
  }
  if constexpr (kChoosing) fill_overlap_weights<T>(shared + Layout::kWeights, threadIdx.x, Layout::kThreads);
  if (!kWindow || !plan.early) {
    ptx::wait_for_dependency();
    if (plan.zeroed != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *plan.zeroed = 0;
    ptx::launch_dependents();
  }
  if (!kWindow && plan.sums.trial == Trial::kFollowed && !goes_on<Layout>(plan.sums, shared)) return;
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == Layout::kConsumers) {
    ptx::release_registers<Layout::kProducerRegisters>();
    if (threadIdx.x % 128 == 0) load<kDimQK, kDimV, Layout>(plan, base, shared);
    if (threadIdx.x % 128 == 32) schedule<Layout>(p, plan, base, shared);
    if (kWindow && threadIdx.x % 128 == 64) {
      ptx::wait_for_dependency();
      ptx::launch_dependents();
    }
  } else {
    ptx::claim_registers<Layout::kConsumerRegisters>();
    consume<T, kDimQK, kDimV, kWindow, Layout>(p, plan, base, shared, warpgroup);
  }
}

// Of a key tile, in compressed attention that does not choose.
template <int kDimQK>
constexpr int kCompressedKeys = kDimQK <= 128 ? 80 : 128;

// What is particular to a launch.
struct BandedLaunch {
  Begin begin = Begin::kOnTime;
  int* zeroed = nullptr;
  SumsPlan sums = {};
  int64_t first_item = 0, end_item = INT64_MAX;
};

template <typename T, int kDimQK, int kDimV, int kKeys, bool kWindow, bool kChoosing = false>
bool launch_banded(const BandedAttentionFwdParams& p, const Stream& stream, Status* status,
                   const BandedLaunch& of) {
  using Layout = BandedLayout<kDimQK, kDimV, kKeys, kChoosing>;
  const int heads = p.shape.num_heads_kv;
  BandedPlan plan;
  plan.group = p.shape.group();
  if (plan.group > kWarpgroupRows) return false;
  plan.part = kWarpgroupRows / plan.group;
  constexpr int64_t kMax = 0x3fffffff;  // 32-bit coordinates and positions, with room for tiles at the ends
  const int64_t num_tiles = num_sequence_tiles(p.seqs, plan.part * Layout::kConsumers);
  if (num_tiles * heads > kMax || p.seqs.total_q > kMax || p.seqs.key_rows > kMax ||
      p.seqs.max_seqlen_k > kMax) {
    return false;
  }
  if (!make_tensor_map(&plan.q, p.dtype, p.q, p.seqs.total_q, p.shape.num_heads_q, kDimQK, plan.part,
                       plan.group) ||
      !make_tensor_map(&plan.k, p.dtype, p.k, p.seqs.key_rows, heads, kDimQK, kKeys, 1) ||
      !make_tensor_map(&plan.v, p.dtype, p.v, p.seqs.key_rows, heads, kDimV, kKeys, 1)) {
    return false;
  }
  plan.num_tiles = static_cast<int>(num_tiles);
  plan.visible = {static_cast<int>(p.keys.block), static_cast<int>(p.keys.stride),
                  static_cast<int>(min64(p.window, kMax))};
  plan.first_item = static_cast<int>(of.first_item);
  plan.end_item = static_cast<int>(min64(num_tiles * heads, of.end_item));
  plan.early = of.begin == Begin::kEarly;
  plan.zeroed = of.zeroed;
  plan.sums = of.sums;
  plan.scale = static_cast<float>(p.softmax_scale) * kLog2e;
  const int64_t blocks =
      min64(plan.end_item - plan.first_item, device_attribute(cudaDevAttrMultiProcessorCount));
  *status = launch_chained(
      "banded_attention_fwd_sm90", banded_attention_fwd_sm90<T, kDimQK, kDimV, kKeys, kWindow, kChoosing>,
      dim3(static_cast<unsigned>(blocks)), Layout::kThreads, Layout::kBytes, stream, p, plan);
  return true;
}

// Shorter sequences find it faster to make scores again: those with items for a trial, and those of fewer
// queries, who wait for one item of each thread block.
constexpr int64_t kMinTrialLength = 32768, kMinChoosingLength = 16384;

bool chooses_blocks(const BandedAttentionFwdParams& p, const SelectBlocksParams& select) {
  const SequenceBatch& seqs = p.seqs;
  const KeyBlocks keys = select.scoring.keys;
  const int blocks = device_attribute(cudaDevAttrMultiProcessorCount);
  const bool has_trial = num_sequence_tiles(seqs, kSumsWarps) * p.shape.num_heads_kv > blocks;
  return seqs.cu_seqlens_q == nullptr &&
         seqs.max_seqlen_k >= (has_trial ? kMinTrialLength : kMinChoosingLength) && keys.block == 32 &&
         keys.stride == 16 && select.scoring.block_size == 64 && p.shape.group() == kSumsGroup &&
         p.shape.head_dim_qk == 128 && p.shape.head_dim_v == 128 &&
         select.num_selected_blocks <= kMaxLaneChoice && select.num_local_blocks >= 1 &&
         seqs.key_rows >= keys.count(seqs.max_seqlen_k) && p.k.stride_row <= INT32_MAX / 2 &&
         blocks <= SumsWorkspace::kMaxBlocks && SumsWorkspace(select).record_bytes() <= UINT32_MAX;
}

}  // namespace

bool compressed_selection_forward(const BandedAttentionFwdParams& p, const SelectBlocksParams& select,
                                  void* workspace, int* zeroed, const Stream& stream, Status* status) {
  if (!chooses_blocks(p, select)) return false;
  const SumsWorkspace parts(select);
  char* const begin = static_cast<char*>(workspace);
  const int64_t num_items = num_sequence_tiles(p.seqs, kSumsWarps) * p.shape.num_heads_kv;
  const int64_t blocks = min64(num_items, device_attribute(cudaDevAttrMultiProcessorCount));
  const int num_warps = static_cast<int>(blocks) * kSumsWarps;
  BandedLaunch of;
  of.sums = {Trial::kMade,
             begin,
             reinterpret_cast<int*>(begin + parts.record_bytes()),
             reinterpret_cast<uint8_t*>(begin + parts.unfinished()),
             reinterpret_cast<int*>(begin + parts.any_unfinished()),
             reinterpret_cast<int*>(begin + parts.gain()),
             num_warps,
             select.block_indices,
             static_cast<int>(parts.tiles),
             static_cast<int>(parts.pitch),
             static_cast<int>(select.scoring.num_blocks),
             {select.num_selected_blocks, select.num_initial_blocks, select.num_local_blocks}};
  of.zeroed = zeroed;
  of.end_item = blocks;
  const bool launched = dispatch_kernels(p.dtype, 128, 128, [&]<typename T, int kDimQK, int kDimV>() {
    if constexpr (kDimQK == 128 && kDimV == 128) {
      if (!launch_banded<T, 128, 128, kSumKeys, false, true>(p, stream, status, of)) return false;
      if (num_items == blocks || !status->ok()) return true;
      of = {Begin::kOnTime, nullptr, of.sums, blocks};
      of.sums.trial = Trial::kFollowed;
      using Plain = BandedLayout<128, 128, kCompressedKeys<128>, false>;
      static_assert(Plain::kConsumers * kWarpgroupRows == kSumsWarps * kSumsGroup,
                    "items are the same tokens");
      return launch_banded<T, 128, 128, kSumKeys, false, true>(p, stream, status, of) &&
             (!status->ok() || launch_banded<T, 128, 128, Plain::kKeys, false>(p, stream, status, of));
    }
    return false;
  });
  if (!launched || !status->ok()) return launched;
  const Unfinished unfinished{of.sums.unfinished, of.sums.any_unfinished, num_warps};
  return select_blocks(select, stream, status, Begin::kOnTime, unfinished);
}

int64_t compressed_selection_workspace(const BandedAttentionFwdParams& p, const SelectBlocksParams& select) {
  return chooses_blocks(p, select) ? SumsWorkspace(select).bytes() : 0;
}

bool banded_attention_forward(const BandedAttentionFwdParams& p, const Stream& stream, Status* status,
                              Begin begin, int* zeroed) {
  return dispatch_kernels(p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v,
                          [&]<typename T, int kDimQK, int kDimV>() {
                            if (p.window > 0)
                              return launch_banded<T, kDimQK, kDimV, (kDimQK <= 128 ? 176 : 128), true>(
                                  p, stream, status, {begin});
                            return launch_banded<T, kDimQK, kDimV, kCompressedKeys<kDimQK>, false>(
                                p, stream, status, {begin, zeroed});
                          });
}

}  // namespace nsa::cuda::sm90
