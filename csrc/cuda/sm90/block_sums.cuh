// What compressed attention that chooses blocks knows of them, where compressed blocks are two strides,
// selection blocks four, and a group has 16 heads: a warp of it owns one token with all heads.
//
// A key tile's probabilities times a matrix of overlap weights, which stands beside V as 16 more columns, are
// their sums over selection blocks. Their weights, 2^(maximum - lse), are known only when the last tile is
// done; until then a warp keeps the sums of its token in a part of the workspace of its own: a record per key
// tile. Then it makes scores of them, by which choose_from_sums.cuh chooses.
#pragma once

#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/choose_blocks.cuh"
#include "cuda/tile/sequence_tile.cuh"
#include "cuda/tile/swizzled_tile.cuh"
#include "cuda/tile/warpgroup_softmax.cuh"
#include "nsa/params.h"

namespace nsa::cuda::sm90 {

constexpr int kSumKeys = 64;       // of a key tile
constexpr int kBlockSums = 16;     // selection blocks of a key tile
constexpr int kSumsGroup = 16;     // heads of a group
constexpr int kSumsBlockLog2 = 6;  // of the tokens of a selection block
constexpr int kSumsDim = 128;      // of queries and keys
constexpr int kSumsWarps = 12;     // of a thread block, each with a token
constexpr int kSumsRows = 64;      // of Q of a warpgroup
// Overlap weights are 2^kSumsShift times as large, so that sums of probabilities up to 2^8 use the range of
// fp16 to its end.
constexpr int kSumsShift = 4;

// Compressed blocks of two strides of 16 that a token sees.
__device__ __forceinline__ int sum_keys_seen(int position) {
  return position < 31 ? 0 : (position - 31 >> 4) + 1;
}

// Of a key tile, in fp16 and 2^kSumsShift times as large: the sums, as the product leaves them in lanes, and
// of the last key of the tile before it, which reaches into its first block, the probabilities of heads h and
// h + 8 together.
struct SumsRecord {
  uint4 sums[32];
  uint2 before[4];
};
constexpr int kSumsLine = 128;    // of the L2 cache
constexpr int kSumsPerLines = 4;  // records that fill whole ones
static_assert(kSumsPerLines * sizeof(SumsRecord) % kSumsLine == 0);

// What the sums of a token are relative to, in shared memory. Maxima grow seldom, and records are written
// from the newest key tile to the oldest: epoch e begins with the record of key tile first[e] and has the
// maxima max[e]. More than kMaxEpochs: its blocks are left to another kernel.
constexpr int kMaxEpochs = 15;
struct SumsEpochs {
  int count;
  int first[kMaxEpochs];
  float max[kMaxEpochs][kSumsGroup];
  float lse[kSumsGroup];  // base 2, in the end
};

// By one warp: the record of this key tile, and all behind it, are relative to rows.max.
__device__ __forceinline__ void begin_epoch(SumsEpochs& epochs, int key_tile, const RowPair& rows, bool first,
                                            int lane) {
  __syncwarp();
  const int count = first ? 0 : epochs.count;
  __syncwarp();
  if (count < kMaxEpochs) {
    if (lane == 0) epochs.first[count] = key_tile;
    if ((lane & 3) == 0) epochs.max[count][lane / 4] = rows.max[0];
    if ((lane & 3) == 1) epochs.max[count][lane / 4 + 8] = rows.max[1];
  }
  if (lane == 0) epochs.count = min(count, kMaxEpochs) + 1;
}

// What a launch does for the trial: the first one, with an item per thread block, makes it. Of the two that
// follow with all other items, one that chooses and one that does not, only one does anything.
enum class Trial { kNone, kMade, kFollowed };

// Where the sums and scores of a launch lie.
struct SumsPlan {
  Trial trial;
  char* records;        // SumsRecord [warp of the grid][max_tiles], below 4 GB
  int* keys;            // [warp of the grid][pitch]: scores of a token, as score_key
  uint8_t* unfinished;  // [T, Hkv]: whether the choice is left to another kernel
  int* any_unfinished;  // [warp of the grid]: whether any of its tokens is, or Unfinished::kAll in the first
  int* gain;            // [num_gains], of the trial: gain_of_choice of the token of each warp of the grid
  int num_gains;
  int32_t* block_indices;
  int max_tiles, pitch, num_blocks;
  ChoiceCounts counts;
};

// Parts of the workspace of a choice, one after the other: of every warp of the grid, and of all rows the
// flags. tiles: one more than there are, for what reaches behind the last, and whole lines of the L2 cache.
struct SumsWorkspace {
  static constexpr int64_t kMaxBlocks = 132;  // of a grid: the SMs of a GPU
  int64_t warps, tiles, pitch, rows;

  explicit SumsWorkspace(const SelectBlocksParams& p)
      : warps(kSumsWarps * min64(kMaxBlocks, num_sequence_tiles(p.scoring.seqs, kSumsWarps) *
                                                 p.scoring.shape.num_heads_kv)),
        tiles(round_up(ceil_div(max64(p.scoring.keys.count(p.scoring.seqs.max_seqlen_k), 1), kSumKeys) + 1,
                       kSumsPerLines)),
        pitch(round_up(max64(p.scoring.num_blocks, 1), kBlockSums)),
        rows(p.scoring.seqs.total_q * p.scoring.shape.num_heads_kv) {}
  int64_t record_bytes() const { return warps * tiles * static_cast<int64_t>(sizeof(SumsRecord)); }
  int64_t key_bytes() const { return warps * pitch * static_cast<int64_t>(sizeof(int)); }
  int64_t unfinished() const { return record_bytes() + key_bytes(); }
  int64_t any_unfinished() const { return unfinished() + round_up(rows, 16); }
  int64_t gain() const { return any_unfinished() + warps * static_cast<int64_t>(sizeof(int)); }
  int64_t bytes() const { return gain() + warps * static_cast<int64_t>(sizeof(int)); }
};

// All threads: weight [key][block], a panel as wgmma reads it, of which no more columns are used.
template <typename T>
__device__ __forceinline__ void fill_overlap_weights(unsigned char* weights, int thread, int threads) {
  constexpr float kOne = 1 << kSumsShift;
#pragma unroll 1
  for (int i = thread; i < kBlockSums * kSumKeys; i += threads) {
    const int block = i % kBlockSums, key = i / kBlockSums, at = key - 4 * block;
    const float weight = at < -1 || at > 3 ? 0.f : at == -1 || at == 3 ? kOne : 2 * kOne;
    *reinterpret_cast<T*>(weights + swizzled_offset(kSumKeys, key, block / 8) + block % 8 * 2) =
        static_cast<T>(weight);
  }
  ptx::async_proxy_fence();
}

// One warp: keeps the sums of a key tile, and in the next record what reaches into the next tile. last: the
// fragment of the probabilities of its last keys.
template <typename T>
__device__ __forceinline__ void keep_sums(SumsRecord* record, const float* sums, const uint32_t (&last)[4],
                                          int lane) {
  __stcg(&record->sums[lane],
         make_uint4(ptx::pack2<__half>(sums[0], sums[1]), ptx::pack2<__half>(sums[2], sums[3]),
                    ptx::pack2<__half>(sums[4], sums[5]), ptx::pack2<__half>(sums[6], sums[7])));
  if ((lane & 3) == 3) {
    const float2 end = ptx::unpack2<T>(__byte_perm(last[2], last[3], 0x7632));
    __stcg(reinterpret_cast<uint32_t*>(record[1].before) + lane / 4,
           ptx::pack2<__half>(end.x * (1 << kSumsShift), end.y * (1 << kSumsShift)));
  }
}

// One warp: lse of its token's heads; inf for a head of no keys.
__device__ __forceinline__ void keep_lse(SumsEpochs& epochs, const RowPair& rows, int lane) {
  const float sum0 = quad_sum(rows.sum[0]), sum1 = quad_sum(rows.sum[1]);
  const float lse0 = sum0 == 0.f ? __int_as_float(0x7f800000) : rows.max[0] + log2f(sum0),
              lse1 = sum1 == 0.f ? __int_as_float(0x7f800000) : rows.max[1] + log2f(sum1);
  if ((lane & 3) == 0) epochs.lse[lane / 4] = lse0;
  if ((lane & 3) == 1) epochs.lse[lane / 4 + 8] = lse1;
  __syncwarp();
}

// The weights of the heads in an epoch, 2^(maximum - lse), as the B fragment of a product m16n8k16 over the
// 16 heads: 2^kWeightShift times as large, what fp16 holds of them in even columns, and the rest in odd ones.
constexpr int kWeightShift = 15;
struct HeadWeights {
  uint32_t b[2];

  __device__ __forceinline__ HeadWeights(const SumsEpochs& epochs, int epoch, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float part[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = (lane & 3) * 2 + e + 8 * i;
        const float weight = ptx::exp2_approx(epochs.max[epoch][head] - epochs.lse[head] + kWeightShift);
        part[e] = lane & 4 ? weight - __half2float(__float2half_rn(weight)) : weight;
      }
      b[i] = ptx::pack2<__half>(part[0], part[1]);
    }
  }
};

// One warp: groups of records are read to their end, and what lies behind the newest key tile must be
// numbers.
__device__ __forceinline__ void clear_records_behind(SumsRecord* record, int key_tile, int lane) {
#pragma unroll 1
  for (int i = 1; (key_tile + i) % kSumsPerLines != 0; ++i)
    __stcg(&record[i].sums[lane], make_uint4(0, 0, 0, 0));
}

// Records on their way to the registers of a warp, from the oldest key tile to the newest, in groups.
struct SumsReader {
  static constexpr int kTiles = 4, kGroups = 2;  // key tiles of a group, groups on their way
  static constexpr uint32_t kGroupBytes = kTiles * sizeof(SumsRecord);
  static_assert(kTiles == kSumsPerLines);
  const SumsRecord* records;
  int tiles, lane;
  uint4 sums[kGroups][kTiles];
  uint2 before[kGroups];  // in lanes of row i: of tile i

  // Records that hold sums of blocks below `end`.
  __device__ __forceinline__ SumsReader(const SumsRecord* records, int end, int lane)
      : records(records), tiles(max(end + kBlockSums - 1, kBlockSums) / kBlockSums), lane(lane) {
#pragma unroll
    for (int slot = 0; slot < kGroups; ++slot) load(slot, slot);
  }
  // Always loads, if twice: else the compiler would keep registers for what was there before.
  __device__ __forceinline__ void load(int slot, int group) {
    const char* const begin = reinterpret_cast<const char*>(records) +
                              static_cast<uint32_t>(min(group, (tiles - 1) / kTiles)) * kGroupBytes;
    const SumsRecord* const first = reinterpret_cast<const SumsRecord*>(begin);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums[slot][i] = __ldcg(&first[i].sums[lane]);
    before[slot] = __ldcg(&first[min(lane / 4, kTiles - 1)].before[lane & 3]);
  }
};

// One warp: they have been read for the last time, and would be written to memory when the L2 cache needs
// room.
__device__ __forceinline__ void discard_records(const SumsRecord* records, int count, int lane) {
  char* const begin = reinterpret_cast<char*>(const_cast<SumsRecord*>(records));
  const int bytes = (count + 1) * static_cast<int>(sizeof(SumsRecord));
#pragma unroll 1
  for (int i = lane * kSumsLine; i < bytes; i += 32 * kSumsLine) ptx::discard(begin + i);
}

// One warp: scores of selection blocks below `end` from the records of its token, as keys (-1: below
// `begin`). Returns this lane's maximum, over one of 32 disjoint parts.
//
// Blocks are the rows of a product, heads what is summed over. Four key tiles share an accumulator: the
// weights of each stand in columns of its own, and so its scores in lanes of their own.
__device__ __forceinline__ int score_blocks(SumsReader& reader, const SumsEpochs& epochs, int* keys,
                                            int begin, int end) {
  constexpr int kTiles = SumsReader::kTiles, kGroups = SumsReader::kGroups;
  const int tiles = reader.tiles, lane = reader.lane, row = lane / 4, column = lane & 3;
  int high = -1, epoch = epochs.count - 1, oldest = 0, newest = epochs.first[epoch];
  HeadWeights weights(epochs, epoch, lane);
  const auto score_group = [&](int front, int slot) {
    uint32_t of_tile[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4& x = reader.sums[slot][i];
      of_tile[i][0] = ptx::transpose_matrix(x.x);
      of_tile[i][1] = ptx::transpose_matrix(x.z);
      of_tile[i][2] = ptx::transpose_matrix(x.y);
      of_tile[i][3] = ptx::transpose_matrix(x.w);
    }
    const uint32_t both[2] = {__byte_perm(reader.before[slot].x, reader.before[slot].y, 0x5410),
                              __byte_perm(reader.before[slot].x, reader.before[slot].y, 0x7632)};
    reader.load(slot, front / kTiles + kGroups);
    float acc[2][4] = {}, reaching[4] = {};
#pragma unroll 1
    while (true) {
      const auto in_epoch = [&](int tile) { return tile >= oldest && tile <= newest; };
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const bool mine = lane / 8 == i && in_epoch(front + i);
        ptx::mma<__half>(acc[i % 2], of_tile[i], mine ? weights.b[0] : 0, mine ? weights.b[1] : 0);
      }
      // Rows are tiles here.
      const bool counts = row < kTiles && in_epoch(front + row - 1), mine = lane < 8;
      const uint32_t ends[4] = {counts ? both[0] : 0, 0, counts ? both[1] : 0, 0};
      ptx::mma<__half>(reaching, ends, mine ? weights.b[0] : 0, mine ? weights.b[1] : 0);
      if (newest >= front + kTiles - 1 || epoch == 0) break;
      oldest = newest + 1;
      newest = epochs.first[--epoch];
      weights = HeadWeights(epochs, epoch, lane);
    }
    const float into = __shfl_sync(~0u, reaching[0] + reaching[1], column * 4);
    constexpr float kUnit = 1.f / (1 << (kSumsShift + kWeightShift));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = (front + column) * kBlockSums + row + 8 * half;
      float score = (acc[0][2 * half] + acc[1][2 * half]) + (acc[0][2 * half + 1] + acc[1][2 * half + 1]);
      if (half == 0 && row == 0) score += into;
      const int key = block >= begin && block < end ? score_key(score * kUnit) : -1;
      if (front + column < tiles) keys[block] = key;
      high = max(high, key);
    }
  };
#pragma unroll 1
  for (int front = 0; front < tiles; front += kGroups * kTiles) {
#pragma unroll
    for (int slot = 0; slot < kGroups; ++slot) {
      if (slot == 0 || front + slot * kTiles < tiles) score_group(front + slot * kTiles, slot);
    }
  }
  __syncwarp();
  return high;
}

}  // namespace nsa::cuda::sm90
