// What the launchers of block scores and the selection share: tile sizes, and the work of one launch.
#pragma once

#include "cuda/sm90/launch.h"

namespace nsa::cuda::sm90 {

constexpr int kScoresKeysLog2 = 6;
constexpr int kScoresKeys = 1 << kScoresKeysLog2;  // the rows of a product: every l' / d divides it
constexpr int kScoresColumns = 128;                // (head, token) pairs of a warpgroup
constexpr int kScoresHalo = 8;                     // sums kept from the tile before: at least l / d - 1
constexpr int kScoresMaxTaps = 24;                 // compressed blocks that touch a selection block

// kHeads: what the heads of a group are padded to; larger groups take several warpgroups, a team.
// kPipelines: the warpgroups of a block share every key tile, or form two pipelines, each with items,
// producers and a ring of its own.
template <int kDim, int kHeads, int kPipelines_>
struct ScoresConfig {
  static constexpr int kTokens = kScoresColumns / kHeads;
  static constexpr int kPipelines = kPipelines_;
  // Few products are enough in flight when four warpgroups take turns between tensor cores and exponentials.
  // Shared memory allows fewer where a warpgroup has many tokens or Q is wide.
  static constexpr int kWarpgroups = kDim == 192 ? 2 : kHeads >= 8 ? 4 : kHeads == 4 || kDim == 64 ? 3 : 2;
  static constexpr int kConsumers = kWarpgroups / kPipelines;  // of a pipeline
  static constexpr int kStages = (kDim == 64 ? 6 : kDim == 128 && kHeads != 8 ? 4 : 3) / kPipelines;
  // The pool is what the launch gives to each thread, times the threads.
  static constexpr int kConsumerRegisters = kWarpgroups == 4 ? 104 : kWarpgroups == 3 ? 144 : 208;
  static constexpr int kOtherRegisters = kWarpgroups == 4 ? 64 : 80;
};

struct ScoresTask {
  BlockScoresParams params;
  float* scores;  // [T, Hkv, pitch], or for a choice [pipeline][token][pitch] with a pitch of whole 16 bytes
  int64_t pitch;
  float scale;  // of scores, for exponentials of base 2
  int num_tiles;
  bool common_weights;  // l / d = 2, l' / d = 4: weights 1, 2, 2, 2, 1
  int tokens, passes;   // of a pipeline; warpgroups of a team
  int block_log2, stride_log2, per_block_log2;
  int before;              // l / d - 1
  int32_t* block_indices;  // [T, Hkv, n], or null: only scores are wanted
  // A choice takes the last (local) blocks of a query unseen, and all blocks of a query that has few.
  int num_selected, num_initial, num_local;
  bool early;             // Begin::kEarly: only lse comes from the kernel in front
  Unfinished unfinished;  // items without such rows are skipped
};

}  // namespace nsa::cuda::sm90
