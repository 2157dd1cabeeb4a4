// Tile sizes of the Hopper kernels, with the reason beside each.
#pragma once

namespace nsa::cuda::sm90 {

// Banded attention: consumer warpgroups of 64 rows share the key tiles, one more brings them. Accumulators
// and probabilities are (kKeys + kKeys / 2 + kDimV) / 2 registers, of 232 where there are two consumers.
// Tiles of 80 keys are the largest that leave registers for a third consumer: what one does at the ends of an
// item, two others hide. Compressed attention that chooses blocks has tiles of 64.
template <int kDimQK, int kDimV, int kKeys>
struct BandedConfig {
  static constexpr int kConsumers = kKeys <= 80 ? 3 : 2;
  static constexpr int kStages = kKeys <= 80 ? 3 : 2;
  // Twice, so that the next item's Q is there in time; 176 keys of (128, 128) and 128 of (192, 128) leave
  // room for one in the 227 KB of an SM.
  static constexpr int kStagesQ = kKeys * (kDimQK + kDimV) > 128 * 256 ? 1 : 2;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;  // 24 spilled
};

}  // namespace nsa::cuda::sm90
