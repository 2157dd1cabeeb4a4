// A step that is appended to a cache, as the Hopper kernel sees it: its sequences, the blocks that they
// complete, and where tokens and compressed rows are. In 32 bits, and without a division: in most steps there
// is nothing else to do but to find this out.
#pragma once

#include "cuda/common/append_stream.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/tile/divisor.cuh"

namespace nsa::cuda::sm90 {

constexpr int kAppendCluster = 16;
constexpr int kAppendWarps = kAppendThreads / 32;
constexpr int kWarpColumns = 32;          // of a product, that a warp has
constexpr int kPhiSlabs = 3;              // of 16 rows, that go through phi together
constexpr int kPhiRows = 16 * kPhiSlabs;  // 12 blocks of 4 heads: a third of 32 sequences

// What is divided by.
constexpr int kTargets = 3;  // of each stream: slc, swa, tail
struct AppendDivisors {
  Divisor tokens;                // the most of a sequence
  Divisor stride;                // of compressed blocks
  Divisor heads[2];              // rows of a block in a slab
  Divisor pieces[2], chunks[2];  // of 16 bytes: of a token, of a head
  Divisor page_rows[2][kTargets];
  Divisor compressed_page_rows[2];
  Divisor groups[2];  // of 32 channels

  explicit AppendDivisors(const AppendKvParams& p)
      : tokens(
            max64(1, p.seqs.cu_seqlens_q == nullptr ? p.seqs.total_q / p.seqs.batch : p.seqs.max_seqlen_q)),
        stride(p.k.phi.blocks.stride) {
    for (int which = 0; which < 2; ++which) {
      const AppendStream& stream = which == 0 ? p.k : p.v;
      const int num_chunks = stream.phi.head_dim / kAppendVector;
      heads[which] = Divisor(stream.phi.per_head ? 1 : stream.phi.num_heads);
      pieces[which] = Divisor(int64_t{num_chunks} * stream.phi.num_heads);
      chunks[which] = Divisor(num_chunks);
      const CachedRows* caches[kTargets] = {&stream.slc_cache, &stream.swa_cache, &stream.tail};
      for (int to = 0; to < kTargets; ++to) page_rows[which][to] = Divisor(max64(1, caches[to]->page_rows));
      compressed_page_rows[which] = Divisor(max64(1, stream.cmp_cache.page_rows));
      groups[which] = Divisor(max64(1, stream.phi.head_dim / kWarpColumns));
    }
  }
};

// A sequence of the step, in 32 bits, and the blocks that it completes.
struct Step {
  int q_begin, q_len, cached;
  int first_block, num_blocks;

  Step() = default;
  // Without tokens unless `exists`: b may be anything then.
  __device__ __forceinline__ Step(const AppendKvParams& p, const AppendDivisors& by, int b, bool exists) {
    const CachedBatch& seqs = p.seqs;
    const int total = static_cast<int>(seqs.total_q), capacity = static_cast<int>(seqs.capacity);
    const bool packed = seqs.cu_seqlens_q != nullptr;
    const int length = ptx::load_4(seqs.cache_seqlens + b, exists),
              from = ptx::load_4(seqs.cu_seqlens_q + b, exists && packed),
              to = ptx::load_4(seqs.cu_seqlens_q + b + 1, exists && packed);
    const int begin = packed ? from : by.tokens.times(b), end = packed   ? to
                                                                : exists ? by.tokens.times(b + 1)
                                                                         : begin;
    cached = min(max(length, 0), capacity);
    q_begin = min(max(begin, 0), total);
    q_len = static_cast<int>(min64(max64(int64_t{end} - begin, 0), min(total - q_begin, capacity - cached)));
    const int block = static_cast<int>(p.k.phi.blocks.block);
    const auto blocks = [&](int tokens) { return tokens < block ? 0 : by.stride.divide(tokens - block) + 1; };
    first_block = blocks(cached);
    num_blocks = blocks(cached + q_len) - first_block;
  }
};

// The sequences of the cluster's share, 32 at a time to the lanes of a warp: f(the lane's one, or batch).
template <typename F>
__device__ __forceinline__ void for_each_warpful(const AppendKvParams& p, int lane, const F& f) {
  const int batch = static_cast<int>(p.seqs.batch), shares = gridDim.z;
#pragma unroll 1
  for (int first = blockIdx.z; first < batch; first += 32 * shares) f(min(first + lane * shares, batch));
}

struct CompletedBlock {
  int b, block;
  int first_new;  // its tokens from this one on are the step's,
  int new_row;    // in this row of theirs and the next ones;
  int tail_row;   // those before, in the tail from this row on, which is a ring
};

// The blocks that rows from first_block * heads on belong to, by one warp. known: what there is to know of
// the lane's last sequence.
__device__ __forceinline__ void list_blocks(const AppendKvParams& p, const AppendDivisors& by, int which,
                                            int first_block, const Step& known,
                                            CompletedBlock (&list)[kPhiRows + 1], int lane) {
  const int stride = static_cast<int>(by.stride.value);
  const bool all_known = p.seqs.batch <= 32 * static_cast<int>(gridDim.z);
  int begin = -first_block;
  for_each_warpful(p, lane, [&](int b) {
    if (begin > kPhiRows) return;
    const bool exists = b < p.seqs.batch;
    const Step step = all_known ? known : Step(p, by, b, exists);
    const int count = exists ? step.num_blocks : 0;
    int end = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += other;
    }
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const int at = begin + end - count + k, block = step.first_block + k, token = block * stride;
      if (at < 0 || at > kPhiRows) continue;
      const int cached = max(0, step.cached - token);
      const Divisor& ring = by.page_rows[which][kTargets - 1];
      list[at] = {b, block, cached, step.q_begin + token + cached - step.cached,
                  token - ring.times(ring.divide(token))};
    }
    begin += __shfl_sync(~0u, end, 31);
  });
}

// What phi sees of token `offset` of a block.
template <typename T>
__device__ __forceinline__ const T* token_of(const AppendStream& stream, const CompletedBlock& block,
                                             int head, int offset) {
  if (offset >= block.first_new) {
    return static_cast<const T*>(stream.cmp.data) +
           (block.new_row + offset - block.first_new) * stream.cmp.stride_row + head * stream.cmp.stride_head;
  }
  const int ring = static_cast<int>(stream.tail.page_rows),
            row = block.tail_row + offset;  // once around at most
  return static_cast<const T*>(stream.tail.data) + block.b * stream.tail.stride_page +
         (row < ring ? row : row - ring) * stream.tail.stride_row + head * stream.tail.stride_head;
}

// Where the compressed row of a block goes; null: there is no such page.
template <typename T>
__device__ __forceinline__ T* target_of(const AppendStream& stream, const AppendDivisors& by, int which,
                                        const CompletedBlock& block, int head) {
  const CachedRows& cache = stream.cmp_cache;
  const Divisor& rows = by.compressed_page_rows[which];
  const int row = static_cast<int>(stream.phi.blocks.cached_row(block.block)), index = rows.divide(row);
  const int page =
      cache.block_table == nullptr ? block.b : cache.block_table[block.b * cache.table_width + index];
  if (page < 0 || page >= cache.num_pages) return nullptr;
  return static_cast<T*>(cache.data) + page * cache.stride_page +
         (row - rows.times(index)) * cache.stride_row + head * cache.stride_head;
}

// Two channels of a compressed row: c and c + dim / 2, with what they are turned by and the bias.
template <typename T>
struct OutputPair {
  float2 cos = {1.f, 1.f}, sin = {0.f, 0.f}, bias = {0.f, 0.f};
  bool rotated;

  __device__ __forceinline__ OutputPair(const AppendKvParams& p, int which, int set, int position, int c) {
    const CompressFwdParams& phi = stream_of(p, which).phi;
    const int dim = phi.head_dim, half = dim / 2;
    rotated = which == 0 && p.rotary_cos != nullptr;
    if (rotated) {
      const int64_t row = min64(position, p.rotary_rows - 1) * dim + c;
      const float* cosines = static_cast<const float*>(p.rotary_cos) + row;
      const float* sines = static_cast<const float*>(p.rotary_sin) + row;
      cos = {cosines[0], cosines[half]};
      sin = {sines[0], sines[half]};
    }
    if (phi.kind == CompressKind::kMlp && phi.b2 != nullptr) {
      const T* b2 = static_cast<const T*>(phi.b2) + int64_t{set} * dim + c;
      bias = {static_cast<float>(b2[0]), static_cast<float>(b2[half])};
    }
  }
  // The sums of the two channels, without the bias.
  __device__ __forceinline__ void store(T* target, int half, float x, float y) const {
    x += bias.x;
    y += bias.y;
    if (rotated) {
      const float2 turned = rotate_compressed<T>(x, y, cos, sin);
      x = turned.x;
      y = turned.y;
    }
    target[0] = static_cast<T>(x);
    target[half] = static_cast<T>(y);
  }
};

}  // namespace nsa::cuda::sm90
