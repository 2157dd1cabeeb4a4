// Tile sizes of the Hopper kernels, with the reason beside each.
#pragma once

namespace nsa::cuda::sm90 {

// Banded attention: two consumer warpgroups of 64 rows share the key tiles, a third brings them. Accumulators
// and probabilities are (kKeys + kKeys / 2 + kDimV) / 2 of the 232 registers.
template <int kDimQK, int kDimV, int kKeys>
struct BandedConfig {
  static constexpr int kStages = 2;  // with 176 keys of (128, 128) and Q, they fill the 227 KB of an SM
  static constexpr int kConsumers = 2;
  static constexpr int kProducerRegisters = 40;  // 24 spilled
  static constexpr int kConsumerRegisters = 232;
};

}  // namespace nsa::cuda::sm90
