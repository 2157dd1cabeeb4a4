// W1 . vec(PE), which the first layer of phi adds as a bias: W1 . vec(X + PE) = W1 . vec(X) + W1 . vec(PE).
// Bound by the read of W1, so the summed dimension is split into kCompressBiasParts.
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/grid_dependency.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kColumns = 256;  // 8 a thread: a warp reads 512 bytes of a row of W1
constexpr int kWarps = 8;

template <typename T>
__global__ void __launch_bounds__(kWarps * 32) compress_bias_portable(const CompressFwdParams p) {
  __shared__ float partial[kWarps][kColumns];
  ptx::launch_dependents();  // the Hopper forward waits for the sums where it needs them
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = blockIdx.x;
  const int first = blockIdx.y * kColumns, f = first + lane * 8;
  const int64_t h = blockIdx.z, depth = p.blocks.block * p.head_dim;
  const int64_t begin = depth * part / kCompressBiasParts, end = depth * (part + 1) / kCompressBiasParts;
  const T *pe = static_cast<const T*>(p.pe) + h * depth,
          *w1 = static_cast<const T*>(p.w1) + h * depth * p.hidden_size + f;
  float sum[8] = {};
  if (f < p.hidden_size) {
#pragma unroll 16
    for (int64_t k = begin + warp; k < end; k += kWarps) {
      const float x = static_cast<float>(pe[k]);
      const uint4 packed = *reinterpret_cast<const uint4*>(w1 + k * p.hidden_size);
      const T* w = reinterpret_cast<const T*>(&packed);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = fmaf(x, static_cast<float>(w[c]), sum[c]);
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) partial[warp][lane * 8 + c] = sum[c];
  __syncthreads();
  const int column = threadIdx.x;
  if (first + column >= p.hidden_size) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += partial[i][column];
  static_cast<float*>(p.workspace)[(h * kCompressBiasParts + part) * p.hidden_size + first + column] = total;
}

}  // namespace

Status compress_bias(const CompressFwdParams& p, const Stream& stream) {
  if (p.pe == nullptr || p.hidden_size % 8 != 0) return {};  // compress_forward names the hidden size
  return dispatch_half(p.dtype, [&]<typename T>() {
    const dim3 grid(kCompressBiasParts, static_cast<unsigned>(ceil_div(p.hidden_size, kColumns)),
                    p.per_head ? p.num_heads : 1);
    return launch("compress_bias_portable", compress_bias_portable<T>, grid, kWarps * 32, 0, stream, p);
  });
}

}  // namespace nsa::cuda::portable
