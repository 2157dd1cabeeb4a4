"""fuzz.py: an error above the tolerance has to repeat as it was, and several draws decide about it."""

from collections.abc import Callable, Iterator

import fuzz
import pytest
import torch
from tolerance import OutsideError, assert_close


def compare(error: float, baseline_error: float) -> None:
    exact = torch.zeros(2, dtype=torch.float64)
    assert_close("x", torch.tensor([0.0, error]), exact, torch.tensor([0.0, baseline_error]))


def judge(monkeypatch: pytest.MonkeyPatch, check: Callable[[int], None]) -> None:
    """As run_shape does it; check: of a draw."""
    monkeypatch.setattr(fuzz, "shape_of", lambda seed, device, draw=0: (None, {"op": lambda: check(draw)}))
    with pytest.raises(OutsideError) as first:
        check(0)
    fuzz.check_draws(0, "cpu", "op", str(first.value))


def test_a_baseline_that_is_exact_by_luck_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, lambda draw: compare(2e-3, 1e-3 if draw else 1e-5))


def test_an_error_above_all_baselines_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"error 3\.000e-03 in 8 draws"):
        judge(monkeypatch, lambda draw: compare(1e-3 if draw else 3e-3, 1e-3))


@pytest.mark.parametrize(("second", "message"), [(5e-3, "the same inputs, first"), (0.0, "did not repeat")])
def test_an_error_that_does_not_repeat_fails(
    monkeypatch: pytest.MonkeyPatch, second: float, message: str
) -> None:
    errors: Iterator[float] = iter([4e-3, second])
    with pytest.raises(AssertionError, match=message):
        judge(monkeypatch, lambda draw: compare(next(errors), 1e-5))
