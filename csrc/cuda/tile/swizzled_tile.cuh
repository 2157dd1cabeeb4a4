// Tiles of 16-bit elements as TMA writes them with the 128-byte swizzle, and their wgmma descriptors.
//
// A tile of `rows` rows and kDim columns lies as kDim / 64 panels of [rows][64 elements = 128 bytes]; within
// a panel, the 16-byte chunk c of row r is stored as chunk c ^ (r % 8). A panel begins at a multiple of 1,024
// bytes, so rows is a multiple of 8.
#pragma once

#include <cstdint>

namespace nsa::cuda {

constexpr int kPanel = 64;        // columns of a panel
constexpr int kPanelPitch = 128;  // bytes of a row in it

template <int kDim>
__host__ __device__ constexpr int swizzled_tile_bytes(int rows) {
  return rows * kDim * 2;
}

// Byte offset of 16-byte chunk `chunk` (0 .. kDim / 8 - 1) of a row.
__device__ __forceinline__ constexpr uint32_t swizzled_offset(int rows, int row, int chunk) {
  return (chunk >> 3) * rows * kPanelPitch + row * kPanelPitch + (((chunk & 7) ^ (row & 7)) << 4);
}

// Fields of a shared-memory matrix descriptor: address, leading and stride byte offsets in units of 16 bytes,
// swizzle mode. `offset` (bytes) is added last, and to the low word alone, so that the descriptors of one
// tile differ by constants.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared, uint32_t offset,
                                                      uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  const uint32_t low = ((leading_bytes >> 4) << 16 | (shared & 0x3ffff) >> 4) + (offset >> 4);
  return static_cast<uint64_t>(kSwizzle128 | stride_bytes >> 4) << 32 | low;
}

// Rows along M or N, columns along K (Q, K): eight rows lie 1,024 bytes apart. The columns k .. k + 15 of the
// tile.
__device__ __forceinline__ uint64_t k_major_descriptor(uint32_t tile, int rows, int k) {
  return matrix_descriptor(tile, (k / kPanel) * rows * kPanelPitch + k % kPanel * 2, 16, 1024);
}

// Rows along K, columns along N (V): panels lie rows * 128 bytes apart. The rows k .. k + 15 of the tile.
__device__ __forceinline__ uint64_t mn_major_descriptor(uint32_t tile, int rows, int k) {
  return matrix_descriptor(tile, k * kPanelPitch, rows * kPanelPitch, 1024);
}

}  // namespace nsa::cuda
