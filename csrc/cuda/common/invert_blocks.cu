// The counting sort behind the backward of selected attention.
//
// A thread block takes 256 rows at a time and marks, for every block, who chose it: one bit per row, set by
// atomicOr, so that the order of threads does not matter. The number of bits is the count, the number of
// lower bits the rank: no atomic counter decides a place.
#include "cuda/common/choices.cuh"
#include "cuda/common/invert_blocks.h"
#include "cuda/host/launch_kernel.h"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/tile/sequence_tile.cuh"

namespace nsa::cuda {
namespace {

constexpr int kTokens = 256;  // rows whose bits are in shared memory together
constexpr int kWords = kTokens / 32;
constexpr int kSortThreads = 1024;
constexpr int kRange = 1024;  // blocks, likewise
constexpr int kMaxCounts = 512;
constexpr int kScanThreads = 1024;
constexpr int kStretchEntries = 128, kStretchTokens = 1024;
constexpr int kUsualItemTokens = 256, kManyLists = 8;

struct Inversion {
  SequenceBatch seqs;
  int64_t block_size;
  int num_heads_kv, n;
  const int32_t* block_indices;
  InvertPlan plan;
  BlockLists lists;

  __device__ int64_t start(int head, int64_t count, int64_t block) const {
    return (head * (plan.num_counts + 1) + count) * plan.num_blocks + block;
  }
};

// Counts (kScatter: places) the choices of count_tokens rows among kRange blocks.
template <bool kScatter>
__global__ void __launch_bounds__(kSortThreads) selected_blocks_sort(const Inversion x) {
  __shared__ uint32_t bits[kWords][kRange];
  __shared__ int before[kRange];  // entries of the rows that came earlier
  __shared__ Choosable choices[kTokens];
  const int head = blockIdx.y, range_begin = blockIdx.z * kRange;
  const int range = static_cast<int>(min64(kRange, x.plan.num_blocks - range_begin));
  for (int i = threadIdx.x; i < kRange; i += kSortThreads) {
    before[i] = kScatter && i < range ? x.lists.bases[head * x.plan.num_blocks + range_begin + i] +
                                            x.lists.starts[x.start(head, blockIdx.x, range_begin + i)]
                                      : 0;
  }
  for (int part = 0; part < x.plan.count_tokens; part += kTokens) {
    const int64_t first_row = int64_t{blockIdx.x} * x.plan.count_tokens + part;
    if (threadIdx.x < kTokens) {
      choices[threadIdx.x] = find_choosable(x.seqs, first_row + threadIdx.x, x.block_size, x.plan.num_blocks);
    }
    for (int i = threadIdx.x; i < kWords * kRange; i += kSortThreads) (&bits[0][0])[i] = 0;
    __syncthreads();
    // Calls visit for every choice, legal or not, whole warps together; local: the block within the range, or
    // negative.
    const auto for_each = [&](const auto& visit) {
      for (int i = threadIdx.x; i < kTokens * x.n; i += kSortThreads) {
        const int token = i / x.n, slot = i - token * x.n;
        const Choosable choice = choices[token];
        const int32_t* row = x.block_indices + ((first_row + token) * x.num_heads_kv + head) * x.n;
        int local = -1;
        if (choice.legal > 0) {
          const int j = row[slot], block = choice.first + j - range_begin;
          if (j >= 0 && j < choice.legal && block >= 0 && block < range) local = block;
        }
        visit(token, slot, local, row);
      }
    };
    for_each([&](int token, int, int local, const int32_t*) {
      if (local >= 0) atomicOr(&bits[token / 32][local], 1u << (token % 32));
    });
    __syncthreads();
    if constexpr (kScatter) {
      for_each([&](int token, int slot, int local, const int32_t* row) {
        if (32 % x.n == 0) {
          // A row lies in one warp, whose first lane with a block counts.
          const int lane = threadIdx.x % 32;
          const unsigned same = __match_any_sync(~0u, local < 0 ? ~lane : local * kTokens + token);
          if (local < 0 || (same & ((1u << lane) - 1)) != 0) return;
        } else {
          if (local < 0) return;
          for (int i = 0; i < slot; ++i) {
            if (row[i] == row[slot]) return;
          }
        }
        int place = before[local] + __popc(bits[token / 32][local] & ((1u << (token % 32)) - 1));
        for (int word = 0; word < token / 32; ++word) place += __popc(bits[word][local]);
        const uint32_t in_chunk = static_cast<uint32_t>(first_row + token) &
                                  static_cast<uint32_t>(x.plan.chunk_tokens - 1);  // a power of two
        x.lists.entries[head * x.seqs.total_q * x.n + place] = in_chunk | static_cast<uint32_t>(slot)
                                                                              << kEntrySlotShift;
      });
      __syncthreads();
    }
    for (int i = threadIdx.x; i < range; i += kSortThreads) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) before[i] += __popc(bits[word][i]);
    }
    __syncthreads();
  }
  if constexpr (!kScatter) {
    for (int i = threadIdx.x; i < range; i += kSortThreads)
      x.lists.starts[x.start(head, blockIdx.x, range_begin + i)] = before[i];
  }
}

// Counts to starts: of 32 blocks, kSegments runs of rows at a time.
constexpr int kSegments = 16;
__global__ void __launch_bounds__(32 * kSegments) selected_blocks_starts(const Inversion x) {
  __shared__ int sums[kSegments][32];
  const int head = blockIdx.y, lane = threadIdx.x % 32, segment = threadIdx.x / 32;
  const int64_t block = int64_t{blockIdx.x} * 32 + lane, counts = x.plan.num_counts;
  const int64_t begin = counts * segment / kSegments, end = counts * (segment + 1) / kSegments;
  const bool valid = block < x.plan.num_blocks;
  int sum = 0;
  if (valid) {
#pragma unroll 8
    for (int64_t c = begin; c < end; ++c) sum += x.lists.starts[x.start(head, c, block)];
  }
  sums[segment][lane] = sum;
  __syncthreads();
  if (!valid) return;
  int running = 0;
  for (int s = 0; s < segment; ++s) running += sums[s][lane];
#pragma unroll 8
  for (int64_t c = begin; c < end; ++c) {
    int* start = &x.lists.starts[x.start(head, c, block)];
    const int count = *start;
    *start = running;
    running += count;
  }
  if (segment == kSegments - 1) x.lists.starts[x.start(head, counts, block)] = running;
}

// Exclusive sums over the thread block of `kCount` numbers per thread, *total being added to and carried on.
template <int kCount>
__device__ void block_scan(int (&value)[kCount], int (&total)[kCount]) {
  __shared__ int warps[kCount][kScanThreads / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int inclusive[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    inclusive[i] = value[i];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive[i], step);
      if (lane >= step) inclusive[i] += other;
    }
    if (lane == 31) warps[i][warp] = inclusive[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    int before = 0, sum = 0;
    for (int w = 0; w < kScanThreads / 32; ++w) {
      if (w == warp) before = sum;
      sum += warps[i][w];
    }
    value[i] = total[i] + before + inclusive[i] - value[i];
    total[i] += sum;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kScanThreads) selected_blocks_bases(const Inversion x) {
  const int head = blockIdx.x;
  int total[1] = {0};
  for (int64_t begin = 0; begin < x.plan.num_blocks; begin += kScanThreads) {
    const int64_t block = begin + threadIdx.x;
    const bool valid = block < x.plan.num_blocks;
    int value[1] = {valid ? x.lists.starts[x.start(head, x.plan.num_counts, block)] : 0};
    block_scan(value, total);
    if (valid) x.lists.bases[head * x.plan.num_blocks + block] = value[0];
  }
}

// The keys of item->part of a block of the batch.
__device__ void find_keys(const Inversion& x, int64_t block, WorkItem* item) {
  int64_t low = 0, high = x.seqs.cu_seqlens_k == nullptr ? 1 : x.seqs.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (x.seqs.cu_seqlens_k[middle] / x.block_size + middle <= block ? low : high) = middle;
  }
  const Sequence seq = clamped_sequence(x.seqs, low);
  const int64_t begin =
      (block - first_block(seq, low, x.block_size)) * x.block_size + item->part * x.plan.key_tile;
  const int64_t keys = count_keys(x.seqs, seq, KeyBlocks{}) - begin;
  item->key_row = static_cast<int>(seq.k_begin + begin);
  item->num_keys = begin < 0 ? 0 : static_cast<int>(max64(0, min64(x.plan.key_tile, keys)));
  item->shift = static_cast<int>(seq.position(-seq.q_begin) + 1 - begin);
}

// A list in one chunk: where its entries of every stretch of rows begin, and into how many items they are
// cut.
struct ChunkList {
  const Inversion& x;
  int64_t begin, end;  // of the chunk, in counts
  int head, tile;      // of the head's keys

  __device__ int block() const { return tile / x.plan.parts; }
  // The list's entries of the rows before stretch s of the chunk, counted over all chunks.
  __device__ int before(int s) const {
    const int64_t stretch_counts = x.plan.stretch_tokens / x.plan.count_tokens;
    return x.lists.starts[x.start(head, min64(begin + s * stretch_counts, end), block())];
  }
  __device__ int pieces(int s, int length) const {
    const int tiles = static_cast<int>(x.plan.num_blocks) * x.plan.parts;
    const int left = ((x.num_heads_kv - head) * x.plan.stretches - s) * tiles - tile;
    const int most = x.plan.most_tokens(left);
    return (length + most - 1) / most;
  }
  __device__ int pieces() const {
    int sum = 0, from = before(0);
#pragma unroll 4
    for (int s = 0; s < x.plan.stretches; ++s) {
      const int to = before(s + 1);
      sum += pieces(s, to - from);
      from = to;
    }
    return sum;
  }
};

// The items of one chunk: head by head, stretch by stretch of its rows, block by block.
__global__ void __launch_bounds__(kScanThreads) selected_blocks_items(const Inversion x) {
  const InvertPlan& plan = x.plan;
  const int64_t chunk = blockIdx.x, ratio = plan.chunk_tokens / plan.count_tokens;
  const int64_t begin = chunk * ratio, end = min64(begin + ratio, plan.num_counts);
  const int tiles = static_cast<int>(plan.num_blocks) * plan.parts;  // of a head's keys
  const int candidates = x.num_heads_kv * tiles;
  WorkItem* items = x.lists.items + chunk * plan.max_items;
  const int all = candidates * plan.stretches;
  int* partials = x.lists.first_partials + chunk * all;
  int num_partials[1] = {0};
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x) < candidates; i += kScanThreads) {
    const int head = i / tiles;
    const ChunkList list{x, begin, end, head, i % tiles};
    const int total = i < candidates ? list.pieces() : 0;
    int place[1] = {total > 1 ? total : 0};
    block_scan(place, num_partials);
    if (i >= candidates) continue;
    int from = list.before(0);
    bool leads = true;
#pragma unroll 4
    for (int s = 0; s < plan.stretches; ++s) {
      const int to = list.before(s + 1), pieces = list.pieces(s, to - from);
      partials[(head * plan.stretches + s) * tiles + list.tile] =
          total > 1 ? 2 * place[0] + static_cast<int>(leads) : -1;
      place[0] += pieces;
      leads = leads && pieces == 0;
      from = to;
    }
  }
  __syncthreads();
  int total[2] = {0, 0};  // items, split lists
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x) < all; i += kScanThreads) {
    WorkItem item{};
    int length = 0, pieces = 0, partial = -1;
    bool leads = false;
    if (i < all) {
      const int head = i / (tiles * plan.stretches), stretch = i / tiles % plan.stretches;
      const ChunkList list{x, begin, end, head, i % tiles};
      item.head = static_cast<int16_t>(head);
      item.part = static_cast<int16_t>(i % plan.parts);
      const int from = list.before(stretch);
      length = list.before(stretch + 1) - from;
      item.first = x.lists.bases[head * plan.num_blocks + list.block()] + from;
      if (length > 0) find_keys(x, list.block(), &item);
      if (item.num_keys > 0) {
        pieces = list.pieces(stretch, length);
        partial = partials[i];
        leads = partial >= 0 && pieces > 0 && partial % 2 == 1;
        if (leads) item.followers = list.pieces() - 1;
      }
    }
    int place[2] = {pieces, leads ? 1 : 0};
    block_scan(place, total);
    if (leads) x.lists.splits[chunk * plan.max_splits + place[1]] = place[0];
    const int first = item.first;
    for (int piece = 0, from = 0; piece < pieces; ++piece) {
      const int even = static_cast<int>(static_cast<uint32_t>(length) * (piece + 1) / pieces);
      const int to = piece + 1 == pieces ? length : (even + kItemAlign / 2) / kItemAlign * kItemAlign;
      item.first = first + from;
      item.count = to - from;
      item.partial = partial < 0 ? -1 : partial / 2 + piece;
      from = to;
      items[place[0] + piece] = item;
      item.followers = 0;
    }
  }
  if (threadIdx.x == 0) {
    x.lists.num_items[chunk] = total[0];
    x.lists.num_splits[chunk] = total[1];
    for (int pass = 0; pass < kMaxPasses; ++pass) x.lists.tickets[pass * plan.num_chunks + chunk] = 0;
  }
}

// A thread block takes shares of the sums of split lists, one share after another; what describes the next is
// on its way meanwhile.
constexpr int kAddThreads = 256, kAddShares = 16, kAddGroup = 8;
constexpr int kAddPerMultiprocessor = 4;  // with more, registers would not hold a group
__global__ void __launch_bounds__(kAddThreads, kAddPerMultiprocessor)
    selected_blocks_add(const SelectedAttentionBwdParams p, const WorkItem* items, const int* splits,
                        const int* num_splits, const int key_tile, const float* partials, const bool early) {
  // Early, it lets the next kernel begin while that in front still runs, but ends behind it.
  const bool waits_last = early && blockIdx.x == 0;
  if (!early) ptx::wait_for_dependency();
  ptx::launch_dependents();
  const int dim_qk = p.shape.head_dim_qk, dims = dim_qk + p.shape.head_dim_v, columns = dims / 4;
  const int shares = *num_splits * kAddShares;
  WorkItem item{};
  if (static_cast<int>(blockIdx.x) < shares) item = items[splits[blockIdx.x / kAddShares]];
#pragma unroll 1
  for (int share = blockIdx.x; share < shares; share += gridDim.x) {
    const int following = share + gridDim.x;
    const WorkItem next_item = items[splits[(following < shares ? following : share) / kAddShares]];
    for (int e = share % kAddShares * kAddThreads + threadIdx.x; e < item.num_keys * columns;
         e += kAddShares * kAddThreads) {
      const int key = e / columns, column = (e - key * columns) * 4;
      const bool is_k = column < dim_qk;
      float* gradient = static_cast<float*>(is_k ? p.grads.dk : p.grads.dv);
      if (gradient == nullptr) continue;
      const int64_t row = (int64_t{item.key_row} + key) * p.shape.num_heads_kv + item.head;
      float4* at = reinterpret_cast<float4*>(
          gradient + (is_k ? row * dim_qk + column : row * p.shape.head_dim_v + column - dim_qk));
      const float4 old = *at;
      const float* partial = partials + (int64_t{item.partial} * key_tile + key) * dims + column;
      float4 sum{};
      // All of a group under way before the first is added, those of the last group too.
#pragma unroll 1
      for (int piece = 0; piece <= item.followers; piece += kAddGroup) {
        float4 next[kAddGroup];
#pragma unroll
        for (int k = 0; k < kAddGroup; ++k) {
          next[k] = piece + k <= item.followers
                        ? __ldcs(reinterpret_cast<const float4*>(partial + int64_t{k} * key_tile * dims))
                        : float4{};
        }
#pragma unroll
        for (int k = 0; k < kAddGroup; ++k)
          sum.x += next[k].x, sum.y += next[k].y, sum.z += next[k].z, sum.w += next[k].w;
        partial += int64_t{kAddGroup} * key_tile * dims;
      }
      *at = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
    }
    item = next_item;
  }
  if (waits_last) ptx::wait_for_dependency();
}

}  // namespace

InvertPlan::InvertPlan(const SelectedAttentionBwdParams& p, int key_tile, int most_chunk_tokens)
    : key_tile(key_tile) {
  const int64_t rows = max64(1, p.seqs.total_q), heads = p.shape.num_heads_kv, n = p.num_selected_blocks;
  parts = static_cast<int>(p.block_size / key_tile);
  count_tokens = kTokens;
  while (ceil_div(rows, count_tokens) > kMaxCounts) count_tokens *= 2;
  chunk_tokens = count_tokens;
  while (chunk_tokens * 2 <= most_chunk_tokens) chunk_tokens *= 2;
  num_blocks = p.seqs.cu_seqlens_k == nullptr
                   ? ceil_div(min64(p.seqs.max_seqlen_k, p.seqs.key_rows), p.block_size)
                   : p.seqs.key_rows / p.block_size + p.seqs.batch;
  num_blocks = max64(1, num_blocks);
  num_counts = ceil_div(rows, count_tokens);
  num_chunks = ceil_div(rows, chunk_tokens);
  const int64_t rows_of_chunk = min64(rows, chunk_tokens), choices = rows_of_chunk * n;  // of a head
  // Stretches in which an average list has kStretchEntries entries.
  stretch_tokens = count_tokens;
  while (stretch_tokens < chunk_tokens &&
         (stretch_tokens < kStretchTokens || stretch_tokens * n < kStretchEntries * num_blocks))
    stretch_tokens *= 2;
  stretches = static_cast<int>(ceil_div(rows_of_chunk, stretch_tokens));
  // Many whole lists balance by themselves. Elsewhere rows in the cache and equal work for all are worth more
  // partial sums. The workspace grows with short items.
  const bool whole = stretches == 1 && parts * heads * num_blocks >= kManyLists * kBackwardWorkers;
  min_tokens = static_cast<int>(whole ? kMaxItemTokens : max64(kMinItemTokens, stretch_tokens / 64));
  max_tokens = whole ? kMaxItemTokens : kUsualItemTokens;
  share = static_cast<float>(static_cast<double>(choices) / static_cast<double>(stretches * num_blocks) /
                             kBackwardWorkers);
  // In a stretch of a head no list is cut finer than its last one.
  int64_t cuts = 0;
  for (int64_t left = heads * stretches - 1; left >= 0; --left)
    cuts += ceil_div(min64(rows_of_chunk, stretch_tokens) * n * parts,
                     most_tokens(left * num_blocks * parts + 1));
  const int64_t lists = parts * heads * min64(num_blocks * stretches, choices);
  max_items = lists + cuts;
  // A list that is cut in a single stretch has at least two items, with more than the most of one together.
  max_partials = stretches == 1 ? min64(2 * cuts, lists + cuts) : lists + cuts;
  max_splits = parts * heads * min64(num_blocks, choices / 2);
}

BlockLists::BlockLists(const SelectedAttentionBwdParams& p, const InvertPlan& plan, int64_t* bytes) {
  const int64_t heads = p.shape.num_heads_kv;
  entries = carve<uint32_t>(p.workspace, heads * p.seqs.total_q * p.num_selected_blocks, bytes);
  starts = carve<int>(p.workspace, heads * (plan.num_counts + 1) * plan.num_blocks, bytes);
  bases = carve<int>(p.workspace, heads * plan.num_blocks, bytes);
  items = carve<WorkItem>(p.workspace, plan.num_chunks * plan.max_items, bytes);
  splits = carve<int>(p.workspace, plan.num_chunks * plan.max_splits, bytes);
  first_partials =
      carve<int>(p.workspace, plan.num_chunks * heads * plan.stretches * plan.num_blocks * plan.parts, bytes);
  num_items = carve<int>(p.workspace, plan.num_chunks, bytes);
  num_splits = carve<int>(p.workspace, plan.num_chunks, bytes);
  tickets = carve<int>(p.workspace, kMaxPasses * plan.num_chunks, bytes);
}

Status invert_blocks(const SelectedAttentionBwdParams& p, const InvertPlan& plan, const BlockLists& lists,
                     const Stream& stream) {
  const Inversion x{p.seqs, p.block_size, p.shape.num_heads_kv, p.num_selected_blocks, p.block_indices,
                    plan,   lists};
  const unsigned heads = static_cast<unsigned>(p.shape.num_heads_kv);
  const dim3 sort_grid(static_cast<unsigned>(plan.num_counts), heads,
                       static_cast<unsigned>(ceil_div(plan.num_blocks, kRange)));
  Status status =
      launch("selected_blocks_sort", selected_blocks_sort<false>, sort_grid, kSortThreads, 0, stream, x);
  if (!status.ok()) return status;
  status =
      launch("selected_blocks_starts", selected_blocks_starts,
             dim3(static_cast<unsigned>(ceil_div(plan.num_blocks, 32)), heads), 32 * kSegments, 0, stream, x);
  if (!status.ok()) return status;
  status = launch("selected_blocks_bases", selected_blocks_bases, dim3(heads), kScanThreads, 0, stream, x);
  if (!status.ok()) return status;
  status = launch("selected_blocks_sort", selected_blocks_sort<true>, sort_grid, kSortThreads, 0, stream, x);
  if (!status.ok()) return status;
  return launch("selected_blocks_items", selected_blocks_items, dim3(static_cast<unsigned>(plan.num_chunks)),
                kScanThreads, 0, stream, x);
}

Status add_partials(const SelectedAttentionBwdParams& p, const InvertPlan& plan, const BlockLists& lists,
                    int64_t chunk, const float* partials, bool early, const Stream& stream) {
  constexpr unsigned kGrid = 132 * kAddPerMultiprocessor;
  return launch_chained("selected_blocks_add", selected_blocks_add, dim3(kGrid), kAddThreads, 0, stream, p,
                        lists.items + chunk * plan.max_items, lists.splits + chunk * plan.max_splits,
                        lists.num_splits + chunk, plan.key_tile, partials, early);
}

}  // namespace nsa::cuda
