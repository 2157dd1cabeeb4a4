// The first launch of decode_attention on Hopper: compressed keys, split over thread blocks. Each leaves a
// partial result, and what the block scores need: the probabilities of a tile, relative to the running
// maximum at that time, summed over the keys of each selection block.
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/sm90/decode_attention.h"
#include "cuda/sm90/decode_tile.cuh"
#include "cuda/sm90/device.h"

namespace nsa::cuda::sm90 {
namespace {

constexpr int kMaxTaps = 64;
constexpr int kScorePitch = kDecodeKeys + 1;

template <int kDimQK, int kDimV>
struct CompressedLayout : DecodeLayout<kDimQK, kDimV> {
  using Base = DecodeLayout<kDimQK, kDimV>;
  static constexpr int kQ = 0;
  static constexpr int kProbabilities = kQ + Base::kQBytes;
  static constexpr int kRing = kProbabilities + kDecodeWarps * kDecodeRows * kScorePitch * 4;
  static constexpr int bytes(int stages) { return kRing + Base::ring_bytes(stages); }
};

// Sums a tile's probabilities by selection block: two lanes a row. target: the entries of the lane's row, or
// null. largest: the row's maximum, base 2.
__device__ __forceinline__ void sum_by_block(float* target, const float* probabilities, const float* taps,
                                             const DecodePlan& plan, float largest, int lane) {
  const int used = plan.blocks_per_tile + plan.spill, num_taps = plan.per_block + plan.before;
  const float* row = probabilities + (lane >> 1) * kScorePitch;
  if (target == nullptr) return;
#pragma unroll 1
  for (int vector = lane & 1; vector * 4 < plan.entries; vector += 2) {
    float total[4] = {};
#pragma unroll 1
    for (int x = 0; x < num_taps; ++x) {
      const float tap = taps[x];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int entry = vector * 4 + e, key = entry * plan.per_block - plan.before + x;
        const bool counts = entry < used && static_cast<unsigned>(key) < kDecodeKeys;
        total[e] = fmaf(tap, counts ? row[key] : 0.f, total[e]);
      }
    }
    if (vector * 4 + 4 == plan.entries) total[3] = largest;
    reinterpret_cast<float4*>(target)[vector] = make_float4(total[0], total[1], total[2], total[3]);
  }
}

template <typename T, int kDimQK, int kDimV>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_compressed_sm90(const __grid_constant__ DecodeAttentionParams p,
                           const __grid_constant__ DecodePlan plan) {
  using Layout = CompressedLayout<kDimQK, kDimV>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ alignas(8) uint64_t barriers[kDecodeWarps * kMaxDecodeStages + 1];
  __shared__ float taps[kMaxTaps];
  __shared__ float2 states[kDecodeWarps * kDecodeRows];
  const uint32_t base = ptx::shared_address(shared), barrier = ptx::shared_address(barriers);
  const uint32_t q_barrier = barrier + kDecodeWarps * kMaxDecodeStages * 8;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  init_decode_barriers(barrier, kDecodeWarps * kMaxDecodeStages + 1);
  if (threadIdx.x < plan.per_block + plan.before) {
    // Tap x of selection block j is compressed block j * per_block + x - before, whatever j.
    const int64_t j = plan.before + 1;
    taps[threadIdx.x] = static_cast<float>(overlap(j * plan.per_block + threadIdx.x - plan.before, j,
                                                   p.compressed, p.block_size)) /
                        static_cast<float>(p.compressed.stride);
  }
  __syncthreads();
  ptx::wait_for_dependency();
  ptx::launch_dependents();

  const int head = blockIdx.y, group = p.shape.group();
  const int64_t b = blockIdx.z / plan.row_tiles;
  const int first_row = blockIdx.z % plan.row_tiles * kDecodeRows;
  const Sequence seq = clamped_sequence(p.seqs, b);
  const int num_rows = static_cast<int>(min64(seq.q_len * group - first_row, kDecodeRows));
  if (num_rows <= 0) return;
  const auto token_of = [&](int row) { return (first_row + row) / group; };
  const auto head_of = [&](int row) { return (first_row + row) % group; };
  const auto position = [&](int row) { return static_cast<int>(seq.position(token_of(row))); };
  const CachedKeyBlocks blocks(p.compressed);
  const int end = blocks.end_visible(position(num_rows - 1));
  const int tiles = (end + kDecodeKeys - 1) / kDecodeKeys, each = (tiles + plan.splits - 1) / plan.splits;
  const int first_tile = blockIdx.x * each, last_tile = min(tiles, first_tile + each);

  const LaneRows keys(p.k_cmp, p.v_cmp, b, head, plan.before, lane);  // cached_row(0) == before
  DecodeRing<T, kDimQK, kDimV> ring(base + Layout::kRing, barrier, plan.stages, warp);
  const auto load_next = [&] {
    const int tile = first_tile + ring.loaded * kDecodeWarps + warp;
    if (tile < last_tile) ring.load(keys, tile * kDecodeKeys, end, lane);
  };
  if (warp == 0 && first_tile < last_tile) {
    load_decode_queries<T, kDimQK>(
        base + Layout::kQ, q_barrier,
        [&](int row) -> const T* {
          if (row >= num_rows) return nullptr;
          return static_cast<const T*>(p.q.data) + (seq.q_begin + token_of(row)) * p.q.stride_row +
                 (head * group + head_of(row)) * p.q.stride_head;
        },
        lane);
  }
#pragma unroll 1
  for (int stage = 0; stage < plan.stages; ++stage) load_next();

  VisibleKeys visible;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    visible.low[half] = 0;
    visible.high[half] = blocks.end_visible(position(min(lane / 4 + 8 * half, num_rows - 1)));
  }
  visible.full_low = 0;
  visible.full_high = blocks.end_visible(position(0));
  const float scale = static_cast<float>(p.softmax_scale) * kLog2e;
  // Where the lane's row goes in sum_by_block.
  float* sums = nullptr;
  const int64_t sums_of_tile = int64_t{group} * plan.entries;
  if ((lane >> 1) < num_rows) {
    const int row = lane >> 1;
    sums = plan.sums +
           ((seq.q_begin + token_of(row)) * p.shape.num_heads_kv + head) * plan.max_tiles * sums_of_tile +
           head_of(row) * plan.entries;
  }
  float* probabilities =
      reinterpret_cast<float*>(shared + Layout::kProbabilities) + warp * kDecodeRows * kScorePitch;
  DecodeWarp<T, kDimQK, kDimV> state;
  if (first_tile < last_tile) {
    ptx::barrier_wait(q_barrier, 0);
    __syncwarp();
  }
#pragma unroll 1
  for (int tile = first_tile + warp; tile < last_tile; tile += kDecodeWarps) {
    state.attend(base + Layout::kQ, ring.front(), tile * kDecodeKeys, end, visible, scale, lane,
                 [&](const float(&score)[kDecodeKeys / 8][4]) {
#pragma unroll
                   for (int half = 0; half < 2; ++half) {
                     float* row = probabilities + (lane / 4 + 8 * half) * kScorePitch + (lane & 3) * 2;
#pragma unroll
                     for (int i = 0; i < kDecodeKeys / 8; ++i) {
                       row[i * 8] = score[i][2 * half];
                       row[i * 8 + 1] = score[i][2 * half + 1];
                     }
                   }
                   const float max0 = __shfl_sync(~0u, state.max[0], (lane >> 1 & 7) * 4);
                   const float max1 = __shfl_sync(~0u, state.max[1], (lane >> 1 & 7) * 4);
                   const float max = lane < 16 ? max0 : max1;  // of row lane / 2
                   __syncwarp();
                   sum_by_block(sums == nullptr ? nullptr : sums + tile * sums_of_tile, probabilities, taps,
                                plan, max * scale, lane);
                   __syncwarp();
                 });
    ring.pop();
    load_next();
  }

  if (first_tile >= last_tile) {  // whoever reads the state leaves the rest alone
    if (threadIdx.x < num_rows) {
      const int row = threadIdx.x;
      plan.part_state[((seq.q_begin + token_of(row)) * p.shape.num_heads_q + head * group + head_of(row)) *
                          plan.splits +
                      blockIdx.x] = make_float2(kNegInf, 0.f);
    }
    return;
  }

  // The warps' results, in place of the ring.
  __syncthreads();
  float* outputs = reinterpret_cast<float*>(shared + Layout::kRing);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * kDecodeRows + lane / 4 + 8 * half;
    const float2 own = state.state(half, scale);
    if ((lane & 3) == 0) states[row] = own;
#pragma unroll
    for (int d = 0; d < kDimV / 8; ++d) {
      *reinterpret_cast<float2*>(outputs + row * Layout::kOutputPitch + d * 8 + (lane & 3) * 2) =
          make_float2(state.out[0][d][2 * half], state.out[0][d][2 * half + 1]);
    }
  }
  __syncthreads();
  constexpr int kVectors = kDimV / 4;
  for (int i = threadIdx.x; i < num_rows * kVectors; i += kDecodeThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const int64_t at =
        ((seq.q_begin + token_of(row)) * p.shape.num_heads_q + head * group + head_of(row)) * plan.splits +
        blockIdx.x;
    float max = kNegInf;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) max = fmaxf(max, states[w * kDecodeRows + row].x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float2 s = states[w * kDecodeRows + row];
      const float weight = s.y == 0.f ? 0.f : ptx::exp2_approx(s.x - max);
      const float4 x = *reinterpret_cast<const float4*>(
          outputs + (w * kDecodeRows + row) * Layout::kOutputPitch + vector * 4);
      total += weight * s.y;
      sum = make_float4(fmaf(weight, x.x, sum.x), fmaf(weight, x.y, sum.y), fmaf(weight, x.z, sum.z),
                        fmaf(weight, x.w, sum.w));
    }
    reinterpret_cast<float4*>(plan.part_o + at * kDimV)[vector] = sum;
    if (vector == 0) plan.part_state[at] = make_float2(max, total);
  }
}

template <typename T, int kDimQK, int kDimV>
Status run(const DecodeAttentionParams& p, const DecodePlan& plan, const Stream& stream) {
  const dim3 grid(static_cast<unsigned>(plan.splits), static_cast<unsigned>(p.shape.num_heads_kv),
                  static_cast<unsigned>(p.seqs.batch * plan.row_tiles));
  return launch_dependent("decode_compressed_sm90", decode_compressed_sm90<T, kDimQK, kDimV>, grid, 1,
                          kDecodeThreads, CompressedLayout<kDimQK, kDimV>::bytes(plan.stages), stream, p,
                          plan);
}

}  // namespace

bool decode_compressed(const DecodeAttentionParams& p, const DecodePlan& plan, const Stream& stream,
                       Status* status) {
  return dispatch_kernels(p.dtype, p.shape.head_dim_qk, p.shape.head_dim_v,
                          [&]<typename T, int kDimQK, int kDimV>() {
                            *status = run<T, kDimQK, kDimV>(p, plan, stream);
                            return true;
                          });
}

}  // namespace nsa::cuda::sm90
