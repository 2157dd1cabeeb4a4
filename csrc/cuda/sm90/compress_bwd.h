// The steps of phi's backward that have Hopper kernels; false as in sm90/launch.h.
#pragma once

#include "cuda/host/compress_bwd_plan.h"
#include "nsa/launch.h"

namespace nsa::cuda::sm90 {

bool compress_bwd_first_weight(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream,
                               Status* status);
bool compress_bwd_input(const CompressBwdParams& p, const CompressBwdPlan& plan, const Stream& stream,
                        Status* status);

}  // namespace nsa::cuda::sm90
