// The one place that maps a device to its launchers: launch(op, device, params) runs the kernel that params
// belong to.
#pragma once

#include <c10/core/Device.h>

#include "nsa/launch.h"

namespace nsa::ops {

// Raises if the device has no kernel for it or the launcher refuses; `op` is named in the message.
#define NSA_DECLARE_LAUNCH(name, Params) \
  void launch(const char* op, c10::Device device, const Params& params);
NSA_FOR_EACH_OP(NSA_DECLARE_LAUNCH)
#undef NSA_DECLARE_LAUNCH

// Bytes of device memory that select_blocks wants for its scores.
int64_t select_blocks_workspace(c10::Device device, const SelectBlocksParams& params);

}  // namespace nsa::ops
