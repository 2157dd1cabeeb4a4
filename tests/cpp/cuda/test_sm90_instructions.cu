// The instructions that the Hopper kernels stand on, each against naive loops: what TMA puts where, and
// products by wgmma from swizzled tiles.
#include <cstdlib>
#include <vector>

#include "catch2_bridge.h"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/swizzled_tile.cuh"
#include "device_memory.h"

namespace nsa::cuda {
namespace {

constexpr int kAlignment = 1024;

template <typename T>
std::vector<T> small_integers(size_t size, unsigned seed) {
  std::srand(seed);
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(static_cast<float>(std::rand() % 9 - 4));
  return values;
}

template <typename T>
constexpr DType kTestDType = ptx::kIsHalf<T> ? DType::kF16 : DType::kBF16;

__device__ uint32_t aligned_shared(const unsigned char* shared) {
  return (ptx::shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
}

// Loads rows [first, first + kRows) of one head and writes them out by swizzled_offset.
template <typename T, int kRows, int kDim>
__global__ void copy_through_tile(const __grid_constant__ CUtensorMap map, int first, int head, T* out) {
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage;
  const uint32_t tile = aligned_shared(shared), barrier = ptx::shared_address(&barrier_storage);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_arrive_expect(barrier, swizzled_tile_bytes<kDim>(kRows));
    for (int panel = 0; panel < kDim / kPanel; ++panel) {
      ptx::bulk_load_3d(tile + panel * kRows * kPanelPitch, &map, barrier, panel * kPanel, head, first);
    }
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kRows * kDim / 8; i += blockDim.x) {
    const int row = i / (kDim / 8), chunk = i % (kDim / 8);
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(tile + swizzled_offset(kRows, row, chunk)));
    reinterpret_cast<uint4*>(out)[i] = value;
  }
}

// scores = a . b^T (both K-major), then out = scores . v with v [kN x kDim], by one warpgroup.
template <typename T, int kN, int kDim, bool kFromRegisters>
__global__ void multiply_tiles(const __grid_constant__ CUtensorMap a_map,
                               const __grid_constant__ CUtensorMap b_map, float* scores, float* out) {
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage;
  const uint32_t a = aligned_shared(shared), b = a + swizzled_tile_bytes<kDim>(64),
                 barrier = ptx::shared_address(&barrier_storage);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_arrive_expect(barrier, swizzled_tile_bytes<kDim>(64 + kN));
    for (int panel = 0; panel < kDim / kPanel; ++panel) {
      ptx::bulk_load_3d(a + panel * 64 * kPanelPitch, &a_map, barrier, panel * kPanel, 0, 0);
      ptx::bulk_load_3d(b + panel * kN * kPanelPitch, &b_map, barrier, panel * kPanel, 0, 0);
    }
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);

  float s[kN / 2];
  ptx::wgmma_fence();
  for (int k = 0; k < kDim; k += 16) {
    if constexpr (kFromRegisters) {
      uint32_t fragment[4];
      ptx::load_matrices(fragment, a + swizzled_offset(64, threadIdx.x / 32 * 16 + threadIdx.x % 16,
                                                       k / 8 + threadIdx.x % 32 / 16));
      ptx::wgmma_fence();
      ptx::wgmma_registers_rows<T, kN>(s, fragment, k_major_descriptor(b, kN, k), k > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    } else {
      ptx::wgmma_shared<T, kN>(s, k_major_descriptor(a, 64, k), k_major_descriptor(b, kN, k), k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(s);
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < kN / 2; ++i)
    scores[(row + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + 2 * (lane & 3) + i % 2] = s[i];

  // The keys double as values: b is [kN x kDim] with kDim contiguous.
  float o[kDim / 2];
  uint32_t p[kN / 16][4];
  for (int i = 0; i < kN / 4; ++i) p[i / 4][i % 4] = ptx::pack2<T>(s[2 * i] / 256, s[2 * i + 1] / 256);
  ptx::wgmma_fence();
  for (int k = 0; k < kN; k += 16)
    ptx::wgmma_registers<T, kDim>(o, p[k / 16], mn_major_descriptor(b, kN, k), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(o);
  for (int i = 0; i < kDim / 2; ++i)
    out[(row + 8 * (i / 2 % 2)) * kDim + 8 * (i / 4) + 2 * (lane & 3) + i % 2] = o[i];
}

// out = a . v by one warpgroup: a [64 x 64] as fragments, v [64 x 144] in panels that lie `rows` rows apart,
// the last of 16 columns.
template <typename T>
__global__ void multiply_far_panels(const T* a, const T* v, int rows, float* out) {
  constexpr int kColumns = 144;
  extern __shared__ unsigned char shared[];
  const uint32_t base = aligned_shared(shared);
  unsigned char* const tile = shared + (base - ptx::shared_address(shared));
  for (int i = threadIdx.x; i < 64 * kColumns; i += blockDim.x) {
    const int key = i / kColumns, column = i % kColumns;
    *reinterpret_cast<T*>(tile + swizzled_offset(rows, key, column / 8) + column % 8 * 2) = v[i];
  }
  ptx::async_proxy_fence();
  __syncthreads();
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + lane / 4;
  uint32_t fragments[4][4];
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i)
      fragments[k][i] = *reinterpret_cast<const uint32_t*>(a + (row + 8 * (i % 2)) * 64 + k * 16 +
                                                           8 * (i / 2) + 2 * (lane & 3));
  }
  float o[kColumns / 2];
  ptx::wgmma_fence();
  for (int k = 0; k < 4; ++k)
    ptx::wgmma_registers<T, kColumns>(o, fragments[k], mn_major_descriptor(base, rows, 16 * k), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(o);
  for (int i = 0; i < kColumns / 2; ++i)
    out[(row + 8 * (i / 2 % 2)) * kColumns + 8 * (i / 4) + 2 * (lane & 3) + i % 2] = o[i];
}

template <typename Kernel>
void allow_shared(Kernel kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename T, int kN, int kDim, bool kFromRegisters = false>
void check_products() {
  const auto a_host = small_integers<T>(64 * kDim, 1), b_host = small_integers<T>(kN * kDim, 2);
  const nsa_test::DeviceArray<T> a(a_host), b(b_host);
  nsa_test::DeviceArray<float> scores(64 * kN), out(64 * kDim);
  CUtensorMap a_map, b_map;
  // Named, because nvcc drops the braces of a temporary here.
  const RowsView a_view{a.data, kDim, kDim}, b_view{b.data, kDim, kDim};
  REQUIRE(sm90::make_tensor_map(&a_map, kTestDType<T>, a_view, 64, 1, kDim, 64, 1));
  REQUIRE(sm90::make_tensor_map(&b_map, kTestDType<T>, b_view, kN, 1, kDim, kN, 1));
  const int bytes = kAlignment + swizzled_tile_bytes<kDim>(64 + kN);
  allow_shared(multiply_tiles<T, kN, kDim, kFromRegisters>, bytes);
  multiply_tiles<T, kN, kDim, kFromRegisters><<<1, 128, bytes>>>(a_map, b_map, scores.data, out.data);
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
  const auto s = scores.host(), o = out.host();
  double worst_score = 0, worst_out = 0;
  for (int i = 0; i < 64; ++i) {
    std::vector<double> expected_out(kDim);
    for (int j = 0; j < kN; ++j) {
      double expected = 0;
      for (int d = 0; d < kDim; ++d)
        expected += static_cast<double>(static_cast<float>(a_host[i * kDim + d])) *
                    static_cast<float>(b_host[j * kDim + d]);
      worst_score = std::max(worst_score, std::abs(expected - s[i * kN + j]));
      const float p = static_cast<float>(static_cast<T>(static_cast<float>(expected / 256)));
      for (int d = 0; d < kDim; ++d) expected_out[d] += p * static_cast<float>(b_host[j * kDim + d]);
    }
    for (int d = 0; d < kDim; ++d)
      worst_out = std::max(worst_out, std::abs(expected_out[d] - o[i * kDim + d]));
  }
  CHECK(worst_score == 0);
  CHECK(worst_out < 1e-3);
}

template <typename T>
void check_far_panels(int rows) {
  CAPTURE(rows);
  constexpr int kColumns = 144;
  const auto a_host = small_integers<T>(64 * 64, 5), v_host = small_integers<T>(64 * kColumns, 6);
  const nsa_test::DeviceArray<T> a(a_host), v(v_host);
  nsa_test::DeviceArray<float> out(64 * kColumns);
  const int bytes = kAlignment + 3 * rows * kPanelPitch;
  allow_shared(multiply_far_panels<T>, bytes);
  multiply_far_panels<T><<<1, 128, bytes>>>(a.data, v.data, rows, out.data);
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
  const auto o = out.host();
  int wrong = 0;
  for (int i = 0; i < 64; ++i) {
    for (int column = 0; column < kColumns; ++column) {
      double expected = 0;
      for (int k = 0; k < 64; ++k)
        expected += static_cast<double>(static_cast<float>(a_host[i * 64 + k])) *
                    static_cast<float>(v_host[k * kColumns + column]);
      wrong += o[i * kColumns + column] != expected;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("TMA lays a tile out as swizzled_offset says", "[sm90]") {
  if (!nsa_test::is_hopper()) return;
  constexpr int kRows = 24, kDim = 128, kTotal = 40, kHeads = 3;
  const auto host = small_integers<__nv_bfloat16>(kTotal * kHeads * kDim, 3);
  const nsa_test::DeviceArray<__nv_bfloat16> x(host);
  CUtensorMap map;
  REQUIRE(sm90::make_tensor_map(&map, DType::kBF16, {x.data, kHeads * kDim, kDim}, kTotal, kHeads, kDim,
                                kRows, 1));
  const int bytes = kAlignment + swizzled_tile_bytes<kDim>(kRows);
  for (const int first : {0, 7, 30, -5}) {  // the last two reach beyond the tensor, where zeros are read
    nsa_test::DeviceArray<__nv_bfloat16> out(kRows * kDim);
    copy_through_tile<__nv_bfloat16, kRows, kDim><<<1, 128, bytes>>>(map, first, 2, out.data);
    REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
    const auto copied = out.host();
    int wrong = 0;
    for (int row = 0; row < kRows; ++row) {
      for (int d = 0; d < kDim; ++d) {
        const bool inside = first + row >= 0 && first + row < kTotal;
        const float expected =
            inside ? static_cast<float>(host[((first + row) * kHeads + 2) * kDim + d]) : 0.f;
        wrong += static_cast<float>(copied[row * kDim + d]) != expected;
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("a box of more heads than the group has reads zeros for the rest", "[sm90]") {
  if (!nsa_test::is_hopper()) return;
  CUtensorMap map;
  const auto host = small_integers<__half>(8 * 6 * 64, 4);
  const nsa_test::DeviceArray<__half> x(host);
  REQUIRE(sm90::make_group_tensor_map(&map, DType::kF16, {x.data, 6 * 64, 64}, 8, 2, 3, 64, 8, 4));
  CHECK_FALSE(sm90::make_group_tensor_map(&map, DType::kF16, {x.data + 1, 6 * 64, 64}, 8, 2, 3, 64, 8, 4));
  CHECK_FALSE(sm90::make_tensor_map(&map, DType::kF16, {x.data, 6 * 64 + 4, 64}, 8, 6, 64, 8, 1));
  CHECK_FALSE(sm90::make_tensor_map(&map, DType::kF16, {x.data, 6 * 64, 64}, 0, 6, 64, 8, 1));
}

TEST_CASE("wgmma multiplies swizzled tiles", "[sm90]") {
  if (!nsa_test::is_hopper()) return;
  check_products<__nv_bfloat16, 64, 64>();
  check_products<__nv_bfloat16, 80, 128>();
  check_products<__nv_bfloat16, 128, 128>();
  check_products<__nv_bfloat16, 176, 128>();
  check_products<__nv_bfloat16, 176, 64>();
  check_products<__nv_bfloat16, 32, 128>();
  check_products<__nv_bfloat16, 128, 192>();
  check_products<__half, 32, 192>();
  check_products<__nv_bfloat16, 64, 128, true>();
  check_products<__half, 128, 64, true>();
  check_products<__half, 64, 128>();
  check_products<__half, 80, 64>();
  check_products<__half, 128, 64>();
  check_products<__half, 176, 128>();
}

TEST_CASE("wgmma multiplies panels that lie apart", "[sm90]") {
  if (!nsa_test::is_hopper()) return;
  for (const int rows : {64, 192, 256}) {
    check_far_panels<__nv_bfloat16>(rows);
    check_far_panels<__half>(rows);
  }
}

}  // namespace
}  // namespace nsa::cuda
