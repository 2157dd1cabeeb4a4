#include "ops/launch_device.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

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
  check_status(op, launcher(params, {c10::cuda::getCurrentCUDAStream(device.index()).stream()}));
}
#define NSA_LAUNCH_CUDA(name) \
  if (device.is_cuda()) return launch_cuda(op, device, &cuda::name, params);
#else
#define NSA_LAUNCH_CUDA(name)
#endif
#define NSA_LAUNCH_NOTHING(name)

#define NSA_DEFINE_LAUNCH(name, Params, cuda_case)                        \
  void launch(const char* op, c10::Device device, const Params& params) { \
    cuda_case(name);                                                      \
    if (!device.is_cpu()) no_kernel(op, device);                          \
    check_status(op, cpu::name(params, intraop_threads()));               \
  }
#define NSA_DEFINE_LAUNCH_CUDA(name, Params) NSA_DEFINE_LAUNCH(name, Params, NSA_LAUNCH_CUDA)
#define NSA_DEFINE_LAUNCH_CPU(name, Params) NSA_DEFINE_LAUNCH(name, Params, NSA_LAUNCH_NOTHING)
NSA_FOR_EACH_FORWARD_OP(NSA_DEFINE_LAUNCH_CUDA)
NSA_FOR_EACH_BACKWARD_OP(NSA_DEFINE_LAUNCH_CPU)

int64_t select_blocks_workspace(c10::Device device, const SelectBlocksParams& params) {
#ifdef NSA_WITH_CUDA
  if (device.is_cuda()) return cuda::select_blocks_workspace(params);
#endif
  return 0;
}

}  // namespace nsa::ops
