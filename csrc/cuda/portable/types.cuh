// From run-time head dims to template arguments of the portable kernels.
#pragma once

#include "cuda/host/launch_kernel.h"

namespace nsa::cuda::portable {

template <typename F>
Status dispatch_head_dims(int dim_qk, int dim_v, F&& f) {
  if (dim_qk == 64 && dim_v == 64) return f.template operator()<64, 64>();
  if (dim_qk == 96 && dim_v == 96) return f.template operator()<96, 96>();
  if (dim_qk == 128 && dim_v == 128) return f.template operator()<128, 128>();
  if (dim_qk == 192 && dim_v == 128) return f.template operator()<192, 128>();
  if (dim_qk == 256 && dim_v == 256) return f.template operator()<256, 256>();
  return Status::error(StatusCode::kUnsupported,
                       "head dims (%d, %d) have no CUDA kernel; there are (64, 64), (96, 96), (128, 128), "
                       "(192, 128), (256, 256)",
                       dim_qk, dim_v);
}

}  // namespace nsa::cuda::portable
