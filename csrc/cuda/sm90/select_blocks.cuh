// The selection where compressed blocks are two strides and selection blocks four: scores as in
// block_scores.cuh, and the choice by the warps that make them.
//
// A thread makes one score in sixteen of a token's row, so when the last key tile is done it knows their
// maxima: the choice begins with its bound, and reads the scores once. It is a chain of waits; the other
// pipeline of a block, which is at another place of its item, keeps the tensor cores busy meanwhile.
#pragma once

#include "cuda/sm90/block_scores.cuh"

namespace nsa::cuda::sm90 {

// The choice for the tokens of a warp, two of each octet, from keys [token][pitch]. high: the maxima of a
// thread's keys of even and odd tiles.
template <typename Tile>
__device__ __forceinline__ void choose_own(const ScoresTask& task, const typename Tile::Rows& rows,
                                           int first_token, const float* keys, int padded_end,
                                           const int (&high)[Tile::kOctets][2], Candidates& kept, int warp,
                                           int lane) {
  const RowsToChoose<Tile> choice(task, rows, first_token);
#pragma unroll 1
  for (int o = 0; o < Tile::kOctets; ++o) {
    const int token = o * 8 + warp * 2, end = min(token + 2, choice.count), own = choice.own_block(token);
    if (end - token < 2 || choice.own_block(token + 1) != own) {
      choose_singly(choice, token, end, keys, task.pitch, kept, lane);
      continue;
    }
    int mine[2], parts[2];
#pragma unroll
    for (int i = 0; i < Tile::kOctets; ++i) {
      if (i == o) mine[0] = high[i][0], mine[1] = high[i][1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int one = __shfl_sync(~0u, mine[0], r * 16 + lane % 16),
                other = __shfl_sync(~0u, mine[1], r * 16 + lane % 16);
      parts[r] = lane < 16 ? one : other;
    }
    choose_blocks<2>(keys + token * task.pitch, task.pitch, own, choice.counts,
                     choice.out + token * choice.out_pitch, choice.out_pitch, kept, lane,
                     [&](const ScoreRows<2>& pair, int k, int32_t* chosen) {
                       choose_best_of_keys(pair, padded_end, parts, k, chosen, choice.out_pitch, kept, lane);
                     });
  }
}

// Addresses and limits are kept in registers where a thread has but two tokens: computed anew for every key
// tile they were a fifth of its instructions.
template <typename T, typename Tile>
__device__ __forceinline__ void select(const ScoresTask& task, typename Tile::Shared& shared, int warpgroup,
                                       int thread) {
  constexpr bool kKeep = Tile::kOctets == 1;
  const auto keep = [](int x) { return kKeep ? ptx::keep(x) : x; };
  constexpr int kOctets = Tile::kOctets, kSlotSums = Tile::kTokens * Tile::kSumPitch;
  const int pipeline = warpgroup / Tile::kConsumers, consumer = warpgroup % Tile::kConsumers;
  const int lane = thread & 31, warp = thread >> 5, quad = lane >> 2, column = lane & 3;
  const int first_token = consumer * Tile::kTokens, my_token = thread >> 4, my_block = thread & 15;
  const float scale = static_cast<float>(task.params.softmax_scale * 1.4426950408889634);
  const uint32_t q = ptx::shared_address(shared.q[warpgroup]);
  RingPlace<Tile::kStages> place;
  uint32_t q_parity = 0;
  int slot = 0;  // where in a warpgroup's sums
  const int first_block = keep(task.num_initial - my_block);

  float* const sums = &shared.sums[0][0][0][0];
  const int own_sums = warpgroup * 2 * kSlotSums;
  const int written = keep(own_sums + column * 2 * Tile::kSumPitch + warp * 16 + quad);
  const int read = keep(own_sums + my_token * Tile::kSumPitch + kScoresHalo + 4 * my_block);
  const int minus_lse = keep((consumer * 4 + column) * Tile::kLsePitch);
  float* const keys =
      task.scores +
      (static_cast<int64_t>(pipeline_number(pipeline)) * task.tokens + first_token) * task.pitch;
  // A warp's part of its warpgroup's sums, where they are not in use.
  Candidates& kept = reinterpret_cast<Candidates*>(&shared.sums[warpgroup])[warp];
  static_assert(sizeof(shared.sums[0]) >= 4 * sizeof(Candidates));

#pragma unroll 1
  for (uint32_t item = 0;; ++item) {
    const typename Tile::Rows& rows = shared.rows[pipeline][item % 2];
    ptx::barrier_wait(ptx::shared_address(&shared.rows_full[pipeline][item % 2]), item / 2 % 2);
    const int num_tiles = rows.num_tiles;
    if (num_tiles < 0) break;
    int* out = reinterpret_cast<int*>(keys) + my_token * task.pitch + my_block;
    const auto end_of = [&](int o, int e) {
      return rows.end[first_token + o * 8 + column * 2 + e] - warp * 16 - quad;
    };
    const auto last_of = [&](int o) { return rows.last[first_token + o * 8 + my_token] - my_block; };
    const int kept_end[2] = {keep(end_of(0, 0)), keep(end_of(0, 1))}, kept_last = keep(last_of(0));
    int high[kOctets][2];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) high[o][0] = high[o][1] = -1;
    float halo[kOctets][2] = {};  // warp 3: its last eight keys of the tile before
    if (num_tiles > 0) {
      ptx::barrier_wait(ptx::shared_address(&shared.q_full[warpgroup]), q_parity);
      q_parity ^= 1;
    }
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      float acc[kScoresColumns / 2];
      ptx::barrier_wait(ptx::shared_address(&shared.k_full[pipeline][place.slot]), place.parity);
      multiply_keys<T, Tile>(acc, ptx::shared_address(shared.k[pipeline][place.slot]), q);
      if (lane == 0) {
        ptx::barrier_arrive(ptx::shared_address(&shared.k_empty[pipeline][place.slot]));
        if (tile + 1 == num_tiles) ptx::barrier_arrive(ptx::shared_address(&shared.q_empty[warpgroup]));
      }
      place.next();

      float sum[kOctets][2][2] = {};
      sum_heads<Tile>(sum, acc, reinterpret_cast<const float4*>(rows.minus_lse[0] + minus_lse), scale);
      const int key = tile * kScoresKeys;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float* row = sums + written + slot + (o * 8 + e) * Tile::kSumPitch;
          const int end = kKeep ? kept_end[e] : end_of(o, e);
          const float upper = key < end ? sum[o][0][e] : 0.f, lower = key + 8 < end ? sum[o][1][e] : 0.f;
          row[kScoresHalo] = upper;
          row[kScoresHalo + 8] = lower;
          if (warp == 3) row[-48] = halo[o][e];
          halo[o][e] = lower;
        }
      }
      ptx::named_barrier_sync(1 + warpgroup, 128);
      const int block = tile * 16;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const float score = common_score(sums + read + slot + o * 8 * Tile::kSumPitch);
        const bool candidate = block >= first_block && block <= (kKeep ? kept_last : last_of(o));
        const int stored = candidate ? score_key(score) : -1;
        out[o * 8 * task.pitch] = stored;
        const int higher = max(high[o][0], stored);
        high[o][0] = high[o][1];
        high[o][1] = higher;
      }
      out += 16;
      slot = kSlotSums - slot;
    }
    if (num_tiles > 0) ptx::named_barrier_sync(1 + warpgroup, 128);  // sums may be overwritten
    choose_own<Tile>(task, rows, first_token, keys, 16 * num_tiles, high, kept, warp, lane);
    if (num_tiles > 0) ptx::named_barrier_sync(1 + warpgroup, 128);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&shared.rows_empty[pipeline][item % 2]));
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    select_blocks_sm90(const __grid_constant__ ScoresTask task, const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ unsigned char dynamic[];
  typename Tile::Shared& shared = aligned_shared<Tile>(dynamic);
  run_pipelines<Tile>(task, &q_map, &k_map, shared,
                      [&](int warpgroup) { select<T, Tile>(task, shared, warpgroup, threadIdx.x % 128); });
}

}  // namespace nsa::cuda::sm90
