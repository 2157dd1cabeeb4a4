"""BlockCompression against the reference, and its initialisation."""

import copy

import pytest
import torch

from nsa_ext import BlockCompression, reference

KINDS = ("mlp", "linear", "mean")


def make(kind: str = "mlp", per_head: bool = False, **kwargs) -> BlockCompression:
    phi = BlockCompression(2, 6, 8, 4, kind, per_head=per_head, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for (
            parameter
        ) in phi.parameters():  # biases and pe start at zero, where an error in them would not show
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return phi


def parameters(phi: BlockCompression) -> tuple:
    return phi.pe, phi.w1, phi.b1, phi.w2, phi.b2


@pytest.mark.parametrize("lengths", [(37,), (9, 0, 33, 7, 3)], ids=["one", "packed"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_the_reference(kind, per_head, lengths):
    phi = make(kind, per_head, hidden_size=5)
    x = torch.randn(sum(lengths), 2, 6, dtype=torch.float64, requires_grad=True)
    cu_seqlens = None
    if len(lengths) > 1:
        cu_seqlens = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=torch.int32)
    actual = phi(x, cu_seqlens, max(lengths))
    expected = reference.compress(x, *parameters(phi), cu_seqlens, max(lengths), 8, 4, kind)
    torch.testing.assert_close(actual, expected)

    inputs = [x, *phi.parameters()]
    d_out = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(actual, inputs, d_out)
    expected_grads = torch.autograd.grad(expected, inputs, d_out)
    torch.testing.assert_close(actual_grads, expected_grads)


def test_parameter_shapes():
    def shapes(phi):
        return {name: tuple(p.shape) for name, p in phi.named_parameters()}

    assert shapes(BlockCompression(3, 6, 8, 4, hidden_size=5)) == {
        "pe": (1, 8, 6),
        "w1": (1, 48, 5),
        "b1": (1, 5),
        "w2": (1, 5, 6),
        "b2": (1, 6),
    }
    assert shapes(BlockCompression(3, 6, 8, 4, "linear", per_head=True)) == {
        "pe": (3, 8, 6),
        "w1": (3, 48, 6),
        "b1": (3, 6),
    }
    assert shapes(BlockCompression(3, 6, 8, 4, "mean")) == {}


@pytest.mark.parametrize("hidden_size", [64, 256])
@pytest.mark.parametrize("repeat", [1, 32], ids=["independent", "equal"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_compressed_tokens_start_with_the_variance_of_tokens(kind, repeat, hidden_size):
    """Whether a block's tokens are independent or all equal, the variance stays 1: phi is no average."""
    block_size, stride, dim = 32, 32, 64
    phi = BlockCompression(4, dim, block_size, stride, kind, hidden_size)
    x = torch.randn(256 * block_size // repeat, 4, dim).repeat_interleave(repeat, dim=0)
    assert phi(x).var().item() == pytest.approx(1.0, rel=0.15)


def test_state_dict_deepcopy_and_repr():
    phi, other = make(), make()
    x = torch.randn(20, 2, 6, dtype=torch.float64)
    assert not torch.equal(phi(x), other(x))
    other.load_state_dict(phi.state_dict())
    assert torch.equal(phi(x), other(x))
    assert torch.equal(phi(x), copy.deepcopy(phi)(x))
    for text in ("num_heads=2", "head_dim=6", "block_size=8", "stride=4", "kind='mlp'", "per_head=False"):
        assert text in repr(phi)


def test_reset_parameters_draws_again():
    phi = make()
    before = [p.detach().clone() for p in phi.parameters()]
    phi.reset_parameters()
    assert not any(torch.equal(old, new) for old, new in zip(before, phi.parameters(), strict=True))
    assert not phi.pe.any() and not phi.b1.any() and not phi.b2.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 6, 8, 3), "stride = 3.*divide block_size = 8"),
        ((2, 6, 8, 4, "conv"), "kind = 'conv'.*mlp"),
        ((2, 0, 8, 4), "head_dim = 0.*at least 1"),
        ((2, 6, 8, 4, "mlp", 0), "hidden_size = 0.*at least 1"),
    ],
)
def test_construction_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockCompression(*arguments)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r"x has shape \[1, 20, 2, 6\].*\[S, 2, 6\]"):
        make()(torch.randn(1, 20, 2, 6, dtype=torch.float64))
