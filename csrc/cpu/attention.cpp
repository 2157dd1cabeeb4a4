// Steps of nsa::attention: one operation after another.
#include "cpu/storage.h"

namespace nsa::cpu::NSA_CPU_ISA {

Status attention_forward(const AttentionFwdParams& p, const Parallel& parallel) {
  Status status = NSA_CPU_ISA::banded_attention_forward(p.cmp, parallel);
  if (status.ok()) status = NSA_CPU_ISA::select_blocks(p.select, parallel);
  if (status.ok()) status = NSA_CPU_ISA::selected_attention_forward(p.slc, parallel);
  if (status.ok()) status = NSA_CPU_ISA::banded_attention_forward(p.swa, parallel);
  if (status.ok()) status = NSA_CPU_ISA::gated_combine_forward(p.gate, parallel);
  return status;
}

Status selected_branch_backward(const SelectedBranchBwdParams& p, const Parallel& parallel) {
  const Status status = NSA_CPU_ISA::gated_combine_backward(p.gate, parallel);
  return status.ok() ? NSA_CPU_ISA::selected_attention_backward(p.slc, parallel) : status;
}

}  // namespace nsa::cpu::NSA_CPU_ISA
