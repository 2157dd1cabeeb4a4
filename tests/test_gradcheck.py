"""torch.autograd.gradcheck of every differentiable operator, in fp64."""

import dataclasses

import pytest
import torch
from cases import Case
from samples import DIFFERENTIABLE, call, floating, sample

CASES = (
    Case(
        "ragged",
        (13, 0, 9),
        heads=(4, 2),
        dims=(3, 2),
        compress=(4, 2),
        block_size=4,
        select=(2, 1, 0),
        window=5,
    ),
    Case(
        "chunk", (17, 6), queries=(5, 2), heads=(3, 1), dims=(2, 3), compress=(6, 2), block_size=2, window=4
    ),
    Case("padded", (11,), pad=(3, 4), heads=(2, 2), dims=(4, 1), compress=(3, 3), block_size=6, window=20),
    Case(
        "no_offsets",
        (15,),
        queries=(6,),
        packed=False,
        compress=(4, 4),
        dims=(2, 2),
        heads=(2, 1),
        block_size=4,
    ),
)


def check(name: str, arguments: dict) -> None:
    keys = floating(arguments)
    inputs = [arguments[key].requires_grad_() for key in keys]

    def differentiable(*tensors: torch.Tensor) -> torch.Tensor:
        result = call(name, arguments | dict(zip(keys, tensors, strict=True)))
        return result if isinstance(result, torch.Tensor) else result[0]

    assert torch.autograd.gradcheck(differentiable, inputs, fast_mode=False, nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
# test_attention.py shows that attention_forward has the gradients of attention, bit for bit.
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "attention_forward"])
def test_gradcheck(name: str, case: Case) -> None:
    check(name, sample(name, torch.float64, case))


@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradcheck_compress(kind: str, per_head: bool) -> None:
    arguments = sample("compress", torch.float64, CASES[0]) | {"kind": kind}
    if kind == "linear":
        generator = torch.Generator().manual_seed(5)
        arguments["w1"] = torch.randn(1, 12, 3, generator=generator, dtype=torch.float64)
        arguments["b1"] = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    for key in {"mlp": (), "linear": ("w2", "b2"), "mean": ("pe", "w1", "b1", "w2", "b2")}[kind]:
        arguments[key] = None
    if per_head:
        for key in ("pe", "w1", "b1", "w2", "b2"):
            if arguments[key] is not None:
                scales = torch.tensor([1.0, -0.5], dtype=torch.float64)
                arguments[key] = arguments[key] * scales.view(-1, *[1] * (arguments[key].dim() - 1))
    check("compress", arguments)


def test_gradcheck_of_gates_only() -> None:
    case = dataclasses.replace(CASES[0], dims=(3, 5))
    arguments = sample("attention", torch.float64, case)
    arguments["gate_logits"].requires_grad_()
    gate = lambda t: call("attention", arguments | {"gate_logits": t})[0]  # noqa: E731
    assert torch.autograd.gradcheck(gate, [arguments["gate_logits"]])
