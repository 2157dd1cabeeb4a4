// Importance of selection blocks on Hopper: S^T = K Q^T, so that keys are the rows of a product and (head,
// token) pairs its columns, in the order [head][token]. A thread then holds all heads of its tokens: the sum
// over the heads of a group is a sum over its registers.
//
// A pipeline, of which a block has one or two, takes adjacent tokens of one KV head. One warp fetches tiles
// of compressed keys into a ring, one the queries and what is to know of each row; each consumer warpgroup
// multiplies every key tile with its queries, takes 2^(score - lse), sums over the heads, and hands the sums
// of a tile over in shared memory, where neighbouring compressed blocks become selection blocks.
#pragma once

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/block_scores.h"
#include "cuda/sm90/choose_blocks.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"

namespace nsa::cuda::sm90 {

template <int kDim_, int kHeads_, int kPipelines_>
struct ScoresTile : ScoresConfig<kDim_, kHeads_, kPipelines_> {
  using Config = ScoresConfig<kDim_, kHeads_, kPipelines_>;
  static constexpr int kDim = kDim_, kHeads = kHeads_;
  static constexpr int kOctets = Config::kTokens / 8;
  static constexpr int kThreads = (Config::kWarpgroups + 1) * 128;
  static constexpr int kLsePitch = 36;  // of the 32 columns of a thread: quads read without bank conflicts
  static constexpr int kSumPitch = kScoresHalo + kScoresKeys + 4;  // neither do they write with any

  // An item, for the consumers.
  struct Rows {
    alignas(16) float minus_lse[Config::kConsumers][4 * kLsePitch];  // in base 2; -inf for a head of nobody
    int end[Config::kConsumers * Config::kTokens];                   // compressed blocks that the token sees
    int last[Config::kConsumers * Config::kTokens];                  // its last wanted block, -1 for none
    int64_t first_row;                                               // of q
    int first_position, count, head;                                 // count: tokens
    int num_tiles;                                                   // -1: there are no more items
    int block_mask;                                                  // bits that name a scored block
  };
  struct Shared {
    alignas(1024) unsigned char q[Config::kWarpgroups][swizzled_tile_bytes<kDim_>(kScoresColumns)];
    alignas(1024) unsigned char k[kPipelines_][Config::kStages][swizzled_tile_bytes<kDim_>(kScoresKeys)];
    alignas(16) float sums[Config::kWarpgroups][2][Config::kTokens][kSumPitch];
    Rows rows[kPipelines_][2];
    float taps[kScoresMaxTaps];
    uint64_t q_full[Config::kWarpgroups], q_empty[Config::kWarpgroups];
    uint64_t k_full[kPipelines_][Config::kStages], k_empty[kPipelines_][Config::kStages];
    uint64_t rows_full[kPipelines_][2], rows_empty[kPipelines_][2];
  };
  static constexpr int kSharedBytes = sizeof(Shared) + 1024;
  static_assert(kSharedBytes <= 227 * 1024);
};

// A place in a ring of kSlots, and the parity of the lap.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// Tokens of one sequence, one KV head, and the key tiles that they need.
struct ScoresItem {
  SequenceTile tile;
  int head, num_keys, num_tiles;
};

__device__ __forceinline__ ScoresItem scores_item(const ScoresTask& task, int index) {
  const BlockScoresParams& p = task.params;
  ScoresItem item;
  item.head = index % p.shape.num_heads_kv;
  item.tile = find_sequence_tile(p.seqs, task.num_tiles - 1 - index / p.shape.num_heads_kv, task.tokens);
  item.num_keys = static_cast<int>(count_keys(p.seqs, item.tile.seq, p.keys));
  item.num_tiles = 0;
  const int last = static_cast<int>(item.tile.seq.position(item.tile.begin + item.tile.count - 1));
  if (item.tile.count == 0 || last < 0) return item;
  const int blocks = min((last >> task.block_log2) + 1, static_cast<int>(p.num_blocks));
  if (blocks <= task.num_selected) return item;
  item.num_tiles = ((blocks - task.num_local) * (1 << task.per_block_log2) + kScoresKeys - 1) / kScoresKeys;
  return item;
}

// Whether there is anything to do for an item.
__device__ __forceinline__ bool is_unfinished(const ScoresTask& task, const ScoresItem& item) {
  if (task.unfinished.rows == nullptr || task.unfinished.any[0] == Unfinished::kAll) return true;
  const int64_t heads = task.params.shape.num_heads_kv;
  const uint8_t* row = task.unfinished.rows + (item.tile.seq.q_begin + item.tile.begin) * heads + item.head;
  int any = 0;
#pragma unroll 1
  for (int i = 0; i < item.tile.count; ++i) any |= row[i * heads];
  return any != 0;
}

// All threads: whether there is anything to do at all. What tells comes from the kernels in front.
__device__ __forceinline__ bool any_unfinished(const ScoresTask& task) {
  if (task.unfinished.rows == nullptr) return true;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  int any = 0;
#pragma unroll 1
  for (int i = ptx::keep(threadIdx.x); i < task.unfinished.num_any; i += blockDim.x)
    any |= task.unfinished.any[i];
  return __syncthreads_or(any);
}

// Where the scores of a pipeline's items begin in the workspace of a choice, in pipelines.
__device__ __forceinline__ int pipeline_number(int pipeline) {
  return static_cast<int>(gridDim.x) * pipeline + static_cast<int>(blockIdx.x);
}

// The items of a pipeline, in snake order over items that get shorter. The second one of a block begins with
// the shortest, so that the two are at different places of items of different lengths.
template <typename Tile, typename Visit>
__device__ __forceinline__ void for_each_item(const ScoresTask& task, int pipeline, const Visit& visit) {
  const int total = task.num_tiles * task.params.shape.num_heads_kv;
  const int workers = static_cast<int>(gridDim.x) * Tile::kPipelines, worker = pipeline_number(pipeline);
  const int rounds = (total + workers - 1) / workers;
#pragma unroll 1
  for (int i = 0; i < rounds; ++i) {
    const int round = pipeline == 0 ? i : rounds - 1 - i;
    const int index = round * workers + (round % 2 ? workers - 1 - worker : worker);
    if (index >= total) continue;
    const ScoresItem item = scores_item(task, index);
    if (is_unfinished(task, item)) visit(item);
  }
}

template <typename Tile>
__device__ __forceinline__ void produce_keys(const ScoresTask& task, const CUtensorMap* map,
                                             typename Tile::Shared& shared, int pipeline) {
  RingPlace<Tile::kStages> place;
  for_each_item<Tile>(task, pipeline, [&](const ScoresItem& item) {
    if (item.num_tiles == 0) return;
    int row = static_cast<int>(task.params.keys.first_row(item.tile.seq.k_begin));
#pragma unroll 1
    for (int i = 0; i < item.num_tiles; ++i, row += kScoresKeys, place.next()) {
      const uint32_t full = ptx::shared_address(&shared.k_full[pipeline][place.slot]);
      ptx::barrier_wait(ptx::shared_address(&shared.k_empty[pipeline][place.slot]), place.parity ^ 1);
      ptx::barrier_arrive_expect(full, sizeof(shared.k[0][0]));
      const uint32_t k = ptx::shared_address(shared.k[pipeline][place.slot]);
#pragma unroll
      for (int panel = 0; panel < Tile::kDim / kPanel; ++panel)
        ptx::bulk_load_3d(k + panel * kScoresKeys * kPanelPitch, map, full, panel * kPanel, item.head, row);
    }
  });
}

// By one thread.
template <typename Tile>
__device__ __forceinline__ void load_queries(const ScoresTask& task, const ScoresItem& item,
                                             const CUtensorMap* map, typename Tile::Shared& shared,
                                             int pipeline, uint32_t parity) {
#pragma unroll 1
  for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
    const int warpgroup = pipeline * Tile::kConsumers + consumer;
    const uint32_t full = ptx::shared_address(&shared.q_full[warpgroup]);
    const int team = consumer / task.passes, pass = consumer - team * task.passes;
    const int row = static_cast<int>(item.tile.seq.q_begin) + item.tile.begin + team * Tile::kTokens;
    ptx::barrier_wait(ptx::shared_address(&shared.q_empty[warpgroup]), parity);
    ptx::barrier_arrive_expect(full, sizeof(shared.q[0]));
    const uint32_t q = ptx::shared_address(shared.q[warpgroup]);
#pragma unroll
    for (int panel = 0; panel < Tile::kDim / kPanel; ++panel) {
      ptx::bulk_load_4d(q + panel * kScoresColumns * kPanelPitch, map, full, panel * kPanel, row,
                        pass * Tile::kHeads, item.head);
    }
  }
}

// By one warp.
template <typename Tile>
__device__ __forceinline__ void fill_rows(const ScoresTask& task, const ScoresItem& item,
                                          typename Tile::Rows& rows, int lane) {
  const BlockScoresParams& p = task.params;
  const int group = p.shape.group();
  const float* lse = static_cast<const float*>(p.lse) +
                     (item.tile.seq.q_begin + item.tile.begin) * p.shape.num_heads_q + item.head * group;
#pragma unroll 1
  for (int consumer = 0; consumer < Tile::kConsumers; ++consumer) {
    const int team = consumer / task.passes, pass = consumer - team * task.passes;
#pragma unroll
    for (int i = 0; i < kScoresColumns / 32; ++i) {
      const int column = i * 32 + lane, token = team * Tile::kTokens + column % Tile::kTokens,
                member = pass * Tile::kHeads + column / Tile::kTokens;
      float value = member < group ? 0.f : __int_as_float(0xff800000);
      if (member < group && token < item.tile.count)
        value = lse[static_cast<int64_t>(token) * p.shape.num_heads_q + member] * -1.4426950408889634f;
      rows.minus_lse[consumer][column % 8 / 2 * Tile::kLsePitch + column / 8 * 2 + column % 2] = value;
    }
  }
#pragma unroll 1
  for (int token = lane; token < task.tokens; token += 32) {
    const int t = static_cast<int>(item.tile.seq.position(item.tile.begin + token));
    const bool valid = token < item.tile.count && t >= 0;
    const int seen = t + 1 - static_cast<int>(p.keys.block);
    rows.end[token] = valid && seen >= 0 ? min((seen >> task.stride_log2) + 1, item.num_keys) : 0;
    rows.last[token] =
        valid ? min(t >> task.block_log2, static_cast<int>(p.num_blocks) - 1) - task.num_local : -1;
  }
}

// By one warp. Rows lie up to two items ahead, so they never keep the queries waiting.
template <typename Tile>
__device__ __forceinline__ void produce_queries(const ScoresTask& task, const CUtensorMap* map,
                                                typename Tile::Shared& shared, int pipeline, int lane) {
  uint32_t q_parity = 1;
  RingPlace<2> place;
  bool waiting = task.early;
  const auto wait_for_lse = [&] {
    if (!waiting) return;
    ptx::wait_for_dependency();
    ptx::launch_dependents();
    waiting = false;
  };
  for_each_item<Tile>(task, pipeline, [&](const ScoresItem& item) {
    wait_for_lse();
    ptx::barrier_wait(ptx::shared_address(&shared.rows_empty[pipeline][place.slot]), place.parity ^ 1);
    typename Tile::Rows& rows = shared.rows[pipeline][place.slot];
    if (item.num_tiles > 0) fill_rows<Tile>(task, item, rows, lane);
    if (lane == 0) {
      rows.first_row = item.tile.seq.q_begin + item.tile.begin;
      rows.first_position = static_cast<int>(item.tile.seq.position(item.tile.begin));
      rows.count = item.tile.count;
      rows.head = item.head;
      rows.num_tiles = item.num_tiles;
      rows.block_mask = PackedKey::mask(max(item.num_tiles, 1) << (kScoresKeysLog2 - task.per_block_log2));
    }
    __syncwarp();
    if (lane == 0) {
      ptx::barrier_arrive(ptx::shared_address(&shared.rows_full[pipeline][place.slot]));
      if (item.num_tiles > 0) load_queries<Tile>(task, item, map, shared, pipeline, q_parity);
    }
    __syncwarp();
    if (item.num_tiles > 0) q_parity ^= 1;
    place.next();
  });
  wait_for_lse();
  ptx::barrier_wait(ptx::shared_address(&shared.rows_empty[pipeline][place.slot]), place.parity ^ 1);
  if (lane == 0) {
    shared.rows[pipeline][place.slot].num_tiles = -1;
    ptx::barrier_arrive(ptx::shared_address(&shared.rows_full[pipeline][place.slot]));
  }
}

// Weights 1, 2, 2, 2, 1 of the sum before `sums`, and the four there.
__device__ __forceinline__ float common_score(const float* sums) {
  const float4 four = *reinterpret_cast<const float4*>(sums);
  return sums[-1] + 2.f * (four.x + four.y + four.z) + four.w;
}

// The scores of the selection blocks that end in this key tile, from the sums of the warpgroups of a team:
// any weights, any size of the team, of whose threads this is number `thread`.
template <typename Tile>
__device__ __forceinline__ void write_scores(const ScoresTask& task, const typename Tile::Shared& shared,
                                             const int* last, float* out, int64_t stride, int first, int slot,
                                             int tile, int thread) {
  const int per_tile_log2 = kScoresKeysLog2 - task.per_block_log2, per_tile = 1 << per_tile_log2;
#pragma unroll 1
  for (int i = thread; i < Tile::kTokens << per_tile_log2; i += 128 * task.passes) {
    const int token = i >> per_tile_log2, in_tile = i & (per_tile - 1), j = tile * per_tile + in_tile;
    float score = 0.f;
#pragma unroll 1
    for (int pass = 0; pass < task.passes; ++pass) {
      const float* sums =
          shared.sums[first + pass][slot][token] + kScoresHalo + (in_tile << task.per_block_log2);
      if (task.common_weights) {
        score += common_score(sums);
      } else {
#pragma unroll 1
        for (int x = 0; x < (1 << task.per_block_log2) + task.before; ++x)
          score += shared.taps[x] * sums[x - task.before];
      }
    }
    if (j <= last[token]) out[token * stride + j] = score;
  }
}

// What a choice for the tokens of a team needs beside their scores.
template <typename Tile>
struct RowsToChoose {
  ChoiceCounts counts;
  int64_t out_pitch;
  int32_t* out;  // of the first token
  int first_position, num_blocks, block_log2;
  int count;  // tokens

  __device__ __forceinline__ RowsToChoose(const ScoresTask& task, const typename Tile::Rows& rows,
                                          int first_token)
      : counts{task.num_selected, task.num_initial, task.num_local},
        out_pitch(static_cast<int64_t>(task.params.shape.num_heads_kv) * task.num_selected),
        out(task.block_indices + (rows.first_row + first_token) * out_pitch +
            static_cast<int64_t>(rows.head) * task.num_selected),
        first_position(rows.first_position + first_token),
        num_blocks(static_cast<int>(task.params.num_blocks)),
        block_log2(task.block_log2),
        count(min(rows.count - first_token, Tile::kTokens)) {}

  __device__ __forceinline__ int own_block(int token) const {
    const int t = first_position + token;
    return t < 0 ? -1 : min(t >> block_log2, num_blocks - 1);
  }
};

// The choice for tokens [begin, end), one by one, from scores [token][pitch].
template <typename Tile>
__device__ __forceinline__ void choose_singly(const RowsToChoose<Tile>& choice, int begin, int end,
                                              const float* scores, int64_t pitch, Candidates& kept,
                                              int lane) {
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    choose_blocks<1>(scores + i * pitch, pitch, choice.own_block(i), choice.counts,
                     choice.out + i * choice.out_pitch, choice.out_pitch, kept, lane);
  }
}

// The choice for the tokens of a team, from scores [token][pitch], by its warps, kChoiceRows queries each.
template <typename Tile>
__device__ __forceinline__ void choose(const ScoresTask& task, const typename Tile::Rows& rows,
                                       int first_token, const float* scores, Candidates& kept, int warp,
                                       int lane) {
  const RowsToChoose<Tile> choice(task, rows, first_token);
#pragma unroll 1
  for (int token = warp * kChoiceRows; token < choice.count; token += 4 * task.passes * kChoiceRows) {
    const int end = min(token + kChoiceRows, choice.count), own = choice.own_block(token);
    if (end - token == kChoiceRows && choice.own_block(end - 1) == own) {
      choose_blocks<kChoiceRows>(scores + token * task.pitch, task.pitch, own, choice.counts,
                                 choice.out + token * choice.out_pitch, choice.out_pitch, kept, lane);
    } else {
      choose_singly(choice, token, end, scores, task.pitch, kept, lane);
    }
  }
}

// S^T of a key tile and the queries of a warpgroup.
template <typename T, typename Tile>
__device__ __forceinline__ void start_multiplying_keys(float (&acc)[kScoresColumns / 2], uint32_t k,
                                                       uint32_t q) {
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < Tile::kDim; d += 16) {
    ptx::wgmma_shared<T, kScoresColumns>(acc, k_major_descriptor(k, kScoresKeys, d),
                                         k_major_descriptor(q, kScoresColumns, d), d > 0);
  }
  ptx::wgmma_commit();
}
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_keys(float (&acc)[kScoresColumns / 2], uint32_t k, uint32_t q) {
  start_multiplying_keys<T, Tile>(acc, k, q);
  ptx::wgmma_wait<0>();
  ptx::pin_registers(acc);
}

// The sums of 2^(score - lse) over the heads, [octet of tokens][key + 8 *][token + 1 *]. minus_lse: of a
// thread's columns.
template <typename Tile>
__device__ __forceinline__ void sum_heads(float (&sum)[Tile::kOctets][2][2],
                                          const float (&acc)[kScoresColumns / 2], const float4* minus_lse,
                                          float scale) {
#pragma unroll
  for (int o = 0; o < kScoresColumns / 8; ++o) {
    const float4 two = minus_lse[o / 2];
    const float lse0 = o % 2 ? two.z : two.x, lse1 = o % 2 ? two.w : two.y;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[o % Tile::kOctets][h][0] += ptx::exp2_approx(fmaf(acc[4 * o + 2 * h], scale, lse0));
      sum[o % Tile::kOctets][h][1] += ptx::exp2_approx(fmaf(acc[4 * o + 2 * h + 1], scale, lse1));
    }
  }
}

template <typename T, typename Tile>
__device__ __forceinline__ void consume(const ScoresTask& task, typename Tile::Shared& shared, int consumer,
                                        int thread) {
  static_assert(Tile::kPipelines == 1);
  constexpr int kOctets = Tile::kOctets;
  const BlockScoresParams& p = task.params;
  const int lane = thread & 31, warp = thread >> 5, quad = lane >> 2, column = lane & 3;
  const int team = consumer / task.passes;
  const int64_t stride = (task.block_indices != nullptr ? 1 : p.shape.num_heads_kv) * task.pitch;
  const uint32_t q = ptx::shared_address(shared.q[consumer]);
  RingPlace<Tile::kStages> place;
  RingPlace<2> rows_place;
  uint32_t q_parity = 0;
  int slot = 0;  // of sums

  const bool choosing = task.block_indices != nullptr;
  const int first_token = team * Tile::kTokens, first = team * task.passes,
            team_warp = (consumer - first) * 4 + warp;
  // The usual case: a thread writes one score per octet of tokens and key tile.
  const bool usual = task.common_weights && task.passes == 1;
  const int my_token = thread >> 4, my_block = thread & 15;
  const float* my_sums = &shared.sums[consumer][0][my_token][kScoresHalo + 4 * my_block];
  float* row_sums = &shared.sums[consumer][0][column * 2][warp * 16 + quad];
  constexpr int kSlotSums = Tile::kTokens * Tile::kSumPitch;
  // A warp's part of its warpgroup's sums, where they are not in use.
  Candidates& kept = reinterpret_cast<Candidates*>(&shared.sums[consumer])[warp];
  static_assert(sizeof(shared.sums[consumer]) >= 4 * sizeof(Candidates));

#pragma unroll 1
  while (true) {
    const typename Tile::Rows& rows = shared.rows[0][rows_place.slot];
    ptx::barrier_wait(ptx::shared_address(&shared.rows_full[0][rows_place.slot]), rows_place.parity);
    const int num_tiles = rows.num_tiles;
    if (num_tiles < 0) break;
    float* out = task.scores;
    if (choosing) {
      out += (blockIdx.x * task.tokens + first_token) * task.pitch;
    } else {
      out += ((rows.first_row + first_token) * p.shape.num_heads_kv + rows.head) * task.pitch;
    }
    float* my_out = out + my_token * stride + my_block;
    float halo[kOctets][2] = {};  // warp 3: its last eight keys of the tile before
    if (num_tiles > 0) {
      ptx::barrier_wait(ptx::shared_address(&shared.q_full[consumer]), q_parity);
      q_parity ^= 1;
    }
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      float acc[kScoresColumns / 2];
      ptx::barrier_wait(ptx::shared_address(&shared.k_full[0][place.slot]), place.parity);
      multiply_keys<T, Tile>(acc, ptx::shared_address(shared.k[0][place.slot]), q);
      if (lane == 0) {
        ptx::barrier_arrive(ptx::shared_address(&shared.k_empty[0][place.slot]));
        if (tile + 1 == num_tiles) ptx::barrier_arrive(ptx::shared_address(&shared.q_empty[consumer]));
      }
      place.next();

      float sum[kOctets][2][2] = {};  // [octet of tokens][key + 8 *][token + 1 *]
      sum_heads<Tile>(sum, acc,
                      reinterpret_cast<const float4*>(rows.minus_lse[consumer] + column * Tile::kLsePitch),
                      task.scale);
      const int key = tile * kScoresKeys + warp * 16 + quad;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int end = rows.end[first_token + o * 8 + column * 2 + e];
          float* row = row_sums + slot * kSlotSums + (o * 8 + e) * Tile::kSumPitch;
          const float upper = key < end ? sum[o][0][e] : 0.f, lower = key + 8 < end ? sum[o][1][e] : 0.f;
          row[kScoresHalo] = upper;
          row[kScoresHalo + 8] = lower;
          if (warp == 3) row[-48] = halo[o][e];
          halo[o][e] = lower;
        }
      }
      ptx::named_barrier_sync(1 + team, 128 * task.passes);
      if (usual) {
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          const float score = common_score(my_sums + slot * kSlotSums + o * 8 * Tile::kSumPitch);
          if (tile * 16 + my_block <= rows.last[first_token + my_token + o * 8])
            my_out[o * 8 * stride + tile * 16] = score;
        }
      } else {
        write_scores<Tile>(task, shared, rows.last + first_token, out, stride, first, slot, tile,
                           team_warp * 32 + lane);
      }
      slot ^= 1;
    }
    if (choosing) {
      if (num_tiles > 0) ptx::named_barrier_sync(1 + team, 128 * task.passes);  // the scores are complete
      choose<Tile>(task, rows, first_token, out, kept, team_warp, lane);
      if (num_tiles > 0) ptx::named_barrier_sync(1 + team, 128 * task.passes);  // they may be overwritten
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&shared.rows_empty[0][rows_place.slot]));
    rows_place.next();
  }
}

// A block: consume(warpgroup) by each consumer warpgroup, and what brings it keys, queries and rows.
template <typename Tile, typename Consume>
__device__ __forceinline__ void run_pipelines(const ScoresTask& task, const CUtensorMap* q_map,
                                              const CUtensorMap* k_map, typename Tile::Shared& shared,
                                              const Consume& consume) {
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // known to be the same in all lanes
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kWarpgroups; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.q_full[i]), 1);
      ptx::barrier_init(ptx::shared_address(&shared.q_empty[i]), 4);
    }
    for (int pipeline = 0; pipeline < Tile::kPipelines; ++pipeline) {
      for (int i = 0; i < Tile::kStages; ++i) {
        ptx::barrier_init(ptx::shared_address(&shared.k_full[pipeline][i]), 1);
        ptx::barrier_init(ptx::shared_address(&shared.k_empty[pipeline][i]), 4 * Tile::kConsumers);
      }
      for (int i = 0; i < 2; ++i) {
        ptx::barrier_init(ptx::shared_address(&shared.rows_full[pipeline][i]), 1);
        ptx::barrier_init(ptx::shared_address(&shared.rows_empty[pipeline][i]), 4 * Tile::kConsumers);
      }
    }
    ptx::barrier_init_fence();
  }
  if (threadIdx.x < kScoresMaxTaps) {
    // Tap x of selection block j is compressed block j * per_block + x - before; weights do not depend on j.
    const int64_t j = kScoresHalo, i = (j << task.per_block_log2) + threadIdx.x - task.before;
    shared.taps[threadIdx.x] = static_cast<float>(overlap(i, j, task.params.keys, task.params.block_size)) /
                               static_cast<float>(task.params.keys.stride);
  }
  if (!task.early) {
    ptx::wait_for_dependency();
    ptx::launch_dependents();
  }
  __syncthreads();

  if (warpgroup == Tile::kWarpgroups) {
    ptx::release_registers<Tile::kOtherRegisters>();
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, pipeline = warp / 2;
    if (pipeline < Tile::kPipelines) {
      if (warp % 2 == 0 && lane == 0) produce_keys<Tile>(task, k_map, shared, pipeline);
      if (warp % 2 == 1) produce_queries<Tile>(task, q_map, shared, pipeline, lane);
    }
  } else {
    ptx::claim_registers<Tile::kConsumerRegisters>();
    consume(warpgroup);
  }
}

template <typename Tile>
__device__ __forceinline__ typename Tile::Shared& aligned_shared(unsigned char* dynamic) {
  return *reinterpret_cast<typename Tile::Shared*>(dynamic +
                                                   (1024 - ptx::shared_address(dynamic) % 1024) % 1024);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    block_scores_sm90(const __grid_constant__ ScoresTask task, const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ unsigned char dynamic[];
  typename Tile::Shared& shared = aligned_shared<Tile>(dynamic);
  run_pipelines<Tile>(task, &q_map, &k_map, shared,
                      [&](int warpgroup) { consume<T, Tile>(task, shared, warpgroup, threadIdx.x % 128); });
}

}  // namespace nsa::cuda::sm90
