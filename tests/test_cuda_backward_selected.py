"""Gradients of selected attention on a GPU against the fp64 reference, on both paths."""

import itertools

import pytest
import torch
from cases import Case, Inputs
from harness import Tensors, check, largest_logit, op
from test_cuda_forward import by_case, by_dtype

pytestmark = pytest.mark.gpu

by_path = pytest.mark.parametrize("path", ["portable", "best"])
SPLIT = Case("split", (1500, 333), heads=(16, 1), dims=(128, 128), select=(16, 1, 2))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    path = getattr(request.node, "callspec", None) and request.node.callspec.params.get("path")
    if path:
        monkeypatch.setenv("NSA_CUDA_PATH", path)


def tensors_of(x: Inputs) -> Tensors:
    return {"q": x.q, "k": x.keys("slc"), "v": x.values("slc"), "block_indices": x.block_indices()}


def compare(x: Inputs, wanted: tuple[str, ...] = ("q", "k", "v"), **kwargs) -> None:
    tensors = tensors_of(x)
    arguments = (*x.cu, x.case.block_size, x.scale)
    logit = largest_logit(x.q, tensors["k"], x.scale)
    check("selected_attention", tensors, arguments, wanted, x.output_like(), logit=logit, **kwargs)


@by_path
@by_dtype
@by_case
def test_gradients(case: Case, dtype: torch.dtype, path: str) -> None:
    compare(Inputs(case, dtype, "cuda"))


@by_path
@by_dtype
def test_split_lists(dtype: torch.dtype, path: str) -> None:
    compare(Inputs(SPLIT, dtype, "cuda"))


@by_path
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize(
    "wanted", [w for r in (1, 2) for w in itertools.combinations("qkv", r)], ids=lambda w: "".join(w)
)
def test_each_subset(wanted: tuple[str, ...], dims: tuple[int, int], path: str) -> None:
    case = Case("subset", (150, 83), heads=(16, 1), dims=dims, select=(4, 1, 1))
    compare(Inputs(case, torch.bfloat16, "cuda"), wanted)


@by_path
def test_large_logits(path: str) -> None:
    case = Case("large", (300,), heads=(16, 1), dims=(128, 128), select=(3, 1, 1))
    compare(Inputs(case, torch.bfloat16, "cuda", q_scale=200.0))


@by_path
def test_garbage_behind_the_sequences(path: str) -> None:
    case = Case("garbage", (150, 40), heads=(16, 1), dims=(128, 128), pad=(19, 75), select=(3, 1, 1))
    rows = {"k": ~case.seen("slc"), "v": ~case.seen("slc")}
    queries = torch.zeros(case.num_queries, dtype=torch.bool)
    queries[sum(case.query_lengths) :] = True
    compare(Inputs(case, torch.bfloat16, "cuda"), garbage={**rows, "q": queries, "d_o": queries})


@by_path
def test_strided_inputs(path: str) -> None:
    case = Case("strided", (190,), heads=(16, 1), dims=(128, 128), select=(3, 1, 1))
    x = Inputs(case, torch.bfloat16, "cuda")
    tensors = tensors_of(x)
    split = torch.cat([tensors["q"], tensors["k"], tensors["v"]], dim=1)
    views = dict(zip("qkv", split.split([16, 1, 1], dim=1), strict=True))
    logit = largest_logit(x.q, tensors["k"], x.scale)
    arguments = (*x.cu, case.block_size, x.scale)
    d_o = x.output_like().transpose(0, 1).contiguous().transpose(0, 1)
    check("selected_attention", {**tensors, **views}, arguments, ("q", "k", "v"), d_o, logit=logit)


@by_path
def test_repeats_bitwise(path: str) -> None:
    x = Inputs(SPLIT, torch.bfloat16, "cuda")
    tensors = tensors_of(x)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    o, _ = op("selected_attention")(*leaves, tensors["block_indices"], *x.cu, SPLIT.block_size, x.scale)
    first = torch.autograd.grad(o, leaves, x.output_like(), retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(o, leaves, x.output_like(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@by_path
def test_wild_offsets_touch_nothing_outside(path: str) -> None:
    """cu_seqlens on the device is never read on the host; whatever it says, the process lives."""
    case = Case("wild", (256,), heads=(16, 1), dims=(128, 128))
    x = Inputs(case, torch.bfloat16, "cuda")
    tensors = tensors_of(x)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    for wild in ([0, 10**9], [-5, 300], [200, 100], [2**31 - 1, -(2**31)]):
        cu = torch.tensor(wild, dtype=torch.int32, device="cuda")
        o, _ = op("selected_attention")(*leaves, tensors["block_indices"], cu, cu, 256, 256, 64, x.scale)
        torch.autograd.grad(o, leaves, x.output_like())
    torch.cuda.synchronize()
