"""torch.compile with one dynamic graph for several lengths, and torch.export."""

from collections.abc import Callable

import pytest
import torch
from cases import Case
from functorch.compile import make_boxed_func
from samples import call, floating, sample
from torch._dynamo.backends.common import aot_autograd

LENGTHS = (61, 83, 130, 47)
ARGUMENTS = {
    "lengths": (1,),
    "heads": (4, 2),
    "dims": (8, 8),
    "compress": (8, 4),
    "block_size": 16,
    "window": 20,
}


class GraphCounter:
    """A backend of torch.compile that counts graphs and runs what inductor's front end traced."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        def count(direction: str) -> Callable:
            def compiler(gm: torch.fx.GraphModule, inputs: list) -> Callable:
                setattr(self, direction, getattr(self, direction) + 1)
                return make_boxed_func(gm.forward)

            return compiler

        return aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))(gm, inputs)


def case_of(length: int, packed: bool) -> Case:
    if packed:
        return Case("", **(ARGUMENTS | {"lengths": (length, length // 3)}))
    return Case("", **(ARGUMENTS | {"lengths": (length,), "packed": False}))


def packed_inputs(name: str, length: int, packed: bool) -> tuple[dict, list[str]]:
    arguments = sample(name, torch.float32, case_of(length, packed))
    keys = [] if name in ("block_scores", "select_blocks") else floating(arguments)
    for key in keys:
        arguments[key].requires_grad_()
    return arguments, keys


def loss_of(name: str) -> Callable:
    """Lengths come from shapes, as in a model: max_seqlen is the number of rows."""

    def loss(arguments: dict) -> torch.Tensor:
        arguments = dict(arguments)
        rows = arguments["x" if name == "compress" else "q"].shape[0] if name != "gated_combine" else 0
        for key in ("max_seqlen", "max_seqlen_q", "max_seqlen_k"):
            if key in arguments:
                arguments[key] = rows
        result = call(name, arguments)
        result = (result,) if isinstance(result, torch.Tensor) else result
        return torch.stack(
            [r.double().nan_to_num(neginf=-7.0).sin().sum() for r in result if r.numel()]
        ).sum()

    return loss


COMPILED = (
    "compress",
    "compressed_attention",
    "block_scores",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
    "attention",
)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one_sequence"])
@pytest.mark.parametrize("name", COMPILED)
def test_one_dynamic_graph_for_several_lengths(name: str, packed: bool) -> None:
    torch._dynamo.reset()
    backend = GraphCounter()
    loss = loss_of(name)
    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        arguments, keys = packed_inputs(name, length, packed)
        expected, actual = loss(arguments), compiled(arguments)
        torch.testing.assert_close(actual, expected)
        if not keys:
            continue
        leaves = [arguments[key] for key in keys]
        for a, b in zip(
            torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert backend.forward == 1, f"{backend.forward} forward graphs for {len(LENGTHS)} lengths"
    assert backend.backward == (1 if keys else 0), f"{backend.backward} backward graphs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "compress"])
def test_inductor_runs_forward_and_backward(name: str) -> None:
    torch._dynamo.reset()
    loss = loss_of(name)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in LENGTHS[:2]:
        arguments, keys = packed_inputs(name, length, packed=True)
        leaves = [arguments[key] for key in keys]
        expected = torch.autograd.grad(loss(arguments), leaves)
        actual = torch.autograd.grad(compiled(arguments), leaves)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_wrong_argument_is_an_error_when_compiled_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: call("attention", a)[0], backend="aot_eager", fullgraph=True)
    arguments = sample("attention", torch.float32, case_of(61, packed=True))
    compiled(arguments)
    with pytest.raises(Exception, match="window_size"):
        compiled(arguments | {"window_size": 0})


class Layer(torch.nn.Module):
    """Compression and attention as a model would call them."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, q, k, v, gate_logits, cu_seqlens):
        rows, cu = k.shape[0], cu_seqlens if self.packed else None
        mean = (None, None, None, None, None, cu, rows, 8, 4, "mean")
        k_cmp, v_cmp = torch.ops.nsa.compress(k, *mean), torch.ops.nsa.compress(v, *mean)
        branches = (k_cmp, v_cmp, k, v, k, v)
        return torch.ops.nsa.attention(
            q, *branches, gate_logits, cu, cu, rows, rows, 8, 4, 16, 3, 1, 1, 20, 0.25
        )


def layer_inputs(length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = (length, 4, 8), (length, 2, 8), (length, 2, 8), (length, 4, 3)
    cu_seqlens = torch.tensor([0, length // 3, length], dtype=torch.int32)
    return (*[torch.randn(*shape, generator=generator) for shape in shapes], cu_seqlens)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one_sequence"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict: bool, packed: bool) -> None:
    length = torch.export.Dim("length", min=16, max=4096)
    dynamic = ({0: length}, {0: length}, {0: length}, {0: length}, None)
    program = torch.export.export(Layer(packed), layer_inputs(96), dynamic_shapes=dynamic, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"nsa.compress.default", "nsa.attention.default"} <= targets
    for tokens in (96, 200, 33):
        inputs = layer_inputs(tokens)
        for actual, expected in zip(program.module()(*inputs), Layer(packed)(*inputs), strict=True):
            assert torch.equal(actual, expected)


def test_export_survives_saving(tmp_path) -> None:
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(Layer(True), layer_inputs(96)), path)
    o, indices = torch.export.load(path).module()(*layer_inputs(96))
    expected, expected_indices = Layer(True)(*layer_inputs(96))
    assert torch.equal(o, expected) and torch.equal(indices, expected_indices)
