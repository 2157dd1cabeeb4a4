// Appends a step's tokens to a cache (sm_80 and newer).
//
// A few tokens per sequence complete a block now and then. Then the first product of phi, whose weights are
// what costs, is split over the tokens of the block, in float: one launch for the partial sums, one that
// finishes phi and stores the tokens (in this order: phi reads the ring that they are stored to). Longer
// steps pack the tokens of all finished blocks and take the kernel of nsa::compress.
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/cached_sequence.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;    // elements of 16 bits in 16 bytes
constexpr int kHeads = 4;     // that share one read of the weights
constexpr int kMaxSlots = 4;  // thread blocks for each token of a block: few sequences complete one at a time
constexpr int kMaxHidden = 2048;
constexpr int kMaxDim = 256;

using TokenStream = AppendKvParams::Stream;

// The workspace of either way.
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

__device__ __forceinline__ const TokenStream& stream_of(const AppendKvParams& p, int index) {
  return index == 0 ? p.k : p.v;
}

template <typename T>
struct alignas(16) Pack {
  T value[kVector];
};

// What phi sees of token t of a sequence: null for a page that does not exist.
template <typename T>
__device__ __forceinline__ const T* phi_token(const TokenStream& stream, const Sequence& seq, int64_t b,
                                              int t, int head) {
  const int64_t fresh = t - seq.position(0);
  if (fresh >= 0) {
    return static_cast<const T*>(stream.cmp.data) + (seq.q_begin + fresh) * stream.cmp.stride_row +
           head * stream.cmp.stride_head;
  }
  return static_cast<const T*>(stream.tail.data) + cached_offset(stream.tail, b, t, head);
}

// 16 bytes at a time: single floats at this stride would meet in four banks.
__device__ __forceinline__ void store_vector(float* to, const float (&x)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; e += 4)
    *reinterpret_cast<float4*>(to + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
}

struct HiddenShared {
  float x[kHeads][kMaxDim];
  alignas(16) float sums[kThreads * kHeads * kVector];
};

// One token's share of W1 . vec(X + PE) for a block, all heads; kMean: the token itself.
template <typename T>
__device__ void hidden_share(const TokenStream& stream, const Sequence& seq, int64_t b, int t, int offset,
                             float* out, HiddenShared& shared) {
  const CompressFwdParams& phi = stream.phi;
  const int dim = phi.head_dim, hidden = phi.hidden_size, heads = phi.num_heads;
  const int64_t length = phi.blocks.block;
  const int per_pass = phi.per_head ? 1 : kHeads, vectors = hidden / kVector, parts = kThreads / vectors;
  const int vector = threadIdx.x % vectors, part = threadIdx.x / vectors;
  for (int head = 0; head < heads; head += per_pass) {
    const int count = min(per_pass, heads - head);
    const int64_t h = phi.per_head ? head : 0;
    const T* pe = phi.pe == nullptr ? nullptr : static_cast<const T*>(phi.pe) + (h * length + offset) * dim;
    for (int i = threadIdx.x; i < kHeads * dim; i += kThreads) {
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
    float acc[kHeads][kVector] = {};
    if (part < parts) {
      const T* w = static_cast<const T*>(phi.w1) + (h * length + offset) * dim * hidden + vector * kVector;
#pragma unroll 8
      for (int c = part; c < dim; c += parts) {
        const Pack<T> weights = *reinterpret_cast<const Pack<T>*>(w + static_cast<int64_t>(c) * hidden);
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            acc[g][e] = fmaf(shared.x[g][c], static_cast<float>(weights.value[e]), acc[g][e]);
        }
      }
#pragma unroll
      for (int g = 0; g < kHeads; ++g) {
        store_vector(&shared.sums[(part * kHeads + g) * hidden + vector * kVector], acc[g]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * hidden; i += kThreads) {
      const int g = i / hidden, f = i % hidden;
      float sum = 0.f;
      for (int k = 0; k < parts; ++k) sum += shared.sums[(k * kHeads + g) * hidden + f];
      out[(head + g) * length * hidden + f] = sum;
    }
    __syncthreads();
  }
}

// Thread blocks (token of a block, K or V, share of the sequences).
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    append_hidden_portable(const __grid_constant__ AppendKvParams p,
                           const __grid_constant__ AppendPlan plan) {
  __shared__ HiddenShared shared;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const TokenStream& stream = stream_of(p, blockIdx.y);
  const CompressFwdParams& phi = stream.phi;
  const int offset = blockIdx.x, num_slots = static_cast<int>(p.seqs.batch) * plan.blocks_per_sequence;
  // Every warp looks at 32 slots at once: most have no finished block.
  for (int first = blockIdx.z; first < num_slots; first += 32 * gridDim.z) {
    const auto exists = [&](int slot) {
      const NewBlocks blocks(phi.blocks, clamped_sequence(p.seqs, slot / plan.blocks_per_sequence));
      return slot % plan.blocks_per_sequence < blocks.count;
    };
    const int own = first + static_cast<int>((threadIdx.x & 31) * gridDim.z);
    unsigned found = __ballot_sync(~0u, own < num_slots && exists(own));
    for (; found != 0; found &= found - 1) {
      const int slot = first + static_cast<int>((__ffs(found) - 1) * gridDim.z);
      const int64_t b = slot / plan.blocks_per_sequence;
      const Sequence seq = clamped_sequence(p.seqs, b);
      const int block = NewBlocks(phi.blocks, seq).first + slot % plan.blocks_per_sequence;
      hidden_share<T>(stream, seq, b, block * static_cast<int>(phi.blocks.stride) + offset, offset,
                      plan.hidden[blockIdx.y] +
                          (int64_t{slot} * phi.num_heads * phi.blocks.block + offset) * phi.hidden_size,
                      shared);
    }
  }
}

// Two channels of a compressed row into the cache: c and c + dim / 2, rotated if there are tables.
template <typename T>
__device__ __forceinline__ void write_pair(const AppendKvParams& p, T* dst, float x, float y,
                                           int64_t position, int c, int dim, bool rotated) {
  const int half = dim / 2;
  if (rotated) {
    // phi's result is rounded before it is rotated, as everywhere.
    x = static_cast<float>(static_cast<T>(x));
    y = static_cast<float>(static_cast<T>(y));
    const int64_t row = min64(position, p.rotary_rows - 1) * dim + c;
    const float* cos = static_cast<const float*>(p.rotary_cos) + row;
    const float* sin = static_cast<const float*>(p.rotary_sin) + row;
    const float turned = x * cos[0] - y * sin[0];
    y = y * cos[half] + x * sin[half];
    x = turned;
  }
  dst[c] = static_cast<T>(x);
  dst[c + half] = static_cast<T>(y);
}

// The end of phi for one block and head, from the sums over its tokens.
template <typename T>
__device__ void finish_block(const AppendKvParams& p, const AppendPlan& plan, int index) {
  __shared__ float z[kMaxHidden];
  __shared__ __align__(16) float sums[kThreads * kVector];
  const int heads = p.k.phi.num_heads, head = index % heads, which = index / heads % 2;
  const int slot = index / (2 * heads);
  const TokenStream& stream = stream_of(p, which);
  const CompressFwdParams& phi = stream.phi;
  const int64_t b = slot / plan.blocks_per_sequence;
  const NewBlocks blocks(phi.blocks, clamped_sequence(p.seqs, b));
  if (slot % plan.blocks_per_sequence >= blocks.count) return;
  const int block = blocks.first + slot % plan.blocks_per_sequence;
  const int dim = phi.head_dim, hidden = phi.hidden_size, length = static_cast<int>(phi.blocks.block);
  const int64_t h = phi.per_head ? head : 0;
  const float* partial = plan.hidden[which] + (int64_t{slot} * heads + head) * length * hidden;
  const bool mlp = phi.kind == CompressKind::kMlp;
  for (int f = threadIdx.x; f < hidden; f += kThreads) {
    float sum = 0.f;
#pragma unroll 16
    for (int k = 0; k < length; ++k) sum += partial[static_cast<int64_t>(k) * hidden + f];
    if (phi.kind == CompressKind::kMean) sum /= static_cast<float>(length);
    if (phi.b1 != nullptr) sum += static_cast<float>(static_cast<const T*>(phi.b1)[h * hidden + f]);
    z[f] = mlp ? static_cast<float>(static_cast<T>(sum / (1.f + __expf(-sum)))) : sum;
  }
  __syncthreads();
  if (mlp) {
    const int vectors = dim / kVector, parts = kThreads / vectors;
    const int vector = threadIdx.x % vectors, part = threadIdx.x / vectors;
    float acc[kVector] = {};
    if (part < parts) {
      const T* w = static_cast<const T*>(phi.w2) + h * hidden * dim + vector * kVector;
#pragma unroll 8
      for (int f = part; f < hidden; f += parts) {
        const Pack<T> weights = *reinterpret_cast<const Pack<T>*>(w + static_cast<int64_t>(f) * dim);
#pragma unroll
        for (int e = 0; e < kVector; ++e) acc[e] = fmaf(z[f], static_cast<float>(weights.value[e]), acc[e]);
      }
      store_vector(&sums[part * dim + vector * kVector], acc);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < dim; c += kThreads) {
      float sum = phi.b2 == nullptr ? 0.f : static_cast<float>(static_cast<const T*>(phi.b2)[h * dim + c]);
      for (int k = 0; k < parts; ++k) sum += sums[k * dim + c];
      z[c] = sum;
    }
    __syncthreads();
  }
  const int64_t at = cached_offset(stream.cmp_cache, b, static_cast<int>(phi.blocks.cached_row(block)), head);
  if (at < 0) return;
  for (int c = threadIdx.x; c < dim / 2; c += kThreads) {
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

// 16 bytes of a token and head, to every stream.
template <typename T>
__device__ void store_token(const AppendKvParams& p, unsigned block) {
  const unsigned heads = p.k.phi.num_heads, chunks = max(p.k.phi.head_dim, p.v.phi.head_dim) / kVector;
  const int64_t index = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  // A 64-bit division, which few steps are long enough for, costs more than all the rest.
  const int64_t row =
      index >> 32 ? index / (chunks * heads) : static_cast<unsigned>(index) / (chunks * heads);
  const unsigned rest = static_cast<unsigned>(index - row * (chunks * heads));
  const int chunk = rest % chunks, head = rest / chunks;
  if (row >= p.seqs.total_q) return;
  const int64_t b = find_sequence(p.seqs, row);
  if (b < 0) return;
  const Sequence seq = clamped_sequence(p.seqs, b);
  // All loads before the first store, which the compiler has to keep in front of any load behind it.
  Chunk chunks_of[2][3];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const TokenStream& stream = which == 0 ? p.k : p.v;
    if (chunk >= stream.phi.head_dim / kVector) continue;
    const int64_t i = row - seq.q_begin;
    load_chunk<T>(&chunks_of[which][0], stream.slc, stream.slc_cache, seq, b, i, head, chunk);
    load_chunk<T>(&chunks_of[which][1], stream.swa, stream.swa_cache, seq, b, i, head, chunk);
    load_chunk<T>(&chunks_of[which][2], stream.cmp, stream.tail, seq, b, i, head, chunk);
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int to = 0; to < 3; ++to) {
      if (chunks_of[which][to].target != nullptr) *chunks_of[which][to].target = chunks_of[which][to].value;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    append_store_portable(const __grid_constant__ AppendKvParams p, const __grid_constant__ AppendPlan plan,
                          const int num_finish) {
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  if (static_cast<int>(blockIdx.x) < num_finish) {
    finish_block<T>(p, plan, blockIdx.x);
  } else {
    store_token<T>(p, blockIdx.x - num_finish);
  }
}

// Longer steps.

__global__ void append_offsets_portable(const __grid_constant__ AppendKvParams p,
                                        const __grid_constant__ AppendPlan plan) {
  int sum = 0;
  for (int64_t begin = 0; begin < p.seqs.batch; begin += 32) {
    const int64_t b = begin + threadIdx.x;
    int own = 0;
    if (b < p.seqs.batch)
      own = NewBlocks(p.k.phi.blocks, clamped_sequence(p.seqs, b)).num_tokens(p.k.phi.blocks);
    int running = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, running, step);
      if (static_cast<int>(threadIdx.x) >= step) running += other;
    }
    if (b < p.seqs.batch) plan.offsets[b + 1] = static_cast<int>(min64(sum + running, plan.rows));
    sum += __shfl_sync(~0u, running, 31);
  }
  if (threadIdx.x == 0) plan.offsets[0] = 0;
}

// The last sequence whose first packed row, in units of `stride` tokens, is at or before `row`.
__device__ int64_t find_packed(const AppendPlan& plan, int64_t batch, int64_t row, int64_t stride) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (plan.offsets[middle] / stride <= row ? low : high) = middle;
  }
  return low;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    append_pack_portable(const __grid_constant__ AppendKvParams p, const __grid_constant__ AppendPlan plan) {
  const TokenStream& stream = stream_of(p, blockIdx.y);
  const int heads = stream.phi.num_heads, dim = stream.phi.head_dim, chunks = dim / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                row = index / chunks / heads;
  if (row >= plan.offsets[p.seqs.batch]) return;
  const int chunk = static_cast<int>(index % chunks), head = static_cast<int>(index / chunks % heads);
  const int64_t b = find_packed(plan, p.seqs.batch, row, 1);
  const Sequence seq = clamped_sequence(p.seqs, b);
  const NewBlocks blocks(stream.phi.blocks, seq);
  const int t = static_cast<int>(blocks.first * stream.phi.blocks.stride + row - plan.offsets[b]);
  const T* source = phi_token<T>(stream, seq, b, t, head);
  static_cast<uint4*>(plan.x[blockIdx.y])[index] = reinterpret_cast<const uint4*>(source)[chunk];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) append_scatter_portable(const __grid_constant__ AppendKvParams p,
                                                                    const __grid_constant__ AppendPlan plan) {
  const TokenStream& stream = stream_of(p, blockIdx.y);
  const KeyBlocks keys = stream.phi.blocks;
  const int heads = stream.phi.num_heads, dim = stream.phi.head_dim, half = dim / 2;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = index / half / heads;
  if (row >= plan.rows / keys.stride) return;
  const int c = static_cast<int>(index % half), head = static_cast<int>(index / half % heads);
  const int64_t b = find_packed(plan, p.seqs.batch, row, keys.stride);
  const NewBlocks blocks(keys, clamped_sequence(p.seqs, b));
  const int64_t j = row - keys.first_row(plan.offsets[b]);
  if (j >= blocks.count) return;
  const int block = static_cast<int>(blocks.first + j);
  const int64_t at = cached_offset(stream.cmp_cache, b, static_cast<int>(keys.cached_row(block)), head);
  if (at < 0) return;
  const T* source = static_cast<const T*>(plan.out[blockIdx.y]) + (row * heads + head) * dim + c;
  write_pair(p, static_cast<T*>(stream.cmp_cache.data) + at, static_cast<float>(source[0]),
             static_cast<float>(source[half]), block * keys.stride, c, dim,
             blockIdx.y == 0 && p.rotary_cos != nullptr);
}

AppendPlan make_plan(const AppendKvParams& p) {
  AppendPlan plan{};
  const KeyBlocks blocks = p.k.phi.blocks;
  plan.packed = p.seqs.max_seqlen_q > kMaxDecodeTokens;
  plan.blocks_per_sequence = static_cast<int>(max64(1, ceil_div(p.seqs.max_seqlen_q, blocks.stride)));
  plan.rows = p.seqs.total_q + p.seqs.batch * (blocks.block - 1);
  return plan;
}

int64_t place(const AppendKvParams& p, AppendPlan* plan, char* base) {
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

unsigned thread_blocks(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

template <typename T>
Status compress_packed(const AppendKvParams& p, const AppendPlan& plan, const Stream& stream) {
  Status status = launch("append_offsets_portable", append_offsets_portable, dim3(1), 32, 0, stream, p, plan);
  if (!status.ok()) return status;
  const int64_t heads = p.k.phi.num_heads, dim = max64(p.k.phi.head_dim, p.v.phi.head_dim);
  status = launch("append_pack_portable", append_pack_portable<T>,
                  dim3(thread_blocks(plan.rows * heads * dim / kVector), 2), kThreads, 0, stream, p, plan);
  if (!status.ok()) return status;
  for (int which = 0; which < 2; ++which) {
    CompressFwdParams phi = (which == 0 ? p.k : p.v).phi;
    const int64_t longest = p.seqs.max_seqlen_q + phi.blocks.block - 1;
    phi.seqs = {plan.offsets, plan.offsets, p.seqs.batch, plan.rows, longest, longest, plan.rows};
    phi.x = {plan.x[which], int64_t{phi.num_heads} * phi.head_dim, phi.head_dim};
    phi.out = plan.out[which];
    phi.num_rows = plan.rows / phi.blocks.stride;
    phi.workspace = plan.bias[which];
    status = cuda::compress_forward(phi, stream);
    if (!status.ok()) return status;
  }
  const int64_t rows = plan.rows / p.k.phi.blocks.stride;
  return launch("append_scatter_portable", append_scatter_portable<T>,
                dim3(thread_blocks(rows * heads * dim / 2), 2), kThreads, 0, stream, p, plan);
}

}  // namespace

int64_t workspace_bytes(const AppendKvParams& p) {
  AppendPlan plan = make_plan(p);
  return place(p, &plan, nullptr);
}

Status append_kv(const AppendKvParams& p, const Stream& stream) {
  for (const CompressFwdParams* phi : {&p.k.phi, &p.v.phi}) {
    if (phi->head_dim % 16 || phi->head_dim > kMaxDim || phi->hidden_size % kVector ||
        phi->hidden_size > kMaxHidden) {
      return Status::error(
          StatusCode::kUnsupported,
          "head dim %d with hidden size %d has no CUDA kernel: they must be multiples of 16 up to "
          "256 and of 8 up to 2048",
          phi->head_dim, phi->hidden_size);
    }
  }
  AppendPlan plan = make_plan(p);
  place(p, &plan, static_cast<char*>(p.workspace));
  return dispatch_half(p.k.phi.dtype, [&]<typename T>() {
    const int64_t heads = p.k.phi.num_heads, length = p.k.phi.blocks.block;
    const int64_t blocks = p.seqs.batch * plan.blocks_per_sequence;
    const Status status = plan.packed ? compress_packed<T>(p, plan, stream)
                                      : launch_chained("append_hidden_portable", append_hidden_portable<T>,
                                                       dim3(static_cast<unsigned>(length), 2,
                                                            static_cast<unsigned>(min64(blocks, kMaxSlots))),
                                                       kThreads, 0, stream, p, plan);
    if (!status.ok()) return status;
    const int num_finish = plan.packed ? 0 : static_cast<int>(blocks * heads * 2);
    const int64_t chunks = max64(p.k.phi.head_dim, p.v.phi.head_dim) / kVector;
    return launch_chained("append_store_portable", append_store_portable<T>,
                          dim3(num_finish + thread_blocks(p.seqs.total_q * heads * chunks)), kThreads, 0,
                          stream, p, plan, num_finish);
  });
}

}  // namespace nsa::cuda::portable
