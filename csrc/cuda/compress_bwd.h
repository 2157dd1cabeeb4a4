// phi, backward: the order of its steps.
//
// Z is computed again by the forward kernel; then dZ, once, as a matrix of 16 bits that every product reads.
// dW1 = U^T dZ reads the unfolded tokens U in place; sums over rows are split into parts that are added in a
// fixed order. dX is computed by the owner of the tokens, where the overlapping blocks add up in registers.
// PE takes no product: vec(X + PE) is linear in it, so dW1 gets PE . db1^T and dPE = W1 . db1.
#pragma once

#include "nsa/launch.h"

namespace nsa::cuda {

Status compress_backward_steps(const CompressBwdParams& p, const Stream& stream, bool use_sm90);
int64_t compress_backward_workspace(const CompressBwdParams& p);

}  // namespace nsa::cuda
