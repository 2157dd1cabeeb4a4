// The pre-pass of every backward: one read of dO and of the outputs gives gate gradients and deltas. Bound by
// memory: a group of lanes owns a row (token and head), 16 bytes a lane.
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/vector.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256;

// The sum over the lanes of a group; a fixed order.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

__device__ __forceinline__ float dot(const float (&x)[kVector], const float (&y)[kVector]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ const T* row_of(const RowsView& view, int64_t row, int num_heads) {
  return static_cast<const T*>(view.data) + row / num_heads * view.stride_row +
         row % num_heads * view.stride_head;
}

template <typename T, typename G, int kLanes>
__global__ void __launch_bounds__(kThreads) gated_combine_bwd_portable(const GatedCombineBwdParams p) {
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes, chunks = p.head_dim_v / kVector;
  const bool exists = row < num_rows;
  const bool visible =
      exists && (p.end_token == nullptr || row < static_cast<int64_t>(*p.end_token) * p.num_heads);
  const G* logits = static_cast<const G*>(p.gate_logits) + row * kNumBranches;
  float gate[kNumBranches], d_gate[kNumBranches] = {};
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) gate[b] = visible ? 1.f / (1.f + __expf(-to_float(logits[b]))) : 0.f;

  const T* d_o = row_of<T>(p.d_o, visible ? row : 0, p.num_heads);
  for (int chunk = lane; exists && chunk < chunks; chunk += kLanes) {
    float x[kVector] = {};
    if (visible) load_floats(x, d_o + chunk * kVector);
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const int64_t at = row * p.head_dim_v + chunk * kVector;
      if (visible && (p.delta[b] != nullptr || p.d_gate_logits != nullptr)) {
        float o[kVector];
        load_floats(o, static_cast<const T*>(p.o_branch[b]) + at);
        d_gate[b] += dot(x, o);
      }
      if (p.d_o_branch[b] != nullptr) {
        float scaled[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) scaled[i] = gate[b] * x[i];
        store_floats(static_cast<T*>(p.d_o_branch[b]) + at, scaled);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) d_gate[b] = sum_lanes<kLanes>(d_gate[b]);
  if (lane != 0 || !exists) return;
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) {
    if (p.gates[b] != nullptr) static_cast<float*>(p.gates[b])[row] = gate[b];
    if (p.delta[b] != nullptr) static_cast<float*>(p.delta[b])[row] = gate[b] * d_gate[b];
    if (p.d_gate_logits != nullptr) {
      static_cast<G*>(p.d_gate_logits)[row * kNumBranches + b] =
          from_float<G>(d_gate[b] * gate[b] * (1.f - gate[b]));
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) attention_delta_portable(const DeltaParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool exists = row < p.num_tokens * p.num_heads;
  float sum = 0.f;
  const T* d_o = row_of<T>(p.d_o, exists ? row : 0, p.num_heads);
  for (int chunk = lane; exists && chunk < p.head_dim_v / kVector; chunk += kLanes) {
    float x[kVector], o[kVector];
    load_floats(x, d_o + chunk * kVector);
    load_floats(o, static_cast<const T*>(p.o) + row * p.head_dim_v + chunk * kVector);
    sum += dot(x, o);
  }
  sum = sum_lanes<kLanes>(sum);
  if (lane == 0 && exists) static_cast<float*>(p.delta)[row] = sum;
}

// f<kLanes>(grid): lanes a row for its 16-byte chunks.
template <typename F>
Status with_lanes(int head_dim, int64_t num_rows, F&& f) {
  if (head_dim % kVector != 0) {
    return Status::error(StatusCode::kUnsupported,
                         "head dim %d of the outputs has no CUDA kernel; it must be a multiple of %d",
                         head_dim, kVector);
  }
  const auto grid = [&](int lanes) {
    return dim3(static_cast<unsigned>(ceil_div(num_rows, kThreads / lanes)));
  };
  if (head_dim <= 8 * kVector) return f.template operator()<8>(grid(8));
  if (head_dim <= 16 * kVector) return f.template operator()<16>(grid(16));
  return f.template operator()<32>(grid(32));
}

}  // namespace

Status gated_combine_backward(const GatedCombineBwdParams& p, const Stream& stream) {
  return with_lanes(p.head_dim_v, p.num_tokens * p.num_heads, [&]<int kLanes>(dim3 grid) {
    return dispatch_half(p.dtype, [&]<typename T>() {
      constexpr const char* kName = "gated_combine_bwd_portable";
      if (p.gate_dtype == DType::kF32)
        return launch(kName, gated_combine_bwd_portable<T, float, kLanes>, grid, kThreads, 0, stream, p);
      return launch(kName, gated_combine_bwd_portable<T, T, kLanes>, grid, kThreads, 0, stream, p);
    });
  });
}

Status attention_delta(const DeltaParams& p, const Stream& stream) {
  return with_lanes(p.head_dim_v, p.num_tokens * p.num_heads, [&]<int kLanes>(dim3 grid) {
    return dispatch_half(p.dtype, [&]<typename T>() {
      return launch("attention_delta_portable", attention_delta_portable<T, kLanes>, grid, kThreads, 0,
                    stream, p);
    });
  });
}

}  // namespace nsa::cuda::portable
