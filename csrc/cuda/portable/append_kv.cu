// Appends a step's tokens to a cache (sm_80 and newer).
//
// A few tokens per sequence complete a block now and then. Then the first product of phi, whose weights are
// what costs, is split over the tokens of the block, in float: one launch for the partial sums, one that
// finishes phi and stores the tokens (in this order: phi reads the ring that they are stored to). Longer
// steps, and hidden layers that do not fit, pack the tokens of all finished blocks and take the kernel of
// nsa::compress.
#include "cuda/portable/append_blocks.cuh"
#include "cuda/portable/launch.h"
#include "cuda/portable/types.cuh"
#include "cuda/ptx/grid_dependency.cuh"

namespace nsa::cuda::portable {
namespace {

constexpr int kThreads = kAppendThreads;
constexpr int kVector = kAppendVector;
constexpr int kMaxSlots = 4;  // thread blocks for each token of a block: few sequences complete one at a time

// Thread blocks (token of a block, K or V, share of the sequences).
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    append_hidden_portable(const __grid_constant__ AppendKvParams p,
                           const __grid_constant__ AppendPlan plan) {
  __shared__ HiddenShared shared;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const AppendStream& stream = stream_of(p, blockIdx.y);
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
    const AppendStream& stream = which == 0 ? p.k : p.v;
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
    __shared__ FinishShared shared;
    finish_block<T>(p, plan, blockIdx.x, shared);
  } else {
    store_token<T>(p, blockIdx.x - num_finish);
  }
}

// By the kernel of nsa::compress.

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
  const AppendStream& stream = stream_of(p, blockIdx.y);
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
  const AppendStream& stream = stream_of(p, blockIdx.y);
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
  AppendPlan plan = make_append_plan(p);
  return place_append(p, &plan, nullptr);
}

Status append_kv(const AppendKvParams& p, const Stream& stream) {
  for (const CompressFwdParams* phi : {&p.k.phi, &p.v.phi}) {
    if (phi->head_dim % 16 || phi->head_dim > kMaxAppendDim || phi->hidden_size % kVector) {
      return Status::error(
          StatusCode::kUnsupported,
          "head dim %d with hidden size %d has no CUDA kernel: they must be multiples of 16 up to "
          "256 and of 8",
          phi->head_dim, phi->hidden_size);
    }
  }
  AppendPlan plan = make_append_plan(p);
  place_append(p, &plan, static_cast<char*>(p.workspace));
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
