// Attention of a few tokens per sequence over a cache, on Hopper, in one launch.
//
// A cluster of thread blocks has one token and the heads of a group. Its warps stream the compressed keys, a
// tile each at a time, and keep the sums of a tile's probabilities by selection block. Then the first four
// warps of every thread block exchange what the softmax needs and the block scores, and make the same choice,
// while the others attend the window; all attend the chosen blocks. All sums are in fixed order.
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/cluster_room.h"
#include "cuda/sm90/decode_plan.h"
#include "cuda/sm90/decode_tile.cuh"
#include "cuda/sm90/device.h"
#include "cuda/sm90/launch.h"
#include "cuda/tile/top_k.cuh"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kMaxThreads = kMaxDecodeWarps * 32;
constexpr int kChoiceWarps = 4;
constexpr int kChoiceThreads = kChoiceWarps * 32;
constexpr int kChoiceBarrier = 1;
// Tiles of the window for each warp; what is more is for those that do not choose.
constexpr int kSharedRounds = 2;
constexpr int kEarlyTiles = 4;               // of a warp, to L2 before the kernel in front has ended
constexpr int kRowStates = 2 * kDecodeRows;  // slc, swa

template <int kDimQK, int kDimV>
struct Layout {
  static constexpr int kQBytes = tile_bytes<kDimQK>(kDecodeRows);
  static constexpr int kStageBytes = DecodeRing<kDimQK, kDimV>::kStageBytes;
  // A warp's outputs, in place of its ring; the pitch spreads the rows of a quad's store over the banks.
  static constexpr int kOutputPitch = kDimV + 8;
  static constexpr int kOutputBytes = kDecodeRows * kOutputPitch * 4;
  static constexpr int kParkedBytes = kDecodeRows * kDimV * 4;  // of a warp
  static_assert(kOutputBytes <= kStageBytes);
};

// What the thread blocks of a cluster tell each other, once each.
enum Exchange { kCmpStates, kScores, kStates, kSlices, kExchanges };

// What is in shared memory beside the tiles.
struct Shared {
  DecodeStream streams[kNumBranches];  // of the plan: a warp reads one of them for every tile
  float taps[kMaxDecodeTaps];
  float gates[kNumBranches][kDecodeRows];
  float2 warp_state[kMaxDecodeWarps][kRowStates];     // of each warp
  float2 cmp_state[kMaxDecodeCluster][kDecodeRows];   // of each thread block (alone: warp), compressed keys
  float2 state[kMaxDecodeCluster][kRowStates];        // of each part, the other branches
  float lse_log2[kMaxDecodeWarps][kDecodeRows];       // of the compressed branch; the same for all warps
  float spilled[kMaxDecodeCluster][kMaxDecodeSpill];  // scores that thread blocks have for the next one
  // Of each warp, where it carries from tile to tile what the last key spills (carries_spill): what the last
  // one of all spills, by head and as a score, and the factor of its sums.
  float carried[kMaxDecodeWarps][kDecodeRows], cmp_factor[kMaxDecodeWarps][kDecodeRows];
  float spilled_score[kMaxDecodeWarps];
  int chosen[kMaxDecodeSelected];
  BestOfBlock<kChoiceThreads> best;
  alignas(8) uint64_t full[kMaxDecodeWarps * kMaxDecodeStages];
  uint64_t q_full;
  uint64_t cmp_done, choice_done;  // by all warps, by those that choose
  uint64_t exchanged[kExchanges];
};

constexpr int kSharedBytes = static_cast<int>(round_up(sizeof(Shared), 256));

// What a thread block works on: one token, and 16 heads of a group.
struct Unit {
  int64_t b, row;                               // sequence (-1: padding), row of q
  int position, head_kv, first_head, num_rows;  // first_head: query head of row 0
  int part, slab;
};

__device__ Unit find_unit(const DecodeAttentionParams& p, const DecodePlan& plan, int lane) {
  const int group = p.shape.group();
  Unit unit;
  unit.part = blockIdx.x / plan.slabs;
  unit.slab = blockIdx.x % plan.slabs;
  unit.head_kv = blockIdx.y;
  unit.row = blockIdx.z;
  unit.first_head = unit.head_kv * group + unit.slab * kDecodeRows;
  unit.num_rows = min(kDecodeRows, group - unit.slab * kDecodeRows);
  const TokenPlace place = find_token_by_warp(p.seqs, unit.row, lane);
  unit.b = place.b;
  unit.position = place.position;
  return unit;
}

// The compressed keys of a thread block.
struct Part {
  int tiles, each, first, last;  // tiles of the sequence, tiles of a part, the own ones

  Part() = default;
  __device__ Part(int tiles, int parts, int part)
      : tiles(tiles), each((tiles + parts - 1) / parts), first(begin(part)), last(begin(part + 1)) {}
  __device__ int begin(int part) const { return min(tiles, part * each); }
  // A warp's tiles lie one behind the other; tile 0 is the first of the part.
  __device__ int begin_warp(int warp, int warps) const {
    return static_cast<unsigned>(warp * (last - first)) / static_cast<unsigned>(warps);
  }
  __device__ int owner(int tile, int warps) const {
    return static_cast<unsigned>((tile + 1) * warps - 1) / static_cast<unsigned>(last - first);
  }
};

// A warp's tiles: compressed keys, window, chosen blocks. The latter two are dealt out to the parts, and
// there to the warps, first to those that have no part in the choice: they attend what of the window is more
// than kSharedRounds tiles a warp.
struct Work {
  Unit unit;
  Part part;
  int end, end_cmp, own;  // tokens and compressed keys that are seen, the own block
  int begin_window;
  int rank, helpers, shared_tiles;     // place of a warp in the deal, warps of the second one
  int first_cmp;                       // of the warp, in the part
  int own_cmp, before_slc, first_slc;  // tiles until the window, until the chosen blocks; first tile of these

  // Tiles that a warp gets of `tiles`: first, first + step, ..
  __device__ int dealt(int tiles, int first, int step) const {
    return first < tiles ? (tiles - first + step - 1) / step : 0;
  }
  __device__ int of_part(int tiles, int parts) const { return max(0, tiles - unit.part + parts - 1) / parts; }
  // Key of the k-th tile of the window.
  __device__ int window_key(int k, int warps, int parts) const {
    const int tile = rank + (k < kSharedRounds ? k * warps : shared_tiles + (k - kSharedRounds) * helpers);
    return begin_window + (tile * parts + unit.part) * kDecodeKeys;
  }
};

__device__ __forceinline__ Work find_work(const DecodeAttentionParams& p, const DecodePlan& plan,
                                          const Unit& unit, int warp) {
  const int warps = plan.warps, parts = plan.parts();
  Work work;
  work.unit = unit;
  work.end = unit.position + 1;
  work.own = unit.position / static_cast<int>(p.block_size);
  work.end_cmp = CachedKeyBlocks(p.compressed).end_visible(unit.position);
  work.part = Part((work.end_cmp + kDecodeKeys - 1) / kDecodeKeys, parts, unit.part);
  work.begin_window = CachedKeyBlocks(KeyBlocks{}).begin_visible(unit.position, static_cast<int>(p.window));
  work.rank = warps - 1 - warp;
  work.helpers = warps > kChoiceWarps ? warps - kChoiceWarps : warps;
  work.shared_tiles = warps * kSharedRounds;
  const int tiles = work.of_part((work.end - work.begin_window + kDecodeKeys - 1) / kDecodeKeys, parts);
  work.first_cmp = work.part.begin_warp(warp, warps);
  work.own_cmp = work.part.begin_warp(warp + 1, warps) - work.first_cmp;
  work.before_slc =
      work.own_cmp + min(kSharedRounds, work.dealt(tiles, work.rank, warps)) +
      (work.rank < work.helpers ? work.dealt(tiles, work.shared_tiles + work.rank, work.helpers) : 0);
  const int last_round = tiles < work.shared_tiles ? tiles % warps : 0;
  work.first_slc = work.rank - last_round + (work.rank < last_round ? warps : 0);
  return work;
}

// The first compressed keys of a warp to the L2 cache.
template <int kDimQK, int kDimV>
__device__ __forceinline__ void prefetch_keys(const Work& work, const DecodePlan& plan, int lane) {
  const DecodeStream& stream = plan.streams[0];
  const int tiles = min(work.own_cmp, kEarlyTiles), bytes = 2 * (lane < kDecodeKeys ? kDimQK : kDimV);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const int key = (work.part.first + work.first_cmp + i) * kDecodeKeys + lane % kDecodeKeys;
    if (key >= work.end_cmp) continue;
    LaneRow at{key + plan.before};
    at.look_up<false>(stream, static_cast<int>(work.unit.b));
    const unsigned offset = at.offset(stream, work.unit.head_kv, lane);
    if (offset == LaneRow::kNone) continue;
    const char* row = (lane < kDecodeKeys ? stream.k : stream.v) + uint64_t{offset} * 16;
#pragma unroll
    for (int byte = 0; byte < 2 * max(kDimQK, kDimV); byte += 128) {
      if (byte < bytes) ptx::prefetch(row + byte);
    }
  }
}

// Rows of no sequence: o = 0, lse = -inf, block_indices = -1.
template <typename T>
__device__ void write_padding(const DecodeAttentionParams& p, const Unit& unit) {
  const int dim_v = p.shape.head_dim_v, n = p.num_selected_blocks, threads = blockDim.x;
  const int64_t first = unit.row * p.shape.num_heads_q + unit.first_head;
  if (unit.part != 0) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += threads)
    p.block_indices[(unit.row * p.shape.num_heads_kv + unit.head_kv) * n + i] = -1;
#pragma unroll 1
  for (int i = threadIdx.x; i < unit.num_rows * dim_v; i += threads)
    static_cast<T*>(p.o)[first * dim_v + i] = static_cast<T>(0.f);
#pragma unroll 1
  for (int i = threadIdx.x; i < unit.num_rows * kNumBranches; i += threads)
    static_cast<float*>(
        p.lse)[i / unit.num_rows * p.seqs.total_q * p.shape.num_heads_q + first + i % unit.num_rows] =
        kNegInf;
}

// Q by one warp. Rows that are none repeat the last one: zeros times a visible infinity would be NaN, which
// no factor takes out of a sum over the rows again. Every lane arrives at the barrier.
template <typename T, int kDimQK>
__device__ __forceinline__ void load_queries(const DecodeAttentionParams& p, const Unit& unit, uint32_t tile,
                                             uint32_t barrier, int lane) {
  const T* first =
      static_cast<const T*>(p.q.data) + unit.row * p.q.stride_row + unit.first_head * p.q.stride_head;
  load_tile<kDimQK, kDecodeRows, 32>(
      tile, [&](int row) { return first + min(row, unit.num_rows - 1) * p.q.stride_head; }, lane);
  ptx::barrier_arrive_after_copies(barrier);
}

// Stores a value at the same place in the shared memory of thread blocks first, first + 1, .. end - 1 of the
// cluster.
template <typename Value>
__device__ __forceinline__ void tell(Shared& s, Exchange exchange, Value* own, Value value, int cluster,
                                     int first, int end) {
  if (cluster == 1) {
    *own = value;
    return;
  }
  const uint32_t address = ptx::shared_address(own), barrier = ptx::shared_address(&s.exchanged[exchange]);
#pragma unroll 1
  for (int rank = first; rank < end; ++rank)
    ptx::store_async(ptx::cluster_address(address, rank), value, ptx::cluster_address(barrier, rank));
}

// Until all that others tell is there.
__device__ __forceinline__ void wait_for(Shared& s, Exchange exchange) {
  ptx::barrier_wait(ptx::shared_address(&s.exchanged[exchange]), 0);
}

__device__ __forceinline__ float2 merge_states(const float2* state, int count, int stride) {
  float2 all = make_float2(kNegInf, 0.f);
#pragma unroll 2
  for (int i = 0; i < count; ++i) all.x = fmaxf(all.x, state[i * stride].x);
#pragma unroll 2
  for (int i = 0; i < count; ++i) {
    const float2 own = state[i * stride];
    if (own.y != 0.f) all.y += own.y * ptx::exp2_approx(own.x - all.x);
  }
  return all;
}

__device__ __forceinline__ float lse_of(float2 state) {
  return state.y == 0.f ? kNegInf : state.x + __log2f(state.y);
}

// What l = 2 d and l' = 4 d give: taps 1, 2, 2, 2, 1. Four sums a head and tile are enough: a warp's tiles
// lie one behind the other, so it carries what the last key spills into the block behind, and all its sums
// are relative to the same logit.
__host__ __device__ __forceinline__ bool carries_spill(const DecodePlan& plan) {
  return plan.per_block == 4 && plan.before == 1;
}

// What a lane leaves of a tile's [heads, 4] sums: at this place and two behind.
__device__ __forceinline__ int sum_of_lane(int lane) {
  return (lane / 4 + 8 * (lane & 1)) * 4 + (lane >> 1 & 1);
}

// Leaves a tile's probabilities summed by selection block: [heads, 4]. carry: of the key in front of the tile
// in the last lane of a quad, then of the tile's last key. sums: of the tile, at sum_of_lane.
__device__ __forceinline__ void sum_by_block(float* sums, const float (&score)[kDecodeKeys / 8][4],
                                             float (&carry)[2], int lane) {
  const bool odd = lane & 1;
  float total[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float a = score[n][2 * half], b = score[n][2 * half + 1];
      float sum = 2.f * a + (odd ? b : 2.f * b);
      sum += __shfl_xor_sync(~0u, sum, 1);
      const float last = n == 0 ? carry[half] : score[0][2 * half + 1];
      total[half][n] =
          sum + __shfl_sync(~0u, (lane & 3) == 3 ? last : b, (lane & 2) != 0 ? (lane & ~3) + 1 : lane | 3);
    }
    carry[half] = score[1][2 * half + 1];
  }
#pragma unroll
  for (int n = 0; n < 2; ++n) sums[2 * n] = odd ? total[1][n] : total[0][n];
}

// The same for other blocks: [heads, entries], with the logit that the sums are relative to. Two lanes a row.
__device__ __forceinline__ void sum_by_taps(float* sums, const float* probabilities, const float* taps,
                                            const DecodePlan& plan, float largest, int lane) {
  const int num_taps = plan.per_block + plan.before;
  const float* row = probabilities + (lane >> 1) * kDecodeScorePitch;
  float* target = sums + (lane >> 1) * plan.entries;
#pragma unroll 1
  for (int e = lane & 1; e < plan.entries; e += 2) {
    float total = 0.f;
    int key = e * plan.per_block - plan.before;
#pragma unroll 1
    for (int x = 0; x < num_taps; ++x, ++key) {
      if (static_cast<unsigned>(key) < kDecodeKeys) total = fmaf(taps[x], row[key], total);
    }
    target[e] = e == plan.entries - 1 ? largest : total;
  }
}

// Entry e of a tile, summed over the heads.
__device__ __forceinline__ float sum_heads(const float* tile, int entries, int e, const float* lse_log2,
                                           int num_rows) {
  float total = 0.f;
#pragma unroll 4
  for (int row = 0; row < num_rows; ++row) {
    const float largest = tile[(row + 1) * entries - 1];
    const float factor = largest == kNegInf ? 0.f : ptx::exp2_approx(largest - lse_log2[row]);
    total = fmaf(tile[row * entries + e], factor, total);
  }
  return total;
}

struct ChoiceBarrier {
  __device__ __forceinline__ void operator()() const {
    ptx::named_barrier_sync(kChoiceBarrier, kChoiceThreads);
  }
};

// The scores of the thread block's own selection blocks, to all of the cluster, by the warps that choose.
// scores: [slabs, num_blocks].
__device__ __forceinline__ void share_scores(const DecodePlan& plan, const Unit& unit, const Part& part,
                                             int own, const float* sums, const float* lse_log2, Shared& s,
                                             float* scores) {
  const int blocks = 1 << plan.tile_shift, tiles = part.last - part.first;
  // What the last keys of the part have for the blocks behind it: alone, those lie behind all tiles.
  const int behind = part.tiles << plan.tile_shift, end_spill = behind + (plan.cluster == 1 ? plan.spill : 0);
  const auto tell_spill = [&](int e, float score) {
    if (plan.cluster > 1) {
      tell(s, kScores, &s.spilled[blockIdx.x][e], score, plan.cluster, 0, plan.cluster);
    } else if (behind + e <= own) {
      scores[behind + e] = score;
    }
  };
  float* own_scores = scores + unit.slab * plan.num_blocks + (part.first << plan.tile_shift);
  if (carries_spill(plan)) {
    // A tile a thread.
#pragma unroll 1
    for (int tile = threadIdx.x; tile < tiles; tile += kChoiceThreads) {
      const int owner = part.owner(tile, plan.warps),
                before = tile == 0 ? 0 : part.owner(tile - 1, plan.warps);
      const float* at = sums + static_cast<int64_t>(tile) * plan.sums_pitch;
      float4 score = make_float4(before < owner ? s.spilled_score[before] : 0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int row = 0; row < kDecodeRows; ++row) {
        const float4 sum = reinterpret_cast<const float4*>(at)[row];
        const float factor = s.cmp_factor[owner][row];
        score.x = fmaf(sum.x, factor, score.x), score.y = fmaf(sum.y, factor, score.y);
        score.z = fmaf(sum.z, factor, score.z), score.w = fmaf(sum.w, factor, score.w);
      }
      tell(s, kScores, reinterpret_cast<float4*>(own_scores) + tile, score, plan.cluster, 0, plan.cluster);
    }
    if (threadIdx.x == 0) tell_spill(0, s.spilled_score[plan.warps - 1]);
  } else {
#pragma unroll 1
    for (int j = threadIdx.x; j < tiles << plan.tile_shift; j += kChoiceThreads) {
      const int tile = j >> plan.tile_shift, e = j & (blocks - 1);
      const float* at = sums + static_cast<int64_t>(tile) * plan.sums_pitch;
      float score = sum_heads(at, plan.entries, e, lse_log2, unit.num_rows);
      if (e < plan.spill && tile > 0)
        score += sum_heads(at - plan.sums_pitch, plan.entries, blocks + e, lse_log2, unit.num_rows);
      tell(s, kScores, &own_scores[j], score, plan.cluster, 0, plan.cluster);
    }
    if (threadIdx.x < plan.spill) {
      float score = 0.f;
      if (tiles > 0) {
        const float* at = sums + static_cast<int64_t>(tiles - 1) * plan.sums_pitch;
        score = sum_heads(at, plan.entries, blocks + threadIdx.x, lse_log2, unit.num_rows);
      }
      tell_spill(threadIdx.x, score);
    }
  }
  // Blocks behind the last tile.
#pragma unroll 1
  for (int j = end_spill + threadIdx.x; j <= own; j += kChoiceThreads) {
#pragma unroll 1
    for (int slab = 0; slab < plan.slabs; ++slab) scores[slab * plan.num_blocks + j] = 0.f;
  }
}

// The bytes that all thread blocks together tell of scores.
__device__ __forceinline__ int score_bytes(const DecodePlan& plan, const Part& part) {
  return ((part.tiles << plan.tile_shift) + plan.parts() * plan.spill) * plan.slabs * 4;
}

// In a cluster: what the slabs have, and what keys of one part have for blocks of the next, two terms a block
// and slab.
__device__ __forceinline__ void finish_scores(const DecodePlan& plan, const Part& part, int own,
                                              const Shared& s, float* scores) {
  const int slabs = plan.slabs;
  if (slabs > 1) {
#pragma unroll 1
    for (int j = threadIdx.x; j <= own; j += kChoiceThreads) {
      float score = scores[j];

#pragma unroll 1
      for (int slab = 1; slab < slabs; ++slab) score += scores[slab * plan.num_blocks + j];
      scores[j] = score;
    }
    ChoiceBarrier()();
  }
  if (plan.spill > 0) {
    if (threadIdx.x < plan.parts() * plan.spill) {
      const int from = threadIdx.x / plan.spill, e = threadIdx.x % plan.spill;
      const int behind = part.begin(from + 1), j = (behind << plan.tile_shift) + e;
      if (part.begin(from) < behind && j <= own) {
        float score = scores[j];

#pragma unroll 1
        for (int slab = 0; slab < slabs; ++slab) score += s.spilled[from * slabs + slab][e];
        scores[j] = score;
      }
    }
    ChoiceBarrier()();
  }
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(kMaxThreads)
    decode_attention_sm90(const __grid_constant__ DecodeAttentionParams p,
                          const __grid_constant__ DecodePlan plan) {
  using L = Layout<kDimQK, kDimV>;
  constexpr int kVectors = kDimV / 4;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Shared s;
  const uint32_t base = ptx::shared_address(shared), q_full = ptx::shared_address(&s.q_full);
  const uint32_t cmp_done = ptx::shared_address(&s.cmp_done),
                 choice_done = ptx::shared_address(&s.choice_done);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = plan.warps, threads = warps * 32;
  const int cluster = plan.cluster, parts = plan.parts(), stages = plan.stages;
  if (threadIdx.x == 0) {
    // All there may be, without a loop.
#pragma unroll
    for (int i = 0; i < kMaxDecodeWarps * kMaxDecodeStages; ++i)
      ptx::barrier_init(ptx::shared_address(&s.full[i]), 32);
#pragma unroll
    for (int i = 0; i < kExchanges; ++i) ptx::barrier_init(ptx::shared_address(&s.exchanged[i]), 1);
    ptx::barrier_init(q_full, 32);
    ptx::barrier_init(cmp_done, threads);
    ptx::barrier_init(choice_done, kChoiceThreads);
    ptx::barrier_init_fence();
  }
  if (threadIdx.x < plan.per_block + plan.before) {
    // Tap x of selection block j is compressed block j * per_block + x - before, whatever j.
    const int64_t j = plan.before + 1;
    s.taps[threadIdx.x] = static_cast<float>(overlap(j * plan.per_block + threadIdx.x - plan.before, j,
                                                     p.compressed, p.block_size)) /
                          static_cast<float>(p.compressed.stride);
  }
  constexpr int kStreamWords = kNumBranches * sizeof(DecodeStream) / 4;
  static_assert(kStreamWords <= kChoiceThreads - kMaxDecodeTaps);
  if (const int word = static_cast<int>(threadIdx.x) - kMaxDecodeTaps; word >= 0 && word < kStreamWords) {
    reinterpret_cast<unsigned*>(s.streams)[word] = reinterpret_cast<const unsigned*>(plan.streams)[word];
  }
  __syncthreads();
  if (cluster > 1) ptx::cluster_arrive_relaxed();
  Work work;
  bool found = false;
  // Thread blocks that begin while the kernel in front is at work look at what it may still write, if nothing
  // comes of that but addresses in the caches and a guess: the lengths are looked at again.
#pragma unroll 1
  for (bool early = blockIdx.z * gridDim.y + blockIdx.y < plan.first_units;; early = false) {
    if (!early) {
      ptx::wait_for_dependency();
      ptx::launch_dependents();
    }
    const Unit unit = find_unit(p, plan, lane);
    if (!found || unit.b != work.unit.b || unit.position != work.unit.position) {
      work = find_work(p, plan, unit, warp);
    }
    if (!early) break;
    found = true;
    if (unit.b >= 0 && cluster == 1) prefetch_keys<kDimQK, kDimV>(work, plan, lane);
  }
  const Unit& unit = work.unit;
  const Part& part = work.part;
  const int own_cmp = work.own_cmp, before_slc = work.before_slc;
  const int size = static_cast<int>(p.block_size), tiles_of_block = size / kDecodeKeys;
  if (unit.b < 0) {
    if (cluster > 1) ptx::cluster_wait();
    write_padding<T>(p, unit);
    return;
  }
  if (cluster > 1 && threadIdx.x == 0) {
    const auto expect = [&](Exchange exchange, int bytes) {
      ptx::barrier_arrive_expect(ptx::shared_address(&s.exchanged[exchange]), bytes);
    };
    expect(kCmpStates, cluster * kDecodeRows * 8);
    expect(kScores, score_bytes(plan, part));
    expect(kStates, parts * kRowStates * 8);
    expect(kSlices, parts * plan.rows_of_part(unit.part) * kDimV * 4);
  }
  struct Tile {
    int first, end;
  };
  const auto tile_at = [&](int i) -> Tile {
    if (i < own_cmp) return {(part.first + work.first_cmp + i) * kDecodeKeys, work.end_cmp};
    if (i < before_slc) return {work.window_key(i - own_cmp, warps, parts), work.end};
    const int tile = (work.first_slc + (i - before_slc) * warps) * parts + unit.part;
    const int block = s.chosen[tile / tiles_of_block];
    return {block * size + tile % tiles_of_block * kDecodeKeys, min(work.end, (block + 1) * size)};
  };
  DecodeRing<kDimQK, kDimV> ring(base + plan.ring + warp * stages * L::kStageBytes,
                                 ptx::shared_address(&s.full[warp * stages]), stages);
  if (warp == 0) load_queries<T, kDimQK>(p, unit, base, q_full, lane);

  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  float* sums = reinterpret_cast<float*>(shared + plan.sums);
  if (plan.global_sums != nullptr) {
    sums = plan.global_sums +
           ((unit.row * p.shape.num_heads_kv + unit.head_kv) * plan.slabs + unit.slab) * plan.max_tiles *
               static_cast<int64_t>(plan.sums_pitch) +
           part.first * static_cast<int64_t>(plan.sums_pitch);
  }
  float* own_sums = sums + work.first_cmp * static_cast<int64_t>(plan.sums_pitch);
  float* next_sums = own_sums + sum_of_lane(lane);
  float carry[2] = {0.f, 0.f};
  float* probabilities =
      reinterpret_cast<float*>(shared + plan.scores) + warp * kDecodeRows * kDecodeScorePitch;
  float* scores = reinterpret_cast<float*>(shared + plan.scores);
  float* lse_log2 = s.lse_log2[warp];
  const auto find_lse = [&] {
    if (lane < kDecodeRows) {
      lse_log2[lane] = lse_of(
          merge_states(&s.cmp_state[unit.slab][lane], cluster > 1 ? parts : warps, kDecodeRows * plan.slabs));
    }
    __syncwarp();
  };
  // Of a warp's compressed branch, from the choice to the end; the sums by block are read by then.
  float2* parked = reinterpret_cast<float2*>(shared + plan.sums + warp * L::kParkedBytes) + lane;
  // Other than the present branch: the compressed one until the choice, then the window.
  DecodeWarp<T, kDimQK, kDimV> acc, held;
  enum { kCompressed, kSoftmax, kChoice, kChosen } phase = kCompressed;
  int all_tiles = before_slc;
  // The lane's row of the tile to be loaded next; its page is looked up a tile early, so that the latency of
  // the table is not in front of a copy.
  LaneRow upcoming;
  bool looked_up = false;
  const auto stream_of = [&](int tile) { return s.streams[(tile >= own_cmp) + (tile >= before_slc)]; };
  const auto look_up = [&](int next) {
    const Tile tile = tile_at(next);
    const int key = tile.first + (lane & (kDecodeKeys - 1));
    upcoming = {key + (next < own_cmp ? plan.before : 0), -1};  // cached_row(0) == before
    if (key < tile.end) upcoming.look_up(stream_of(next), static_cast<int>(unit.b));
  };
  // One loop, so that its code is there once: a decoding step runs it cold.
#pragma unroll 1
  for (int i = 0;;) {
#pragma unroll 1
    while (ring.loaded < min(all_tiles, i + stages)) {
      const int next = ring.loaded;
      if (!looked_up) look_up(next);
      const DecodeStream stream = stream_of(next);
      ring.load(stream, upcoming.offset(stream, unit.head_kv, lane), lane);
      looked_up = next + 1 < all_tiles;
      if (looked_up) look_up(next + 1);
    }
    if (i == 0 && phase == kCompressed) {
      if (threadIdx.x < kNumBranches * kDecodeRows) {
        const int branch = threadIdx.x / kDecodeRows, r = threadIdx.x % kDecodeRows;
        s.gates[branch][r] =
            r < unit.num_rows ? gate(p, unit.row * p.shape.num_heads_q + unit.first_head + r, branch) : 0.f;
      }
      ptx::barrier_wait(q_full, 0);
      __syncthreads();  // for the gates
    }
    if (i == own_cmp && phase == kCompressed) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 state = acc.state(half, scale);
        if ((lane & 3) == 0)
          (cluster > 1 ? s.warp_state[warp] : s.cmp_state[warp])[lane / 4 + 8 * half] = state;
        if ((lane & 3) == 3) s.carried[warp][lane / 4 + 8 * half] = carry[half];
      }
      held = acc, acc = {};
      if (cluster > 1) ptx::cluster_wait();  // all have begun
      ptx::barrier_arrive(cmp_done);
      phase = warp < kChoiceWarps ? kSoftmax : kChoice;
    }
    if (phase == kSoftmax) {
      // Until all compressed keys are attended, those that choose attend the window too.
      bool all_done = __all_sync(~0u, ptx::barrier_test(cmp_done, 0));
#pragma unroll 1
      while (!all_done && !(i < before_slc && ring.is_there())) {
        __nanosleep(32);
        all_done = __all_sync(~0u, ptx::barrier_test(cmp_done, 0));
      }
      if (all_done) {
        // The softmax of the compressed branch, and the choice.
        if (cluster > 1) {
          const float2 state = merge_states(&s.warp_state[0][threadIdx.x % kDecodeRows], warps, kRowStates);
#pragma unroll 1
          for (int to = threadIdx.x / kDecodeRows; to < cluster; to += kChoiceThreads / kDecodeRows)
            tell(s, kCmpStates, &s.cmp_state[blockIdx.x][threadIdx.x % kDecodeRows], state, cluster, to,
                 to + 1);
          wait_for(s, kCmpStates);
        }
        find_lse();
        if (carries_spill(plan)) {
          static_assert(kChoiceThreads == kMaxDecodeWarps * kDecodeRows);
          const int of = threadIdx.x / kDecodeRows, row = threadIdx.x % kDecodeRows;
          const float2 state = cluster > 1 ? s.warp_state[of][row] : s.cmp_state[of][row];
          float spill = 0.f;
          if (of < warps) {
            const float factor =
                row < unit.num_rows && state.y != 0.f ? ptx::exp2_approx(state.x - lse_log2[row]) : 0.f;
            s.cmp_factor[of][row] = factor;
            spill = s.carried[of][row] * factor;
          }
#pragma unroll
          for (int step = kDecodeRows / 2; step > 0; step /= 2) spill += __shfl_xor_sync(~0u, spill, step);
          if (row == 0) s.spilled_score[of] = spill;
          ChoiceBarrier()();
        }
        share_scores(plan, unit, part, work.own, sums, lse_log2, s, scores);
        if (cluster > 1) wait_for(s, kScores);
        ChoiceBarrier()();  // for what the block itself has written
        if (cluster > 1) finish_scores(plan, part, work.own, s, scores);
        choose_blocks_by_block(s.chosen, scores, work.own, p.num_selected_blocks, p.num_initial_blocks,
                               p.num_local_blocks, s.best, ChoiceBarrier());
        ptx::barrier_arrive(choice_done);
        phase = kChoice;
      }
    }
    // Those that attend the window meanwhile look for the choice before every tile.
    if (phase == kChoice && (i == before_slc || __all_sync(~0u, ptx::barrier_test(choice_done, 0)))) {
      ptx::barrier_wait(cmp_done, 0);
      ptx::barrier_wait(choice_done, 0);
      if (warp >= kChoiceWarps) {
        if (cluster > 1) wait_for(s, kCmpStates);
        find_lse();
      }
      const int n = p.num_selected_blocks;
      int entries = 0;
#pragma unroll
      for (int k = 0; k < kMaxDecodeSelected; k += 32)
        entries += __popc(__ballot_sync(~0u, k + lane < n && s.chosen[k + lane] >= 0));
      all_tiles =
          before_slc + work.dealt(work.of_part(entries * tiles_of_block, parts), work.first_slc, warps);
      if (blockIdx.x == 0 && threadIdx.x < n) {
        p.block_indices[(unit.row * p.shape.num_heads_kv + unit.head_kv) * n + threadIdx.x] =
            s.chosen[threadIdx.x];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        const float largest = held.largest(half, scale);
        const float factor =
            largest == kNegInf ? 0.f : ptx::exp2_approx(largest - lse_log2[row]) * s.gates[0][row];
#pragma unroll
        for (int d = 0; d < kDimV / 8; ++d)
          parked[(2 * d + half) * 32] =
              make_float2(held.out[0][d][2 * half] * factor, held.out[0][d][2 * half + 1] * factor);
      }
      phase = kChosen;
      continue;
    }
    if (i == before_slc) held = acc, acc = {};
    if (i == all_tiles) break;
    const Tile tile = tile_at(i);
    acc.attend(
        base, ring.front(), tile.first, tile.end, scale, lane,
        [&](const float(&shrink)[2]) {
          if (phase != kCompressed || !carries_spill(plan)) return;
          // The sums so far are relative to another logit from now on.
          __syncwarp();
          float* at = own_sums + lane;
#pragma unroll 1
          for (int k = 0; k < i; ++k, at += plan.sums_pitch) at[0] *= shrink[0], at[32] *= shrink[1];
#pragma unroll
          for (int half = 0; half < 2; ++half) carry[half] *= shrink[half];
          __syncwarp();
        },
        [&](const float(&score)[kDecodeKeys / 8][4]) {
          if (phase != kCompressed) return;
          if (carries_spill(plan)) {
            sum_by_block(next_sums, score, carry, lane);
            next_sums += plan.sums_pitch;
            return;
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float* row = probabilities + (lane / 4 + 8 * half) * kDecodeScorePitch + (lane & 3) * 2;
#pragma unroll
            for (int n = 0; n < kDecodeKeys / 8; ++n) {
              row[n * 8] = score[n][2 * half];
              row[n * 8 + 1] = score[n][2 * half + 1];
            }
          }
          const float max0 = __shfl_sync(~0u, acc.softmax.max[0], (lane >> 1 & 7) * 4);
          const float max1 = __shfl_sync(~0u, acc.softmax.max[1], (lane >> 1 & 7) * 4);
          __syncwarp();
          sum_by_taps(own_sums + i * static_cast<int64_t>(plan.sums_pitch), probabilities, s.taps, plan,
                      (lane < 16 ? max0 : max1) * scale, lane);
          __syncwarp();
        });
    ring.pop();
    ++i;
  }

  // (largest logit, sum) of every warp, part, and of all.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float2 of_slc = acc.state(half, scale), of_swa = held.state(half, scale);
    if ((lane & 3) == 0) {
      s.warp_state[warp][row] = of_slc;
      s.warp_state[warp][kDecodeRows + row] = of_swa;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int k = threadIdx.x; cluster > 1 && k < kRowStates * parts; k += threads) {
    const int r = k % kRowStates, to = k / kRowStates * plan.slabs + unit.slab;
    const float2 state = merge_states(&s.warp_state[0][r], warps, kRowStates);
    tell(s, kStates, &s.state[unit.part][r], state, cluster, to, to + 1);
  }
  if (cluster > 1) wait_for(s, kStates);
  const int part_rows = plan.part_rows(), first_own = unit.part * part_rows;
  const int branch = lane < kDecodeRows ? 1 : 2, r = lane & (kDecodeRows - 1);
  float factor = 0.f;  // of the warp's output of the branch
  const float2 all = merge_states(cluster > 1 ? &s.state[0][lane] : &s.warp_state[0][lane],
                                  cluster > 1 ? parts : warps, kRowStates);
  if (all.y != 0.f)
    factor = ptx::exp2_approx(s.warp_state[warp][lane].x - all.x) * s.gates[branch][r] / all.y;
  float* outputs = reinterpret_cast<float*>(shared + plan.ring);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float f_slc = __shfl_sync(~0u, factor, row), f_swa = __shfl_sync(~0u, factor, kDecodeRows + row);
#pragma unroll
    for (int d = 0; d < kDimV / 8; ++d) {
      const auto both = [&](int c) { return acc.out[0][d][c] * f_slc + held.out[0][d][c] * f_swa; };
      *reinterpret_cast<float2*>(outputs + (warp * kDecodeRows + row) * L::kOutputPitch + d * 8 +
                                 (lane & 3) * 2) = make_float2(both(2 * half), both(2 * half + 1));
    }
  }
  __syncthreads();
  if (warp == warps - 1 && r < unit.num_rows && r / part_rows == unit.part) {
    const int64_t of_branch = p.seqs.total_q * p.shape.num_heads_q;
    float* lse = static_cast<float*>(p.lse) + unit.row * p.shape.num_heads_q + unit.first_head + r;
    lse[branch * of_branch] = lse_of(all) * kLn2;
    if (branch == 1) *lse = lse_log2[r] * kLn2;
  }
  const auto store = [&](int row, int vector, float4 x) {
    T* o =
        static_cast<T*>(p.o) + (unit.row * p.shape.num_heads_q + unit.first_head + row) * kDimV + vector * 4;
    *reinterpret_cast<uint2*>(o) = make_uint2(ptx::pack2<T>(x.x, x.y), ptx::pack2<T>(x.z, x.w));
  };
  const auto sum_of = [](float4 a, const float4& b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  };
  // A slice of rows goes to each part, which sums what the parts have.
  float4* slices = reinterpret_cast<float4*>(shared + plan.slices);
#pragma unroll 1
  for (int k = threadIdx.x; k < kDecodeRows * kVectors; k += threads) {
    // Eight rows a warp: of_cmp lies as the fragments do.
    const int row = k / (kVectors * 8) * 8 + k / 4 % 8, vector = k / 32 % (kVectors / 4) * 4 + k % 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const float4* of_cmp = reinterpret_cast<const float4*>(shared + plan.sums) +
                           (2 * (vector / 2) + row / 8) * 16 + row % 8 * 2 + vector % 2;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      sum = sum_of(sum, *reinterpret_cast<const float4*>(outputs + (w * kDecodeRows + row) * L::kOutputPitch +
                                                         vector * 4));
      sum = sum_of(sum, of_cmp[w * (L::kParkedBytes / 16)]);
    }
    if (parts == 1) {
      if (row < unit.num_rows) store(row, vector, sum);
    } else {
      const int to = row / part_rows * plan.slabs + unit.slab;
      tell(s, kSlices, &slices[(unit.part * part_rows + row % part_rows) * kVectors + vector], sum, cluster,
           to, to + 1);
    }
  }
  if (parts == 1) return;
  wait_for(s, kSlices);
#pragma unroll 1
  for (int k = threadIdx.x; k < part_rows * kVectors; k += threads) {
    const int row = first_own + k / kVectors;
    if (row >= unit.num_rows) continue;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int from = 0; from < parts; ++from) sum = sum_of(sum, slices[from * part_rows * kVectors + k]);
    store(row, k % kVectors, sum);
  }
}

// How many clusters of i thread blocks, each with an SM to itself, the current device runs at once.
struct ClusterRoom {
  int count[kMaxDecodeCluster + 1] = {};
};

// Asked once for each device.
const ClusterRoom& cluster_room() {
  static OncePerDevice<ClusterRoom> rooms;
  return rooms.get([] {
    const int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kSharedBytes;
    ClusterRoom room;
    room.count[1] = device_attribute(cudaDevAttrMultiProcessorCount);
    for (int size = 2; size <= kMaxDecodeCluster; ++size)
      room.count[size] =
          max_active_clusters(decode_attention_sm90<__nv_bfloat16, 128, 128>, size, kMaxThreads, bytes);
    return room;
  });
}

// Places everything in shared memory; false if it is too much.
template <int kDimQK, int kDimV>
bool place_shared(DecodePlan* plan, bool sums_in_shared, int limit) {
  using L = Layout<kDimQK, kDimV>;
  int used = 0;
  const auto take = [&](int64_t bytes) {
    const int at = used;
    used += static_cast<int>(round_up(bytes, 16));
    return at;
  };
  const int64_t own_tiles = ceil_div(plan->max_tiles, plan->parts());
  take(L::kQBytes);
  plan->ring = take(int64_t{plan->warps} * plan->stages * L::kStageBytes);
  // There are scores when all of the cluster are through with the probabilities. All have made their choice
  // before compressed outputs are parked, which the sums are read for, and before there are slices.
  const int64_t parked = plan->warps * L::kParkedBytes, sums = own_tiles * plan->sums_pitch * 4,
                probabilities =
                    carries_spill(*plan) ? 0 : plan->warps * kDecodeRows * kDecodeScorePitch * int64_t{4},
                scores = max64(probabilities, int64_t{plan->slabs} * plan->num_blocks * 4),
                slices = plan->parts() > 1 ? plan->parts() * plan->part_rows() * kDimV * 4 : 0;
  plan->sums = take(max64(parked, sums_in_shared ? sums : scores));
  plan->slices = take(sums_in_shared ? max64(scores, slices) : slices);
  plan->scores = sums_in_shared ? plan->slices : plan->sums;
  plan->shared_bytes = used;
  return used <= limit;
}

// False where offsets do not fit, those of a tile of rows at one distance behind any other included.
inline bool describe_stream(const CachedRows& k, const CachedRows& v, const AttentionShape& shape,
                            DecodeStream* stream) {
  for (const CachedRows* rows : {&k, &v}) {
    const int64_t end = max64(0, rows->num_pages - 1) * rows->stride_page +
                        (rows->page_rows + kDecodeKeys) * rows->stride_row +
                        shape.num_heads_kv * rows->stride_head;
    if (end / 8 >= LaneRow::kNone) return false;
  }
  const auto units = [](int64_t elements) { return static_cast<unsigned>(elements / 8); };
  *stream = {static_cast<const char*>(k.data),
             static_cast<const char*>(v.data),
             k.block_table,
             static_cast<unsigned>(k.table_width),
             static_cast<unsigned>(min64(k.num_pages, v.num_pages)),
             units(k.stride_page),
             units(k.stride_row),
             units(v.stride_page),
             units(v.stride_row),
             Divisor(max64(1, k.page_rows)),
             units(k.stride_head),
             units(v.stride_head)};
  return true;
}

// Shapes alone decide, and the device. False where the portable kernels have to do.
template <int kDimQK, int kDimV>
bool make_plan(const DecodeAttentionParams& p, DecodePlan* plan) {
  const int64_t group = p.shape.group(), heads = p.shape.num_heads_kv;
  const int64_t per_block = p.block_size / p.compressed.stride,
                before = p.compressed.block / p.compressed.stride - 1;
  if (group > kMaxDecodeGroup || p.num_selected_blocks > kMaxDecodeSelected) return false;
  if (p.block_size % kDecodeKeys != 0 || per_block > kDecodeKeys || kDecodeKeys % per_block != 0)
    return false;
  const int64_t tile_blocks = kDecodeKeys / per_block, spill = ceil_div(before, per_block);
  if (spill > min64(tile_blocks, kMaxDecodeSpill) || per_block + before > kMaxDecodeTaps) return false;
  if (p.seqs.total_q > 65535 || heads > 65535) return false;
  *plan = {};
  plan->slabs = static_cast<int>(ceil_div(group, kDecodeRows));
  plan->max_tiles = static_cast<int>(max64(1, ceil_div(p.compressed.count(p.seqs.capacity), kDecodeKeys)));
  // All of the last tile's, and for 16 bytes at a time.
  plan->num_blocks = static_cast<int>(
      round_up(max64(ceil_div(p.seqs.capacity, p.block_size), plan->max_tiles * tile_blocks), 4));
  plan->per_block = static_cast<int>(per_block);
  plan->before = static_cast<int>(before);
  while (tile_blocks >> (plan->tile_shift + 1) != 0) ++plan->tile_shift;
  plan->spill = static_cast<int>(spill);
  if (!describe_stream(p.k_cmp, p.v_cmp, p.shape, &plan->streams[0]) ||
      !describe_stream(p.k_swa, p.v_swa, p.shape, &plan->streams[1]) ||
      !describe_stream(p.k_slc, p.v_slc, p.shape, &plan->streams[2]))
    return false;
  plan->entries = static_cast<int>(carries_spill(*plan) ? tile_blocks : tile_blocks + spill + 1);
  plan->sums_pitch = static_cast<int>(kDecodeRows * plan->entries);
  while (plan->sums_pitch % 32 != tile_blocks % 32) ++plan->sums_pitch;

  const int64_t units = max64(1, p.seqs.total_q) * heads;
  const ClusterRoom& room = cluster_room();
  plan->cluster = plan->slabs;
  const auto tiles_of_part = [&](int cluster) { return ceil_div(plan->max_tiles, cluster / plan->slabs); };
  int64_t least = plan->max_tiles;  // that a part has
  for (int size = plan->slabs; size <= kMaxDecodeCluster; size += plan->slabs) {
    if (size > plan->slabs && room.count[size] < units) continue;
    // Larger clusters take longer to begin.
    if (size > kPortableCluster && least - tiles_of_part(size) < kMaxDecodeWarps) continue;
    if (size <= kPortableCluster) least = tiles_of_part(size);
    plan->cluster = size;
  }
  plan->first_units = room.count[plan->cluster];
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kSharedBytes;
  // Where the sums do not fit, they go to the workspace, which stays in the L2 cache: that costs more than
  // one warp and less than two.
  plan->stages = kMaxDecodeStages;
  const auto places = [&](int warps, bool sums_in_shared) {
    plan->warps = warps;
    plan->global_sums = sums_in_shared ? nullptr : reinterpret_cast<float*>(1);
    return place_shared<kDimQK, kDimV>(plan, sums_in_shared, limit);
  };
  if (places(kMaxDecodeWarps, true)) return true;
  for (int warps = kMaxDecodeWarps; warps > kChoiceWarps; --warps) {
    if (places(warps - 1, true) || places(warps, false)) return true;
  }
  return places(kChoiceWarps, false);
}

// f<T, kDimQK, kDimV>(plan) -> bool; false where the portable kernels have to do.
template <typename F>
bool with_plan(const DecodeAttentionParams& p, F&& f) {
  return dispatch_kernels(
      p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v, [&]<typename T, int kDimQK, int kDimV>() {
        DecodePlan plan;
        return make_plan<kDimQK, kDimV>(p, &plan) && f.template operator()<T, kDimQK, kDimV>(plan);
      });
}

}  // namespace

int64_t workspace_bytes(const DecodeAttentionParams& p) {
  int64_t bytes = 0;
  with_plan(p, [&]<typename T, int kDimQK, int kDimV>(const DecodePlan& plan) {
    if (plan.global_sums != nullptr)
      bytes =
          p.seqs.total_q * p.shape.num_heads_kv * plan.slabs * plan.max_tiles * plan.sums_pitch * int64_t{4};
    return true;
  });
  return bytes;
}

bool decode_attention(const DecodeAttentionParams& p, const Stream& stream, Status* status) {
  return with_plan(p, [&]<typename T, int kDimQK, int kDimV>(DecodePlan plan) {
    if (plan.global_sums != nullptr) plan.global_sums = static_cast<float*>(p.workspace);
    const auto kernel = decode_attention_sm90<T, kDimQK, kDimV>;
    if (plan.cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    const dim3 grid(static_cast<unsigned>(plan.cluster), static_cast<unsigned>(p.shape.num_heads_kv),
                    static_cast<unsigned>(p.seqs.total_q));
    *status = launch_chained_clusters("decode_attention_sm90", kernel, grid, plan.cluster, plan.warps * 32,
                                      plan.shared_bytes, stream, p, plan);
    return true;
  });
}

}  // namespace nsa::cuda::sm90
