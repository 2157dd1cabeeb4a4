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

// A group takes kRows adjacent rows one after another; then one lane a row writes, so that the small outputs
// fill whole sectors.
constexpr int kRows = 4;

template <typename T, typename G, int kLanes>
__global__ void __launch_bounds__(kThreads) gated_combine_bwd_portable(const GatedCombineBwdParams p) {
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t end =
      p.end_token == nullptr ? num_rows : min64(num_rows, static_cast<int64_t>(*p.end_token) * p.num_heads);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes * kRows;
  const int lane = threadIdx.x % kLanes, chunks = p.head_dim_v / kVector;
  float gate[kNumBranches] = {}, d_gate[kNumBranches] = {};  // of row first + lane
  if (lane < kRows && first + lane < end) {
    const G* logits = static_cast<const G*>(p.gate_logits) + (first + lane) * kNumBranches;
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) gate[b] = 1.f / (1.f + __expf(-to_float(logits[b])));
  }
#pragma unroll 1
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    const T* d_o = row_of<T>(p.d_o, row < end ? row : 0, p.num_heads);
    float row_gate[kNumBranches], sum[kNumBranches] = {};
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) row_gate[b] = __shfl_sync(~0u, gate[b], r, kLanes);
    for (int chunk = lane; row < num_rows && chunk < chunks; chunk += kLanes) {
      const int64_t at = row * p.head_dim_v + chunk * kVector;
      float x[kVector] = {};
      if (row < end) load_floats(x, d_o + chunk * kVector);
#pragma unroll
      for (int b = 0; b < kNumBranches; ++b) {
        if (row < end && (p.delta[b] != nullptr || p.d_gate_logits != nullptr)) {
          float o[kVector];
          load_floats(o, static_cast<const T*>(p.o_branch[b]) + at);
          sum[b] += dot(x, o);
        }
        if (p.d_o_branch[b] == nullptr) continue;
        float scaled[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) scaled[i] = row_gate[b] * x[i];
        store_floats(static_cast<T*>(p.d_o_branch[b]) + at, scaled);
      }
    }
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) {
      const float total = sum_lanes<kLanes>(sum[b]);
      if (lane == r) d_gate[b] = total;
    }
  }
  const int64_t row = first + lane;
  if (lane >= kRows || row >= num_rows) return;
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

// f<kLanes>(grid): as many lanes a group as a row has chunks of 16 bytes.
template <typename F>
Status with_lanes(int head_dim, int64_t num_groups, F&& f) {
  if (head_dim % kVector != 0) {
    return Status::error(StatusCode::kUnsupported,
                         "head dim %d of the outputs has no CUDA kernel; it must be a multiple of %d",
                         head_dim, kVector);
  }
  const auto grid = [&](int lanes) {
    return dim3(static_cast<unsigned>(ceil_div(num_groups, kThreads / lanes)));
  };
  if (head_dim <= 8 * kVector) return f.template operator()<8>(grid(8));
  if (head_dim <= 16 * kVector) return f.template operator()<16>(grid(16));
  return f.template operator()<32>(grid(32));
}

}  // namespace

Status gated_combine_backward(const GatedCombineBwdParams& p, const Stream& stream) {
  const int64_t groups = ceil_div(p.num_tokens * p.num_heads, kRows);
  return with_lanes(p.head_dim_v, groups, [&]<int kLanes>(dim3 grid) {
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
