"""nsa::sliding_window_attention against the fp64 reference."""

import pytest
import torch
from cases import Case, Inputs, by_case, by_target
from harness import branch_check, op


@by_target
@by_case()
def test_equals_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    branch_check("sliding_window_attention", Inputs(case, dtype, device), "swa", (case.window,))


@by_target
@pytest.mark.parametrize("window", [1, 7, 64, 65])
def test_a_query_sees_exactly_w_keys(window: int, device: str, dtype: torch.dtype) -> None:
    """With equal logits, lse is the log of the number of keys."""
    num_tokens = 100
    q = torch.zeros(num_tokens, 1, 64, dtype=dtype, device=device)
    _, lse = op("sliding_window_attention")(q, q, q, None, None, num_tokens, num_tokens, window, 1.0)
    expected = torch.arange(1, num_tokens + 1).clamp(max=window).double().log()
    torch.testing.assert_close(lse[:, 0].cpu().double(), expected, rtol=0, atol=1e-5)


@by_target
def test_window_counts_from_the_position_not_the_row(device: str, dtype: torch.dtype) -> None:
    """Three queries at the end of ten keys: values are one-hot, so o says which keys were read."""
    num_keys, window = 10, 4
    q = torch.zeros(3, 1, 64, dtype=dtype, device=device)
    k = torch.zeros(num_keys, 1, 64, dtype=dtype, device=device)
    v = torch.eye(num_keys, 64, dtype=dtype, device=device).unsqueeze(1)
    o, _ = op("sliding_window_attention")(q, k, v, None, None, 3, num_keys, window, 1.0)
    for i, t in enumerate((7, 8, 9)):
        read = o[i, 0].nonzero().flatten().tolist()
        assert read == list(range(t - window + 1, t + 1))
