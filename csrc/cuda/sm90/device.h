// From run-time dtypes and head dims to template arguments of the Hopper kernels.
#pragma once

#include "cuda/host/launch_kernel.h"

namespace nsa::cuda::sm90 {

// f<T, kDimQK, kDimV>() -> bool; false where there is no kernel.
template <typename F>
bool dispatch_kernels(DType dtype, int dim_qk, int dim_v, F&& f) {
  const auto with_dtype = [&]<int kDimQK, int kDimV>() {
    if (dtype == DType::kBF16) return f.template operator()<__nv_bfloat16, kDimQK, kDimV>();
    if (dtype == DType::kF16) return f.template operator()<__half, kDimQK, kDimV>();
    return false;
  };
  if (dim_qk == 64 && dim_v == 64) return with_dtype.template operator()<64, 64>();
  if (dim_qk == 128 && dim_v == 128) return with_dtype.template operator()<128, 128>();
  if (dim_qk == 192 && dim_v == 128) return with_dtype.template operator()<192, 128>();
  return false;
}

}  // namespace nsa::cuda::sm90
