// The two launches of decode_attention on Hopper.
#pragma once

#include "cuda/sm90/decode_plan.h"
#include "nsa/launch.h"

namespace nsa::cuda::sm90 {

// False where the head dims have no kernel.
bool decode_compressed(const DecodeAttentionParams& p, const DecodePlan& plan, const Stream& stream,
                       Status* status);

}  // namespace nsa::cuda::sm90
