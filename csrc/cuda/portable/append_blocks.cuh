// phi of the blocks that a step of a few tokens completes, block by block, and the step's tokens on their way
// to a cache.
//
// The first product of phi, whose weights are what costs, is split over the tokens of a block, in float; the
// sums over one token each go to the workspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/append_stream.cuh"
#include "nsa/launch.h"

namespace nsa::cuda::portable {

constexpr int kAppendHeads = 4;  // that share one read of the weights
constexpr int kMaxAppendHidden = 2048;

// The workspace, block by block and packed.
struct AppendPlan {
  bool packed;
  int blocks_per_sequence;  // that a step can complete
  float* hidden[2];         // K, V: [B * blocks_per_sequence, Hkv, l, F], sums over one token each
  int64_t rows;             // of the packed tokens, at most
  int32_t* offsets;         // [B + 1], of the packed sequences
  void* x[2];               // [rows, Hkv, D]
  void* out[2];             // [rows / d, Hkv, D]
  void* bias[2];            // the workspace of compress_forward
};

// The blocks that a step completes.
struct NewBlocks {
  int first, count;

  __device__ NewBlocks(KeyBlocks blocks, const Sequence& seq)
      : first(CachedKeyBlocks(blocks).count(static_cast<int>(seq.k_len - seq.q_len))),
        count(CachedKeyBlocks(blocks).count(static_cast<int>(seq.k_len)) - first) {}
  __device__ int num_tokens(KeyBlocks blocks) const {
    return count > 0 ? static_cast<int>((count - 1) * blocks.stride + blocks.block) : 0;
  }
};

template <typename T>
struct alignas(16) AppendPack {
  T value[kAppendVector];
};

// What phi sees of token t of a sequence: null for a page that does not exist.
template <typename T>
__device__ __forceinline__ const T* phi_token(const AppendStream& stream, const Sequence& seq, int64_t b,
                                              int t, int head) {
  const int64_t fresh = t - seq.position(0);
  if (fresh >= 0) {
    return static_cast<const T*>(stream.cmp.data) + (seq.q_begin + fresh) * stream.cmp.stride_row +
           head * stream.cmp.stride_head;
  }
  return static_cast<const T*>(stream.tail.data) + cached_offset(stream.tail, b, t, head);
}

// 16 bytes at a time: single floats at this stride would meet in four banks.
__device__ __forceinline__ void store_vector(float* to, const float (&x)[kAppendVector]) {
#pragma unroll
  for (int e = 0; e < kAppendVector; e += 4)
    *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
}

struct HiddenShared {
  float x[kAppendHeads][kMaxAppendDim];
  alignas(16) float sums[kAppendThreads * kAppendHeads * kAppendVector];
};

// One token's share of W1 . vec(X + PE) for a block, all heads; kMean: the token itself.
template <typename T>
__device__ void hidden_share(const AppendStream& stream, const Sequence& seq, int64_t b, int t, int offset,
                             float* out, HiddenShared& shared) {
  const CompressFwdParams& phi = stream.phi;
  const int dim = phi.head_dim, hidden = phi.hidden_size, heads = phi.num_heads;
  const int64_t length = phi.blocks.block;
  const int per_pass = phi.per_head ? 1 : kAppendHeads, vectors = hidden / kAppendVector,
            parts = kAppendThreads / vectors;
  const int vector = threadIdx.x % vectors, part = threadIdx.x / vectors;
  for (int head = 0; head < heads; head += per_pass) {
    const int count = min(per_pass, heads - head);
    const int64_t h = phi.per_head ? head : 0;
    const T* pe = phi.pe == nullptr ? nullptr : static_cast<const T*>(phi.pe) + (h * length + offset) * dim;
    for (int i = threadIdx.x; i < kAppendHeads * dim; i += kAppendThreads) {
      const int g = i / dim, c = i % dim;
      float value = 0.f;
      if (g < count) {
        value = static_cast<float>(phi_token<T>(stream, seq, b, t, head + g)[c]);
        if (pe != nullptr) value += static_cast<float>(pe[c]);
        if (phi.kind == CompressKind::kMean) out[(head + g) * length * hidden + c] = value;
      }
      shared.x[g][c] = value;
    }
    if (phi.kind == CompressKind::kMean) continue;
    __syncthreads();
    float acc[kAppendHeads][kAppendVector] = {};
    if (part < parts) {
      const T* w =
          static_cast<const T*>(phi.w1) + (h * length + offset) * dim * hidden + vector * kAppendVector;
#pragma unroll 16
      for (int c = part; c < dim; c += parts) {
        const AppendPack<T> weights =
            *reinterpret_cast<const AppendPack<T>*>(w + static_cast<int64_t>(c) * hidden);
#pragma unroll
        for (int g = 0; g < kAppendHeads; ++g) {
#pragma unroll
          for (int e = 0; e < kAppendVector; ++e)
            acc[g][e] = fmaf(shared.x[g][c], static_cast<float>(weights.value[e]), acc[g][e]);
        }
      }
#pragma unroll
      for (int g = 0; g < kAppendHeads; ++g) {
        store_vector(&shared.sums[(part * kAppendHeads + g) * hidden + vector * kAppendVector], acc[g]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * hidden; i += kAppendThreads) {
      const int g = i / hidden, f = i % hidden;
      float sum = 0.f;
      for (int k = 0; k < parts; ++k) sum += shared.sums[(k * kAppendHeads + g) * hidden + f];
      out[(head + g) * length * hidden + f] = sum;
    }
    __syncthreads();
  }
}

// Two channels of a compressed row into the cache: c and c + dim / 2, rotated if there are tables.
template <typename T>
__device__ __forceinline__ void write_pair(const AppendKvParams& p, T* dst, float x, float y,
                                           int64_t position, int c, int dim, bool rotated) {
  const int half = dim / 2;
  if (rotated) {
    const int64_t row = min64(position, p.rotary_rows - 1) * dim + c;
    const float* cos = static_cast<const float*>(p.rotary_cos) + row;
    const float* sin = static_cast<const float*>(p.rotary_sin) + row;
    const float2 turned = rotate_compressed<T>(x, y, {cos[0], cos[half]}, {sin[0], sin[half]});
    x = turned.x;
    y = turned.y;
  }
  dst[c] = static_cast<T>(x);
  dst[c + half] = static_cast<T>(y);
}

struct FinishShared {
  float z[kMaxAppendHidden];
  alignas(16) float sums[kAppendThreads * kAppendVector];
};

// The end of phi for one block and head, from the sums over its tokens.
template <typename T>
__device__ void finish_block(const AppendKvParams& p, const AppendPlan& plan, int index,
                             FinishShared& shared) {
  float *const z = shared.z, *const sums = shared.sums;
  const int heads = p.k.phi.num_heads, head = index % heads, which = index / heads % 2;
  const int slot = index / (2 * heads);
  const AppendStream& stream = stream_of(p, which);
  const CompressFwdParams& phi = stream.phi;
  const int64_t b = slot / plan.blocks_per_sequence;
  const NewBlocks blocks(phi.blocks, clamped_sequence(p.seqs, b));
  if (slot % plan.blocks_per_sequence >= blocks.count) return;
  const int block = blocks.first + slot % plan.blocks_per_sequence;
  const int dim = phi.head_dim, hidden = phi.hidden_size, length = static_cast<int>(phi.blocks.block);
  const int64_t h = phi.per_head ? head : 0;
  const float* partial = plan.hidden[which] + (int64_t{slot} * heads + head) * length * hidden;
  const bool mlp = phi.kind == CompressKind::kMlp;
  for (int f = threadIdx.x; f < hidden; f += kAppendThreads) {
    float sum = 0.f;
#pragma unroll 16
    for (int k = 0; k < length; ++k) sum += partial[static_cast<int64_t>(k) * hidden + f];
    if (phi.kind == CompressKind::kMean) sum /= static_cast<float>(length);
    if (phi.b1 != nullptr) sum += static_cast<float>(static_cast<const T*>(phi.b1)[h * hidden + f]);
    z[f] = mlp ? static_cast<float>(static_cast<T>(sum / (1.f + __expf(-sum)))) : sum;
  }
  __syncthreads();
  if (mlp) {
    const int vectors = dim / kAppendVector, parts = kAppendThreads / vectors;
    const int vector = threadIdx.x % vectors, part = threadIdx.x / vectors;
    float acc[kAppendVector] = {};
    if (part < parts) {
      const T* w = static_cast<const T*>(phi.w2) + h * hidden * dim + vector * kAppendVector;
#pragma unroll 8
      for (int f = part; f < hidden; f += parts) {
        const AppendPack<T> weights =
            *reinterpret_cast<const AppendPack<T>*>(w + static_cast<int64_t>(f) * dim);
#pragma unroll
        for (int e = 0; e < kAppendVector; ++e)
          acc[e] = fmaf(z[f], static_cast<float>(weights.value[e]), acc[e]);
      }
      store_vector(&sums[part * dim + vector * kAppendVector], acc);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dim; c += kAppendThreads) {
      float sum = phi.b2 == nullptr ? 0.f : static_cast<float>(static_cast<const T*>(phi.b2)[h * dim + c]);
      for (int k = 0; k < parts; ++k) sum += sums[k * dim + c];
      z[c] = sum;
    }
    __syncthreads();
  }
  const int64_t at = cached_offset(stream.cmp_cache, b, static_cast<int>(phi.blocks.cached_row(block)), head);
  if (at < 0) return;
  for (int c = threadIdx.x; c < dim / 2; c += kAppendThreads) {
    write_pair(p, static_cast<T*>(stream.cmp_cache.data) + at, z[c], z[c + dim / 2],
               block * phi.blocks.stride, c, dim, which == 0 && p.rotary_cos != nullptr);
  }
}

// 16 bytes on their way to one of the caches.
struct Chunk {
  uint4 value;
  uint4* target = nullptr;  // null: nowhere
};

template <typename T>
__device__ __forceinline__ void load_chunk(Chunk* out, const RowsView& from, const CachedRows& to,
                                           const Sequence& seq, int64_t b, int64_t i, int head, int chunk) {
  if (from.data == nullptr) return;
  // Of what a ring cannot hold, the last tokens.
  if (to.block_table == nullptr && i < seq.q_len - to.page_rows) return;
  const int t = static_cast<int>(seq.position(i));
  const int64_t at = cached_offset(to, b, t, head);
  if (at < 0) return;
  const T* source =
      static_cast<const T*>(from.data) + (seq.q_begin + i) * from.stride_row + head * from.stride_head;
  out->value = reinterpret_cast<const uint4*>(source)[chunk];
  out->target = reinterpret_cast<uint4*>(static_cast<T*>(to.data) + at) + chunk;
}

inline AppendPlan make_append_plan(const AppendKvParams& p) {
  AppendPlan plan{};
  const KeyBlocks blocks = p.k.phi.blocks;
  plan.packed = p.seqs.max_seqlen_q > kMaxDecodeTokens ||
                max(p.k.phi.hidden_size, p.v.phi.hidden_size) > kMaxAppendHidden;
  plan.blocks_per_sequence = static_cast<int>(max64(1, ceil_div(p.seqs.max_seqlen_q, blocks.stride)));
  plan.rows = p.seqs.total_q + p.seqs.batch * (blocks.block - 1);
  return plan;
}

inline int64_t place_append(const AppendKvParams& p, AppendPlan* plan, char* base) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += round_up(bytes, 256);
    return at;
  };
  if (plan->packed) plan->offsets = reinterpret_cast<int32_t*>(take((p.seqs.batch + 1) * 4));
  for (int which = 0; which < 2; ++which) {
    const CompressFwdParams& phi = (which == 0 ? p.k : p.v).phi;
    const int64_t row_bytes = int64_t{phi.num_heads} * phi.head_dim * 2;
    if (plan->packed) {
      plan->x[which] = take(plan->rows * row_bytes);
      plan->out[which] = take(plan->rows / phi.blocks.stride * row_bytes);
      plan->bias[which] =
          take(int64_t{phi.per_head ? phi.num_heads : 1} * kCompressBiasParts * phi.hidden_size * 4);
    } else {
      plan->hidden[which] = reinterpret_cast<float*>(take(
          p.seqs.batch * plan->blocks_per_sequence * phi.num_heads * phi.blocks.block * phi.hidden_size * 4));
    }
  }
  return used;
}

}  // namespace nsa::cuda::portable
