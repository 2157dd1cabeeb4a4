// The gate, forward: o = sum over branches of sigmoid(logit) * o_branch. Bound by memory: 16 bytes a thread
// and branch.
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/vector.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256;

template <typename T, typename G>
__global__ void __launch_bounds__(kThreads) gated_combine_fwd_portable(const GatedCombineFwdParams p) {
  const int per_row = p.head_dim_v / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / per_row;
  if (row >= p.num_rows) return;
  Vector<T> out{};
  if (p.end_token == nullptr || row < static_cast<int64_t>(*p.end_token) * p.num_heads) {
    float sum[kVector] = {};
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const float gate =
          1.f / (1.f + __expf(-to_float(static_cast<const G*>(p.gate_logits)[row * kNumBranches + b])));
      const Vector<T> in = static_cast<const Vector<T>*>(p.o_branch[b])[i];
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[j] = fmaf(gate, to_float(in.value[j]), sum[j]);
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) out.value[j] = from_float<T>(sum[j]);
  }
  static_cast<Vector<T>*>(p.o)[i] = out;
}

}  // namespace

Status gated_combine_forward(const GatedCombineFwdParams& p, const Stream& stream) {
  if (p.head_dim_v % kVector != 0) {
    return Status::error(StatusCode::kUnsupported,
                         "head dim %d of the outputs has no CUDA kernel; it must be a multiple of %d",
                         p.head_dim_v, kVector);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.num_rows * (p.head_dim_v / kVector), kThreads)));
  return dispatch_half(p.dtype, [&]<typename T>() {
    if (p.gate_dtype == DType::kF32)
      return launch("gated_combine_fwd_portable", gated_combine_fwd_portable<T, float>, grid, kThreads, 0,
                    stream, p);
    return launch("gated_combine_fwd_portable", gated_combine_fwd_portable<T, T>, grid, kThreads, 0, stream,
                  p);
  });
}

}  // namespace nsa::cuda::portable
