"""Gradients on a GPU: every head dim, every G, each subset of requires_grad, both paths."""

import copy

import pytest
import torch
from attention_case import attention_tensors, check_attention
from cases import Case, Inputs
from harness import branch_check, check
from test_compress import check_compress, phi
from test_cuda_forward import by_case, by_dtype
from tolerance import assert_close

from nsa_ext import NativeSparseAttention, NSAConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_path")]


@by_dtype
@by_case
def test_compressed_attention(case: Case, dtype: torch.dtype) -> None:
    branch_check("compressed_attention", Inputs(case, dtype, "cuda"), "cmp", case.compress)


@by_dtype
@by_case
def test_sliding_window_attention(case: Case, dtype: torch.dtype) -> None:
    branch_check("sliding_window_attention", Inputs(case, dtype, "cuda"), "swa", (case.window,))


@by_dtype
@by_case
def test_selected_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    indices = {"block_indices": x.block_indices()}
    branch_check("selected_attention", x, "slc", (case.block_size,), extra=indices)


@by_dtype
@by_case
def test_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    check_attention(x, attention_tensors(x))


@by_dtype
@by_case
@pytest.mark.parametrize(
    ("kind", "per_head", "hidden"),
    [("mlp", False, 256), ("mlp", True, 40), ("linear", False, 8), ("mean", False, 8)],
    ids=["mlp", "per_head", "linear", "mean"],
)
def test_compress(case: Case, kind: str, per_head: bool, hidden: int, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    check_compress(x, kind, phi(x, kind, per_head, hidden))


@by_dtype
@by_case
def test_gated_combine(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    tensors = {name: x.output_like(20 + i) for i, name in enumerate(("o_cmp", "o_slc", "o_swa"))}
    tensors["gate_logits"] = x.gate_logits()
    check("gated_combine", tensors, (), tuple(tensors), x.output_like())


@by_dtype
@pytest.mark.parametrize("wanted", ["q", "k", "v", "q k", "q v", "k v"])
@pytest.mark.parametrize("name", ["compressed_attention", "sliding_window_attention", "selected_attention"])
def test_each_subset_of_gradients(name: str, wanted: str, dtype: torch.dtype) -> None:
    """A gradient that nobody wants is not computed, and the others are the same bits without it."""
    x = Inputs(Case("subset", (150, 0, 83), heads=(8, 2), dims=(64, 64), pad=(3, 5)), dtype, "cuda")
    branch = {"compressed_attention": "cmp", "sliding_window_attention": "swa"}.get(name, "slc")
    parameters = {"cmp": x.case.compress, "swa": (x.case.window,), "slc": (x.case.block_size,)}[branch]
    extra = (x.block_indices(),) if branch == "slc" else ()
    tensors = {"q": x.q, "k": x.keys(branch), "v": x.values(branch)}

    def gradients(names: list[str]) -> dict[str, torch.Tensor]:
        leaves = {key: t.detach().requires_grad_(key in names) for key, t in tensors.items()}
        o, _ = getattr(torch.ops.nsa, name)(*leaves.values(), *extra, *x.cu, *parameters, x.scale)
        grads = torch.autograd.grad(o, [leaves[key] for key in names], x.output_like())
        return dict(zip(names, grads, strict=True))

    every = gradients(["q", "k", "v"])
    for key, gradient in gradients(wanted.split()).items():
        assert torch.equal(gradient, every[key]), f"d_{key} depends on what else is wanted"


def test_module_like_the_cpu() -> None:
    """Gradients of every parameter of the module, phi and the gate included."""
    torch.manual_seed(0)
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, window_size=128)
    module = NativeSparseAttention(config).bfloat16()
    hidden, d_o = torch.randn(2, 700, 256).bfloat16(), torch.randn(2, 700, 256).bfloat16()

    def gradients(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
        copied = copy.deepcopy(module).to(device, dtype)
        x = hidden.to(device, dtype).requires_grad_()
        names = [name for name, _ in copied.named_parameters()]
        grads = torch.autograd.grad(copied(x), [x, *copied.parameters()], d_o.to(device, dtype))
        return dict(zip(["hidden", *names], grads, strict=True))

    exact, baseline, actual = (
        gradients(dtype, device)
        for dtype, device in (
            (torch.float64, "cpu"),
            (torch.bfloat16, "cpu"),
            (torch.bfloat16, "cuda"),
        )
    )
    for name, gradient in actual.items():
        assert_close(name, gradient, exact[name], baseline[name])
