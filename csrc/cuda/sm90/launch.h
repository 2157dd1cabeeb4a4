// The Hopper launchers. Each returns false, and does nothing, where the shape has no Hopper kernel or a
// tensor does not suit TMA: then the portable kernel runs. Where it returns true, *status says how the launch
// went.
#pragma once

#include "nsa/launch.h"

namespace nsa::cuda::sm90 {

// When a kernel begins, as seen from the one in front of it in the stream.
enum class Begin {
  kOnTime,  // it waits until that one has ended
  kEarly,   // it reads nothing that that one writes, or waits where it does
};

bool banded_attention_backward(const BandedAttentionBwdParams& p, const Stream& stream, Status* status);
bool banded_branches_backward(const BandedBranchesBwdParams& p, const Stream& stream, Status* status);
// The first step of that, dK and dV of the first branch, launched early; false where there is none.
bool begin_banded_branches_backward(const BandedBranchesBwdParams& p, const Stream& stream, Status* status);
int64_t workspace_bytes(const BandedBranchesBwdParams& p);
int64_t workspace_bytes(const BandedAttentionBwdParams& p);
bool compress_forward(const CompressFwdParams& p, const Stream& stream, Status* status);
// zeroed, or null: what it sets to 0 meanwhile; not for a window.
bool banded_attention_forward(const BandedAttentionFwdParams& p, const Stream& stream, Status* status,
                              Begin begin = Begin::kOnTime, int* zeroed = nullptr);
// Compressed attention that chooses blocks too, of long sequences, where that is faster than to make scores
// again, and behind it the choice of what it leaves, mostly of nothing. workspace:
// compressed_selection_workspace bytes, a multiple of 128 in memory; 0 where it returns false.
bool compressed_selection_forward(const BandedAttentionFwdParams& p, const SelectBlocksParams& select,
                                  void* workspace, int* zeroed, const Stream& stream, Status* status);
int64_t compressed_selection_workspace(const BandedAttentionFwdParams& p, const SelectBlocksParams& select);
// What is left of a choice: all where rows is null.
struct Unfinished {
  static constexpr int kAll = 2;
  const uint8_t* rows = nullptr;  // [T, Hkv]: whether it is left
  const int* any = nullptr;       // [num_any]: all zero where none is; the first one kAll where all rows are
  int num_any = 0;
};
bool block_scores(const BlockScoresParams& p, const Stream& stream, Status* status);
bool select_blocks(const SelectBlocksParams& p, const Stream& stream, Status* status,
                   Begin begin = Begin::kOnTime, const Unfinished& unfinished = {});
int64_t workspace_bytes(const SelectBlocksParams& p);  // 0 where select_blocks returns false
bool selected_attention_forward(const SelectedAttentionFwdParams& p, const Stream& stream, Status* status);
// Selected attention, and the gate, whose selected branch is p.o: that is not stored where it is gate.o too.
// It may begin early if what chose the blocks has ended when the kernel in front lets it begin. ticket, or
// null: deals out the tiles; 0 since before the kernel in front began.
bool gated_selected_attention_forward(const SelectedAttentionFwdParams& p, const GatedCombineFwdParams& gate,
                                      Begin begin, int* ticket, const Stream& stream, Status* status);
// What selected_attention_backward needs of block_indices alone: it can be made beside other kernels, and is
// in the workspace.
enum class Lists { kMissing, kPrepared };
bool prepare_selected_backward(const SelectedAttentionBwdParams& p, const Stream& stream, Status* status);
// next, or null: begun with where that fills the time in which the last items of the first chunk are at work.
bool selected_attention_backward(const SelectedAttentionBwdParams& p, const Stream& stream, Status* status,
                                 Lists prepared = Lists::kMissing, BandedBranchesBwdParams* next = nullptr);
int64_t workspace_bytes(const SelectedAttentionBwdParams& p);
bool append_kv(const AppendKvParams& p, const Stream& stream, Status* status);  // needs no workspace
bool can_append(const AppendKvParams& p);  // whether append_kv returns true
bool decode_attention(const DecodeAttentionParams& p, const Stream& stream, Status* status);
int64_t workspace_bytes(const DecodeAttentionParams& p);  // 0 where decode_attention returns false

}  // namespace nsa::cuda::sm90
