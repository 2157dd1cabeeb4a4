// Tile sizes of the portable kernels (sm_80 and newer), with the reason beside each.
#pragma once

namespace nsa::cuda::portable {

// Banded attention: a warp owns kSlabs slabs of 16 query rows, so that one read of a key tile from shared
// memory serves 16 * kSlabs rows; the accumulators (16 * kSlabs * (kDimV + kKeys) / 32 registers) set the
// limit. Shared memory stays below 99 KB, the most that sm_86 and sm_89 give to a block.
template <int kDimQK, int kDimV>
struct BandedConfig {
  static constexpr int kWarps = 4;
  static constexpr int kSlabs = kDimV <= 128 && kDimQK <= 128 ? 2 : 1;
  static constexpr int kKeys = kDimQK < 128 ? 64 : 32;
  static constexpr int kRows = kWarps * kSlabs * 16;
};

// Banded attention, backward. By key tile: 16 keys a warp, whose dK and dV are 16 * (kDimQK + kDimV) / 32
// registers of a thread; where those are too many (kTogether false), each has a walk of its own. By query
// tile: as the forward, with dO beside Q in shared memory, hence fewer slabs.
template <int kDimQK, int kDimV>
struct BandedBwdConfig {
  static constexpr int kWarps = 4;
  static constexpr bool kTogether = kDimQK + kDimV <= 256;
  static constexpr int kQueryRows = kDimQK <= 96 ? 64 : kDimQK <= 192 ? 32 : 16;  // walked at a time
  static constexpr int kSlabs = kDimQK <= 96 ? 2 : 1;
  static constexpr int kWalkedKeys = kDimQK <= 192 ? 32 : 16;
  static constexpr int kStages = kDimQK <= 192 ? 2 : 1;
};

// Blocks that the walks of all key tiles are split into where key tiles are few. Walks of compressed keys are
// the longer the earlier the key is, so many short ones balance; those of a window are alike, and are split
// only where they would not fill a device.
constexpr long long kBandedBwdBlocksCompressed = 2048;
constexpr long long kBandedBwdBlocksWindow = 256;

// Block scores: no output accumulator, but Q, two key tiles and the reduced rows share 99 KB.
template <int kDimQK>
struct ScoresConfig {
  static constexpr int kWarps = 4;
  static constexpr int kSlabs = kDimQK <= 128 ? 2 : 1;
  static constexpr int kStages = kDimQK <= 128 ? 2 : 1;
  static constexpr int kKeys =
      64;  // a multiple of every l' / d, so that a selection block ends where a tile does
  static constexpr int kRows = kWarps * kSlabs * 16;
};

// Selected attention: consumer warps own 16 query rows each, producer warps fill a ring of (K, V) tiles.
template <int kDimQK, int kDimV>
struct SelectedConfig {
  static constexpr int kConsumers = kDimQK <= 128 ? 8 : 4;  // their Q tile and one stage stay below 99 KB
  static constexpr int kProducers = 4;  // fewer cannot issue copies as fast as the cache delivers
  static constexpr int kMaxStages = 6;
  static constexpr int kMaxTokens = 32;  // the bits of a block's mask
};

// Decoding: every warp has a ring of its own, so that none waits for another. Two stages of 32 keys (17 KB at
// dim 128), two warps and three thread blocks on an SM keep more bytes in flight than the memory's latency
// asks for; fewer keys a tile would spend more instructions on addresses and on the softmax than on products.
template <int kDimQK, int kDimV>
struct DecodeConfig {
  static constexpr int kWarps = 2;
  static constexpr int kStages = 2;
  static constexpr int kKeys = kDimQK + kDimV <= 320 ? 32 : 16;  // stays below 99 KB
};

// Selected attention, backward, dK and dV: a warp owns 16 keys and their sums in registers, (kDimQK + kDimV)
// / 2 of them; at 256 that is too many, so dK and dV take a pass each.
template <int kDimQK, int kDimV>
struct SelectedKeysConfig {
  static constexpr bool kOnePass = kDimQK + kDimV <= 320;
  static constexpr int kMaxKeys = kOnePass ? 64 : 32;
  // Query rows of a stage: K, V and two stages stay below 99 KB, the scores within the registers.
  static constexpr int kRows = kDimQK + kDimV <= 256 ? 32 : 16;
};

// dQ: as the forward, with dO beside Q; so a stage is shorter.
template <int kDimQK, int kDimV>
struct SelectedQueriesConfig {
  static constexpr int kConsumers = kDimQK <= 128 ? 8 : 4;
  static constexpr int kProducers = 4;
  static constexpr int kMaxStages = 6;
  static constexpr int kMaxTokens = 32;
  static constexpr int kKeys = kDimQK < 96 ? 64 : kDimV <= 128 ? 32 : 16;  // at most; block_size may be 32
};

// Memory for the scores of the queries that select_blocks works on at a time.
constexpr long long kSelectWorkspaceBytes = 128ll << 20;

}  // namespace nsa::cuda::portable
