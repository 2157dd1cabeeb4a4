// Appends a step of a few tokens to a cache, on Hopper, in one launch: nearly all steps complete no
// compressed block, and a launch more is half of what they take.
//
// A cluster of thread blocks has the keys or the values of a share of the sequences. It stores their tokens;
// where some complete a block, the thread blocks share phi of all of these (append_phi.cuh).
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/append_phi.cuh"
#include "cuda/sm90/cluster_room.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {
namespace {

enum Target { kSlc, kSwa, kTail };

// 16 bytes of a token and head.
struct Piece {
  int b, i, head, chunk;  // sequence, its token, head, 16 bytes of that

  __device__ __forceinline__ Piece(const AppendDivisors& by, int which, int index) {
    const int token = by.pieces[which].divide(index), piece = index - by.pieces[which].times(token);
    const int of_share = by.tokens.divide(token);
    b = static_cast<int>(blockIdx.z + of_share * gridDim.z);
    i = token - by.tokens.times(of_share);
    head = by.chunks[which].divide(piece);
    chunk = piece - by.chunks[which].times(head);
  }
};

// It on its way to a cache.
struct Copy {
  uint4 value;
  uint4* target;  // null: nowhere

  // No branches but those that all copies take or none.
  template <typename T>
  __device__ __forceinline__ void load(const AppendKvParams& p, const AppendDivisors& by, const Piece& piece,
                                       const RowsView& from, const CachedRows& to, const Divisor& page_rows,
                                       bool exists) {
    const Step step(p, by, piece.b, exists);
    const bool ring = to.block_table == nullptr;
    // Of what a ring cannot hold, the last tokens.
    const bool stays =
        piece.i < step.q_len && (!ring || piece.i >= step.q_len - static_cast<int>(page_rows.value));
    const int t = step.cached + piece.i, index = page_rows.divide(t);
    value = ptx::load_16(static_cast<const T*>(from.data) + (step.q_begin + piece.i) * from.stride_row +
                             piece.head * from.stride_head + piece.chunk * kAppendVector,
                         stays);
    const int in_table = ptx::load_4(to.block_table + piece.b * to.table_width + index, stays && !ring),
              page = ring ? piece.b : in_table;
    T* const there = static_cast<T*>(to.data) + page * to.stride_page +
                     (t - page_rows.times(index)) * to.stride_row + piece.head * to.stride_head +
                     piece.chunk * kAppendVector;
    target = stays && page >= 0 && page < to.num_pages ? reinterpret_cast<uint4*>(there) : nullptr;
  }
  __device__ __forceinline__ void store() const {
    if (target != nullptr) *target = value;
  }
};

// Thread blocks (of the cluster, K or V, share of the sequences). tail_is_free: no token takes the place of
// one that phi still reads.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads, 1)
    append_kv_sm90(const __grid_constant__ AppendKvParams p, const __grid_constant__ AppendDivisors by,
                   const __grid_constant__ PhiMaps maps, const bool tail_is_free) {
  extern __shared__ __align__(16) unsigned char bytes[];
  PhiShared& shared = *reinterpret_cast<PhiShared*>(
      bytes + (kPanelAlignment - ptx::shared_address(bytes) % kPanelAlignment) % kPanelAlignment);
  // A thread block copies to one of the three caches: less code, which has to come from memory first.
  constexpr int kCopiers = kAppendCluster / kTargets;
  const int which = blockIdx.y, lane = threadIdx.x & 31, to = blockIdx.x % kTargets;
  const AppendStream& stream = stream_of(p, which);
  const RowsView& from = to == kSlc ? stream.slc : to == kSwa ? stream.swa : stream.cmp;
  const CachedRows& cache = to == kSlc ? stream.slc_cache : to == kSwa ? stream.swa_cache : stream.tail;
  const int batch = static_cast<int>(p.seqs.batch), shares = gridDim.z;
  const int count = from.data == nullptr || blockIdx.x >= kCopiers * kTargets
                        ? 0
                        : (batch - static_cast<int>(blockIdx.z) + shares - 1) / shares *
                              static_cast<int>(by.tokens.value * by.pieces[which].value);
  const int first = blockIdx.x / kTargets * kAppendThreads + threadIdx.x;
  const Piece first_piece(by, which, first);
  const auto copy_from = [&](int first) {
#pragma unroll 1
    for (int index = first; index < count; index += kCopiers * kAppendThreads) {
      Copy copy;
      copy.load<T>(p, by, Piece(by, which, index), from, cache, by.page_rows[which][to], true);
      copy.store();
    }
  };
  const bool copies_at_once = to != kTail || tail_is_free;
  ptx::wait_for_dependency();
  ptx::launch_dependents();
  Copy copy;  // what follows hides behind its load
  copy.load<T>(p, by, first_piece, from, cache, by.page_rows[which][to], copies_at_once && first < count);
  Step step{};
  int completed_by_lane = 0;
  for_each_warpful(p, lane, [&](int b) {
    step = Step(p, by, b, b < p.seqs.batch);
    completed_by_lane += step.num_blocks;
  });
  copy.store();
  if (copies_at_once) copy_from(first + kCopiers * kAppendThreads);
  const int num_blocks = __reduce_add_sync(~0u, completed_by_lane);  // the same in the whole cluster
  if (num_blocks > 0) {
    if (stream.phi.kind == CompressKind::kMean) {
      average_blocks<T>(p, by, which, by.heads[which].times(num_blocks), step, shared);
    } else {
      compress_blocks<T>(p, by, which, num_blocks, maps, step, shared);
    }
  }
  if (tail_is_free) return;
  if (num_blocks > 0) ptx::cluster_sync();  // no thread block reads the tail any more
  if (to == kTail) copy_from(first);
}

// Clusters that the device runs at once.
template <typename T>
int active_clusters() {
  static OncePerDevice<int> room;
  return room.get(
      [] { return max_active_clusters(append_kv_sm90<T>, kAppendCluster, kAppendThreads, kPhiSharedBytes); });
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <typename T>
Status launch_append(const AppendKvParams& p, const Stream& stream) {
  const auto kernel = append_kv_sm90<T>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  const int64_t reach = p.k.phi.blocks.block - 1 + p.seqs.max_seqlen_q;
  const bool tail_is_free = p.k.tail.page_rows >= reach && p.v.tail.page_rows >= reach;
  const int64_t shares =
      min64(max64(1, active_clusters<T>() / 2), ceil_div(p.seqs.batch * p.k.phi.num_heads, kPhiRows));
  PhiMaps maps{};
  for (int which = 0; which < 2; ++which) {
    const CompressFwdParams& phi = (which == 0 ? p.k : p.v).phi;
    if (phi.kind == CompressKind::kMean) continue;
    const int64_t sets = phi.per_head ? phi.num_heads : 1;
    const RowsView w1{phi.w1, phi.hidden_size, phi.hidden_size}, w2{phi.w2, phi.head_dim, phi.head_dim};
    bool made = make_tensor_map(&maps.first[which], phi.dtype, w1, sets * phi.blocks.block * phi.head_dim, 1,
                                phi.hidden_size, min(kPhiDepth, phi.head_dim), 1);
    if (made && phi.kind == CompressKind::kMlp) {
      made = make_tensor_map(&maps.second[which], phi.dtype, w2, sets * phi.hidden_size, 1, phi.head_dim,
                             min(kPhiDepth, phi.hidden_size), 1);
    }
    if (!made)
      return Status::error(StatusCode::kDeviceError, "the driver makes no tensor map of the weights");
  }
  const dim3 grid(kAppendCluster, 2, static_cast<unsigned>(shares));
  return launch_chained_clusters("append_kv_sm90", kernel, grid, kAppendCluster, kAppendThreads,
                                 kPhiSharedBytes, stream, p, AppendDivisors(p), maps, tail_is_free);
}

}  // namespace

bool can_append(const AppendKvParams& p) {
  if (p.seqs.max_seqlen_q > kMaxDecodeTokens) return false;
  // Lengths have 32 bits; a ring has a row to store to.
  if (p.seqs.capacity >= int64_t{1} << 31) return false;
  if (p.k.tail.page_rows == 0 || p.v.tail.page_rows == 0) return false;
  for (const CompressFwdParams* phi : {&p.k.phi, &p.v.phi}) {
    if (phi->head_dim % kWarpColumns || phi->head_dim > kMaxAppendDim || phi->hidden_size % kWarpColumns)
      return false;
    if (phi->blocks.block > kMaxPhiTokens * kAppendCluster) return false;
    if (p.seqs.batch * p.seqs.max_seqlen_q * phi->num_heads * phi->head_dim >= int64_t{1} << 31) return false;
    if (!is_aligned(phi->w1) || !is_aligned(phi->w2)) return false;
  }
  const DType dtype = p.k.phi.dtype;
  return (dtype == DType::kBF16 && active_clusters<__nv_bfloat16>() > 0) ||
         (dtype == DType::kF16 && active_clusters<__half>() > 0);
}

bool append_kv(const AppendKvParams& p, const Stream& stream, Status* status) {
  if (!can_append(p)) return false;
  *status = dispatch_half(p.k.phi.dtype, [&]<typename T>() { return launch_append<T>(p, stream); });
  return true;
}

}  // namespace nsa::cuda::sm90
