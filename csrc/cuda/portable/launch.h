// The portable launchers, for sm_80 and newer: the fallback of every GPU.
#pragma once

#include "nsa/launch.h"

namespace nsa::cuda::portable {

#define NSA_DECLARE_PORTABLE(name, Params) Status name(const Params& p, const Stream& stream);
NSA_FOR_EACH_FORWARD_OP(NSA_DECLARE_PORTABLE)
NSA_DECLARE_PORTABLE(banded_attention_backward, BandedAttentionBwdParams)
NSA_DECLARE_PORTABLE(selected_attention_backward, SelectedAttentionBwdParams)
NSA_DECLARE_PORTABLE(gated_combine_backward, GatedCombineBwdParams)
NSA_DECLARE_PORTABLE(attention_delta, DeltaParams)
#undef NSA_DECLARE_PORTABLE

// The partial sums of W1 . vec(PE) that every compress_forward of the device reads.
Status compress_bias(const CompressFwdParams& p, const Stream& stream);

int64_t workspace_bytes(const SelectBlocksParams& p);
int64_t workspace_bytes(const BandedAttentionBwdParams& p);
int64_t workspace_bytes(const AppendKvParams& p);
int64_t workspace_bytes(const DecodeAttentionParams& p);
int64_t workspace_bytes(const SelectedAttentionBwdParams& p);

}  // namespace nsa::cuda::portable
