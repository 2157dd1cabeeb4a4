"""What an implementation is given (a Case) and what it returns (a Workload)."""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMOOTH_RHO = 0.98  # of the AR(1) process over tokens
FLAT_SCALE = 0.3
DATA = ("random", "smooth", "flat")


@dataclass(frozen=True)
class Shape:
    """Heads, head dims and the settings of the sparse attention."""

    num_heads_q: int = 8
    num_heads_kv: int = 1
    head_dim_qk: int = 64
    head_dim_v: int = 64
    compress_block_size: int = 32
    compress_stride: int = 16
    compress_hidden_size: int = 128
    block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    @property
    def group(self) -> int:
        return self.num_heads_q // self.num_heads_kv


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: what every implementation of an op is given."""

    length: int  # tokens; in the cache of every sequence where there is one
    shape: Shape = Shape()
    batch: int = 1  # sequences
    data: str = "random"
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    variant: str = ""  # for an implementation with several ways to do it: the one to take, "" for the fastest

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.shape.head_dim_qk)

    def generator(self) -> Callable[..., Tensor]:
        """make(rows, *dims, spacing=1): normal tensors, the same ones for every implementation, and of unit
        variance but for "flat".

        data = "random" draws every element on its own; "smooth" is an AR(1) process over rows that lie
        `spacing` tokens apart; "flat" is random with a standard deviation of FLAT_SCALE, so that logits are
        small, and scores nearly equal, as in a model at the beginning of its training.
        """
        source = torch.Generator(self.device).manual_seed(self.seed)

        def make(rows: int, *dims: int, spacing: int = 1, requires_grad: bool = True) -> Tensor:
            x = torch.randn(rows, *dims, generator=source, device=self.device)
            if self.data == "smooth":
                x = _autoregressive(x, SMOOTH_RHO**spacing)
            elif self.data == "flat":
                x *= FLAT_SCALE
            return x.to(getattr(torch, self.dtype)).requires_grad_(requires_grad)

        return make


def _autoregressive(noise: Tensor, rho: float) -> Tensor:
    """x[t] = rho x[t-1] + sqrt(1 - rho^2) noise[t] by recursive doubling; x[0] = noise[0]."""
    x = noise * math.sqrt(1 - rho * rho)
    x[0] = noise[0]
    shift = 1
    while shift < len(x) and rho**shift > 1e-8:
        x = torch.cat([x[:shift], x[shift:] + rho**shift * x[:-shift]])
        shift *= 2
    return x


@dataclass
class Workload:
    """One implementation, bound to its inputs."""

    inputs: tuple[Tensor, ...]  # of which those that require a gradient are differentiated
    run: Callable[[], tuple[Tensor, ...]]
    flops: dict[str, float] = field(default_factory=dict)  # direction -> matrix-product FLOPs
    variant: str = ""
    gathered_bytes: int = 0  # what the selected branch must fetch, from L2 at best
    bytes: dict[str, int] | None = None  # direction -> least traffic; None: inputs and outputs
    units: dict[str, int] = field(default_factory=dict)  # direction -> repetitions within a call; default: 1
    context: Callable[[], AbstractContextManager] = nullcontext  # around every call

    def __post_init__(self) -> None:
        self.parameters = tuple(x for x in self.inputs if x.requires_grad)
        if "backward" in self.flops:
            self.flops["step"] = self.flops["forward"] + self.flops["backward"]
        self._grad_outputs: list[Tensor] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        with self.context():
            return self.run()

    def backward(self, outputs: tuple[Tensor, ...], retain_graph: bool = False) -> tuple[Tensor, ...]:
        grad_outputs = self.grad_outputs(outputs)
        with self.context():
            return torch.autograd.grad(outputs, self.parameters, grad_outputs, retain_graph=retain_graph)

    def step(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def grad_outputs(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        if self._grad_outputs is None:
            self._grad_outputs = [torch.randn_like(x) for x in outputs]
        return self._grad_outputs

    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward", "step") if self.parameters else ("forward",)

    def call(self, direction: str) -> Callable[[], object]:
        """A call to time. `forward` saves what a backward needs; `backward` repeats on one saved graph."""
        if direction == "backward":
            outputs = self.forward()
            return functools.partial(self.backward, outputs, retain_graph=True)
        return self.step if direction == "step" else self.forward

    def least_bytes(self, outputs: tuple[Tensor, ...]) -> dict[str, int]:
        """The least traffic of each direction: inputs read once and outputs written once."""
        if self.bytes is not None:
            return self.bytes
        sizes = [sum(x.nbytes for x in group) for group in (self.inputs, outputs, self.parameters)]
        read, written, gradients = sizes
        forward, backward = read + written, read + 2 * written + gradients
        return {"forward": forward, "backward": backward, "step": forward + backward}
