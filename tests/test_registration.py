"""Schemas, opcheck, and what PyTorch's own machinery makes of the operators."""

import dataclasses
import warnings

import pytest
import torch
from cases import Case
from samples import DIFFERENTIABLE, FORWARD, SMALL, call, floating, sample
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CU = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
COMPRESSED = "int compress_block_size, int compress_stride"
SELECTION = "int block_size, int num_selected_blocks, int num_initial_blocks, int num_local_blocks"
BRANCHES = "Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_swa, Tensor v_swa"
ATTENTION = (
    f"Tensor q, {BRANCHES}, Tensor gate_logits, {CU}, {COMPRESSED}, {SELECTION}, int window_size, "
    "float softmax_scale"
)
SCHEMAS = {
    "compress": "(Tensor x, Tensor? pe, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? cu_seqlens, "
    "SymInt max_seqlen, int block_size, int stride, str kind) -> Tensor",
    "compressed_attention": f"(Tensor q, Tensor k_cmp, Tensor v_cmp, {CU}, {COMPRESSED}, "
    "float softmax_scale) -> (Tensor o, Tensor lse)",
    "block_scores": f"(Tensor q, Tensor k_cmp, Tensor lse, {CU}, {COMPRESSED}, int block_size, "
    "float softmax_scale) -> Tensor",
    "select_blocks": f"(Tensor q, Tensor k_cmp, Tensor lse, {CU}, {COMPRESSED}, {SELECTION}, "
    "float softmax_scale) -> Tensor",
    "selected_attention": f"(Tensor q, Tensor k, Tensor v, Tensor block_indices, {CU}, int block_size, "
    "float softmax_scale) -> (Tensor o, Tensor lse)",
    "sliding_window_attention": f"(Tensor q, Tensor k, Tensor v, {CU}, int window_size, float softmax_scale) "
    "-> (Tensor o, Tensor lse)",
    "gated_combine": "(Tensor o_cmp, Tensor o_slc, Tensor o_swa, Tensor gate_logits) -> Tensor",
    "attention": f"({ATTENTION}) -> (Tensor o, Tensor block_indices)",
    "attention_forward": f"({ATTENTION}) -> (Tensor o, Tensor block_indices, Tensor o_cmp, Tensor o_slc, "
    "Tensor o_swa, Tensor lse_cmp, Tensor lse_slc, Tensor lse_swa)",
}
BACKWARD = tuple(f"{name}_backward" for name in DIFFERENTIABLE if name != "attention_forward")


@pytest.mark.parametrize("name", FORWARD)
def test_schema(name: str) -> None:
    assert str(getattr(torch.ops.nsa, name).default._schema) == f"nsa::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", FORWARD + BACKWARD)
def test_registrations(name: str) -> None:
    overload = getattr(torch.ops.nsa, name).default
    assert torch.Tag.pt2_compliant_tag in overload.tags
    for key in ("CPU", "Meta", "Autograd"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa::{name}", key)
        assert registered or torch._C._dispatch_has_kernel_for_dispatch_key(f"nsa::{name}", f"{key}CPU"), key


VARIANTS = (
    SMALL,
    Case(
        "ragged", (45, 0, 13), heads=(3, 1), dims=(5, 8), compress=(4, 2), block_size=4, window=6, pad=(3, 5)
    ),
    Case("chunk", (64, 31), queries=(9, 4), heads=(2, 2), dims=(16, 16), compress=(16, 8), block_size=32),
    Case("plain", (50,), packed=False, dims=(8, 8), compress=(8, 8), block_size=16),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", VARIANTS, ids=lambda c: c.name)
@pytest.mark.parametrize("name", FORWARD)
def test_opcheck(name: str, case: Case, dtype: torch.dtype) -> None:
    arguments = sample(name, dtype, case)
    if name in DIFFERENTIABLE:
        for key in floating(arguments):
            arguments[key].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.nsa, name).default, (), arguments)


@pytest.mark.parametrize("name", ["compressed_attention", "selected_attention", "sliding_window_attention"])
@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False]], ids=["all", "dk"])
def test_opcheck_backward(name: str, mask: list[bool]) -> None:
    arguments = sample(name, torch.float32)
    o, lse = call(name, arguments)
    given = {"d_o": torch.ones_like(o), "o": o, "lse": lse, "grad_mask": mask}
    torch.library.opcheck(getattr(torch.ops.nsa, f"{name}_backward").default, (), arguments | given)


def test_opcheck_backward_of_the_rest() -> None:
    arguments = sample("compress", torch.float32)
    given = {"d_out": torch.ones_like(call("compress", arguments)), "grad_mask": [True] * 6}
    torch.library.opcheck(torch.ops.nsa.compress_backward.default, (), arguments | given)
    arguments = sample("gated_combine", torch.float32)
    given = {"d_o": arguments["o_cmp"], "grad_mask": [True, False, True, True]}
    torch.library.opcheck(torch.ops.nsa.gated_combine_backward.default, (), arguments | given)
    arguments = sample("attention", torch.float32)
    outputs = call("attention_forward", arguments)
    names = ("o", "block_indices", "o_cmp", "o_slc", "o_swa", "lse_cmp", "lse_slc", "lse_swa")
    given = dict(zip(names, outputs, strict=True))
    given = {"d_o": torch.ones_like(given.pop("o")), **given, "grad_mask": [True] * 8}
    torch.library.opcheck(torch.ops.nsa.attention_backward.default, (), arguments | given)


@pytest.mark.parametrize("name", FORWARD)
def test_meta_shapes_equal_real_ones(name: str) -> None:
    for case in VARIANTS:
        arguments = sample(name, torch.float32, case)
        real = call(name, arguments)
        meta = call(
            name, {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        )
        for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (real, meta)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# Autocast.


@pytest.mark.parametrize("name", [n for n in FORWARD if n not in ("block_scores", "select_blocks")])
def test_autocast_lowers_like_scaled_dot_product_attention(name: str) -> None:
    arguments = sample(name, torch.float32)
    keys = floating(arguments)
    leaves = {key: arguments[key].clone().requires_grad_() for key in keys}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(name, arguments | leaves)
    o = result if isinstance(result, torch.Tensor) else result[0]
    assert o.dtype == torch.bfloat16
    lowered = call(name, arguments | {key: arguments[key].bfloat16() for key in keys})
    assert torch.equal(o, lowered if isinstance(lowered, torch.Tensor) else lowered[0])
    o.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())


@pytest.mark.parametrize("name", ["block_scores", "select_blocks"])
def test_autocast_of_the_selection(name: str) -> None:
    arguments = sample(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(name, arguments)
    lowered = {key: arguments[key].bfloat16() for key in ("q", "k_cmp")}
    assert torch.equal(result, call(name, arguments | lowered))


# Activation checkpointing.


def attention_leaves() -> tuple[dict, list[str]]:
    arguments = sample("attention", torch.float32, dataclasses.replace(SMALL, lengths=(90, 70)))
    keys = floating(arguments)
    for key in keys:
        arguments[key].requires_grad_()
    return arguments, keys


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    arguments, keys = attention_leaves()

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return call("attention", arguments | dict(zip(keys, tensors, strict=True)))[0].tanh()

    leaves = [arguments[key] for key in keys]
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    checkpoint(layer, *leaves, use_reentrant=reentrant).sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_names_the_operator(policy: CheckpointPolicy) -> None:
    arguments, keys = attention_leaves()
    forward = torch.ops.nsa.attention_forward.default
    calls = []

    def choose(context, op, *args, **kwargs) -> CheckpointPolicy:
        if op == forward:
            calls.append(context.is_recompute)
            return policy
        return CheckpointPolicy.PREFER_RECOMPUTE

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return call("attention", arguments | dict(zip(keys, tensors, strict=True)))[0].tanh()

    leaves = [arguments[key] for key in keys]
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    contexts = lambda: create_selective_checkpoint_contexts(choose)  # noqa: E731
    o = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grads = torch.autograd.grad(o.sum(), leaves)
    assert calls, "the policy never saw nsa::attention_forward"
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
