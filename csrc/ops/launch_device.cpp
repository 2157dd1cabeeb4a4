#include "ops/launch_device.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

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
  const bool by_arguments = status.code == StatusCode::kUnsupported || status.code == StatusCode::kInvalidValue;
  TORCH_CHECK_VALUE(!by_arguments, "nsa::", op, ": ", status.message);
  TORCH_CHECK(false, "nsa::", op, ": ", status.message);
}

[[noreturn]] void no_kernel(const char* op, c10::Device device) {
  TORCH_CHECK_VALUE(false, "nsa::", op, ": the tensors are on device ", device,
                    ", for which there is no kernel; nsa_ext.support_matrix() lists what runs where");
}

}  // namespace

#define NSA_DEFINE_LAUNCH(name, Params)                                            \
  void launch(const char* op, c10::Device device, const Params& params) {          \
    if (!device.is_cpu()) no_kernel(op, device);                                   \
    check_status(op, cpu::name(params, intraop_threads()));                        \
  }
NSA_FOR_EACH_OP(NSA_DEFINE_LAUNCH)
#undef NSA_DEFINE_LAUNCH

}  // namespace nsa::ops
