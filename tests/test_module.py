"""NativeSparseAttention against a plain re-computation, sequence by sequence, through nsa_ext.reference."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nsa_ext import NativeSparseAttention, NSAConfig, reference

BASE = NSAConfig(
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    head_dim_v=6,
    compress_block_size=8,
    compress_stride=4,
    block_size=8,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=7,
)
CONFIGS = {
    "base": {},
    "share_kv": {"share_kv": True},
    "share_kv_before": {"share_kv": True, "compress_rope": "before"},
    "rope_before": {"compress_rope": "before"},
    "rope_none": {"compress_rope": "none", "rope_theta": 500.0},
    "linear_per_head": {"compress_kind": "linear", "compress_per_head": True},
    "mlp_per_head": {"compress_per_head": True, "compress_hidden_size": 5, "qkv_bias": True},
    "mean": {"compress_kind": "mean"},
    "mha": {"num_kv_heads": 4, "head_dim_v": None},
    "mqa": {"num_kv_heads": 1, "head_dim_v": 10, "softmax_scale": 0.9},
    "blocks": {"compress_block_size": 12, "compress_stride": 4, "block_size": 4, "num_initial_blocks": 0},
}


def make(dtype: torch.dtype = torch.float64, **changes) -> NativeSparseAttention:
    module = NativeSparseAttention(dataclasses.replace(BASE, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():  # what starts at zero would hide an error
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as a multiplication of complex numbers: channels c and c + D/2 are one number."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def recompute(module: NativeSparseAttention, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Output and block_indices for one sequence [T, C], whose first token stands at the position offset."""
    c = module.config
    positions = torch.arange(offset, offset + x.shape[0])
    starts = positions[:: c.compress_stride][: x.shape[0] // c.compress_stride]

    def heads(name: str) -> Tensor:
        linear = module.get_submodule(name)
        dim = c.value_dim if name[0] == "v" else c.head_dim
        y = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        return y.unflatten(-1, (-1, dim))

    def compress(phi, tokens: Tensor) -> Tensor:
        parameters = (phi.pe, phi.w1, phi.b1, phi.w2, phi.b2)
        sizes = (c.compress_block_size, c.compress_stride, c.compress_kind)
        return reference.compress(tokens, *parameters, None, len(x), *sizes)

    suffix = (lambda branch: "") if c.share_kv else (lambda branch: f"_{branch}")
    q = rotate(heads("q_proj"), positions, c.rope_theta)
    k_cmp = heads("k_proj" + suffix("cmp"))
    k_cmp = rotate(k_cmp, positions, c.rope_theta) if c.compress_rope == "before" else k_cmp
    k_cmp = compress(module.compress_k, k_cmp)
    k_cmp = rotate(k_cmp, starts, c.rope_theta) if c.compress_rope == "after" else k_cmp
    v_cmp = compress(module.compress_v, heads("v_proj" + suffix("cmp")))
    pairs = []
    for branch in ("slc", "swa"):
        pairs += [rotate(heads("k_proj" + suffix(branch)), positions, c.rope_theta)]
        pairs += [heads("v_proj" + suffix(branch))]
    gate_logits = (x @ module.gate_proj.weight.T + module.gate_proj.bias).view(x.shape[0], c.num_heads, 3)
    outputs = reference.attention_forward(
        q,
        k_cmp,
        v_cmp,
        *pairs,
        gate_logits,
        compress_block_size=c.compress_block_size,
        compress_stride=c.compress_stride,
        block_size=c.block_size,
        num_selected_blocks=c.num_selected_blocks,
        num_initial_blocks=c.num_initial_blocks,
        num_local_blocks=c.num_local_blocks,
        window_size=c.window_size,
        softmax_scale=c.softmax_scale,
    )
    return outputs.o.flatten(1) @ module.o_proj.weight.T, outputs.block_indices


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def assert_grads_equal(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    d_o = torch.randn_like(expected)
    grads = [torch.autograd.grad(o, inputs, d_o) for o in (actual, expected)]
    for grad, expected_grad in zip(*grads, strict=True):
        assert_equal(grad, expected_grad)


def random_input(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, BASE.hidden_size, dtype=dtype)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_batch_and_all_gradients_equal_the_recomputation(changes):
    module = make(**changes)
    x = random_input(2, 45).requires_grad_()
    actual, info = module(x, return_info=True)
    parts = [recompute(module, x[b]) for b in range(2)]
    expected = torch.stack([part[0] for part in parts])
    assert_equal(actual, expected)
    assert torch.equal(info.block_indices, torch.stack([part[1] for part in parts]))
    assert_grads_equal(actual, expected, [x, *module.parameters()])


@pytest.mark.parametrize("changes", [CONFIGS[name] for name in ("base", "rope_before", "mean")])
def test_packed_sequences_and_rows_behind_them(changes):
    module = make(**changes)
    x = random_input(60)
    x[52:] = float("nan")
    x.requires_grad_()
    bounds = (0, 9, 9, 42, 45, 46, 52)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    actual = module(x, cu_seqlens=cu_seqlens, max_seqlen=33)
    parts = [recompute(module, x[a:b])[0] for a, b in pairwise(bounds) if a < b]
    expected = torch.cat([*parts, torch.zeros(8, BASE.hidden_size, dtype=torch.float64)])
    assert_equal(actual, expected)
    assert_grads_equal(actual, expected, [x, *module.parameters()])
    assert torch.equal(actual, module(x, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_mask_with_garbage_at_the_padding(side):
    module = make()
    x, mask = random_input(3, 45), torch.zeros(3, 45, dtype=torch.bool)
    for b, length in enumerate((20, 45, 3)):
        mask[b, slice(45 - length, 45) if side == "left" else slice(0, length)] = True
    x = x.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    actual = module(x, attention_mask=mask)
    parts = [recompute(module, x[b, mask[b]])[0] for b in range(3)]
    expected = torch.zeros_like(actual).masked_scatter(mask.unsqueeze(-1), torch.cat(parts))
    assert_equal(actual, expected)
    assert_grads_equal(actual, expected, [x, *module.parameters()])


@pytest.mark.parametrize("layout", ["batch", "shared", "one_row", "packed", "mask"])
def test_given_position_embeddings(layout):
    """Tables as transformers makes them, here for sequences that begin at the position 5."""
    module = make()
    x = random_input(2, 30)
    angles = torch.arange(5, 35).double()[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    cos, sin = (f(torch.cat((angles, angles), dim=-1)) for f in (torch.cos, torch.sin))
    expected = torch.stack([recompute(module, x[b], offset=5)[0] for b in range(2)])
    if layout == "packed":
        cu_seqlens = torch.tensor([0, 30, 60], dtype=torch.int32)
        actual = module(x.flatten(0, 1), (cos.repeat(2, 1), sin.repeat(2, 1)), cu_seqlens=cu_seqlens)
        actual = actual.unflatten(0, (2, 30))
    elif layout == "mask":
        actual = module(x, (cos, sin), attention_mask=torch.ones(2, 30))
    else:
        expand = {
            "batch": lambda t: t.expand(2, -1, -1),
            "shared": lambda t: t,
            "one_row": lambda t: t[None],
        }[layout]
        actual = module(x, (expand(cos), expand(sin)))
    assert_equal(actual, expected)


def test_sequences_shorter_than_a_block_and_empty_inputs():
    module = make()
    for length in (0, 1, 3, 7):
        x = random_input(length)
        assert_equal(module(x), recompute(module, x)[0])
    assert module(random_input(0, 12)).shape == (0, 12, BASE.hidden_size)


def test_a_later_token_never_changes_an_earlier_output():
    module = make(num_selected_blocks=2)
    x = random_input(1, 64)
    before = module(x)
    for t in (1, 20, 31, 32, 50, 63):
        changed = x.clone()
        changed[:, t:] = 10 * random_input(1, 64 - t)
        after = module(changed)
        assert_equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_every_branch_receives_gradient_of_comparable_size_at_the_first_step(kind):
    """On independent tokens of unit variance. Measured: the branches' projections are within a factor of
    3 of each other, their gates within 4; a starved branch would be off by 10 and more, as keys under the
    mean are (by 20)."""
    config = NSAConfig(
        hidden_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_selected_blocks=6,
        window_size=128,
        compress_kind=kind,
    )
    module = NativeSparseAttention(config)
    x = torch.randn(1, 768, 128)
    o = module(x)
    (o * torch.randn_like(o)).sum().backward()

    def norm(name: str) -> float:
        return module.get_parameter(name).grad.norm().item()

    for projection in ("k_proj", "v_proj"):
        norms = [norm(f"{projection}_{branch}.weight") for branch in ("cmp", "slc", "swa")]
        assert max(norms) < 5 * min(norms), f"{projection}: {norms}"
    gates = module.gate_proj.weight.grad.unflatten(0, (4, 3)).norm(dim=(0, 2)).tolist()
    assert max(gates) < 5 * min(gates), f"gates: {gates}"

    # What a relative change of a weight does to the loss, against that of the projection in front of it.
    for stream in ("k", "v"):
        projection = module.get_parameter(f"{stream}_proj_cmp.weight")
        effect = norm(f"{stream}_proj_cmp.weight") * projection.norm().item()
        for name in ("w1", "w2") if kind == "mlp" else ("w1",):
            weight = f"compress_{stream}.{name}"
            ratio = norm(weight) * module.get_parameter(weight).norm().item() / effect
            assert 0.2 < ratio < 5, f"{weight}: {ratio}"
    unused = [name for name, parameter in module.named_parameters() if not parameter.grad.any()]
    assert not unused, "DistributedDataParallel would wait for these"


def test_initial_gates_and_projections():
    module = NativeSparseAttention(dataclasses.replace(BASE, hidden_size=512, num_heads=64))
    _, info = module(torch.randn(1, 9, 512), return_info=True)
    torch.testing.assert_close(info.gates, torch.full_like(info.gates, 1 / 3))
    assert module.q_proj.weight.std().item() == pytest.approx(512**-0.5, rel=0.05)
    assert module.o_proj.weight.std().item() == pytest.approx((64 * 6) ** -0.5, rel=0.05)
    biased = NativeSparseAttention(dataclasses.replace(BASE, gate_bias=2.0))
    assert (biased.gate_proj.bias == 2.0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_states": (2, 10, 23)}, r"hidden_states has shape \[2, 10, 23\].*\[B, S, 24\]"),
        ({"hidden_states": (24,)}, r"hidden_states has shape \[24\]"),
        ({"attention_mask": (2, 1, 10, 10)}, r"mask has shape \[2, 1, 10, 10\].*\[2, 10\]"),
        ({"cu_seqlens": (2,)}, "cu_seqlens is torch.float32"),
        ({"position_embeddings": ((10, 8), (10, 4))}, r"sin has shape \[10, 4\].*\[2, 10, 8\]"),
        ({"position_embeddings": ((3, 10, 8), (3, 10, 8))}, r"cos has shape \[3, 10, 8\].*\[2, 10, 8\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    module = make(torch.float32)

    def ones(shape):
        return tuple(ones(s) for s in shape) if isinstance(shape[0], tuple) else torch.ones(shape)

    arguments = {"hidden_states": (2, 10, 24)} | arguments
    with pytest.raises(ValueError, match=message):
        module(**{name: ones(shape) for name, shape in arguments.items()})
