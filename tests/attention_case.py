"""The inputs of nsa::attention for a case, and its comparison with the reference on its own selection."""

from collections.abc import Callable

import torch
from cases import Inputs
from harness import Masks, as_tuple, check, largest_logit, op, to
from tolerance import accumulator, assert_selection_close, finite_max, floor
from torch import Tensor

from nsa_ext import reference

GRADIENTS = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_swa", "v_swa", "gate_logits")


def attention_tensors(x: Inputs) -> dict[str, Tensor]:
    tensors = {"q": x.q}
    for branch in ("cmp", "slc", "swa"):
        tensors |= {f"k_{branch}": x.keys(branch), f"v_{branch}": x.values(branch)}
    return tensors | {"gate_logits": x.gate_logits()}


def attention_rest(x: Inputs) -> tuple:
    case = x.case
    return (*x.cu, *case.compress, case.block_size, *case.select, case.window, x.scale)


def attention_reference(indices: Tensor, every_output: bool = False) -> Callable:
    """reference.attention on a given selection: in low precision near-ties may be chosen differently."""
    indices = to(indices)

    def attend(q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits, *rest):
        *cu, length, stride, block_size, _, _, _, window, scale = rest
        o_cmp, lse_cmp = reference.compressed_attention(q, k_cmp, v_cmp, *cu, length, stride, scale)
        o_slc, lse_slc = reference.selected_attention(q, k_slc, v_slc, indices, *cu, block_size, scale)
        o_swa, lse_swa = reference.sliding_window_attention(q, k_swa, v_swa, *cu, window, scale)
        o = reference.gated_combine(o_cmp, o_slc, o_swa, gate_logits)
        return (o, indices, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa) if every_output else (o, indices)

    return attend


def check_attention(
    x: Inputs,
    tensors: dict[str, Tensor],
    wanted: tuple[str, ...] = GRADIENTS,
    garbage: Masks | None = None,
    compare_selection: bool = False,
) -> tuple:
    """check() of nsa::attention, and of the selection by its scores (exactly in fp64)."""
    rest = attention_rest(x)
    _, indices = as_tuple(op("attention")(*[t.detach() for t in tensors.values()], *rest))
    logit = max(largest_logit(x.q, tensors[f"k_{branch}"], x.scale) for branch in ("cmp", "slc", "swa"))
    given = attention_reference(indices)
    outputs = check("attention", tensors, rest, wanted, x.output_like(), garbage, given, logit)
    assert torch.equal(outputs[1], indices), "the selection depends on more than what queries see"
    if compare_selection:
        assert_selection_like_reference(x, tensors, outputs[1])
    return outputs


def assert_selection_like_reference(x: Inputs, tensors: dict[str, Tensor], indices: Tensor) -> None:
    case, cu, acc = x.case, [to(c) for c in x.cu], accumulator(x.dtype)
    blocks = (*case.compress, case.block_size)

    def scores(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k, v = (to(tensors[name], dtype) for name in ("q", "k_cmp", "v_cmp"))
        _, lse = reference.compressed_attention(q, k, v, *cu, *case.compress, x.scale)
        indices = reference.select_blocks(q, k, lse, *cu, *blocks, *case.select, x.scale)
        return reference.block_scores(q, k, lse, *cu, *blocks, x.scale), indices

    exact, expected = scores(torch.float64)
    if x.dtype == torch.float64:
        assert torch.equal(indices, expected)
        return
    error = 2 * finite_max(scores(acc)[0] - exact) + floor(exact, acc, acc)
    assert_selection_close(indices, expected, exact, error)
