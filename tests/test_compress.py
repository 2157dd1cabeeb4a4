"""nsa::compress against the fp64 reference."""

import math

import pytest
import torch
from cases import Case, Inputs, by_case, by_target
from harness import check, misaligned
from torch import Tensor

PARAMETERS = ("pe", "w1", "b1", "w2", "b2")


def phi(
    x: Inputs, kind: str, per_head: bool, hidden: int, without: tuple[str, ...] = ()
) -> dict[str, Tensor | None]:
    """x and phi's parameters, at the scale of an initialised module."""
    dim, length = x.case.dims[0], x.case.compress[0]
    heads = x.case.heads[1] if per_head else 1
    hidden = dim if kind == "linear" else hidden
    shapes = {
        "pe": (heads, length, dim),
        "w1": (heads, length * dim, hidden),
        "b1": (heads, hidden),
        "w2": (heads, hidden, dim),
        "b2": (heads, dim),
    }
    size = {"pe": 0.5, "w1": 1 / math.sqrt(length * dim), "b1": 0.5, "w2": 1 / math.sqrt(hidden), "b2": 0.5}
    absent = {"mlp": (), "linear": ("w2", "b2"), "mean": PARAMETERS}[kind] + without
    tensors: dict[str, Tensor | None] = {"x": x.keys("slc")}
    for i, name in enumerate(PARAMETERS):
        tensors[name] = None if name in absent else x.random(40 + i, *shapes[name]) * size[name]
    return tensors


def rest(x: Inputs, kind: str) -> tuple:
    return (x.cu[1], x.cu[3], *x.case.compress, kind)


def check_compress(x: Inputs, kind: str, tensors: dict[str, Tensor | None], **kwargs) -> Tensor:
    rows = x.case.num_keys // x.case.compress[1]
    d_out = x.random(50, rows, *tensors["x"].shape[1:])
    wanted = tuple(name for name, t in tensors.items() if t is not None)
    (out,) = check("compress", tensors, rest(x, kind), wanted, d_out, **kwargs)
    assert out.shape == (rows, *tensors["x"].shape[1:])
    is_block = torch.zeros(rows, dtype=torch.bool)
    for b in range(len(x.case.lengths)):
        first = x.case.first_compressed_row(b)
        is_block[first : first + x.case.num_compressed(b)] = True
    assert not out[~is_block].any(), "rows of no block are zero"
    return out


@by_target
@by_case()
@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_equals_reference(case: Case, kind: str, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    check_compress(x, kind, phi(x, kind, per_head=False, hidden=2 * case.dims[0]))


@by_target
@by_case("one_sequence", "ragged_with_empty", "mha_g1", "gqa_g5", "l_equals_d", "padding_rows", "odd_strides")
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_parameters_per_head(case: Case, kind: str, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    hidden = 24 if device == "cuda" else 19  # CUDA reads eight at a time
    check_compress(x, kind, phi(x, kind, per_head=True, hidden=hidden))


@by_target
@by_case("ragged_with_empty")
@pytest.mark.parametrize("without", [("pe",), ("b1",), ("b2",), ("pe", "b1", "b2")], ids="-".join)
def test_optional_parameters(case: Case, without: tuple[str, ...], device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    check_compress(x, "mlp", phi(x, "mlp", per_head=False, hidden=40, without=without))


@by_target
@by_case("ragged_with_empty")
def test_parameters_may_begin_anywhere(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    tensors = {name: misaligned(t) for name, t in phi(x, "mlp", per_head=False, hidden=40).items()}
    check_compress(x, "mlp", tensors)


@by_target
def test_vec_is_token_major(device: str, dtype: torch.dtype) -> None:
    """w1 that picks token 2, channel 1 of each block: index 2 * D + 1."""
    length, stride, dim = 8, 8, 64
    x = torch.arange(32 * dim, dtype=torch.float32).remainder(128).view(32, 1, dim).to(dtype).to(device)
    w1 = torch.zeros(1, length * dim, dim, dtype=dtype, device=device)
    w1[0, 2 * dim + 1, 5] = 1
    out = torch.ops.nsa.compress(x, None, w1, None, None, None, None, 32, length, stride, "linear")
    assert torch.equal(out[:, 0, 5], x[2::stride, 0, 1])
    assert out.count_nonzero() == out[:, 0, 5].count_nonzero()
