// The one place that maps a device to its launchers: launch(op, device, params) runs the kernel that params
// belong to.
#pragma once

#include <ATen/core/Tensor.h>

#include "nsa/launch.h"

namespace nsa::ops {

// Raises if the device has no kernel for it or the launcher refuses; `op` is named in the message.
#define NSA_DECLARE_LAUNCH(name, Params) \
  void launch(const char* op, c10::Device device, const Params& params);
NSA_FOR_EACH_OP(NSA_DECLARE_LAUNCH)
#undef NSA_DECLARE_LAUNCH

// Allocates what the device's kernels want as params->workspace, if anything; keep the tensor until the
// launch.
#define NSA_FOR_EACH_WORKSPACE(X) \
  X(SelectBlocksParams)           \
  X(AttentionFwdParams)           \
  X(BandedAttentionBwdParams)     \
  X(BandedBranchesBwdParams)      \
  X(SelectedAttentionBwdParams)   \
  X(CompressBwdParams)            \
  X(AppendKvParams)               \
  X(DecodeAttentionParams)
#define NSA_DECLARE_WORKSPACE(Params) at::Tensor allocate_workspace(c10::Device device, Params* params);
NSA_FOR_EACH_WORKSPACE(NSA_DECLARE_WORKSPACE)
#undef NSA_DECLARE_WORKSPACE

// Whether the device's kernels write dk and dv as results (AttentionGrads::key_results).
bool writes_key_results(c10::Device device, const BandedAttentionBwdParams& params);

}  // namespace nsa::ops
