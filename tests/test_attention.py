"""nsa::attention and nsa::attention_forward against the fp64 reference."""

from collections.abc import Callable

import pytest
import torch
from attention_case import GRADIENTS, attention_reference, attention_rest, attention_tensors, check_attention
from cases import Case, Inputs, by_case, by_target
from harness import largest_logit, op, run, to
from tolerance import SelectionRule, assert_lse_close, assert_selection_valid


@by_target
@by_case()
def test_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    _, indices = check_attention(x, attention_tensors(x))
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))


@by_target
@by_case("one_sequence", "ragged_with_empty", "padding_rows", "chunked_prefill", "nothing_forced")
def test_selection_is_exact_in_fp64_and_close_elsewhere(case: Case, device: str, dtype: torch.dtype) -> None:
    """The operator's own lse feeds its own selection: the whole chain is compared."""
    x = Inputs(case, dtype, device, q_scale=3.0)
    check_attention(x, attention_tensors(x), compare_selection=True)


@by_target
@by_case("ragged_with_empty", "mha_g1")
def test_gates_in_fp32(case: Case, device: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        pytest.skip("gates of fp64 outputs are fp64")
    x = Inputs(case, dtype, device)
    tensors = attention_tensors(x)
    tensors["gate_logits"] = tensors["gate_logits"].float()
    check_attention(x, tensors)


@by_target
@by_case("ragged_with_empty", "padding_rows", "chunked_prefill", "chunk_without_offsets")
def test_forward_returns_every_branch(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    tensors = attention_tensors(x)
    o, indices, o_cmp, o_slc, o_swa, *lse = op("attention_forward")(*tensors.values(), *attention_rest(x))
    alone_o, alone_indices = op("attention")(*tensors.values(), *attention_rest(x))
    assert torch.equal(o, alone_o) and torch.equal(indices, alone_indices)
    combined = op("gated_combine")(o_cmp, o_slc, o_swa, tensors["gate_logits"])
    assert torch.equal(o, combined), "the gate, fused or not, is that of gated_combine"
    band = (*x.cu, *case.compress, x.scale)
    window = (*x.cu, case.window, x.scale)
    blocks = (indices, *x.cu, case.block_size, x.scale)
    alone = (
        op("compressed_attention")(x.q, tensors["k_cmp"], tensors["v_cmp"], *band),
        op("selected_attention")(x.q, tensors["k_slc"], tensors["v_slc"], *blocks),
        op("sliding_window_attention")(x.q, tensors["k_swa"], tensors["v_swa"], *window),
    )
    exact = attention_reference(indices, every_output=True)(
        *[to(t, torch.float64) for t in tensors.values()], *map(to, attention_rest(x))
    )
    for branch, o_branch, lse_branch, (o_alone, lse_alone), exact_lse in zip(
        ("cmp", "slc", "swa"), (o_cmp, o_slc, o_swa), lse, alone, exact[5:], strict=True
    ):
        torch.testing.assert_close(o_branch, o_alone, rtol=0, atol=0)
        torch.testing.assert_close(lse_branch, lse_alone, rtol=0, atol=0)
        logit = largest_logit(x.q, tensors[f"k_{branch}"], x.scale)
        assert_lse_close(f"lse_{branch}", lse_branch, exact_lse, logit)


@by_target
@by_case("chunk_without_offsets")
def test_the_window_needs_its_last_keys_alone(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    tensors, rest = attention_tensors(x), attention_rest(x)
    expected = op("attention_forward")(*tensors.values(), *rest)
    (total,), (num_queries,) = case.lengths, case.query_lengths
    enough = num_queries + case.window - 1
    assert enough + 3 < total

    def last(rows: int) -> dict[str, torch.Tensor]:
        return tensors | {name: tensors[name][total - rows : total] for name in ("k_swa", "v_swa")}

    for rows in (enough, enough + 3):
        outputs = op("attention_forward")(*last(rows).values(), *rest)
        assert torch.equal(outputs[1], expected[1])
        for actual, wanted in zip(outputs, expected, strict=True):  # tiles begin at other keys
            close = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(actual, wanted, rtol=close, atol=close)
        o, indices = op("attention")(*last(rows).values(), *rest)
        assert torch.equal(o, outputs[0]) and torch.equal(indices, outputs[1])
    with pytest.raises(ValueError, match=f"k_swa has {enough - 1} rows; max_seqlen_k = {total}"):
        op("attention")(*last(enough - 1).values(), *rest)
    with pytest.raises(ValueError, match=f"attention_backward: k_swa has {enough} rows"):
        run(op("attention"), last(enough), rest, GRADIENTS, x.output_like())


@by_target
def test_forward_is_differentiable_through_o_only(device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (150, 70), heads=(4, 2), dims=(64, 64)), dtype, device)
    tensors, rest = attention_tensors(x), attention_rest(x)
    outputs, grads = run(op("attention_forward"), tensors, rest, GRADIENTS, x.output_like())
    assert [t.requires_grad for t in outputs] == [True] + [False] * 7
    _, expected = run(op("attention"), tensors, rest, GRADIENTS, x.output_like())
    for name in GRADIENTS:
        assert torch.equal(grads[name], expected[name]), name


@by_target
@by_case("ragged_with_empty", "chunked_prefill", "mha_g1")
def test_one_key_and_value_for_every_branch(case: Case, device: str, dtype: torch.dtype) -> None:
    """The same tensor as k_slc and k_swa (share_kv): its gradient is the sum of both."""
    x = Inputs(case, dtype, device)
    tensors, rest = attention_tensors(x), attention_rest(x)
    tensors["k_swa"], tensors["v_swa"] = tensors["k_slc"], tensors["v_slc"]
    _, separate = run(op("attention"), tensors, rest, GRADIENTS, x.output_like())

    def shared(fn: Callable) -> Callable:
        return lambda q, k_cmp, v_cmp, k, v, gate, *rest: fn(q, k_cmp, v_cmp, k, v, k, v, gate, *rest)

    once = {name: t for name, t in tensors.items() if name not in ("k_swa", "v_swa")}
    _, together = run(shared(op("attention")), once, rest, tuple(once), x.output_like())
    for name in ("k", "v"):
        torch.testing.assert_close(together[f"{name}_slc"], separate[f"{name}_slc"] + separate[f"{name}_swa"])
