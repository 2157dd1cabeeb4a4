// Tile sizes of the Hopper kernels, with the reason beside each.
#pragma once

namespace nsa::cuda::sm90 {

// Banded attention: two consumer warpgroups of 64 rows share the key tiles, a third brings them. Accumulators
// and probabilities are (kKeys + kKeys / 2 + kDimV) / 2 of the 232 registers.
template <int kDimQK, int kDimV, int kKeys>
struct BandedConfig {
  static constexpr int kStages = 2;
  // Twice, so that the next item's Q is there in time; 176 keys of (128, 128) and 128 of (192, 128) leave
  // room for one in the 227 KB of an SM.
  static constexpr int kStagesQ = kKeys * (kDimQK + kDimV) > 128 * 256 ? 1 : 2;
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 40;  // 24 spilled
  static constexpr int kConsumerRegisters = 232;
};

}  // namespace nsa::cuda::sm90
