// The one place that chooses between the portable and the Hopper kernels.
#include <cstdlib>
#include <cstring>

#include "cuda/compress_bwd.h"
#include "cuda/host/launch_kernel.h"
#include "cuda/host/side_stream.h"
#include "cuda/portable/launch.h"
#include "cuda/sm90/launch.h"

namespace nsa::cuda {
namespace {

// NSA_CUDA_PATH=portable forces the portable kernels. Read at every call, so that a test can compare both in
// one process.
bool use_sm90() {
  const char* path = std::getenv("NSA_CUDA_PATH");
  if (path != nullptr && std::strcmp(path, "portable") == 0) return false;
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

constexpr int64_t kTicketBytes = 256;  // in front of what has to be aligned

}  // namespace

// Operations with Hopper kernels.
#define NSA_LAUNCH_BEST(name, Params)                                \
  Status name(const Params& p, const Stream& stream) {               \
    Status status;                                                   \
    if (use_sm90() && sm90::name(p, stream, &status)) return status; \
    return portable::name(p, stream);                                \
  }
#define NSA_LAUNCH_PORTABLE(name, Params) \
  Status name(const Params& p, const Stream& stream) { return portable::name(p, stream); }

NSA_LAUNCH_BEST(banded_attention_forward, BandedAttentionFwdParams)
NSA_LAUNCH_BEST(block_scores, BlockScoresParams)
NSA_LAUNCH_BEST(select_blocks, SelectBlocksParams)
NSA_LAUNCH_BEST(selected_attention_forward, SelectedAttentionFwdParams)
NSA_LAUNCH_PORTABLE(gated_combine_forward, GatedCombineFwdParams)
NSA_LAUNCH_PORTABLE(fill_padding, FillPaddingParams)
NSA_LAUNCH_BEST(append_kv, AppendKvParams)
NSA_LAUNCH_BEST(decode_attention, DecodeAttentionParams)
NSA_LAUNCH_BEST(banded_attention_backward, BandedAttentionBwdParams)
NSA_LAUNCH_BEST(selected_attention_backward, SelectedAttentionBwdParams)
NSA_LAUNCH_PORTABLE(gated_combine_backward, GatedCombineBwdParams)
NSA_LAUNCH_PORTABLE(attention_delta, DeltaParams)

// The order lets a kernel begin while the one in front ends: the selection reads only lse of what compressed
// attention writes, the window nothing that the selection writes, and selected attention nothing of the
// window before the gate, which is the end of a tile's work. Compressed attention, which has ended when the
// last kernel begins, zeroes the ticket by which that one deals out its tiles. Where it chooses the blocks
// itself, the selection only takes what it leaves.
Status attention_forward(const AttentionFwdParams& p, const Stream& stream) {
  const bool hopper = use_sm90();
  Status status;
  int* ticket = static_cast<int*>(p.workspace);
  if (!hopper ||
      !sm90::compressed_selection_forward(p.cmp, p.select, static_cast<char*>(p.workspace) + kTicketBytes,
                                          ticket, stream, &status)) {
    if (!hopper || !sm90::banded_attention_forward(p.cmp, stream, &status, sm90::Begin::kOnTime, ticket)) {
      ticket = nullptr;
      status = portable::banded_attention_forward(p.cmp, stream);
    }
    if (!status.ok()) return status;
    if (!hopper || !sm90::select_blocks(p.select, stream, &status, sm90::Begin::kEarly))
      status = portable::select_blocks(p.select, stream);
  }
  if (!status.ok()) return status;
  if (!hopper || !sm90::banded_attention_forward(p.swa, stream, &status, sm90::Begin::kEarly))
    status = portable::banded_attention_forward(p.swa, stream);
  if (!status.ok()) return status;
  if (hopper &&
      sm90::gated_selected_attention_forward(p.slc, p.gate, sm90::Begin::kEarly, ticket, stream, &status))
    return status;
  status = selected_attention_forward(p.slc, stream);
  return status.ok() ? gated_combine_forward(p.gate, stream) : status;
}

// Who chose which block is found beside the gate's pass, which memory alone bounds.
Status selected_branch_backward(const SelectedBranchBwdParams& p, const Stream& stream) {
  Status status, prepared;
  bool done = false;
  {
    const SideStream side(stream);
    if (side.exists() && use_sm90()) done = sm90::prepare_selected_backward(p.slc, side.stream(), &prepared);
    status = gated_combine_backward(p.gate, stream);
  }
  if (!status.ok()) return status;
  if (!prepared.ok()) return prepared;
  if (done && sm90::selected_attention_backward(p.slc, stream, &status, sm90::Lists::kPrepared, p.next))
    return status;
  return selected_attention_backward(p.slc, stream);
}

// The branches one by one where they do not fit one kernel together.
Status banded_branches_backward(const BandedBranchesBwdParams& p, const Stream& stream) {
  Status status;
  if (use_sm90() && sm90::banded_branches_backward(p, stream, &status)) return status;
  int64_t offset = 0;
  for (BandedAttentionBwdParams branch : p.branch) {
    branch.workspace = static_cast<char*>(p.workspace) + offset;
    offset += workspace_bytes(branch);
    if (status.ok()) status = banded_attention_backward(branch, stream);
  }
  return status;
}

Status compress_forward(const CompressFwdParams& p, const Stream& stream) {
  Status status = portable::compress_bias(p, stream);
  if (!status.ok()) return status;
  if (use_sm90() && sm90::compress_forward(p, stream, &status)) return status;
  return portable::compress_forward(p, stream);
}

Status compress_backward(const CompressBwdParams& p, const Stream& stream) {
  return compress_backward_steps(p, stream, use_sm90());
}

bool writes_key_results(const BandedAttentionBwdParams&) { return true; }

// Enough for either path: which one runs is known at the launch.
int64_t workspace_bytes(const SelectBlocksParams& p) {
  return max64(portable::workspace_bytes(p), sm90::workspace_bytes(p));
}
int64_t workspace_bytes(const AttentionFwdParams& p) {
  return use_sm90() ? kTicketBytes + sm90::compressed_selection_workspace(p.cmp, p.select) : 0;
}
int64_t workspace_bytes(const BandedAttentionBwdParams& p) {
  return max64(portable::workspace_bytes(p), sm90::workspace_bytes(p));
}
int64_t workspace_bytes(const BandedBranchesBwdParams& p) {
  int64_t bytes = 0;
  for (const BandedAttentionBwdParams& branch : p.branch) bytes += workspace_bytes(branch);
  return max64(bytes, sm90::workspace_bytes(p));
}
int64_t workspace_bytes(const SelectedAttentionBwdParams& p) {
  return max64(portable::workspace_bytes(p), use_sm90() ? sm90::workspace_bytes(p) : 0);
}
int64_t workspace_bytes(const CompressBwdParams& p) { return compress_backward_workspace(p); }
// Much in the portable kernels, and asked for with each token: only where they run.
int64_t workspace_bytes(const AppendKvParams& p) {
  return use_sm90() && sm90::can_append(p) ? 0 : portable::workspace_bytes(p);
}
int64_t workspace_bytes(const DecodeAttentionParams& p) {
  return max64(portable::workspace_bytes(p), use_sm90() ? sm90::workspace_bytes(p) : 0);
}

}  // namespace nsa::cuda
