// Rows of block_indices that hold any integers.
#pragma once

#include <random>

#include "naive.h"

namespace nsa_test {

// Random sets with repeats, disorder, -1, numbers past the own block, and extreme numbers.
inline std::vector<int32_t> random_indices(const Batch& batch, int heads_kv, int n, int64_t block_size,
                                           uint32_t seed) {
  std::mt19937 generator(seed);
  std::vector<int32_t> indices(static_cast<size_t>(batch.total_q() * heads_kv * n), 0);
  const int32_t wild[] = {-1, -2, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min(),
                          1 << 26};
  for_each_query(batch, {heads_kv, heads_kv, 1, 1}, [&](const Query& query, int g) {
    const int64_t own = query.position / block_size;
    for (int slot = 0; slot < n; ++slot) {
      int32_t j =
          static_cast<int32_t>(generator() % static_cast<uint32_t>(own + 2));  // own + 1 is to be ignored
      if (generator() % 6 == 0) j = wild[generator() % 5];
      if (query.row % 9 == 4) j = -1;
      indices[static_cast<size_t>((query.row * heads_kv + g) * n + slot)] = j;
    }
  });
  return indices;
}

}  // namespace nsa_test
