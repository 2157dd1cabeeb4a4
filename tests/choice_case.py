"""Long sequences, on which compressed attention chooses the blocks on Hopper, against the selection alone."""

from dataclasses import dataclass

import torch
from attention_case import attention_rest, attention_tensors
from cases import Case, Inputs
from harness import op
from tolerance import SelectionRule, assert_selection_valid
from torch import Tensor

# What makes the choice hard: scores that are equal or nearly, of all magnitudes, or relative to maxima that
# change often.
UNUSUAL_SCORES = (
    "zero queries",
    "few zero queries",
    "not a number",
    "small",
    "equal blocks",
    "near ties",
    "smooth",
    "growing",
    "peaked",
)


def long_case(queries: int, keys: int, heads_kv: int = 2, select: tuple[int, int, int] = (16, 1, 2)) -> Case:
    """The shape with a kernel that chooses: SPEC's defaults, 16 heads a group."""
    heads, dims = (16 * heads_kv, heads_kv), (128, 128)
    return Case("long", (keys,), heads, dims, select=select, window=512, queries=(queries,), packed=False)


def make_unusual(kind: str, q: Tensor, k_cmp: Tensor) -> None:
    """In place; of every other kind, they stay as they are."""
    if kind == "zero queries":
        q[::3] = 0
    elif kind == "few zero queries":
        q[1000:1003] = 0
    elif kind == "not a number":  # in one head of a group
        q[1000:1003, 3] = float("nan")
    elif kind == "small":  # most scores are nearly equal
        q *= 0.02
    elif kind == "sharp":  # one probability, rounded to 16 bits, may decide
        q *= 2
    elif kind == "equal blocks":
        k_cmp[512:] = k_cmp[: k_cmp.shape[0] - 512].clone()
    elif kind == "near ties":
        k_cmp[:] = k_cmp[:8].repeat(k_cmp.shape[0] // 8 + 1, 1, 1)[: k_cmp.shape[0]] + 2.0**-7 * k_cmp
    elif kind == "smooth":
        k_cmp[:] = 0.1 * k_cmp.float().cumsum(0)
    elif kind == "growing":  # towards the oldest keys, which come last
        k_cmp *= torch.linspace(40, 0, k_cmp.shape[0], device=k_cmp.device)[:, None, None].to(k_cmp.dtype)
    elif kind == "peaked":
        q *= 15


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Where torch.equal says that NaN differs from itself."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def scores_of_chosen(scores: Tensor, indices: Tensor) -> Tensor:
    """Of every row in ascending order; 0 for what is no block."""
    return torch.where(indices < 0, 0, scores.gather(2, indices.clamp(min=0).long())).sort(2).values


@dataclass(frozen=True)
class Chosen:
    tensors: dict[str, Tensor]
    indices: Tensor
    o_cmp: Tensor  # of nsa::attention_forward
    alone: Tensor  # of compressed_attention


def check_choice(x: Inputs, kind: str) -> Chosen:
    """The blocks score like those that select_blocks chooses, and o is made of them, bit by bit the same in
    all that runs them."""
    case, cu, scale = x.case, x.cu, x.scale
    tensors = attention_tensors(x)
    q, k_cmp, v_cmp, k_slc, v_slc, *_, gates = tensors.values()
    make_unusual(kind, q, k_cmp)
    o, indices, *branches = op("attention_forward")(*tensors.values(), *attention_rest(x))
    for _ in range(2):
        again = op("attention")(*tensors.values(), *attention_rest(x))
        assert equal_bits(again[0], o) and torch.equal(again[1], indices)
    assert equal_bits(o, op("gated_combine")(*branches[:3], gates))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op("attention")(*tensors.values(), *attention_rest(x))
    graph.replay()
    assert equal_bits(captured[0], o) and torch.equal(captured[1], indices)

    o_cmp, lse_cmp = op("compressed_attention")(q, k_cmp, v_cmp, *cu, *case.compress, scale)
    torch.testing.assert_close(branches[3], lse_cmp, atol=1e-5, rtol=1e-5, equal_nan=True)
    roundings = {"atol": 2.0**-6, "rtol": 2.0**-6, "equal_nan": True}
    torch.testing.assert_close(branches[0].float(), o_cmp.float(), **roundings)
    o_slc = op("selected_attention")(q, k_slc, v_slc, indices, *cu, case.block_size, scale)[0]
    torch.testing.assert_close(branches[1].float(), o_slc.float(), **roundings)

    scores = op("block_scores")(q, k_cmp, lse_cmp, *cu, *case.compress, case.block_size, scale)
    best = op("select_blocks")(q, k_cmp, lse_cmp, *cu, *case.compress, case.block_size, *case.select, scale)
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))
    chosen, expected = scores_of_chosen(scores, indices), scores_of_chosen(scores, best)
    # Nothing is best of what is not a number: which blocks these tokens get is as select_blocks has it, and
    # no other token loses anything.
    hopeless = q.isnan().any(2).view(q.shape[0], -1, 16).any(2)
    assert torch.equal(scores.isnan().any(2), hopeless)
    assert torch.equal(o.isnan().any(2).view((*hopeless.shape, 16)).any(2), hopeless)
    assert torch.equal(indices[hopeless], best[hopeless])
    chosen, expected = chosen[~hopeless], expected[~hopeless]
    # Exponentials have the error of their exponents: large logits times the precision of fp32.
    tolerance = 1e-3 if kind in ("growing", "peaked") else 1e-5
    assert (chosen >= expected * (1 - tolerance) - 1e-30).all()
    return Chosen(tensors, indices, branches[0], o_cmp)
