// What runs natively where: the one table that the argument checks, the error messages and
// nsa_ext.support_matrix() read.
#pragma once

#include <cstdint>

#include "nsa/params.h"

namespace nsa {

enum class Path : int8_t { kCpu, kCudaPortable, kCudaSm90 };

constexpr unsigned bit(DType dtype) { return 1u << static_cast<unsigned>(dtype); }

struct HeadDims {
  int qk = 0, v = 0;
};

struct SupportRow {
  const char* op;
  Path path;
  unsigned dtypes;        // bits of DType
  HeadDims head_dims[8];  // ends at the first {0, 0}; an empty list means any
};

constexpr unsigned kCpuDTypes = bit(DType::kF32) | bit(DType::kF64) | bit(DType::kBF16);
constexpr unsigned kCudaDTypes = bit(DType::kBF16) | bit(DType::kF16);

#define NSA_PORTABLE_HEAD_DIMS                               \
  {                                                          \
    {64, 64}, {96, 96}, {128, 128}, {192, 128}, { 256, 256 } \
  }
#define NSA_SM90_HEAD_DIMS             \
  {                                    \
    {64, 64}, {128, 128}, { 192, 128 } \
  }

constexpr SupportRow kSupport[] = {
    {"compress", Path::kCpu, kCpuDTypes, {}},
    {"compressed_attention", Path::kCpu, kCpuDTypes, {}},
    {"block_scores", Path::kCpu, kCpuDTypes, {}},
    {"select_blocks", Path::kCpu, kCpuDTypes, {}},
    {"selected_attention", Path::kCpu, kCpuDTypes, {}},
    {"sliding_window_attention", Path::kCpu, kCpuDTypes, {}},
    {"gated_combine", Path::kCpu, kCpuDTypes, {}},
    {"attention", Path::kCpu, kCpuDTypes, {}},
    {"append_kv", Path::kCpu, kCpuDTypes, {}},
    {"decode_attention", Path::kCpu, kCpuDTypes, {}},
    {"compress", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"compressed_attention", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"block_scores", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"select_blocks", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"selected_attention", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"sliding_window_attention", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"gated_combine", Path::kCudaPortable, kCudaDTypes, {}},
    {"append_kv", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"decode_attention", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"attention", Path::kCudaPortable, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"compress", Path::kCudaSm90, kCudaDTypes, {{64, 64}, {128, 128}, {192, 192}, {256, 256}}},
    {"compressed_attention", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
    {"block_scores", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
    {"select_blocks", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
    {"selected_attention", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
    {"sliding_window_attention", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
    {"append_kv", Path::kCudaSm90, kCudaDTypes, NSA_PORTABLE_HEAD_DIMS},
    {"decode_attention", Path::kCudaSm90, kCudaDTypes, NSA_SM90_HEAD_DIMS},
};

#undef NSA_PORTABLE_HEAD_DIMS
#undef NSA_SM90_HEAD_DIMS

}  // namespace nsa
