"""The one tolerance policy (FlashAttention's rule).

The error against the exact result (the fp64 reference on the same, possibly rounded, inputs) may be at
most twice the error of the *baseline*: the same mathematics by plain PyTorch in the precision under
test. NaN and Inf must stand in the same places.

A baseline can be exact by luck (a query with one visible key), so a floor is added to what it allows:
  * one ulp of the largest result in the storage type: the result and the exact value are each rounded
    once;
  * ACCUMULATION_ULPS ulps of the accumulator type, relative to the largest result but at least to 1, the
    size of the inputs: gradients that cancel to zero keep the rounding error of what cancelled. Where
    nothing else is left (a softmax over one key), what cancelled sets the scale. fp64 is its own
    reference, whose error is not zero but unmeasured: there the ulps stand for the sums of up to some
    thousand terms on both sides;
  * half an ulp of the largest logit: lse is rounded once, to be stored in the accumulator type, so
    p = exp(logit - lse) of the backward has that relative error, which a baseline that keeps p itself
    does not make.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

ACCUMULATION_ULPS = {torch.float32: 32, torch.float64: 2048}
LSE_ERROR = {torch.float32: 1e-5, torch.float64: 1e-13}
BASELINE_FACTOR = 2.0
NOTHING_LEFT = 1e-9  # of gradients whose exact value is zero everywhere


@dataclasses.dataclass(frozen=True)
class Measured:
    """What assert_close compares."""

    name: str
    error: float
    baseline_error: float
    floor: float


class OutsideError(AssertionError):
    """An error above what is allowed; not masks or shapes that differ."""


_measured: list[Measured] | None = None


@contextlib.contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Inside, assert_close notes what it compares, and raises for masks and shapes alone."""
    global _measured
    _measured = []
    try:
        yield _measured
    finally:
        _measured = None


def outside(measured: list[Measured]) -> list[str]:
    """The rule for several draws of the same tensors together: the worst error of a name against the worst of
    its baseline. Where few numbers decide, a baseline is exact by luck now and then, but not in every draw.
    """
    found = []
    for name in dict.fromkeys(m.name for m in measured):
        draws = [m for m in measured if m.name == name]
        error, base, tiny = (
            max(values) for values in zip(*((m.error, m.baseline_error, m.floor) for m in draws), strict=True)
        )
        if not error <= BASELINE_FACTOR * base + tiny:
            found.append(
                f"{name}: error {error:.3e} in {len(draws)} draws, baseline {base:.3e}, floor {tiny:.3e}"
            )
    return found


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def floor(
    exact: Tensor,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    logit: float = 0.0,
    cancelled: float = 0.0,
) -> float:
    """The error that is allowed when the baseline makes none."""
    largest = finite_max(exact)
    scale = max(1.0, largest, cancelled if largest < NOTHING_LEFT else 0.0)
    acc = accumulator(compute_dtype)
    ulps = ACCUMULATION_ULPS[acc] + logit / 2
    return torch.finfo(dtype).eps * largest + ulps * torch.finfo(acc).eps * scale


def finite_max(x: Tensor) -> float:
    x = x[torch.isfinite(x)]
    return x.abs().max().item() if x.numel() else 0.0


def worst(error: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))


def assert_masks_equal(name: str, actual: Tensor, exact: Tensor) -> None:
    for kind, mask in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        differs = mask(actual) != mask(exact)
        if differs.any():
            at = worst(differs.int())
            raise AssertionError(
                f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in being {kind}, "
                f"the first at {at}: actual {actual[at].item()}, exact {exact[at].item()}"
            )


def assert_within(name: str, actual: Tensor, exact: Tensor, allowed: float, why: str = "") -> None:
    """|actual - exact| <= allowed everywhere, with equal NaN / Inf masks."""
    actual, exact = actual.detach().cpu().double(), exact.detach().cpu().double()
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return
    assert_masks_equal(name, actual, exact)
    error = torch.where(torch.isfinite(exact), (actual - exact).abs(), torch.zeros_like(exact))
    at = worst(error)
    if not error[at] <= allowed:
        raise OutsideError(
            f"{name}: worst at {at} of {tuple(actual.shape)}: actual {actual[at].item():.9g}, "
            f"exact {exact[at].item():.9g}, error {error[at].item():.3e} > allowed {allowed:.3e}{why}; "
            f"{int((error > allowed).sum())} elements are outside"
        )


def assert_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    compute_dtype: torch.dtype | None = None,
    largest_logit: float = 0.0,
    cancelled: float = 0.0,
) -> None:
    """The rule. compute_dtype: the precision under test where the result is stored in another one;
    cancelled: the size of the terms of a gradient.
    """
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, expected {baseline.dtype}"
    exact = exact.detach().cpu().double()
    base = baseline.detach().cpu().double()
    assert base.shape == exact.shape, f"{name}: shapes of baseline {base.shape}, exact {exact.shape}"
    base_error = finite_max(base - exact) if exact.numel() else 0.0
    tiny = floor(exact, actual.dtype, compute_dtype or actual.dtype, largest_logit, cancelled)
    why = f" (baseline error {base_error:.3e}, floor {tiny:.3e})"
    if _measured is not None:
        assert_within(name, actual, exact, float("inf"))
        difference = torch.where(torch.isfinite(exact), actual.detach().cpu().double() - exact, 0.0)
        _measured.append(Measured(name, finite_max(difference), base_error, tiny))
        return
    assert_within(name, actual, exact, BASELINE_FACTOR * base_error + tiny, why)


def assert_lse_close(name: str, actual: Tensor, exact: Tensor, largest_logit: float) -> None:
    """lse has its own bound, because it is stored in the accumulator type whatever the inputs are."""
    assert actual.dtype in LSE_ERROR, f"{name}: dtype {actual.dtype}, expected fp32 or fp64"
    assert_within(name, actual, exact, LSE_ERROR[actual.dtype] * max(1.0, largest_logit))


@dataclasses.dataclass(frozen=True)
class SelectionRule:
    num_selected_blocks: int
    num_initial_blocks: int
    num_local_blocks: int


def assert_selection_valid(indices: Tensor, own: Tensor, rule: SelectionRule) -> None:
    """What holds of every selection. own: the block of each query, -1 for rows of no query."""
    assert indices.dtype == torch.int32, f"block_indices: dtype {indices.dtype}"
    indices, own = indices.cpu().long(), own.cpu().long()
    num_tokens, num_heads_kv, n = indices.shape
    assert n == rule.num_selected_blocks and num_tokens == own.numel()
    for t in range(num_tokens):
        candidates = int(own[t]) + 1
        forced = {
            j
            for j in range(candidates)
            if j < rule.num_initial_blocks or j > int(own[t]) - rule.num_local_blocks
        }
        for g in range(num_heads_kv):
            row = indices[t, g].tolist()
            used = [j for j in row if j >= 0]
            where = f"block_indices[{t}, {g}] = {row}, own block {int(own[t])}"
            assert row == used + [-1] * (n - len(used)), f"{where}: not padded with -1 at the end"
            assert used == sorted(set(used)), f"{where}: not ascending and unique"
            assert len(used) == min(candidates, n), f"{where}: expected {min(candidates, n)} blocks"
            assert not used or used[-1] < candidates, f"{where}: a block past the query's own"
            assert forced <= set(used), f"{where}: a forced block of {sorted(forced)} is missing"


def assert_selection_close(
    actual: Tensor, expected: Tensor, exact_scores: Tensor, score_error: float
) -> None:
    """Rank by rank, both sets have the same exact scores, up to the error of each of two swapped scores."""
    scores = exact_scores.cpu().double()
    padded = torch.cat(
        [scores, scores.new_zeros(*scores.shape[:2], 1)], dim=-1
    )  # index -1 reads the zero at the end

    def chosen(indices: Tensor) -> Tensor:
        return padded.gather(-1, indices.cpu().long() % padded.shape[-1]).sort(dim=-1).values

    assert_within("scores of the chosen blocks", chosen(actual), chosen(expected), 2 * score_error)
