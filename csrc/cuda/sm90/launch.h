// The Hopper launchers. Each returns false, and does nothing, where the shape has no Hopper kernel or a
// tensor does not suit TMA: then the portable kernel runs. Where it returns true, *status says how the launch
// went.
#pragma once

#include "nsa/launch.h"

namespace nsa::cuda::sm90 {

bool banded_attention_backward(const BandedAttentionBwdParams& p, const Stream& stream, Status* status);
int64_t workspace_bytes(const BandedAttentionBwdParams& p);
bool compress_forward(const CompressFwdParams& p, const Stream& stream, Status* status);
bool banded_attention_forward(const BandedAttentionFwdParams& p, const Stream& stream, Status* status);
bool block_scores(const BlockScoresParams& p, const Stream& stream, Status* status);
bool select_blocks(const SelectBlocksParams& p, const Stream& stream, Status* status);
int64_t workspace_bytes(const SelectBlocksParams& p);  // 0 where select_blocks returns false
bool selected_attention_forward(const SelectedAttentionFwdParams& p, const Stream& stream, Status* status);
bool selected_attention_backward(const SelectedAttentionBwdParams& p, const Stream& stream, Status* status);
int64_t workspace_bytes(const SelectedAttentionBwdParams& p);

}  // namespace nsa::cuda::sm90
