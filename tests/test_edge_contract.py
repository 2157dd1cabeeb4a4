"""The edge contract, line by line, but for garbage and errors (test_edge_garbage.py, test_edge_errors.py)."""

import itertools

import pytest
import torch
from attention_case import GRADIENTS, attention_rest, attention_tensors, check_attention
from cases import Case, Inputs, by_device, by_target, case, default_dtype
from harness import branch_check, op, run
from test_compress import check_compress, phi
from tolerance import finite_max

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")

BANDS = {"cmp": "compressed_attention", "swa": "sliding_window_attention"}


def branch_call(branch: str, x: Inputs) -> tuple[str, tuple]:
    """The operator of a branch and its arguments behind q, k, v."""
    if branch == "slc":
        return "selected_attention", (x.block_indices(), *x.cu, x.case.block_size, x.scale)
    return BANDS[branch], (*x.cu, *(x.case.compress if branch == "cmp" else (x.case.window,)), x.scale)


# A query with no visible key in a branch: o = 0, lse = -inf, all its gradients 0, never NaN.


@by_target
def test_no_visible_compressed_key(device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (31, 40), dims=(64, 64)), dtype, device)
    tensors = {"q": x.q, "k": x.keys("cmp"), "v": x.values("cmp")}
    name, rest = branch_call("cmp", x)
    (o, lse), grads = run(op(name), tensors, rest, ("q", "k", "v"), x.output_like())
    blind = torch.tensor([t < 31 for _, _, t in x.case.queries_and_positions()])
    assert blind.sum() == 62
    assert not o[blind].any() and torch.isneginf(lse[blind]).all() and not grads["q"][blind].any()
    assert o[~blind].any() and torch.isfinite(lse[~blind]).all()
    assert all(torch.isfinite(g).all() for g in grads.values())


@by_target
def test_no_selected_block(device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (100,), dims=(64, 64), packed=False), dtype, device)
    indices = torch.full((100, 1, 4), -1, dtype=torch.int32, device=device)
    tensors = {"q": x.q, "k": x.keys("slc"), "v": x.values("slc")}
    rest = (indices, *x.cu, 64, x.scale)
    (o, lse), grads = run(op("selected_attention"), tensors, rest, ("q", "k", "v"), x.output_like())
    assert not o.any() and torch.isneginf(lse).all()
    assert not any(g.any() for g in grads.values())


# S < l, S = 0, B = 0, T = 0, a zero-length sequence in the middle.


@by_target
@pytest.mark.parametrize(
    "lengths,queries,packed",
    [
        ((), (), True),
        ((0,), (0,), True),
        ((0,), (0,), False),
        ((7,), (7,), False),
        ((40,), (0,), True),
        ((40,), (0,), False),
        ((40, 0, 3), (2, 0, 3), True),
        ((0, 0, 65, 0), (0, 0, 65, 0), True),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_sizes_down_to_nothing(
    lengths: tuple, queries: tuple, packed: bool, device: str, dtype: torch.dtype
) -> None:
    small = Case("", lengths, queries=queries, packed=packed, dims=(64, 64), heads=(4, 2))
    x = Inputs(small, dtype, device)
    o, indices = check_attention(x, attention_tensors(x))
    assert o.shape == (sum(queries), 4, 64) and indices.shape == (sum(queries), 2, 4)
    for branch in ("cmp", "swa"):
        name, _ = branch_call(branch, x)
        branch_check(name, x, branch, small.compress if branch == "cmp" else (small.window,))
    check_compress(x, "mlp", phi(x, "mlp", per_head=False, hidden=8))


# S not a multiple of d, l', or any tile: keys outside a sequence are never read as if inside.


@by_device
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 63, 65, 127, 129, 130])
def test_a_sequence_does_not_know_its_neighbours(length: int, device: str) -> None:
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    packed = Inputs(Case("", (37, length, 50), dims=(64, 64), heads=(4, 2)), dtype, device)
    alone = Inputs(Case("", (length,), dims=(64, 64), heads=(4, 2), packed=False), dtype, device)
    tensors = attention_tensors(packed)
    o, indices = op("attention")(*tensors.values(), *attention_rest(packed))
    tokens = slice(37, 37 + length)
    rows = slice(37 // 16, 37 // 16 + length // 16)
    mine = {name: t[rows if name.endswith("cmp") else tokens] for name, t in tensors.items()}
    o_alone, indices_alone = op("attention")(*mine.values(), *attention_rest(alone))
    assert torch.equal(indices[tokens], indices_alone)
    bound = 1e-13 if dtype == torch.float64 else 2**-6
    torch.testing.assert_close(o[tokens], o_alone, rtol=bound, atol=bound)


# Strided but last-dim-contiguous inputs.


def qkv_split(x: Inputs, branch: str) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one buffer, as a fused projection gives them."""
    parts = [x.q, x.keys(branch), x.values(branch)]
    fused = torch.cat([p.flatten(1) for p in parts], dim=1)
    views = fused.split([p[0].numel() for p in parts], dim=1)
    return tuple(v.unflatten(1, p.shape[1:]) for v, p in zip(views, parts, strict=True))


def head_major(x: Inputs, branch: str) -> tuple[torch.Tensor, ...]:
    """[H, T, D] in memory."""
    parts = x.q, x.keys(branch), x.values(branch)
    return tuple(p.transpose(0, 1).contiguous().transpose(0, 1) for p in parts)


def dim_strided(x: Inputs, branch: str) -> tuple[torch.Tensor, ...]:
    """Every second channel of a wider buffer: may be refused, but not read wrongly."""
    parts = x.q, x.keys(branch), x.values(branch)
    return tuple(torch.stack([p, torch.full_like(p, float("nan"))], dim=-1)[..., 0] for p in parts)


@by_target
@pytest.mark.parametrize("layout", [qkv_split, head_major, dim_strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("branch", ["slc", "swa"])
def test_strided_inputs(branch: str, layout, device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (90, 45), dims=(64, 64), heads=(4, 2)), dtype, device)
    name, rest = branch_call(branch, x)
    wanted = ("q", "k", "v")
    views = dict(zip(wanted, layout(x, branch), strict=True))
    assert not views["k"].is_contiguous()
    d_o = x.output_like().transpose(0, 1).contiguous().transpose(0, 1)
    try:
        outputs, grads = run(op(name), views, rest, wanted, d_o)
    except ValueError:
        assert layout is dim_strided
        return
    tight = {k: v.contiguous() for k, v in views.items()}
    expected, expected_grads = run(op(name), tight, rest, wanted, d_o.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert all(torch.equal(grads[k], expected_grads[k]) for k in wanted)


@by_target
def test_strided_everything_of_attention_and_compress(device: str, dtype: torch.dtype) -> None:
    x = Inputs(Case("", (90, 45), dims=(64, 64), heads=(4, 2)), dtype, device)

    def gaps(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full(
            (2 * t.shape[0], t.shape[1] + 1, t.shape[2] + 3), float("nan"), dtype=dtype, device=device
        )
        view = wide[::2, 1:, : t.shape[2]]
        return view.copy_(t)

    tensors = attention_tensors(x)
    rest = attention_rest(x)
    expected, expected_grads = run(op("attention"), tensors, rest, GRADIENTS, x.output_like())
    views = {name: gaps(t) for name, t in tensors.items()}
    actual, grads = run(op("attention"), views, rest, GRADIENTS, gaps(x.output_like()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(grads[name], expected_grads[name]) for name in GRADIENTS)
    parameters = phi(x, "mlp", per_head=True, hidden=24)
    check_compress(x, "mlp", parameters | {"x": gaps(parameters["x"]), "w1": gaps(parameters["w1"])})


@by_target
@pytest.mark.parametrize("branch", ["cmp", "slc", "swa"])
def test_gradient_of_a_sum(branch: str, device: str, dtype: torch.dtype) -> None:
    """o.sum() hands backward a dO with strides of 0."""
    x = Inputs(Case("", (90, 45), dims=(64, 64), heads=(4, 2)), dtype, device)
    name, rest = branch_call(branch, x)
    tensors = {"q": x.q, "k": x.keys(branch), "v": x.values(branch)}
    ones = torch.ones((), dtype=dtype, device=device).expand(x.output_like().shape)
    _, grads = run(op(name), tensors, rest, ("q", "k", "v"), ones)
    _, expected = run(op(name), tensors, rest, ("q", "k", "v"), ones.contiguous())
    assert all(torch.equal(grads[k], expected[k]) for k in grads)


# q with +-large values: finite, equals the reference.


@by_target
@pytest.mark.parametrize("largest", [1e2, 1e4])
def test_large_logits(largest: float, device: str, dtype: torch.dtype) -> None:
    shape = Case("", (150, 70), dims=(64, 64), heads=(4, 2))
    size = largest / finite_max(
        Inputs(shape, dtype, device).scale
        * torch.einsum(
            "thd,sgd->thsg", Inputs(shape, torch.float64).q, Inputs(shape, torch.float64).keys("swa")
        )
    )
    x = Inputs(shape, dtype, device, q_scale=size)
    branch_check("compressed_attention", x, "cmp", shape.compress)
    branch_check("sliding_window_attention", x, "swa", (shape.window,))
    indices = {"block_indices": x.block_indices()}
    branch_check("selected_attention", x, "slc", (shape.block_size,), extra=indices)
    o, _ = check_attention(x, attention_tensors(x))
    assert torch.isfinite(o).all()


# q.requires_grad only, or v only: just that gradient is produced.


@by_device
def test_each_subset_of_gradients(device: str) -> None:
    x = Inputs(Case("", (70, 45), dims=(64, 64), heads=(4, 2)), default_dtype(device), device)
    for branch in ("cmp", "slc", "swa"):
        name, rest = branch_call(branch, x)
        tensors = {"q": x.q, "k": x.keys(branch), "v": x.values(branch)}
        (o, lse), full = run(op(name), tensors, rest, ("q", "k", "v"), x.output_like())
        for wanted in itertools.chain.from_iterable(itertools.combinations(full, n) for n in range(3)):
            outputs, grads = run(op(name), tensors, rest, wanted, x.output_like())
            assert outputs[0].requires_grad == bool(wanted) and set(grads) == set(wanted)
            assert all(torch.equal(grads[k], full[k]) for k in wanted)
        indices = rest[:1] if branch == "slc" else ()
        rest = rest[len(indices) :]
        for mask in itertools.product([False, True], repeat=3):
            backward = op(f"{name}_backward")
            grads = backward(x.output_like(), *tensors.values(), o.detach(), lse, *indices, *rest, list(mask))
            for wanted, grad, key in zip(mask, grads, full, strict=True):
                assert torch.equal(grad, full[key]) if wanted else grad.shape == (0,)


@by_device
@pytest.mark.parametrize(
    "wanted",
    [(name,) for name in GRADIENTS]
    + [("q", "v_cmp"), ("q", "k_slc"), ("q", "k_swa"), ("k_swa", "gate_logits")],
)
def test_single_gradients_of_attention(wanted: tuple[str, ...], device: str) -> None:
    x = Inputs(Case("", (70, 45), dims=(64, 64), heads=(4, 2)), default_dtype(device), device)
    tensors, rest = attention_tensors(x), attention_rest(x)
    _, full = run(op("attention"), tensors, rest, GRADIENTS, x.output_like())
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    op("attention")(*leaves.values(), *rest)[0].backward(x.output_like())
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(leaf.grad, full[name])


# Double backward: a clear error.


@by_device
@pytest.mark.parametrize("name", ["compress", "gated_combine", "attention", "cmp", "slc", "swa"])
def test_double_backward_is_an_error(name: str, device: str) -> None:
    shape = case("ragged_with_empty")
    x = Inputs(shape if device == "cpu" else shape.on_cuda(), default_dtype(device), device)
    leaf = x.q.clone().requires_grad_()
    if name == "compress":
        o = op("compress")(leaf, *[None] * 5, None, leaf.shape[0], 32, 16, "mean")
    elif name == "gated_combine":
        o = op("gated_combine")(leaf, x.q, x.q, x.gate_logits())
    elif name == "attention":
        o, _ = op("attention")(leaf, *list(attention_tensors(x).values())[1:], *attention_rest(x))
    else:
        operator, rest = branch_call(name, x)
        o, _ = op(operator)(leaf, x.keys(name), x.values(name), *rest)
    (grad,) = torch.autograd.grad((o.float() ** 2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.float().sum().backward()
