// wgmma with operands whose summed dimension is not contiguous, and 256 columns wide, against naive loops.
#include <cstdlib>
#include <vector>

#include "catch2_bridge.h"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/tensor_map.h"
#include "cuda/tile/swizzled_tile.cuh"
#include "device_memory.h"

namespace nsa::cuda {
namespace {

constexpr int kAlignment = 1024, kDepth = 64;

enum class Form { kBoth, kNatural, kTransposed };  // which operands have the summed dimension contiguous

// out = a . b for one slice of the summed dimension; a is [64 x kDepth], or [kDepth x 64] for kTransposed; b
// is [kN x kDepth] for kBoth, else [kDepth x kN].
template <typename T, int kN, Form kForm>
__global__ void multiply_slice(const __grid_constant__ CUtensorMap a_map,
                               const __grid_constant__ CUtensorMap b_map, float* out) {
  extern __shared__ unsigned char shared[];
  __shared__ __align__(8) uint64_t barrier_storage;
  const uint32_t a = (ptx::shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment,
                 b = a + 64 * kPanelPitch, barrier = ptx::shared_address(&barrier_storage);
  if (threadIdx.x == 0) {
    ptx::barrier_init(barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_arrive_expect(barrier, (64 + kN) * kPanelPitch);
    ptx::bulk_load_3d(a, &a_map, barrier, 0, 0, 0);
    if (kForm == Form::kBoth) {
      ptx::bulk_load_3d(b, &b_map, barrier, 0, 0, 0);
    } else {
      for (int n = 0; n < kN / kPanel; ++n)
        ptx::bulk_load_3d(b + n * kDepth * kPanelPitch, &b_map, barrier, n * kPanel, 0, 0);
    }
  }
  __syncthreads();
  ptx::barrier_wait(barrier, 0);
  float acc[kN / 2];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    if constexpr (kForm == Form::kBoth) {
      ptx::wgmma_shared<T, kN>(acc, k_major_descriptor(a, 64, k), k_major_descriptor(b, kN, k), k > 0);
    } else if constexpr (kForm == Form::kNatural) {
      ptx::wgmma_shared_natural<T, kN>(acc, k_major_descriptor(a, 64, k), mn_major_descriptor(b, kDepth, k),
                                       k > 0);
    } else {
      ptx::wgmma_shared_transposed<T, kN>(acc, mn_major_descriptor(a, kDepth, k),
                                          mn_major_descriptor(b, kDepth, k), k > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(acc);
  const int lane = threadIdx.x & 31, row = threadIdx.x / 32 * 16 + lane / 4;
  for (int i = 0; i < kN / 2; ++i)
    out[(row + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + 2 * (lane & 3) + i % 2] = acc[i];
}

template <typename T, int kN, Form kForm>
void check() {
  std::srand(kN);
  std::vector<T> a_host(64 * kDepth), b_host(kN * kDepth);
  for (T& x : a_host) x = static_cast<T>(static_cast<float>(std::rand() % 9 - 4));
  for (T& x : b_host) x = static_cast<T>(static_cast<float>(std::rand() % 9 - 4));
  const nsa_test::DeviceArray<T> a(a_host), b(b_host);
  nsa_test::DeviceArray<float> out(64 * kN);
  constexpr DType kType = ptx::kIsHalf<T> ? DType::kF16 : DType::kBF16;
  constexpr int kWidth = kForm == Form::kBoth ? kDepth : kN, kHeight = kForm == Form::kBoth ? kN : kDepth;
  const RowsView a_view{a.data, 64, 64}, b_view{b.data, kWidth, kWidth};
  CUtensorMap a_map, b_map;
  REQUIRE(sm90::make_tensor_map(&a_map, kType, a_view, 64, 1, 64, 64, 1));
  REQUIRE(sm90::make_tensor_map(&b_map, kType, b_view, kHeight, 1, kWidth, kHeight, 1));
  constexpr int kBytes = kAlignment + (64 + kN) * kPanelPitch;
  cudaFuncSetAttribute(multiply_slice<T, kN, kForm>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  multiply_slice<T, kN, kForm><<<1, 128, kBytes>>>(a_map, b_map, out.data);
  REQUIRE(cudaDeviceSynchronize() == cudaSuccess);
  const auto actual = out.host();
  int wrong = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < kN; ++n) {
      float expected = 0;
      for (int k = 0; k < kDepth; ++k) {
        expected += static_cast<float>(a_host[kForm == Form::kTransposed ? k * 64 + m : m * kDepth + k]) *
                    static_cast<float>(b_host[kForm == Form::kBoth ? n * kDepth + k : k * kN + n]);
      }
      wrong += expected != actual[m * kN + n];
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("wgmma multiplies operands of either order", "[sm90]") {
  if (!nsa_test::is_hopper()) return;
  check<__nv_bfloat16, 128, Form::kBoth>();
  check<__nv_bfloat16, 256, Form::kBoth>();
  check<__nv_bfloat16, 128, Form::kNatural>();
  check<__nv_bfloat16, 256, Form::kNatural>();
  check<__nv_bfloat16, 128, Form::kTransposed>();
  check<__nv_bfloat16, 256, Form::kTransposed>();
  check<__half, 256, Form::kBoth>();
  check<__half, 256, Form::kNatural>();
  check<__half, 256, Form::kTransposed>();
}

}  // namespace
}  // namespace nsa::cuda
