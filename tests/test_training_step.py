"""Training through the module as users train: checkpointing, compiled steps, gradients; on a GPU too."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from tolerance import assert_close
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa_ext import NativeSparseAttention, NSAConfig

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "window_size": 64}
NSA = torch.ops.nsa
FORWARDS = (NSA.attention_forward.default, NSA.compress.default)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def make(device: str, **changes: object) -> NativeSparseAttention:
    return NativeSparseAttention(NSAConfig(**(SMALL | changes))).to(device)


def inputs(device: str, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Packed hidden states of three sequences, one of them empty, and their offsets."""
    hidden = torch.randn(tokens, SMALL["hidden_size"], device=device, requires_grad=True)
    return hidden, torch.tensor([0, tokens // 3, tokens // 3, tokens], dtype=torch.int32, device=device)


class Block(nn.Module):
    """Residual, attention and an activation, as much of a transformer as checkpointing cares about."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.attention = make(device)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return x + self.attention(x, cu_seqlens=cu_seqlens).float().tanh()


def leaves(block: nn.Module, hidden: Tensor) -> list[Tensor]:
    return [hidden, *block.parameters()]


def gradients(block: nn.Module, hidden: Tensor, o: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(o.square().sum(), leaves(block, hidden))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device: str, reentrant: bool) -> None:
    block = Block(device)
    hidden, offsets = inputs(device)
    expected = gradients(block, hidden, block(hidden, offsets))
    checkpoint(block, hidden, offsets, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves(block, hidden), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def selective(policy: CheckpointPolicy) -> Callable:
    """Contexts of a policy for the operators of nsa; everything else is computed again."""

    def choose(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return policy if op in FORWARDS else CheckpointPolicy.PREFER_RECOMPUTE

    return lambda: create_selective_checkpoint_contexts(choose)


class Calls(TorchDispatchMode):
    """Counts the operators that run; what a checkpoint inside has saved does not get here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
@pytest.mark.filterwarnings("ignore")
def test_selective_checkpointing(device: str, policy: CheckpointPolicy) -> None:
    """A policy that names the operators decides whether the backward runs them again; gradients are the same
    bit by bit.
    """
    block = Block(device)
    hidden, offsets = inputs(device)
    expected = gradients(block, hidden, block(hidden, offsets))
    o = checkpoint(block, hidden, offsets, use_reentrant=False, context_fn=selective(policy))
    with Calls() as calls:
        actual = gradients(block, hidden, o)
    again = 0 if policy == CheckpointPolicy.MUST_SAVE else 1
    assert calls.counts[NSA.attention_backward.default] == 1
    assert calls.counts[NSA.attention_forward.default] == again
    assert calls.counts[NSA.compress.default] == 2 * again  # keys and values
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


class Graphs:
    """A backend of torch.compile that keeps the operators of the forward and of the backward graph."""

    def __init__(self) -> None:
        self.operators: dict[str, Counter] = {}

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        def keep(direction: str) -> Callable:
            def compiler(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
                self.operators[direction] = Counter(node.target for node in gm.graph.nodes)
                return make_boxed_func(gm.forward)

            return compiler

        return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))(gm, example_inputs)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing_in_a_compiled_graph(policy: CheckpointPolicy) -> None:
    """The compiler follows the same policy: the backward graph holds the operators again, or does not."""
    block = Block("cpu")
    hidden, offsets = inputs("cpu", 150)
    graphs = Graphs()
    contexts = selective(policy)

    @torch.compile(backend=graphs, fullgraph=True)
    def compiled(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return checkpoint(block, x, cu_seqlens, use_reentrant=False, context_fn=contexts)

    expected = gradients(block, hidden, block(hidden, offsets))
    actual = gradients(block, hidden, compiled(hidden, offsets))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    again = 0 if policy == CheckpointPolicy.MUST_SAVE else 1
    assert graphs.operators["forward"][NSA.attention_forward.default] == 1
    assert graphs.operators["backward"][NSA.attention_forward.default] == again
    assert graphs.operators["backward"][NSA.compress.default] == 2 * again


class Model(nn.Module):
    """The module between an embedding and a loss."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, SMALL["hidden_size"], device=device)
        self.norm = nn.RMSNorm(SMALL["hidden_size"], device=device)
        self.attention = make(device)
        self.head = nn.Linear(SMALL["hidden_size"], 64, device=device)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            x = self.embedding(tokens)
            x = x + self.attention(self.norm(x), cu_seqlens=cu_seqlens)
            return nn.functional.cross_entropy(self.head(x).float(), tokens.roll(-1))


def losses(model: Model, device: str, wrap: Callable, length: int = 300, steps: int = 6) -> list[float]:
    """Losses of some steps; `wrap` gets the forward with its loss, and the optimiser's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3, device=device))
    loss_of, update = wrap(model, True), wrap(optimizer.step, False)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 64, (length,), generator=generator).to(device)
    offsets = torch.tensor([0, length // 3, length // 3, length], dtype=torch.int32, device=device)
    seen = []
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(tokens, offsets)
        loss.backward()
        update()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_training_step(device: str) -> None:
    """Forward with loss, its backward and the optimiser compiled; the model is one graph without a break.

    PyTorch's optimisers break a graph themselves, around their step.
    """
    model = Model(device)
    eager = copy.deepcopy(model)
    expected = losses(eager, device, lambda fn, is_model: fn)
    actual = losses(model, device, lambda fn, is_model: torch.compile(fn, fullgraph=is_model))
    assert expected[-1] < expected[0] - 0.3, expected
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=2**-6 if device == "cuda" else 1e-4)


@pytest.mark.slow
@pytest.mark.gpu
def test_compiled_training_step_in_cuda_graphs() -> None:
    """Forward and backward through mode="reduce-overhead", which captures them in CUDA graphs.

    A step with its optimiser in one graph: test_cuda_runtime.py.
    """

    def wrap(fn: Callable, is_model: bool) -> Callable:
        return torch.compile(fn, fullgraph=True, mode="reduce-overhead") if is_model else fn

    model = Model("cuda")
    expected = losses(copy.deepcopy(model), "cuda", lambda fn, is_model: fn)
    actual = losses(model, "cuda", wrap)
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=2**-6)


LAYOUTS = ("batch", "mask", "packed")


def module_gradients(
    module: NativeSparseAttention, hidden: Tensor, layout: str, d_o: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the hidden states and of every parameter. hidden [2, S, C]."""
    hidden = hidden.detach().requires_grad_()
    x, kwargs = hidden, {}
    if layout == "mask":
        kept = torch.tensor([[hidden.shape[1]], [hidden.shape[1] // 2 + 5]], device=hidden.device)
        kwargs = {"attention_mask": torch.arange(hidden.shape[1], device=hidden.device) < kept}
    elif layout == "packed":
        x, total = hidden.flatten(0, 1), 2 * hidden.shape[1]
        offsets = [0, 7, 7, total // 3, total]
        kwargs = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=hidden.device)}
    o = module(x, **kwargs).reshape(hidden.shape)
    return torch.autograd.grad(o, [hidden, *module.parameters()], d_o.to(o.dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_path")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share_kv", [False, True])
def test_module_gradients_like_the_cpu(layout: str, share_kv: bool) -> None:
    """Every gradient of the module in bf16 on a GPU, against fp64 and bf16 on the CPU.

    All blocks are selected, so that no near-tie of the selection decides.
    """
    module = make("cpu", share_kv=share_kv, num_selected_blocks=16)
    with torch.no_grad():
        for parameter in module.parameters():  # what starts at zero would hide an error
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    module = module.bfloat16()
    hidden, d_o = (torch.randn(2, 500, SMALL["hidden_size"]).bfloat16() for _ in range(2))
    exact = module_gradients(copy.deepcopy(module).double(), hidden.double(), layout, d_o.double())
    baseline = module_gradients(module, hidden, layout, d_o)
    actual = module_gradients(copy.deepcopy(module).cuda(), hidden.cuda(), layout, d_o.cuda())
    names = ["hidden_states", *(name for name, _ in module.named_parameters())]
    for name, a, e, b in zip(names, actual, exact, baseline, strict=True):
        assert_close(name, a, e, b)
