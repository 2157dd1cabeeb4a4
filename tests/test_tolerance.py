"""tolerance.py: the rule, and the same for several draws of few numbers."""

import pytest
import torch
from tolerance import Measured, OutsideError, assert_close, measuring, outside


def result(error: float) -> torch.Tensor:
    return torch.tensor([0.0, error, 0.0, 1.0])


def compare(error: float, baseline_error: float) -> None:
    exact = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert_close("x", result(error), exact, result(baseline_error))


def test_twice_the_error_of_the_baseline_is_allowed() -> None:
    compare(1.9e-3, 1e-3)
    with pytest.raises(OutsideError, match="x: worst at"):
        compare(2.1e-3, 1e-3)


def test_masks_differ_at_once() -> None:
    for error in (float("nan"), float("inf")):
        with pytest.raises(AssertionError), measuring():
            compare(error, 1e-3)


def test_draws_are_judged_together() -> None:
    with measuring() as measured:
        compare(2e-3, 1e-5)  # a baseline that is exact by luck
        compare(1e-3, 2e-3)
    assert [m.error for m in measured] == pytest.approx([2e-3, 1e-3])
    assert outside(measured) == []
    with pytest.raises(OutsideError):  # no longer measuring
        compare(2e-3, 1e-5)


def test_an_error_beyond_all_draws_fails() -> None:
    good = [Measured("x", 1e-3, 1e-3, 0.0)] * 7
    assert outside([*good, Measured("x", 2.1e-3, 1e-3, 0.0)])[0].startswith("x: error 2.100e-03 in 8 draws")
    assert outside([*good, Measured("y", 2.1e-3, 1e-3, 0.0)])  # other names do not help
