#include "ops/launch_device.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <type_traits>

#ifdef NSA_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace nsa::ops {
namespace {

void run_on_intraop_threads(int num_threads, void (*body)(void* context, int thread), void* context) {
  at::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body(context, static_cast<int>(thread));
  });
}

cpu::Parallel intraop_threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), &run_on_intraop_threads};
}

void check_status(const char* op, const Status& status) {
  if (status.ok()) return;
  const bool by_arguments =
      status.code == StatusCode::kUnsupported || status.code == StatusCode::kInvalidValue;
  TORCH_CHECK_VALUE(!by_arguments, "nsa::", op, ": ", status.message);
  TORCH_CHECK(false, "nsa::", op, ": ", status.message);
}

[[noreturn]] void no_kernel(const char* op, c10::Device device) {
  TORCH_CHECK_VALUE(false, "nsa::", op, ": the tensors are on device ", device,
                    ", for which there is no kernel; nsa_ext.support_matrix() lists what runs where");
}

}  // namespace

#ifdef NSA_WITH_CUDA
template <typename Params>
void launch_cuda(const char* op, c10::Device device, Status (*launcher)(const Params&, const cuda::Stream&),
                 const Params& params) {
  const c10::cuda::CUDAGuard guard(device);
  cuda::Stream stream{c10::cuda::getCurrentCUDAStream(device.index()).stream()};
  // What it is for is short: it goes first.
  if constexpr (std::is_same_v<Params, SelectedBranchBwdParams>)
    stream.side = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index()).stream();
  check_status(op, launcher(params, stream));
}
#define NSA_LAUNCH_CUDA(name) \
  if (device.is_cuda()) return launch_cuda(op, device, &cuda::name, params);
#define NSA_WORKSPACE_CUDA(params) \
  if (device.is_cuda()) bytes = cuda::workspace_bytes(params);
#else
#define NSA_LAUNCH_CUDA(name)
#define NSA_WORKSPACE_CUDA(params)
#endif

#define NSA_DEFINE_LAUNCH(name, Params)                                   \
  void launch(const char* op, c10::Device device, const Params& params) { \
    NSA_LAUNCH_CUDA(name)                                                 \
    if (!device.is_cpu()) no_kernel(op, device);                          \
    check_status(op, cpu::name(params, intraop_threads()));               \
  }
NSA_FOR_EACH_OP(NSA_DEFINE_LAUNCH)

#define NSA_DEFINE_WORKSPACE(Params)                                                \
  at::Tensor allocate_workspace(c10::Device device, Params* params) {               \
    int64_t bytes = 0;                                                              \
    NSA_WORKSPACE_CUDA(*params)                                                     \
    if (bytes == 0) return {};                                                      \
    at::Tensor workspace = at::empty({bytes}, at::device(device).dtype(at::kByte)); \
    params->workspace = workspace.mutable_data_ptr();                               \
    return workspace;                                                               \
  }
NSA_FOR_EACH_WORKSPACE(NSA_DEFINE_WORKSPACE)

bool writes_key_results([[maybe_unused]] c10::Device device,
                        [[maybe_unused]] const BandedAttentionBwdParams& params) {
#ifdef NSA_WITH_CUDA
  if (device.is_cuda()) return cuda::writes_key_results(params);
#endif
  return false;
}

}  // namespace nsa::ops
