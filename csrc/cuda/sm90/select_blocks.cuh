// The selection where compressed blocks are two strides and selection blocks four: scores as in
// block_scores.cuh, and the choice by the warps that make them.
//
// A thread makes one score in sixteen of a token's row and keeps the best of them, so when the last key tile
// is done the choice mostly needs no score. It is a chain of waits all the same; the other pipeline of a
// block, which is at another place of its item, keeps the tensor cores busy meanwhile.
#pragma once

#include "cuda/sm90/block_scores.cuh"

namespace nsa::cuda::sm90 {

// The choice for the tokens of a warp, two of each octet, from keys [token][pitch] and the best of each
// thread.
template <typename Tile, int kKept>
__device__ __forceinline__ void choose_own(const ScoresTask& task, const typename Tile::Rows& rows,
                                           int first_token, const float* keys, int padded_end,
                                           const BestOfPart<kKept> (&parts)[Tile::kOctets], int mask,
                                           Candidates& kept, int warp, int lane) {
  const RowsToChoose<Tile> choice(task, rows, first_token);
#pragma unroll 1
  for (int o = 0; o < Tile::kOctets; ++o) {
    const int token = o * 8 + warp * 2, end = min(token + 2, choice.count), own = choice.own_block(token);
    if (end - token < 2 || choice.own_block(token + 1) != own) {
      choose_singly(choice, token, end, keys, task.pitch, kept, lane);
      continue;
    }
    BestOfPart<kKept> mine = parts[0];
#pragma unroll
    for (int i = 1; i < Tile::kOctets; ++i) {
      if (i == o) mine = parts[i];
    }
    choose_blocks<2>(
        keys + token * task.pitch, task.pitch, own, choice.counts, choice.out + token * choice.out_pitch,
        choice.out_pitch, kept, lane, [&](const ScoreRows<2>& pair, int k, int32_t* chosen) {
          choose_best_of_parts(pair, padded_end, mine, mask, k, chosen, choice.out_pitch, kept, lane);
        });
  }
}

// Products and exponentials take a tile equally long, so they must overlap: a warpgroup begins the product of
// the next tile as soon as the exponentials of this one have its accumulators free, and hands sums over
// meanwhile; and the warpgroups take turns in pairs, the second one begins its exponentials when the first is
// half through its own. Otherwise both get slow together and then wait for the tensor cores together.
template <typename T, typename Tile>
__device__ __forceinline__ void select(const ScoresTask& task, typename Tile::Shared& shared, int warpgroup,
                                       int thread) {
  constexpr int kOctets = Tile::kOctets, kSlotSums = Tile::kTokens * Tile::kSumPitch;
  constexpr bool kTurns = Tile::kWarpgroups == 4;
  // Threads of many tokens have no registers for more than the two best of their part.
  constexpr int kKept = kOctets == 1 ? 5 : 2;
  const int pipeline = warpgroup / Tile::kConsumers, consumer = warpgroup % Tile::kConsumers;
  const int lane = thread & 31, warp = thread >> 5, quad = lane >> 2, column = lane & 3;
  const int first_token = consumer * Tile::kTokens, my_token = thread >> 4, my_block = thread & 15;
  const uint32_t q = ptx::shared_address(shared.q[warpgroup]);
  // Addresses and limits stay in registers where a thread has but two tokens: ptxas would compute them anew
  // for every key tile, a tenth of its instructions. What comes out of a shuffle it cannot compute.
  const auto keep = [lane](int x) { return kOctets == 1 ? __shfl_sync(~0u, x, lane) : x; };
  RingPlace<Tile::kStages> place;
  uint32_t q_parity = 0;
  int slot = 0;  // where in a warpgroup's sums

  float* const sums = &shared.sums[0][0][0][0];
  const int own_sums = warpgroup * 2 * kSlotSums;
  const int written = keep(own_sums + column * 2 * Tile::kSumPitch + warp * 16 + quad);
  const int read = keep(own_sums + my_token * Tile::kSumPitch + kScoresHalo + 4 * my_block);
  const int minus_lse = keep((consumer * 4 + column) * Tile::kLsePitch);
  const auto scores = [&] {
    return task.scores +
           (static_cast<int64_t>(pipeline_number(pipeline)) * task.tokens + ptx::keep(first_token)) *
               task.pitch;
  };
  // A warp's part of its warpgroup's sums, where they are not in use.
  Candidates& kept = reinterpret_cast<Candidates*>(&shared.sums[warpgroup])[warp];
  static_assert(sizeof(shared.sums[0]) >= 4 * sizeof(Candidates));

  const auto wait_for_turn = [&] {
    if constexpr (kTurns) ptx::named_barrier_sync(5 + warpgroup, 256);
  };
  // When the sum x is known: nothing else would keep ptxas from passing the turn before all exponentials, so
  // the number of the barrier depends on it, by bits that are never set.
  const int no_bits = task.tokens >> 31;
  const auto pass_turn = [&](int x) {
    if constexpr (kTurns) ptx::named_barrier_arrive_if((5 + (warpgroup ^ 1)) | (x & no_bits), 256, true);
  };
  if (warpgroup % 2 == 1) pass_turn(0);

#pragma unroll 1
  for (uint32_t item = 0;; ++item) {
    const typename Tile::Rows& rows = shared.rows[pipeline][item % 2];
    ptx::barrier_wait(ptx::shared_address(&shared.rows_full[pipeline][item % 2]), item / 2 % 2);
    const int num_tiles = __shfl_sync(~0u, rows.num_tiles, 0);  // known to be the same in all lanes
    if (num_tiles < 0) break;
    int* out = reinterpret_cast<int*>(scores()) + my_token * task.pitch + my_block;
    const auto end_of = [&](int o, int e) {
      return rows.end[first_token + o * 8 + column * 2 + e] - warp * 16 - quad;
    };
    const auto last_of = [&](int o) { return rows.last[first_token + o * 8 + my_token] - my_block; };
    const int kept_end[2] = {keep(end_of(0, 0)), keep(end_of(0, 1))}, kept_last = keep(last_of(0));
    BestOfPart<kKept> best[kOctets];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) best[o].clear();
    const int mask = rows.block_mask;
    int name = mask - my_block;
    float acc[kScoresColumns / 2];

    const auto start_product = [&] {
      ptx::barrier_wait(ptx::shared_address(&shared.k_full[pipeline][place.slot]), place.parity);
      float fresh[kScoresColumns / 2];  // what acc holds is of no use any more
#pragma unroll
      for (int i = 0; i < kScoresColumns / 2; ++i) acc[i] = fresh[i];
      start_multiplying_keys<T, Tile>(acc, ptx::shared_address(shared.k[pipeline][place.slot]), q);
    };
    const auto finish_product = [&](bool last) {
      ptx::wgmma_wait<0>();
      ptx::pin_registers(acc);
      ptx::barrier_arrive_if(ptx::shared_address(&shared.k_empty[pipeline][place.slot]), lane == 0);
      if (last) ptx::barrier_arrive_if(ptx::shared_address(&shared.q_empty[warpgroup]), lane == 0);
      place.next();
    };
    const auto add_heads = [&](float(&sum)[kOctets][2][2]) {
      wait_for_turn();
      sum_heads<Tile>(sum, acc, reinterpret_cast<const float4*>(rows.minus_lse[0] + minus_lse), task.scale);
      // One sum is known after half of a thread's exponentials, two after three quarters: in the order that
      // ptxas makes.
      const int one = __float_as_int(sum[0][1][1]), other = __float_as_int(sum[0][0][0]);
      pass_turn(Tile::kPipelines == 1 ? one | other : one);
    };
    // The last eight keys of a tile, of warp 3, stand before those of the next one.
    const auto store_halo = [&](const float(&last_keys)[kOctets][2]) {
      if (warp != 3) return;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          (sums + written + slot + (o * 8 + e) * Tile::kSumPitch)[-48] = last_keys[o][e];
      }
    };
    const auto score_tile = [&](const float(&sum)[kOctets][2][2], int tile) {
      const int key = tile * kScoresKeys, block = tile * 16;
      float last_keys[kOctets][2];
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float* row = sums + written + slot + (o * 8 + e) * Tile::kSumPitch;
          const int end = kOctets == 1 ? kept_end[e] : end_of(o, e);
          const float upper = key < end ? sum[o][0][e] : 0.f, lower = key + 8 < end ? sum[o][1][e] : 0.f;
          row[kScoresHalo] = upper;
          row[kScoresHalo + 8] = lower;
          last_keys[o][e] = lower;
        }
      }
      ptx::named_barrier_sync(1 + warpgroup, 128);
      slot = kSlotSums - slot;
      store_halo(last_keys);
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        // Without a branch, which between the issue of a product and its wait would serialise it.
        const int score =
            ptx::keep(score_key(common_score(sums + read + kSlotSums - slot + o * 8 * Tile::kSumPitch)));
        const bool candidate =
            name <= mask - task.num_initial && block <= (kOctets == 1 ? kept_last : last_of(o));
        out[o * 8 * task.pitch] = candidate ? score : -1;
        best[o].add(score, candidate, mask, name);
      }
      name -= 16;
      out += 16;
    };

    if (num_tiles > 0) {
      ptx::barrier_wait(ptx::shared_address(&shared.q_full[warpgroup]), q_parity);
      q_parity ^= 1;
      store_halo({});
      start_product();
#pragma unroll 1
      for (int tile = 0; tile + 1 < num_tiles; ++tile) {
        finish_product(false);
        float sum[kOctets][2][2] = {};
        add_heads(sum);
        start_product();
        score_tile(sum, tile);
      }
      finish_product(true);
      float sum[kOctets][2][2] = {};
      add_heads(sum);
      score_tile(sum, num_tiles - 1);
      ptx::named_barrier_sync(1 + warpgroup, 128);  // sums may be overwritten
    }
    choose_own<Tile>(task, rows, first_token, scores(), 16 * num_tiles, best, mask, kept, warp, lane);
    if (num_tiles > 0) ptx::named_barrier_sync(1 + warpgroup, 128);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&shared.rows_empty[pipeline][item % 2]));
  }
  if (warpgroup % 2 == 0) wait_for_turn();  // nobody is left at a barrier
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    select_blocks_sm90(const __grid_constant__ ScoresTask task, const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ unsigned char dynamic[];
  if (!any_unfinished(task)) return;
  typename Tile::Shared& shared = aligned_shared<Tile>(dynamic);
  run_pipelines<Tile>(task, &q_map, &k_map, shared,
                      [&](int warpgroup) { select<T, Tile>(task, shared, warpgroup, threadIdx.x % 128); });
}

}  // namespace nsa::cuda::sm90
