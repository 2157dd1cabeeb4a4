// Small kernels, each with one way of passing a buffer between warps, to learn what racecheck knows of
// mbarriers (docs/kernels/racecheck.md):
//
//   nvcc -std=c++17 -lineinfo -arch=sm_90a -o racecheck_patterns tools/racecheck_patterns.cu
//   compute-sanitizer --tool racecheck racecheck_patterns
//
// Warp 0 fills one of two slots of shared memory, warp 1 sums it, many rounds. The sums are checked, too.
#include <cstdint>
#include <cstdio>

namespace {

constexpr int kRounds = 64, kSlots = 2;

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

__device__ void arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(address(barrier))
               : "memory");
}

__device__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address(barrier)), "r"(parity)
        : "memory");
  }
}

enum class Arrival { kAllLanes, kLane0, kLane0WithoutSyncwarp };

template <Arrival kBy>
__device__ void arrive_for_warp(uint64_t* barrier) {
  if constexpr (kBy == Arrival::kAllLanes) {
    arrive(barrier);
  } else {
    if constexpr (kBy == Arrival::kLane0) __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
  }
}

template <Arrival kBy>
__host__ __device__ constexpr int arrivals() {
  return kBy == Arrival::kAllLanes ? 32 : 1;
}

template <Arrival kFull, Arrival kEmpty>
__device__ void pass_on(int* sums) {
  __shared__ int slots[kSlots][32];
  __shared__ uint64_t full[kSlots], empty[kSlots];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) {
      init(&full[s], arrivals<kFull>());
      init(&empty[s], arrivals<kEmpty>());
    }
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int s = round % kSlots, lap = round / kSlots;
    if (threadIdx.x < 32) {
      if (lap > 0) wait(&empty[s], (lap - 1) & 1);
      slots[s][lane] = round + lane;
      arrive_for_warp<kFull>(&full[s]);
    } else {
      wait(&full[s], lap & 1);
      sum += slots[s][lane ^ 1];
      arrive_for_warp<kEmpty>(&empty[s]);
    }
  }
  if (threadIdx.x >= 32) sums[lane] = sum;
}

__global__ void all_lanes_arrive(int* sums) { pass_on<Arrival::kAllLanes, Arrival::kAllLanes>(sums); }
__global__ void writers_lane0_arrives(int* sums) { pass_on<Arrival::kLane0, Arrival::kAllLanes>(sums); }
__global__ void readers_lane0_arrives(int* sums) { pass_on<Arrival::kAllLanes, Arrival::kLane0>(sums); }
__global__ void both_lane0_arrive(int* sums) { pass_on<Arrival::kLane0, Arrival::kLane0>(sums); }
// A race: nothing orders the writes of lanes 1 to 31 before the arrival of lane 0.
__global__ void race_writers_without_syncwarp(int* sums) {
  pass_on<Arrival::kLane0WithoutSyncwarp, Arrival::kAllLanes>(sums);
}

// The same by a chain: warp 0 fills, warp 1 copies, warp 2 sums and frees warp 0's slot only.
__global__ void chain_of_barriers(int* sums) {
  __shared__ int first[32], second[32];
  __shared__ uint64_t filled, copied, summed;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    init(&filled, 32);
    init(&copied, 32);
    init(&summed, 32);
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    if (warp == 0) {
      if (round > 0) wait(&summed, (round - 1) & 1);
      first[lane] = round + lane;
      arrive(&filled);
    } else if (warp == 1) {
      wait(&filled, round & 1);
      second[lane] = first[lane ^ 1];
      arrive(&copied);
    } else {
      wait(&copied, round & 1);
      sum += round % 2 ? second[lane ^ 2] : first[lane];
      arrive(&summed);
    }
  }
  if (warp == 2) sums[lane] = sum;
}

__global__ void syncwarp_only(int* sums) {
  __shared__ int slots[64];
  const int lane = threadIdx.x % 32;
  int* mine = slots + (threadIdx.x & 32);
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    mine[lane] = round + lane;
    __syncwarp();
    sum += mine[lane ^ 1];
    __syncwarp();
  }
  if (threadIdx.x >= 32) sums[lane] = sum;
}

template <typename Kernel>
int run(const char* name, Kernel kernel, int threads) {
  int* sums = nullptr;
  int host[32];
  cudaMalloc(&sums, sizeof(host));
  kernel<<<1, threads>>>(sums);
  cudaMemcpy(host, sums, sizeof(host), cudaMemcpyDeviceToHost);
  int total = 0, expected = 0;
  for (int lane = 0; lane < 32; ++lane) total += host[lane];
  for (int round = 0; round < kRounds; ++round) expected += 32 * round + 31 * 16;
  std::printf("%-32s %s (%s)\n", name, total == expected ? "right" : "WRONG",
              cudaGetErrorString(cudaGetLastError()));
  cudaFree(sums);
  return total != expected;
}

}  // namespace

int main() {
  int wrong = 0;
  wrong += run("all_lanes_arrive", all_lanes_arrive, 64);
  wrong += run("writers_lane0_arrives", writers_lane0_arrives, 64);
  wrong += run("readers_lane0_arrives", readers_lane0_arrives, 64);
  wrong += run("both_lane0_arrive", both_lane0_arrive, 64);
  wrong += run("race_writers_without_syncwarp", race_writers_without_syncwarp, 64);
  wrong += run("chain_of_barriers", chain_of_barriers, 96);
  wrong += run("syncwarp_only", syncwarp_only, 64);
  return wrong;
}
