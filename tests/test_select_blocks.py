"""nsa::select_blocks: what holds of every selection, exact sets in fp64, scores of the sets elsewhere."""

import pytest
import torch
from cases import Case, Inputs, by_case, by_device, by_target, default_dtype
from harness import exact_lse, op, to
from tolerance import (
    SelectionRule,
    accumulator,
    assert_selection_close,
    assert_selection_valid,
    finite_max,
    floor,
)

from nsa_ext import reference


@by_target
@by_case()
@pytest.mark.parametrize("q_scale", [1.0, 8.0], ids=["even", "peaked"])
def test_equals_reference(case: Case, q_scale: float, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device, q_scale=q_scale)
    k_cmp = x.keys("cmp")
    lse = exact_lse(x, k_cmp)
    acc = accumulator(dtype)
    actual = op("select_blocks")(
        x.q, k_cmp, lse.to(acc).to(device), *x.cu, *case.compress, case.block_size, *case.select, x.scale
    )
    assert_selection_valid(actual, case.own_blocks(), SelectionRule(*case.select))

    cu, q, k = [to(c) for c in x.cu], to(x.q, torch.float64), to(k_cmp, torch.float64)
    blocks = (*case.compress, case.block_size)
    expected = reference.select_blocks(q, k, lse, *cu, *blocks, *case.select, x.scale)
    if dtype == torch.float64:
        assert torch.equal(actual, expected)
        return
    scores = reference.block_scores(q, k, lse, *cu, *blocks, x.scale)
    baseline = reference.block_scores(q.to(acc), k.to(acc), lse.to(acc), *cu, *blocks, x.scale)
    error = 2 * finite_max(baseline - scores) + floor(scores, acc, acc) if scores.numel() else 0.0
    assert_selection_close(actual, expected, scores, error)


def select(k_cmp: torch.Tensor, q: torch.Tensor, n: int, initial: int, local: int) -> torch.Tensor:
    """block_indices of one head, for l = d = 16, l' = 32."""
    cu = (None, None, q.shape[0], q.shape[0])
    _, lse = op("compressed_attention")(q, k_cmp, k_cmp, *cu, 16, 16, 1.0)
    return op("select_blocks")(q, k_cmp, lse, *cu, 16, 16, 32, n, initial, local, 1.0)[:, 0].cpu()


@by_device
def test_equal_scores_go_to_the_lower_block(device: str) -> None:
    dtype = default_dtype(device)
    q = torch.zeros(320, 1, 64, dtype=dtype, device=device)
    k_cmp = torch.zeros(20, 1, 64, dtype=dtype, device=device)
    indices = select(k_cmp, q, 3, 0, 0)
    assert indices[319].tolist() == [0, 1, 2]
    assert indices[159].tolist() == [0, 1, 2]
    indices = select(k_cmp, q, 4, 1, 1)
    assert indices[319].tolist() == [0, 1, 2, 9]


@by_device
def test_zero_score_still_qualifies(device: str) -> None:
    dtype = default_dtype(device)
    q = torch.zeros(320, 1, 64, dtype=dtype, device=device)
    k_cmp = torch.zeros(20, 1, 64, dtype=dtype, device=device)
    assert select(k_cmp, q, 3, 0, 0)[40].tolist() == [0, 1, -1]  # no compressed block of 1 is visible
    assert select(k_cmp, q, 3, 0, 0)[6].tolist() == [0, -1, -1]


@by_device
def test_highest_scores_win(device: str) -> None:
    dtype = default_dtype(device)
    q = torch.ones(320, 1, 64, dtype=dtype, device=device)
    k_cmp = torch.zeros(20, 1, 64, dtype=dtype, device=device)
    for block, size in ((3, 0.25), (5, 0.5), (8, 0.125)):
        k_cmp[2 * block] = size
    indices = select(k_cmp, q, 2, 0, 0)
    assert indices[319].tolist() == [3, 5]
    assert indices[141].tolist() == [0, 3]  # own block 4: block 5 does not exist yet
    assert select(k_cmp, q, 4, 1, 1)[319].tolist() == [0, 3, 5, 9]


@by_device
def test_no_gradient_flows(device: str) -> None:
    x = Inputs(Case("", (150,), dims=(64, 64), packed=False), default_dtype(device), device)
    q, k = x.q.requires_grad_(), x.keys("cmp").requires_grad_()
    lse = exact_lse(x, k).to(accumulator(q.dtype)).to(device)
    for result in (
        op("select_blocks")(q, k, lse, *x.cu, 32, 16, 64, 4, 1, 2, x.scale),
        op("block_scores")(q, k, lse, *x.cu, 32, 16, 64, x.scale),
    ):
        assert not result.requires_grad
