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

constexpr SupportRow kSupport[] = {
    {"compress", Path::kCpu, kCpuDTypes, {}},
    {"compressed_attention", Path::kCpu, kCpuDTypes, {}},
    {"block_scores", Path::kCpu, kCpuDTypes, {}},
    {"select_blocks", Path::kCpu, kCpuDTypes, {}},
    {"selected_attention", Path::kCpu, kCpuDTypes, {}},
    {"sliding_window_attention", Path::kCpu, kCpuDTypes, {}},
    {"gated_combine", Path::kCpu, kCpuDTypes, {}},
    {"attention", Path::kCpu, kCpuDTypes, {}},
};

}  // namespace nsa
