// phi of the blocks that a step completes, by a cluster of thread blocks.
//
// Rows are (completed block, head), a slab of them at a time. Each thread block multiplies its share of the
// tokens of a block by their weights for all rows of the slab, so that the cluster reads the weights once;
// its sums go straight to the shared memory of the thread blocks that finish the rows: bias, activation,
// second product, rotation. All sums in fixed order, and those of a row do not depend on the other rows.
//
// There is little to compute, and everything waits for everything: work is spread over threads so that no
// thread has much of it one after the other, and memory is asked for as early as possible, the weights by
// bulk copies, behind which nothing else has to queue.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/append_step.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warp_tile.cuh"

namespace nsa::cuda::sm90 {

constexpr int kPanelAlignment = 1024;
constexpr int kPhiOwned = kPhiRows / kAppendCluster;  // rows that a thread block finishes
constexpr int kPhiDepth = 128;                        // rows of the weights at a time
constexpr int kPhiColumns = 256;                      // of the weights at a time
constexpr int kMaxPhiTokens = 64 / kAppendCluster;    // of a block, for a thread block
static_assert(kPhiColumns == kAppendThreads);         // one to a thread where they are added up
static_assert(kPhiColumns == kAppendWarps * kWarpColumns && kPhiOwned <= 16);

// The weights as rows of columns, of K and V.
struct PhiMaps {
  CUtensorMap first[2], second[2];
};

// Rows of the weights, as panels of 64 columns (tile/swizzled_tile.cuh), and of what they are multiplied by.
struct PhiStage {
  alignas(kPanelAlignment) uint16_t weights[kPhiDepth * kPhiColumns];
  uint16_t tokens[kPhiRows * kPitch<kPhiDepth>];
};
constexpr int kPhiStages = 2;
constexpr int kPhiLoader = 32;  // the thread that orders the weights, while the first warp lists the blocks

struct PhiShared {
  PhiStage stages[kPhiStages];
  float sums[kAppendCluster][kPhiOwned][kPhiColumns];  // from each thread block
  float out[kPhiOwned][kPhiColumns];                   // [part of the hidden columns][channel] of a row
  uint16_t hidden[16 * kPitch<kPhiColumns>];
  CompletedBlock blocks[kPhiRows + 1];
  const void* tokens[kMaxPhiTokens][kPhiRows];  // what phi sees of them
  void* targets[kPhiRows];                      // compressed rows in the cache; null: there is no such page
  int positions[kPhiRows];                      // of the first tokens
  uint64_t sent;                                // the sums of all are there
  uint64_t full[kPhiStages];
};
constexpr int kPhiSharedBytes = sizeof(PhiShared) + kPanelAlignment;  // wherever it begins
static_assert(kPhiSharedBytes <= 232448);                             // what a thread block can have

// What a slab is.
struct Slab {
  int first, num_rows;  // rows of the cluster's share
  int set;              // of weights

  __device__ __forceinline__ int num_owned(int rank) const {
    return (num_rows - rank + kAppendCluster - 1) / kAppendCluster;
  }
};

// Addresses of the slab's rows: 64 threads a token of theirs, and as many where they go. num_tokens: of a
// block, for this thread block.
template <typename T>
__device__ __forceinline__ void find_rows(const AppendKvParams& p, const AppendDivisors& by, int which,
                                          const Slab& slab, int rank, int num_tokens, PhiShared& shared) {
  const AppendStream& stream = stream_of(p, which);
  const Divisor& heads = by.heads[which];
  const int row = threadIdx.x % 64, skipped = slab.first - heads.times(heads.divide(slab.first));
#pragma unroll 1
  for (int task = threadIdx.x / 64; task <= num_tokens; task += kAppendThreads / 64) {
    if (row >= slab.num_rows) continue;
    const int at = heads.divide(skipped + row), head = slab.set + skipped + row - heads.times(at);
    const CompletedBlock block = shared.blocks[at];
    if (task < num_tokens) {
      shared.tokens[task][row] = token_of<T>(stream, block, head, rank + task * kAppendCluster);
    } else {
      shared.targets[row] = target_of<T>(stream, by, which, block, head);
      const int position = by.stride.times(block.block);
      shared.positions[row] = position;
      if (which == 0 && p.rotary_cos != nullptr && row % kAppendCluster == rank) {
        const int dim = stream.phi.head_dim;
        const int64_t begin = min64(position, p.rotary_rows - 1) * dim;
#pragma unroll 1
        for (int c = 0; c < dim; c += 32) {
          ptx::prefetch(static_cast<const float*>(p.rotary_cos) + begin + c);
          ptx::prefetch(static_cast<const float*>(p.rotary_sin) + begin + c);
        }
      }
    }
  }
}

// What the products of a slab go through, for kPhiColumns hidden columns: the weights of the first one, a
// token of the thread block, or kPhiDepth channels of it, at a time, then those of the second one, kPhiDepth
// hidden columns at a time. They come by turns into the stages.
template <typename T>
struct PhiPass {
  PhiShared& shared;
  const CUtensorMap *first_map, *second_map;
  const T* pe;  // of the thread block's first token, or null
  Slab slab;
  int rank, dim, length, hidden;
  int column, columns;        // hidden columns [column, column + columns)
  int num_first, num_second;  // turns
  int begin;                  // turns of the passes before

  __device__ __forceinline__ int num_turns() const { return num_first + num_second; }
  __device__ __forceinline__ PhiStage& stage(int turn) const {
    return shared.stages[(begin + turn) & (kPhiStages - 1)];
  }
  __device__ __forceinline__ uint32_t full(int turn) const {
    return ptx::shared_address(&shared.full[(begin + turn) & (kPhiStages - 1)]);
  }
  __device__ __forceinline__ void wait(int turn) const {
    static_assert(kPhiStages == 2);
    ptx::barrier_wait(full(turn), (begin + turn) >> 1 & 1);
  }

  __device__ __forceinline__ int token(int turn) const { return dim > kPhiDepth ? turn >> 1 : turn; }
  __device__ __forceinline__ int channel(int turn) const {
    return dim > kPhiDepth ? (turn & 1) * kPhiDepth : 0;
  }
  // Rows of the weights.
  __device__ __forceinline__ int depth(int turn) const {
    return min(kPhiDepth, turn < num_first ? dim - channel(turn) : columns - (turn - num_first) * kPhiDepth);
  }

  // By one thread.
  __device__ __forceinline__ void load_weights(int turn) const {
    if (threadIdx.x != kPhiLoader || turn >= num_turns()) return;
    const bool first = turn < num_first;
    const CUtensorMap* const map = first ? first_map : second_map;
    const int row = first ? (slab.set * length + rank + token(turn) * kAppendCluster) * dim + channel(turn)
                          : slab.set * hidden + column + (turn - num_first) * kPhiDepth;
    const int begin_column = first ? column : 0, width = first ? columns : dim,
              box_rows = min(kPhiDepth, first ? dim : hidden);
    const uint32_t target = ptx::shared_address(stage(turn).weights), barrier = full(turn);
    ptx::barrier_arrive_expect(barrier, (width + kPanel - 1) / kPanel * box_rows * kPanelPitch);
#pragma unroll 1
    for (int panel = 0; panel * kPanel < width; ++panel) {
      ptx::bulk_load_3d(target + panel * kPhiDepth * kPanelPitch, map, barrier, begin_column + panel * kPanel,
                        0, row);
    }
  }

  // A thread has the same 8 channels of some rows.
  static constexpr int kChunks = kPhiDepth / kAppendVector, kStep = kAppendThreads / kChunks;
  __device__ __forceinline__ T* own_chunk(int turn) const {
    return reinterpret_cast<T*>(stage(turn).tokens) + threadIdx.x / kChunks * kPitch<kPhiDepth> +
           threadIdx.x % kChunks * kAppendVector;
  }
  __device__ __forceinline__ int own_channel(int turn) const {
    return channel(turn) + static_cast<int>(threadIdx.x % kChunks) * kAppendVector;
  }

  __device__ __forceinline__ void load_tokens(int turn) const {
    const int c = own_channel(turn);
    if (turn < num_first && c < dim) {
#pragma unroll
      for (int i = 0; i < kPhiRows / kStep; ++i) {
        const int row = threadIdx.x / kChunks + i * kStep;
        if (row >= slab.num_rows) continue;
        ptx::async_copy_16(ptx::shared_address(own_chunk(turn) + i * kStep * kPitch<kPhiDepth>),
                           static_cast<const T*>(shared.tokens[token(turn)][row]) + c, true);
      }
    }
    ptx::async_commit();
  }

  // PE, which a thread adds to what it has copied.
  __device__ __forceinline__ uint4 load_pe(int turn) const {
    const int c = own_channel(turn);
    return ptx::load_16(pe + token(turn) * kAppendCluster * dim + c,
                        turn < num_first && pe != nullptr && c < dim);
  }
  __device__ __forceinline__ void add_pe(int turn, const uint4& pe_of_turn) const {
    ptx::async_wait<0>();
    if (turn >= num_first || pe == nullptr) return;
    const uint32_t* others = reinterpret_cast<const uint32_t*>(&pe_of_turn);
#pragma unroll
    for (int i = 0; i < kPhiRows / kStep; ++i) {
      if (i * kStep >= slab.num_rows) break;
      uint4* const at = reinterpret_cast<uint4*>(own_chunk(turn) + i * kStep * kPitch<kPhiDepth>);
      uint4 x = *at;
      uint32_t* words = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 a = ptx::unpack2<T>(words[w]), b = ptx::unpack2<T>(others[w]);
        words[w] = ptx::pack2<T>(a.x + b.x, a.y + b.y);
      }
      *at = x;
    }
  }
};

// acc += A . B for `depth` rows of B from row `begin` on, a multiple of 32. a: shared address of the corner
// of A, at the pitch of kADim; B: 32 columns, group `group` of them, of panels of kPhiDepth rows.
template <typename T, int kADim, int kSlabs>
__device__ __forceinline__ void multiply_panels(float (&acc)[kSlabs][4][4], uint32_t a, uint32_t weights,
                                                int group, int begin, int depth, int lane) {
  const uint32_t a_lane = a + ((lane & 15) * kPitch<kADim> + (lane >> 4) * 8 + begin) * 2;
  const uint32_t b_lane =
      weights + swizzled_offset(kPhiDepth, lane & 15, group * 4 + (lane >> 4)) + begin * kPanelPitch;
#pragma unroll 2
  for (int step = 0; step < depth; step += 32) {
#pragma unroll
    for (int k = step; k < step + 32; k += 16) {
      uint32_t ra[kSlabs][4], rb[2][4];
#pragma unroll
      for (int s = 0; s < kSlabs; ++s) ptx::load_matrices(ra[s], a_lane + (s * 16 * kPitch<kADim> + k) * 2);
#pragma unroll
      for (int n = 0; n < 2; ++n) ptx::load_matrices_transposed(rb[n], (b_lane ^ (n * 32)) + k * kPanelPitch);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int s = 0; s < kSlabs; ++s) {
          ptx::mma<T>(acc[s][2 * n], ra[s], rb[n][0], rb[n][1]);
          ptx::mma<T>(acc[s][2 * n + 1], ra[s], rb[n][2], rb[n][3]);
        }
      }
    }
  }
}

// Columns of two tiles of accumulators: the lanes of a pair exchange what they have of one of the two, so
// that each has four adjacent columns of a row, from 8 * (lane % 2) + 4 * (lane % 4 / 2) on. half: 0 for row
// lane / 4, 1 for row lane / 4 + 8.
__device__ __forceinline__ float4 adjacent_columns(const float (&a)[4], const float (&b)[4], int half,
                                                   int lane) {
  const bool odd = lane & 1;
  const float x = __shfl_xor_sync(~0u, odd ? a[2 * half] : b[2 * half], 1),
              y = __shfl_xor_sync(~0u, odd ? a[2 * half + 1] : b[2 * half + 1], 1);
  return odd ? make_float4(x, y, b[2 * half], b[2 * half + 1])
             : make_float4(a[2 * half], a[2 * half + 1], x, y);
}
__device__ __forceinline__ int adjacent_column(int lane) { return 8 * (lane & 1) + 4 * (lane >> 1 & 1); }

// The thread block's share of the first product, a warp 32 hidden columns of it, to the thread blocks that
// finish the rows: row r of the slab to r % kAppendCluster.
template <typename T, int kSlabs>
__device__ __forceinline__ void first_product(const PhiPass<T>& pass) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const bool multiplies = warp * kWarpColumns < pass.columns;
  PhiShared& shared = pass.shared;
  float acc[kSlabs][4][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < pass.num_first; ++turn) {
    const uint4 next_pe = pass.load_pe(turn + 1);
    const PhiStage& stage = pass.stage(turn);
    pass.wait(turn);
    if (multiplies) {
      multiply_panels<T, kPhiDepth, kSlabs>(acc, ptx::shared_address(stage.tokens),
                                            ptx::shared_address(stage.weights), warp, 0, pass.depth(turn),
                                            lane);
    }
    pass.add_pe(turn + 1, next_pe);
    __syncthreads();
    pass.load_weights(turn + kPhiStages);
    pass.load_tokens(turn + kPhiStages);
  }
  ptx::cluster_wait();
  if (!multiplies || pass.num_first == 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int owner = lane / 4 + 8 * half;
    const uint32_t sums = ptx::cluster_address(
                       ptx::shared_address(
                           &shared.sums[pass.rank][0][warp * kWarpColumns + adjacent_column(lane)]),
                       owner),
                   sent = ptx::cluster_address(ptx::shared_address(&shared.sent), owner);
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float4 values = adjacent_columns(acc[s][2 * pair], acc[s][2 * pair + 1], half, lane);
        if (16 * s + owner < pass.slab.num_rows)
          ptx::store_async(sums + (s * kPhiColumns + 16 * pair) * 4, values, sent);
      }
    }
  }
}

// Hidden column f of this thread for the thread block's own rows, from the sums of all.
template <typename T>
__device__ __forceinline__ void activate(PhiShared& shared, int num_owned, int num_senders, bool exists,
                                         bool mlp, float bias) {
  const int f = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPhiOwned; ++i) {
    if (i >= num_owned) break;
    float sum = 0.f;
    if (exists) {
#pragma unroll
      for (int sender = 0; sender < kAppendCluster; ++sender) {
        if (sender < num_senders) sum += shared.sums[sender][i][f];
      }
      sum += bias;
    }
    if (mlp) {
      const T z = static_cast<T>(__fdividef(sum, 1.f + __expf(-sum)));
      shared.hidden[i * kPitch<kPhiColumns> + f] = reinterpret_cast<const uint16_t&>(z);
    } else {
      shared.out[i][f] = sum;
    }
  }
}

// A warp's share of the second product: 32 output columns and, if there are fewer of them than warps, a part
// of the depth.
struct SecondShare {
  int group, part, log_parts;

  __device__ __forceinline__ SecondShare(const AppendDivisors& by, int which) {
    const int warp = threadIdx.x / 32, groups = static_cast<int>(by.groups[which].value);
    log_parts = groups <= 2 ? 2 : groups <= 4 ? 1 : 0;
    part = by.groups[which].divide(warp);
    group = warp - by.groups[which].times(part);
  }
  __device__ __forceinline__ int parts() const { return 1 << log_parts; }
};

// acc += the second product, whose first layer is in shared.hidden.
template <typename T>
__device__ __forceinline__ void second_product(const PhiPass<T>& pass, const SecondShare& share,
                                               float (&acc)[1][4][4]) {
  PhiShared& shared = pass.shared;
#pragma unroll 1
  for (int i = 0; i < pass.num_second; ++i) {
    const int turn = pass.num_first + i, depth = pass.depth(turn),
              each = (depth + (32 << share.log_parts) - 1) >> (5 + share.log_parts) << 5,
              begin = share.part * each;
    pass.wait(turn);
    if (share.part < share.parts()) {
      multiply_panels<T, kPhiColumns, 1>(acc, ptx::shared_address(shared.hidden + i * kPhiDepth),
                                         ptx::shared_address(pass.stage(turn).weights), share.group, begin,
                                         min(each, depth - begin), threadIdx.x & 31);
    }
    if (turn + kPhiStages >= pass.num_turns()) continue;
    __syncthreads();
    pass.load_weights(turn + kPhiStages);
  }
}

// kMean: each thread adds up two channels of a row.
template <typename T>
__device__ void average_blocks(const AppendKvParams& p, const AppendDivisors& by, int which, int num_rows,
                               const Step& step, PhiShared& shared) {
  const AppendStream& stream = stream_of(p, which);
  const CompressFwdParams& phi = stream.phi;
  const Divisor& heads = by.heads[which];
  const int half = phi.head_dim / 2, length = static_cast<int>(phi.blocks.block);
#pragma unroll 1
  for (int first = 0; first < num_rows; first += kPhiRows) {
    const Slab slab{first, min(kPhiRows, num_rows - first), 0};
    const int skipped = first - heads.times(heads.divide(first));
    __syncthreads();
    if (threadIdx.x < 32)
      list_blocks(p, by, which, heads.divide(first), step, shared.blocks, static_cast<int>(threadIdx.x));
    __syncthreads();
#pragma unroll 1
    for (int i = blockIdx.x * kAppendThreads + threadIdx.x; i < slab.num_rows * half;
         i += kAppendCluster * kAppendThreads) {
      const int row = skipped + i / half, c = i % half, at = heads.divide(row), head = row - heads.times(at);
      const CompletedBlock block = shared.blocks[at];
      float x = 0.f, y = 0.f;
#pragma unroll 8
      for (int offset = 0; offset < length; ++offset) {
        const T* token = token_of<T>(stream, block, head, offset) + c;
        x += static_cast<float>(token[0]);
        y += static_cast<float>(token[half]);
      }
      T* const target = target_of<T>(stream, by, which, block, head);
      if (target == nullptr) continue;
      const OutputPair<T> pair(p, which, 0, by.stride.times(block.block), c);
      pair.store(target + c, half, x / static_cast<float>(length), y / static_cast<float>(length));
    }
  }
}

// phi of the num_blocks blocks that the sequences of the cluster's share complete.
template <typename T>
__device__ void compress_blocks(const AppendKvParams& p, const AppendDivisors& by, int which, int num_blocks,
                                const PhiMaps& maps, const Step& step, PhiShared& shared) {
  const CompressFwdParams& phi = stream_of(p, which).phi;
  const Divisor& heads = by.heads[which];
  const int rank = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int dim = phi.head_dim, half = dim / 2, hidden = phi.hidden_size,
            length = static_cast<int>(phi.blocks.block);
  const int sets = phi.per_head ? phi.num_heads : 1, num_rows = heads.times(num_blocks);
  const int num_senders = min(kAppendCluster, length),
            num_tokens = (length - rank + kAppendCluster - 1) / kAppendCluster;
  const bool mlp = phi.kind == CompressKind::kMlp;
  const SecondShare second(by, which);
  const uint32_t sent = ptx::shared_address(&shared.sent);
  // The thread that uses the barriers before the others come to them. These meet it before they wait.
  if (threadIdx.x == kPhiLoader) {
    ptx::barrier_init(sent, 1);
    for (uint64_t& full : shared.full) ptx::barrier_init(ptx::shared_address(&full), 1);
    ptx::barrier_init_fence();
  }
  // The second weights to the L2 cache meanwhile, a set of them by each thread block.
  if (mlp && rank < sets && threadIdx.x == kPhiLoader + 32) {
#pragma unroll 1
    for (int set = rank; set < sets; set += kAppendCluster) {
      ptx::bulk_prefetch(static_cast<const T*>(phi.w2) + int64_t{set} * hidden * dim,
                         static_cast<uint32_t>(hidden * dim * sizeof(T)));
    }
  }
  int turns = 0, passes = 0;
#pragma unroll 1
  for (int first_row = 0; first_row < num_rows; first_row += kPhiRows) {
#pragma unroll 1
    for (int set = 0; set < sets; ++set) {
      const Slab slab{first_row, min(kPhiRows, num_rows - first_row), set};
      const int num_owned = slab.num_owned(rank);
      float out[1][4][4] = {};
#pragma unroll 1
      for (int column = 0; column < hidden; column += kPhiColumns, ++passes) {
        if (column > 0) __syncthreads();  // the stages are free
        PhiPass<T> pass{shared,
                        &maps.first[which],
                        &maps.second[which],
                        static_cast<const T*>(phi.pe),
                        slab,
                        rank,
                        dim,
                        length,
                        hidden,
                        column,
                        min(kPhiColumns, hidden - column),
                        dim > kPhiDepth ? 2 * num_tokens : num_tokens,
                        0,
                        turns};
        if (pass.pe != nullptr) pass.pe += (set * length + rank) * dim;
        pass.num_second = mlp && num_owned > 0 ? (pass.columns + kPhiDepth - 1) / kPhiDepth : 0;
        turns += pass.num_turns();
        // This thread block is there, and has read what was sent to it before: all its warps have since met,
        // so the release of one of them is enough, and it waits while the first one lists blocks.
        if (passes > 0 && warp == kAppendWarps - 1) {
          ptx::cluster_arrive();
        } else {
          ptx::cluster_arrive_relaxed();
        }
        if (threadIdx.x == kPhiLoader)
          ptx::barrier_arrive_expect(sent, num_senders * num_owned * pass.columns * 4);
#pragma unroll 1
        for (int turn = 0; turn < kPhiStages; ++turn) pass.load_weights(turn);
        if (column == 0) {
          if (warp == 0) list_blocks(p, by, which, heads.divide(first_row), step, shared.blocks, lane);
          __syncthreads();
          find_rows<T>(p, by, which, slab, rank, num_tokens, shared);
          __syncthreads();
        }
        const uint4 pe = pass.load_pe(0);
#pragma unroll 1
        for (int turn = 0; turn < kPhiStages; ++turn) pass.load_tokens(turn);
        pass.add_pe(0, pe);
        __syncthreads();
        if (slab.num_rows <= 16) {
          first_product<T, 1>(pass);
        } else {
          first_product<T, kPhiSlabs>(pass);
        }
        const bool exists = column + static_cast<int>(threadIdx.x) < hidden;
        float bias = 0.f;
        if (exists && phi.b1 != nullptr) {
          bias =
              static_cast<float>(static_cast<const T*>(phi.b1)[int64_t{set} * hidden + column + threadIdx.x]);
        }
        ptx::barrier_wait(sent, passes & 1);
        activate<T>(shared, num_owned, num_senders, exists, mlp, bias);
        __syncthreads();
        second_product(pass, second, out);
      }
      // A thread has two channels of every fourth or second row.
      const int shift = half <= 64 ? 6 : 7, c = threadIdx.x & ((1 << shift) - 1);
      int owned = threadIdx.x >> shift;
      const int row = min(owned * kAppendCluster + rank, slab.num_rows - 1);
      const OutputPair<T> pair(p, which, set, shared.positions[row], min(c, half - 1));
      if (mlp) {
        const int at = second.part * dim + second.group * kWarpColumns + adjacent_column(lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 values = adjacent_columns(out[0][2 * i], out[0][2 * i + 1], 0, lane);
          if (lane / 4 < num_owned && second.part < second.parts())
            *reinterpret_cast<float4*>(&shared.out[lane / 4][at + 16 * i]) = values;
        }
        __syncthreads();
      }
      const int parts = mlp ? second.parts() : 1;
#pragma unroll 1
      for (bool again = false; owned < num_owned; owned += kAppendThreads >> shift, again = true) {
        const int row = owned * kAppendCluster + rank;
        T* const target = static_cast<T*>(shared.targets[row]);
        if (c >= half || target == nullptr) continue;
        float x = 0.f, y = 0.f;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) {
          x += shared.out[owned][part * dim + c];
          y += shared.out[owned][part * dim + c + half];
        }
        if (again) {
          OutputPair<T>(p, which, set, shared.positions[row], c).store(target + c, half, x, y);
        } else {
          pair.store(target + c, half, x, y);
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace nsa::cuda::sm90
