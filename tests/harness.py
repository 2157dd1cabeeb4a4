"""Runs an operator and its reference on the same inputs, forward and backward, and compares them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from cases import Case, Inputs
from tolerance import assert_close, assert_lse_close, finite_max
from torch import Tensor

import nsa_ext  # noqa: F401  (registers torch.ops.nsa)
from nsa_ext import reference

Tensors = Mapping[str, Tensor | None]
Masks = Mapping[str, Tensor]

reference_device = "cpu"  # where the reference computes; fuzz.py has it on the GPU, for speed


def op(name: str) -> Callable:
    return getattr(torch.ops.nsa, name)


def as_tuple(result: Tensor | tuple) -> tuple:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def forward(
    fn: Callable, tensors: Tensors, rest: Sequence, wanted: Sequence[str]
) -> tuple[dict[str, Tensor | None], tuple]:
    """fn(*tensors, *rest) -> the leaves that it was called with, and its outputs."""
    leaves = {
        name: t.detach().requires_grad_(name in wanted) if isinstance(t, Tensor) else None
        for name, t in tensors.items()
    }
    return leaves, as_tuple(fn(*leaves.values(), *rest))


def gradients(
    leaves: Tensors, outputs: tuple, wanted: Sequence[str], d_o: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of the first output for the wanted leaves."""
    present = [name for name in wanted if leaves[name] is not None]
    if not outputs[0].requires_grad:  # nothing is wanted, or the reference met no sequence
        return {name: torch.zeros_like(leaves[name]) for name in present}
    grads = torch.autograd.grad(outputs[0], [leaves[name] for name in present], d_o, allow_unused=True)
    return {
        name: torch.zeros_like(leaves[name]) if g is None else g
        for name, g in zip(present, grads, strict=True)
    }


def run(
    fn: Callable, tensors: Tensors, rest: Sequence, wanted: Sequence[str], d_o: Tensor | None
) -> tuple[tuple, dict[str, Tensor]]:
    """The outputs of fn(*tensors, *rest), and the gradients of the first one for the wanted tensors."""
    leaves, outputs = forward(fn, tensors, rest, wanted)
    return outputs, gradients(leaves, outputs, wanted, d_o)


def to(x: object, dtype: torch.dtype | None = None) -> object:
    """Where the reference computes, floating tensors in dtype."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().to(reference_device, dtype if dtype is not None and x.is_floating_point() else x.dtype)


def with_garbage(x: Tensor, rows: Tensor) -> Tensor:
    """A copy whose rows hold NaN, Inf and huge numbers in turn where the mask says so."""
    x = x.clone()
    garbage = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38], device=x.device).to(x.dtype)
    at = rows.nonzero().flatten().to(x.device)
    x[at] = (
        garbage[torch.arange(len(at), device=x.device) % 4].view(-1, *[1] * (x.dim() - 1)).expand_as(x[at])
    )
    return x


def check(
    name: str,
    tensors: Tensors,
    rest: Sequence,
    wanted: Sequence[str],
    d_o: Tensor,
    garbage: Masks | None = None,
    reference_fn: Callable | None = None,
    logit: float = 0.0,
    second_is_lse: bool = False,
) -> tuple:
    """Compares torch.ops.nsa.<name> with the reference.

    tensors: the leading tensor arguments, in order; wanted: those to differentiate. garbage: rows ("d_o"
    too) that hold NaN and Inf when the operator sees them, and zeros when the reference does.
    """
    reference_fn = reference_fn or getattr(reference, name)
    garbage = dict(garbage or {})
    dirty = {k: with_garbage(t, garbage[k]) if k in garbage else t for k, t in tensors.items()}
    clean = {k: zero_rows(t, garbage[k]) if k in garbage else t for k, t in tensors.items()}
    dirty_d_o = with_garbage(d_o, garbage["d_o"]) if "d_o" in garbage else d_o
    clean_d_o = zero_rows(d_o, garbage["d_o"]) if "d_o" in garbage else d_o

    leaves, outputs = forward(op(name), dirty, rest, wanted)
    results = []
    for precision in (torch.float64, None):  # exact, and as it is
        arguments = {k: to(t, precision) for k, t in clean.items()}
        results.append(run(reference_fn, arguments, [to(r) for r in rest], wanted, to(clean_d_o, precision)))
    (exact, exact_grads), (baseline, baseline_grads) = results
    assert len(outputs) == len(exact)
    assert_close("o", outputs[0], exact[0], baseline[0], largest_logit=logit)
    if second_is_lse:
        assert_lse_close("lse", outputs[1], exact[1], logit)
        assert not outputs[1].requires_grad, "lse is not differentiable"
    grads = gradients(leaves, outputs, wanted, dirty_d_o)
    assert outputs[0].requires_grad == bool(grads)
    inputs = [t for t in clean.values() if isinstance(t, Tensor) and t.is_floating_point()]
    terms = finite_max(clean_d_o) * max(map(finite_max, inputs), default=0.0)
    for key, grad in grads.items():
        assert_close(f"d_{key}", grad, exact_grads[key], baseline_grads[key], None, logit, terms)
        if key in garbage:
            assert not grad[garbage[key].to(grad.device)].any(), (
                f"d_{key} is not zero in rows that nobody sees"
            )
    return outputs


def zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    x = x.clone()
    x[rows.to(x.device)] = 0
    return x


def largest_logit(q: Tensor, k: Tensor, scale: float) -> float:
    q, k = to(q, torch.float64), to(k, torch.float64)
    if 0 in (q.numel(), k.numel()):
        return 0.0
    logits = scale * torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    return logits[torch.isfinite(logits)].abs().max().item()


def rows_of_no_query(case: Case) -> Tensor:
    mask = torch.ones(case.num_queries, dtype=torch.bool)
    mask[: sum(case.query_lengths)] = False
    return mask


def exact_lse(x: Inputs, k_cmp: Tensor) -> Tensor:
    """lse of the compressed attention in fp64, for the operators that take it as an input."""
    arguments = [to(t, torch.float64) for t in (x.q, k_cmp, k_cmp)]
    return reference.compressed_attention(*arguments, *map(to, x.cu), *x.case.compress, x.scale)[1]


def branch_check(
    name: str, x: Inputs, branch: str, parameters: tuple, extra: Tensors | None = None, **kwargs
) -> tuple:
    """check() of one of the three attention branches: q, k, v and what else it takes, with all gradients."""
    tensors = {"q": x.q, "k": x.keys(branch), "v": x.values(branch), **(extra or {})}
    outputs = check(
        name,
        tensors,
        (*x.cu, *parameters, x.scale),
        ("q", "k", "v"),
        x.output_like(),
        logit=largest_logit(x.q, tensors["k"], x.scale),
        second_is_lse=True,
        **kwargs,
    )
    unused = rows_of_no_query(x.case)
    assert not outputs[0][unused].any() and torch.isneginf(outputs[1][unused]).all()
    return outputs


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy that begins one element behind what memory is aligned to."""
    copy = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x)
    return copy.copy_(x.detach())
