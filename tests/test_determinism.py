"""The same bits on every run, with every number of threads."""

from collections.abc import Iterator

import pytest
import torch
from cases import Case, by_device, default_dtype
from harness import run
from samples import DIFFERENTIABLE, FORWARD, floating, sample

LONG = Case("long", (700, 0, 333), heads=(8, 2), dims=(64, 64), select=(6, 1, 2), window=130, pad=(7, 9))


def results(name: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    arguments = sample(name, dtype, LONG, device)
    operator = getattr(torch.ops.nsa, name)
    wanted = floating(arguments) if name in DIFFERENTIABLE else []

    def call(*values: object) -> object:
        return operator(**dict(zip(arguments, values, strict=True)))

    with torch.no_grad():
        first = operator(**arguments)
    shape = (first if isinstance(first, torch.Tensor) else first[0]).shape
    d_o = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    outputs, grads = run(
        lambda *t: call(*(arguments | dict(zip(tensors, t, strict=True))).values()), tensors, (), wanted, d_o
    )
    return [*outputs, *grads.values()]


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} of {len(first)} differs in {int((a != b).sum())} elements"


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@by_device
@pytest.mark.parametrize("name", FORWARD)
def test_two_runs_give_the_same_outputs(name: str, device: str) -> None:
    count = 1 if name in ("compress", "gated_combine", "block_scores", "select_blocks") else 2
    first, second = (results(name, default_dtype(device), device) for _ in range(2))
    assert_same_bits(first[:count], second[:count])


@by_device
@pytest.mark.parametrize("name", FORWARD)
def test_two_runs_give_the_same_gradients(name: str, device: str, deterministic: None) -> None:
    dtype = default_dtype(device)
    assert_same_bits(results(name, dtype, device), results(name, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORWARD)
def test_the_number_of_threads_changes_nothing(name: str, dtype: torch.dtype, threads: None) -> None:
    torch.set_num_threads(1)
    one = results(name, dtype, "cpu")
    for count in (2, 5):
        torch.set_num_threads(count)
        assert_same_bits(one, results(name, dtype, "cpu"))
