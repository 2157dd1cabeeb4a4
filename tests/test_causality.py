"""A later token never changes an earlier output: through compression, selection and every branch."""

import os

import pytest
import torch
from cases import Case, by_device

import nsa_ext  # noqa: F401  (registers torch.ops.nsa)

SHAPES = (
    Case("defaults", (400,), heads=(4, 2), dims=(64, 64), select=(4, 1, 2)),
    Case(
        "wide_blocks", (400,), heads=(2, 1), dims=(64, 64), compress=(64, 16), block_size=32, select=(5, 1, 1)
    ),
    Case(
        "free_selection",
        (300,),
        heads=(2, 1),
        dims=(64, 64),
        compress=(16, 16),
        block_size=32,
        select=(2, 0, 0),
    ),
)


class Layer:
    """nsa::compress (mlp) and nsa::attention from tokens; every token's k and v feed all branches."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.dtype = case, torch.float64 if device == "cpu" else torch.bfloat16
        length, dim = case.compress[0], case.dims[0]
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * size).to(self.dtype).to(device)

        tokens, (heads, heads_kv) = case.lengths[0], case.heads
        fan_in = (length * dim) ** -0.5
        phi = [random(1, length, dim), random(1, length * dim, dim, size=fan_in), random(1, dim)]
        self.phi = [*phi, random(1, dim, dim, size=dim**-0.5), random(1, dim)]
        self.q, self.gates = random(tokens, heads, dim, size=3.0), random(tokens, heads, 3)
        self.k, self.v = random(tokens, heads_kv, dim), random(tokens, heads_kv, dim)

    def __call__(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        case = self.case
        q, k, v, gates = (t[:tokens] for t in (self.q, self.k, self.v, self.gates))
        compressed = [
            torch.ops.nsa.compress(t, *self.phi, None, tokens, *case.compress, "mlp") for t in (k, v)
        ]
        rest = (None, None, tokens, tokens, *case.compress, case.block_size, *case.select, case.window, 0.125)
        return torch.ops.nsa.attention(q, *compressed, k, v, k, v, gates, *rest)


def assert_unchanged(o: torch.Tensor, other: torch.Tensor) -> None:
    """The same bits on the CPU and by the portable CUDA kernels.

    Hopper kernels work on neighbouring tokens together: whether to rescale a sum, or which product to use,
    depends on all of them; and on long sequences the last tokens tell how all choose their blocks. So a later
    token may change the rounding of an earlier one, as the length does in the test of a prefix.
    """
    if o.is_cuda and os.environ.get("NSA_CUDA_PATH") != "portable":
        torch.testing.assert_close(o, other, rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(o, other)


@by_device
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_a_changed_token_changes_no_earlier_output(case: Case, device: str) -> None:
    layer = Layer(case, device)
    tokens = case.lengths[0]
    o, indices = layer(tokens)
    for changed in (1, 16, 31, 63, 64, 130, 200, tokens - 1):
        saved = [t[changed].clone() for t in (layer.q, layer.k, layer.v, layer.gates)]
        for t in (layer.q, layer.k, layer.v, layer.gates):
            t[changed] += 5
        other_o, other_indices = layer(tokens)
        assert_unchanged(o[:changed], other_o[:changed])
        assert torch.equal(indices[:changed], other_indices[:changed])
        assert not torch.equal(o[changed], other_o[changed]), "the token itself must notice"
        for t, old in zip((layer.q, layer.k, layer.v, layer.gates), saved, strict=True):
            t[changed] = old


@by_device
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_a_later_outlier_reaches_no_earlier_output(case: Case, device: str) -> None:
    """A huge masked key must not move a maximum, nor leave a rest of its product with 0."""
    layer = Layer(case, device)
    o, indices = layer(case.lengths[0])
    for changed in (33, 64, 150, case.lengths[0] - 1):
        outlier = Layer(case, device)
        for t in (outlier.k, outlier.v, outlier.q):
            t[changed:] = 1e30
        other_o, other_indices = outlier(case.lengths[0])
        assert_unchanged(o[:changed], other_o[:changed])
        assert torch.equal(indices[:changed], other_indices[:changed])


@by_device
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_a_prefix_alone_gives_the_same_outputs(case: Case, device: str) -> None:
    layer = Layer(case, device)
    o, indices = layer(case.lengths[0])
    bound = 1e-13 if layer.dtype == torch.float64 else 2**-6
    for tokens in (1, 31, 64, 177):
        prefix_o, prefix_indices = layer(tokens)
        assert torch.equal(indices[:tokens], prefix_indices)
        torch.testing.assert_close(o[:tokens], prefix_o, rtol=bound, atol=bound)


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: c.name)
def test_no_gradient_reaches_a_later_token(case: Case) -> None:
    layer = Layer(case, "cpu")
    for t in (layer.k, layer.v, layer.q, layer.gates):
        t.requires_grad_()
    o, _ = layer(case.lengths[0])
    for t in (40, 64, 200):
        grads = torch.autograd.grad(o[t].sum(), (layer.k, layer.v, layer.q, layer.gates), retain_graph=True)
        for grad in grads:
            assert not grad[t + 1 :].any()
            assert grad[: t + 1].any()
