"""nsa::gated_combine against the fp64 reference."""

import pytest
import torch
from cases import Case, Inputs, by_case, by_target, case
from harness import check, misaligned, op

BRANCHES = ("o_cmp", "o_slc", "o_swa")


@by_target
@by_case("one_sequence", "mha_g1", "dims_1_3", "dims_33_65", "nothing", "gqa_g5")
@pytest.mark.parametrize("gate_dtype", ["same", "fp32"])
def test_equals_reference(case: Case, gate_dtype: str, device: str, dtype: torch.dtype) -> None:
    if gate_dtype == "fp32" and dtype == torch.float64:
        pytest.skip("gates of fp64 outputs are fp64")
    x = Inputs(case, dtype, device)
    gates = 3 * x.gate_logits()
    tensors = {name: x.output_like(20 + i) for i, name in enumerate(BRANCHES)}
    tensors["gate_logits"] = gates.float() if gate_dtype == "fp32" else gates
    check("gated_combine", tensors, (), tuple(tensors), x.output_like())


@by_target
def test_branches_may_begin_anywhere(device: str, dtype: torch.dtype) -> None:
    shape = case("gqa_g5")
    x = Inputs(shape if device == "cpu" else shape.on_cuda(), dtype, device)
    tensors = {name: misaligned(x.output_like(20 + i)) for i, name in enumerate(BRANCHES)}
    tensors["gate_logits"] = misaligned(x.gate_logits())
    check("gated_combine", tensors, (), tuple(tensors), x.output_like())


@by_target
def test_saturated_gates(device: str, dtype: torch.dtype) -> None:
    x = Inputs(case("mha_g1"), dtype, device)
    branches = [x.output_like(20 + i) for i in range(3)]
    gates = torch.full_like(x.gate_logits(), -1e4)
    gates[..., 1] = 1e4
    gates.requires_grad_()
    o = op("gated_combine")(*branches, gates)
    assert torch.equal(o, branches[1])
    (grad,) = torch.autograd.grad(o, gates, torch.ones_like(o))
    assert not grad.any()
