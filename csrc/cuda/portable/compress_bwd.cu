// The steps of phi's backward beside the matrix products: bound by memory, on every GPU.
#include "cuda/portable/compress_bwd.h"
#include "cuda/portable/types.cuh"
#include "cuda/tile/compress_rows.cuh"
#include "cuda/tile/vector.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads)
    compress_bwd_tokens_portable(const CompressFwdParams p, const CompressBwdPlan plan) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < p.num_rows) plan.tokens[row] = first_token(p.seqs, p.blocks, p.num_rows, row);
}

// kLinear: dZ is dOut, with zeros in rows of no block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    compress_bwd_linear_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  const CompressFwdParams& p = bwd.fwd;
  const int chunks = p.hidden_size / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / chunks / p.num_heads;
  if (row >= p.num_rows) return;
  Vector<T> v{};
  if (plan.tokens[row] >= 0) {
    v = *reinterpret_cast<const Vector<T>*>(
        static_cast<const T*>(bwd.d_out.data) + row * bwd.d_out.stride_row +
        i / chunks % p.num_heads * bwd.d_out.stride_head + i % chunks * kVector);
  }
  static_cast<Vector<T>*>(plan.dz)[i] = v;
}

// Sums over rows of dZ (for db1) and of dOut (for db2), both in one launch: `set` counts parameter heads of
// the one, then of the other.
struct ColumnSum {
  bool hidden;  // dZ
  int64_t h;
  int width;

  __device__ ColumnSum(const CompressFwdParams& p, int set) {
    const int heads = p.per_head ? p.num_heads : 1;
    hidden = set < heads;
    h = set % heads;
    width = hidden ? p.hidden_size : p.head_dim;
  }
};

// One of kColumnParts partial sums over the rows of a parameter head; a warp reads 256 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    compress_bwd_columns_portable(const CompressBwdParams bwd, const CompressBwdPlan plan, int first_set) {
  __shared__ float sums[kWarps][32 * kVector];
  const CompressFwdParams& p = bwd.fwd;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = blockIdx.x, set = first_set + blockIdx.z;
  const ColumnSum column_sum(p, set);
  const int first = blockIdx.y * 32 * kVector, column = first + lane * kVector;
  const int64_t rows = p.num_rows * (p.per_head ? 1 : p.num_heads);
  const int64_t begin = rows * part / CompressBwdPlan::kColumnParts,
                end = rows * (part + 1) / CompressBwdPlan::kColumnParts;
  const T* data = static_cast<const T*>(column_sum.hidden ? plan.dz : bwd.d_out.data) + column;
  const int64_t stride_head = column_sum.hidden ? p.hidden_size : bwd.d_out.stride_head;
  const int64_t stride_row = column_sum.hidden ? stride_head * p.num_heads : bwd.d_out.stride_row;
  float sum[kVector] = {};
#pragma unroll 4
  for (int64_t i = begin + warp; column < column_sum.width && i < end; i += kWarps) {
    const int64_t row = p.per_head ? i : i / p.num_heads, head = p.per_head ? column_sum.h : i % p.num_heads;
    const bool exists = plan.tokens[row] >= 0;
    float x[kVector];
    load_floats(x, data + row * stride_row + head * stride_head);
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum[c] += exists ? x[c] : 0.f;
  }
#pragma unroll
  for (int c = 0; c < kVector; ++c) sums[warp][lane * kVector + c] = sum[c];
  __syncthreads();
  if (first + static_cast<int>(threadIdx.x) >= column_sum.width) return;
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums[i][threadIdx.x];
  const int64_t at = static_cast<int64_t>(set) * CompressBwdPlan::kColumnParts + part;
  plan.columns[at * plan.width + first + threadIdx.x] = total;
}

// The sum of the parts, into the gradient of a bias; that of dZ is kept for dW1 and dPE.
__global__ void __launch_bounds__(kThreads)
    compress_bwd_bias_portable(const CompressBwdParams bwd, const CompressBwdPlan plan, int first_set) {
  const int column = blockIdx.x * kThreads + threadIdx.x, set = first_set + blockIdx.y;
  const ColumnSum column_sum(bwd.fwd, set);
  if (column >= column_sum.width) return;
  const float* part =
      plan.columns + static_cast<int64_t>(set) * CompressBwdPlan::kColumnParts * plan.width + column;
  float sum = 0.f;
#pragma unroll 32
  for (int i = 0; i < CompressBwdPlan::kColumnParts; ++i) sum += part[static_cast<int64_t>(i) * plan.width];
  float* bias = static_cast<float*>(column_sum.hidden ? bwd.d_b1 : bwd.d_b2);
  if (bias != nullptr) bias[column_sum.h * column_sum.width + column] += sum;
  if (column_sum.hidden) plan.d_b1[column_sum.h * column_sum.width + column] = sum;
}

// dPE = W1 . db1: a warp per row of W1.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    compress_bwd_pe_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  const CompressFwdParams& p = bwd.fwd;
  const int lane = threadIdx.x & 31;
  const int64_t depth = p.blocks.block * p.head_dim, h = blockIdx.y;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (k >= depth) return;
  const T* w1 = static_cast<const T*>(p.w1) + (h * depth + k) * p.hidden_size;
  const float* d_b1 = plan.d_b1 + h * p.hidden_size;
  float sum = 0.f;
  for (int f = lane * kVector; f < p.hidden_size; f += 32 * kVector) {
    float w[kVector];
    load_floats(w, w1 + f);
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum = fmaf(w[c], d_b1[f + c], sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) static_cast<float*>(bwd.d_pe)[h * depth + k] += sum;
}

// The sum of the parts of dW1 (kFirst) or dW2, four elements a thread. dW1 = (X + PE)^T . dZ: the part of PE
// is PE . db1^T.
template <typename T, bool kFirst>
__global__ void __launch_bounds__(kThreads)
    compress_bwd_add_portable(const CompressBwdParams bwd, const CompressBwdPlan plan) {
  const CompressFwdParams& p = bwd.fwd;
  const int64_t depth = p.blocks.block * p.head_dim, h = blockIdx.y;
  const int64_t size = kFirst ? depth * p.hidden_size : static_cast<int64_t>(p.hidden_size) * p.head_dim;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i >= size) return;
  const int parts = kFirst ? plan.parts_w1 : plan.parts_w2;
  const float* part = (kFirst ? plan.d_w1 : plan.d_w2) + h * parts * size + i;
  float4 sum = *reinterpret_cast<const float4*>(part);
#pragma unroll 16
  for (int n = 1; n < parts; ++n) {
    const float4 x = *reinterpret_cast<const float4*>(part + n * size);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  if (kFirst && p.pe != nullptr) {
    const float pe = to_float(static_cast<const T*>(p.pe)[h * depth + i / p.hidden_size]);
    const float* d_b1 = plan.d_b1 + h * p.hidden_size + i % p.hidden_size;
    sum.x = fmaf(pe, d_b1[0], sum.x), sum.y = fmaf(pe, d_b1[1], sum.y);
    sum.z = fmaf(pe, d_b1[2], sum.z), sum.w = fmaf(pe, d_b1[3], sum.w);
  }
  float4* target =
      reinterpret_cast<float4*>(static_cast<float*>(kFirst ? bwd.d_w1 : bwd.d_w2) + h * size + i);
  const float4 before = *target;
  *target = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
}

// kMean: a token gets its share of every block that it lies in.
template <typename T>
__global__ void __launch_bounds__(kThreads) compress_mean_bwd_portable(const CompressBwdParams bwd) {
  const CompressFwdParams& p = bwd.fwd;
  const int chunks = p.head_dim / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t token = i / chunks / p.num_heads;
  if (token >= p.seqs.key_rows) return;
  int64_t low = 0, high = p.seqs.cu_seqlens_k == nullptr ? 1 : p.seqs.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.seqs.cu_seqlens_k[middle] <= token ? low : high) = middle;
  }
  const Sequence seq = p.seqs.sequence(low);
  const int64_t t = token - seq.k_begin;
  if (seq.k_begin < 0 || t < 0 || t >= seq.k_len) return;
  // From the first block that does not end before the token to the last that does not begin behind it.
  const int64_t begin = p.blocks.count(t),
                end = min64(count_blocks(p.seqs, p.blocks, seq), t / p.blocks.stride + 1);
  const T* d_out = static_cast<const T*>(bwd.d_out.data) + i / chunks % p.num_heads * bwd.d_out.stride_head +
                   i % chunks * kVector;
  float sum[kVector] = {};
  for (int64_t block = begin; block < end; ++block) {
    float x[kVector];
    load_floats(x, d_out + (p.blocks.first_row(seq.k_begin) + block) * bwd.d_out.stride_row);
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum[c] += x[c];
  }
#pragma unroll
  for (int c = 0; c < kVector; ++c) sum[c] /= static_cast<float>(p.blocks.block);
  store_floats(static_cast<T*>(bwd.dx) + i * kVector, sum);
}

dim3 grid_for(int64_t elements, int64_t y = 1) {
  return dim3(static_cast<unsigned>(ceil_div(elements, kThreads)), static_cast<unsigned>(y));
}

template <bool kFirst>
Status add_weight(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const CompressFwdParams& f = p.fwd;
  const int64_t size = (kFirst ? f.blocks.block * f.head_dim : f.head_dim) * f.hidden_size;
  return dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_add_portable", compress_bwd_add_portable<T, kFirst>,
                  grid_for(size / 4, f.per_head ? f.num_heads : 1), kThreads, 0, stream, p, plan);
  });
}

}  // namespace

Status compress_bwd_tokens(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  return launch("compress_bwd_tokens_portable", compress_bwd_tokens_portable, grid_for(p.fwd.num_rows),
                kThreads, 0, stream, p.fwd, plan);
}

Status compress_bwd_linear(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const CompressFwdParams& f = p.fwd;
  return dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_bwd_linear_portable", compress_bwd_linear_portable<T>,
                  grid_for(f.num_rows * f.num_heads * (f.hidden_size / kVector)), kThreads, 0, stream, p,
                  plan);
  });
}

Status compress_bwd_biases(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const int heads = p.fwd.per_head ? p.fwd.num_heads : 1;
  const int first = needs_hidden_sum(p) ? 0 : heads, sets = (p.d_b2 != nullptr ? 2 : 1) * heads - first;
  const Status status = dispatch_half(p.fwd.dtype, [&]<typename T>() {
    const dim3 grid(CompressBwdPlan::kColumnParts, static_cast<unsigned>(ceil_div(plan.width, 32 * kVector)),
                    static_cast<unsigned>(sets));
    return launch("compress_bwd_columns_portable", compress_bwd_columns_portable<T>, grid, kThreads, 0,
                  stream, p, plan, first);
  });
  if (!status.ok()) return status;
  return launch("compress_bwd_bias_portable", compress_bwd_bias_portable, grid_for(plan.width, sets),
                kThreads, 0, stream, p, plan, first);
}

Status compress_bwd_pe(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  const int64_t depth = p.fwd.blocks.block * p.fwd.head_dim;
  const dim3 grid(static_cast<unsigned>(ceil_div(depth, kWarps)), p.fwd.per_head ? p.fwd.num_heads : 1);
  return dispatch_half(p.fwd.dtype, [&]<typename T>() {
    return launch("compress_bwd_pe_portable", compress_bwd_pe_portable<T>, grid, kThreads, 0, stream, p,
                  plan);
  });
}

Status compress_bwd_add_first(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream) {
  return add_weight<true>(p, plan, stream);
}

Status compress_bwd_add_second(const CompressBwdParams& p, const CompressBwdPlan& plan,
                               const Stream& stream) {
  return add_weight<false>(p, plan, stream);
}

Status compress_bwd_mean(const CompressBwdParams& p, const Stream& stream) {
  const CompressFwdParams& f = p.fwd;
  return dispatch_half(f.dtype, [&]<typename T>() {
    return launch("compress_mean_bwd_portable", compress_mean_bwd_portable<T>,
                  grid_for(f.seqs.key_rows * f.num_heads * (f.head_dim / kVector)), kThreads, 0, stream, p);
  });
}

}  // namespace nsa::cuda::portable
