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

template <typename T>
__device__ __forceinline__ float dot(const float (&x)[kVector], const Vector<T>& y) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVector; ++i) sum = fmaf(x[i], to_float(y.value[i]), sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ const Vector<T>* vectors(const void* rows, int64_t element) {
  return reinterpret_cast<const Vector<T>*>(static_cast<const T*>(rows) + element);
}

// Where a row of heads begins. Two 64-bit divisions cost as much as the rest of a kernel that reads a row
// once, so rows without gaps go without.
__device__ __forceinline__ int64_t row_offset(const RowsView& view, int64_t row, int num_heads) {
  if (view.stride_row == num_heads * view.stride_head) return row * view.stride_head;
  const int64_t token = row / num_heads;
  return token * view.stride_row + (row - token * num_heads) * view.stride_head;
}

// kBranches: g_b * dO is wanted of some branch.
template <typename T, typename G, int kLanes, bool kBranches>
__global__ void __launch_bounds__(kThreads) gated_combine_bwd_portable(const GatedCombineBwdParams p) {
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes, chunks = p.head_dim_v / kVector;
  const bool exists = row < num_rows;
  const bool visible =
      exists && (p.end_token == nullptr || row < static_cast<int64_t>(*p.end_token) * p.num_heads);
  const G* logits = static_cast<const G*>(p.gate_logits) + row * kNumBranches;
  const auto gate_of = [&](int b) { return visible ? 1.f / (1.f + __expf(-to_float(logits[b]))) : 0.f; };
  float d_gate[kNumBranches] = {};

  const int64_t first = visible ? row_offset(p.d_o, row, p.num_heads) : 0;
  for (int chunk = lane; exists && chunk < chunks; chunk += kLanes) {
    const int64_t at = row * p.head_dim_v + chunk * kVector;
    // All loads before the first of them is used: nothing else of this thread hides their latency.
    Vector<T> d_o{}, o[kNumBranches]{};
    if (visible) {
      d_o = *vectors<T>(p.d_o.data, first + chunk * kVector);
#pragma unroll
      for (int b = 0; b < kNumBranches; ++b) {
        if (p.delta[b] != nullptr || p.d_gate_logits != nullptr) o[b] = *vectors<T>(p.o_branch[b], at);
      }
    }
    float x[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(d_o.value[i]);
#pragma unroll
    for (int b = 0; b < kNumBranches; ++b) d_gate[b] += dot(x, o[b]);
    if constexpr (kBranches) {
#pragma unroll
      for (int b = 0; b < kNumBranches; ++b) {
        if (p.d_o_branch[b] == nullptr) continue;
        const float gate = gate_of(b);
        float scaled[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) scaled[i] = gate * x[i];
        store_floats(static_cast<T*>(p.d_o_branch[b]) + at, scaled);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) d_gate[b] = sum_lanes<kLanes>(d_gate[b]);
  if (lane != 0 || !exists) return;
#pragma unroll
  for (int b = 0; b < kNumBranches; ++b) {
    const float gate = gate_of(b);
    if (p.gates[b] != nullptr) static_cast<float*>(p.gates[b])[row] = gate;
    if (p.delta[b] != nullptr) static_cast<float*>(p.delta[b])[row] = gate * d_gate[b];
    if (p.d_gate_logits != nullptr) {
      static_cast<G*>(p.d_gate_logits)[row * kNumBranches + b] =
          from_float<G>(d_gate[b] * gate * (1.f - gate));
    }
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) attention_delta_portable(const DeltaParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool exists = row < p.num_tokens * p.num_heads;
  float sum = 0.f;
  const int64_t first = exists ? row_offset(p.d_o, row, p.num_heads) : 0;
  for (int chunk = lane; exists && chunk < p.head_dim_v / kVector; chunk += kLanes) {
    const Vector<T> o = *vectors<T>(p.o, row * p.head_dim_v + chunk * kVector);
    float x[kVector];
    load_floats(x, static_cast<const T*>(p.d_o.data) + first + chunk * kVector);
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
      const auto run = [&]<typename G>() {
        constexpr const char* kName = "gated_combine_bwd_portable";
        if (p.d_o_branch[0] == nullptr && p.d_o_branch[1] == nullptr && p.d_o_branch[2] == nullptr)
          return launch(kName, gated_combine_bwd_portable<T, G, kLanes, false>, grid, kThreads, 0, stream, p);
        return launch(kName, gated_combine_bwd_portable<T, G, kLanes, true>, grid, kThreads, 0, stream, p);
      };
      return p.gate_dtype == DType::kF32 ? run.template operator()<float>() : run.template operator()<T>();
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
