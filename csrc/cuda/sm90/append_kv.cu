// Appends a step of a few tokens to a cache, on Hopper, in one launch: nearly all steps complete no
// compressed block, and a launch more is half of what they take.
//
// A cluster of thread blocks has the keys or the values of a share of the sequences. It stores their tokens;
// where one completes a block, each thread block adds up the products of a few of its tokens, and behind a
// barrier of the cluster each finishes phi for some of the heads.
#include "cuda/common/append_tokens.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/cluster_room.h"
#include "cuda/sm90/launch.h"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kCluster = 16;
constexpr int kMaxShares = 16;
// Of more sequences, several may complete a block at once, and the portable kernels read the weights by more
// thread blocks at a time: 67 us against 115 where 32 do (H100); other steps take about the same.
constexpr int kMaxBatch = 16;

// 16 bytes of a token and head, to the streams that `wanted` says: bit 0 slc, 1 swa, 2 the tail.
template <typename T>
__device__ __forceinline__ void store_tokens(const AppendKvParams& p, const AppendStream& stream,
                                             unsigned wanted) {
  const unsigned heads = stream.phi.num_heads, chunks = stream.phi.head_dim / kAppendVector;
  const unsigned of_sequence = static_cast<unsigned>(p.seqs.max_seqlen_q) * heads * chunks;
  const unsigned share = blockIdx.z, shares = gridDim.z, batch = static_cast<unsigned>(p.seqs.batch);
  const unsigned count = (batch - share + shares - 1) / shares * of_sequence;
#pragma unroll 1
  for (unsigned u = blockIdx.x * kAppendThreads + threadIdx.x; u < count; u += kCluster * kAppendThreads) {
    const unsigned of_share = u / of_sequence, piece = u - of_share * of_sequence;
    const int64_t b = share + of_share * shares;
    const int64_t i = piece / (heads * chunks);
    const int head = piece / chunks % heads, chunk = piece % chunks;
    const Sequence seq = clamped_sequence(p.seqs, b);
    if (i >= seq.q_len) continue;
    // All loads before the first store, which the compiler has to keep in front of any load behind it.
    Chunk found[3];
    if (wanted & 1) load_chunk<T>(&found[0], stream.slc, stream.slc_cache, seq, b, i, head, chunk);
    if (wanted & 2) load_chunk<T>(&found[1], stream.swa, stream.swa_cache, seq, b, i, head, chunk);
    if (wanted & 4) load_chunk<T>(&found[2], stream.cmp, stream.tail, seq, b, i, head, chunk);
#pragma unroll
    for (int to = 0; to < 3; ++to) {
      if (found[to].target != nullptr) *found[to].target = found[to].value;
    }
  }
}

// f(slot, sequence, its first new block, its number of new blocks) for the sequences of the share that
// complete blocks. Every warp looks at 32 sequences at once: most complete none.
template <typename F>
__device__ __forceinline__ void for_each_completing(const AppendKvParams& p, KeyBlocks keys, const F& f) {
  const int batch = static_cast<int>(p.seqs.batch), share = blockIdx.z, shares = gridDim.z;
#pragma unroll 1
  for (int first = share; first < batch; first += 32 * shares) {
    const int own = first + static_cast<int>(threadIdx.x & 31) * shares;
    unsigned found =
        __ballot_sync(~0u, own < batch && NewBlocks(keys, clamped_sequence(p.seqs, own)).count > 0);
#pragma unroll 1
    for (; found != 0; found &= found - 1) {
      const int64_t b = first + static_cast<int64_t>(__ffs(found) - 1) * shares;
      const Sequence seq = clamped_sequence(p.seqs, b);
      f(b, seq, NewBlocks(keys, seq));
    }
  }
}

// The weights of phi that this thread block reads, to the L2 cache: all at once, long before it comes to the
// last of them.
template <typename T>
__device__ __forceinline__ void prefetch_weights(const CompressFwdParams& phi) {
  if (phi.kind == CompressKind::kMean) return;
  const int64_t length = phi.blocks.block, of_token = int64_t{phi.head_dim} * phi.hidden_size;
  const int sets = phi.per_head ? phi.num_heads : 1;
#pragma unroll 1
  for (int h = 0; h < sets; ++h) {
#pragma unroll 1
    for (int64_t offset = blockIdx.x; offset < length; offset += kCluster) {
      ptx::bulk_prefetch(static_cast<const T*>(phi.w1) + (h * length + offset) * of_token,
                         static_cast<uint32_t>(of_token * sizeof(T)));
    }
    if (phi.kind == CompressKind::kMlp && blockIdx.x == h % kCluster) {
      ptx::bulk_prefetch(static_cast<const T*>(phi.w2) + h * of_token,
                         static_cast<uint32_t>(of_token * sizeof(T)));
    }
  }
}

// Thread blocks (of the cluster, K or V, share of the sequences). tail_is_free: no token takes the place of
// one that phi still reads.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    append_kv_sm90(const __grid_constant__ AppendKvParams p, const __grid_constant__ AppendPlan plan,
                   const bool tail_is_free) {
  __shared__ union {
    HiddenShared hidden;
    FinishShared finish;
  } shared;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  const int rank = blockIdx.x, which = blockIdx.y;
  const AppendStream& stream = stream_of(p, which);
  const CompressFwdParams& phi = stream.phi;
  const int heads = phi.num_heads, length = static_cast<int>(phi.blocks.block);
  store_tokens<T>(p, stream, tail_is_free ? 7 : 3);

  bool completes = false;
  for_each_completing(p, phi.blocks, [&](int64_t b, const Sequence& seq, const NewBlocks& blocks) {
    if (!completes && threadIdx.x == 0) prefetch_weights<T>(phi);
    completes = true;
#pragma unroll 1
    for (int k = 0; k < blocks.count; ++k) {
      const int begin = (blocks.first + k) * static_cast<int>(phi.blocks.stride);
      const int64_t slot = b * plan.blocks_per_sequence + k;
#pragma unroll 1
      for (int offset = rank; offset < length; offset += kCluster) {
        hidden_share<T>(stream, seq, b, begin + offset, offset,
                        plan.hidden[which] + (slot * heads * length + offset) * phi.hidden_size,
                        shared.hidden);
      }
    }
  });
  if (completes) {
    // What the other thread blocks have left in memory is there, and none reads the tail any more.
    ptx::cluster_sync();
    int task = 0;
    for_each_completing(p, phi.blocks, [&](int64_t b, const Sequence&, const NewBlocks& blocks) {
#pragma unroll 1
      for (int k = 0; k < blocks.count * heads; ++k, ++task) {
        if (task % kCluster != rank) continue;
        const int slot = static_cast<int>(b) * plan.blocks_per_sequence + k / heads;
        finish_block<T>(p, plan, (slot * 2 + which) * heads + k % heads, shared.finish);
        __syncthreads();
      }
    });
  }
  if (!tail_is_free) store_tokens<T>(p, stream, 4);
}

}  // namespace

bool append_kv(const AppendKvParams& p, const Stream& stream, Status* status) {
  AppendPlan plan = make_append_plan(p);
  if (plan.packed || p.seqs.batch > kMaxBatch) return false;
  for (const CompressFwdParams* phi : {&p.k.phi, &p.v.phi}) {
    if (phi->head_dim % 16 || phi->head_dim > kMaxAppendDim || phi->hidden_size % kAppendVector ||
        phi->hidden_size > kMaxAppendHidden)
      return false;
    if (p.seqs.batch * p.seqs.max_seqlen_q * phi->num_heads * phi->head_dim >= int64_t{1} << 31) return false;
  }
  const auto run = [&]<typename T>() {
    static OncePerDevice<int> room;
    const auto kernel = append_kv_sm90<T>;
    if (room.get([&] { return max_active_clusters(kernel, kCluster, kAppendThreads, 0); }) == 0) return false;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    place_append(p, &plan, static_cast<char*>(p.workspace));
    const int64_t reach = p.k.phi.blocks.block - 1 + p.seqs.max_seqlen_q;
    const bool tail_is_free = p.k.tail.page_rows >= reach && p.v.tail.page_rows >= reach;
    const dim3 grid(kCluster, 2, static_cast<unsigned>(min64(p.seqs.batch, kMaxShares)));
    *status = launch_chained_clusters("append_kv_sm90", kernel, grid, kCluster, kAppendThreads, 0, stream, p,
                                      plan, tail_is_free);
    return true;
  };
  if (p.k.phi.dtype == DType::kBF16) return run.template operator()<__nv_bfloat16>();
  if (p.k.phi.dtype == DType::kF16) return run.template operator()<__half>();
  return false;
}

}  // namespace nsa::cuda::sm90
