"""nsa::block_scores against the fp64 reference."""

import torch
from cases import Case, Inputs, by_case, by_target
from harness import exact_lse, op, to
from tolerance import accumulator, assert_close

from nsa_ext import reference


@by_target
@by_case()
def test_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    k_cmp = x.keys("cmp")
    lse = exact_lse(x, k_cmp)
    rest = (*case.compress, case.block_size, x.scale)
    scores = op("block_scores")(x.q, k_cmp, lse.to(accumulator(dtype)).to(device), *x.cu, *rest)
    assert scores.shape == (case.num_queries, case.heads[1], case.num_score_blocks)
    cu = [to(c) for c in x.cu]
    exact = reference.block_scores(to(x.q, torch.float64), to(k_cmp, torch.float64), lse, *cu, *rest)
    baseline = reference.block_scores(to(x.q), to(k_cmp), lse.to(accumulator(dtype)), *cu, *rest)
    assert_close("scores", scores, exact, baseline.to(accumulator(dtype)), compute_dtype=accumulator(dtype))


@by_target
def test_weights_of_the_defaults_by_hand(device: str, dtype: torch.dtype) -> None:
    """32 / 16 / 64 with equal probabilities: weights 1, 2, 2, 2, 1 of the five blocks that touch one."""
    num_tokens = 512
    q = torch.zeros(num_tokens, 2, 64, dtype=dtype, device=device)
    k_cmp = torch.zeros(num_tokens // 16, 1, 64, dtype=dtype, device=device)
    v_cmp = torch.zeros_like(k_cmp)
    cu = (None, None, num_tokens, num_tokens)
    _, lse = op("compressed_attention")(q, k_cmp, v_cmp, *cu, 32, 16, 1.0)
    scores = op("block_scores")(q, k_cmp, lse, *cu, 32, 16, 64, 1.0)[:, 0].cpu().double()
    num_visible = (num_tokens - 32) // 16 + 1
    p = 2 / num_visible  # of both heads
    expected = torch.tensor([7.0] + [8.0] * 6 + [7.0]).double() * p
    torch.testing.assert_close(scores[-1], expected, rtol=1e-5, atol=0)
    # A block that straddles two selection blocks gives each half of its 2 p: t = 79 sees blocks 0 .. 3.
    torch.testing.assert_close(
        scores[79, :3], torch.tensor([7.0, 1.0, 0.0]).double() * 2 / 4, rtol=1e-5, atol=0
    )
