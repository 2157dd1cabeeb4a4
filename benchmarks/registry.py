"""What can be measured: every operation with its implementations, and the suites that group them.

An implementation is a function Case -> Workload, entered in REGISTRY with @implementation. A new op, baseline
or suite is one entry here; run.py, compare.py, plot.py and table.py know none of them by name.
"""

import functools
import importlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
SMOOTH_RHO = 0.98  # of the AR(1) process over tokens


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


@dataclass(frozen=True)
class Case:
    """One point of a benchmark: what every implementation of an op is given."""

    length: int
    shape: Shape = Shape()
    data: str = "random"
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    variant: str = ""  # for an implementation with several ways to do it: the one to take, "" for the fastest

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.shape.head_dim_qk)

    def generator(self) -> Callable[..., Tensor]:
        """make(rows, *dims, spacing=1): unit-variance normal tensors, the same ones for every implementation.

        data = "random" draws every element on its own; "smooth" is an AR(1) process over rows that lie
        `spacing` tokens apart.
        """
        source = torch.Generator(self.device).manual_seed(self.seed)

        def make(rows: int, *dims: int, spacing: int = 1, requires_grad: bool = True) -> Tensor:
            x = torch.randn(rows, *dims, generator=source, device=self.device)
            if self.data == "smooth":
                x = _autoregressive(x, SMOOTH_RHO**spacing)
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
    forward: Callable[[], tuple[Tensor, ...]]
    flops: dict[str, float] = field(default_factory=dict)  # direction -> matrix-product FLOPs
    variant: str = ""

    def __post_init__(self) -> None:
        self.parameters = tuple(x for x in self.inputs if x.requires_grad)
        if "backward" in self.flops:
            self.flops["step"] = self.flops["forward"] + self.flops["backward"]
        self._grad_outputs: list[Tensor] | None = None

    def step(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def backward(self, outputs: tuple[Tensor, ...], retain_graph: bool = False) -> tuple[Tensor, ...]:
        grad_outputs = self.grad_outputs(outputs)
        return torch.autograd.grad(outputs, self.parameters, grad_outputs, retain_graph=retain_graph)

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

    def compulsory_bytes(self) -> dict[str, int]:
        """Inputs read once and outputs written once: the least traffic of each direction."""
        outputs = self.forward()
        sizes = [sum(x.nbytes for x in group) for group in (self.inputs, outputs, self.parameters)]
        read, written, gradients = sizes
        forward, backward = read + written, read + 2 * written + gradients
        return {"forward": forward, "backward": backward, "step": forward + backward}


Builder = Callable[[Case], Workload]
REGISTRY: dict[str, dict[str, Builder]] = {}


def implementation(op: str, impl: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        REGISTRY.setdefault(op, {})[impl] = builder
        return builder

    return register


# ---- Work: the query-key pairs of each branch, and the matrix products over them ----


def dense_pairs(case: Case) -> int:
    return case.length * (case.length + 1) // 2


def compressed_pairs(case: Case) -> int:
    block, stride = case.shape.compress_block_size, case.shape.compress_stride
    visible = range(block - 1, case.length)  # query t sees (t + 1 - block) // stride + 1 blocks
    return sum((t + 1 - block) // stride + 1 for t in visible)


def selected_pairs(case: Case) -> int:
    """Assumes that the own block is forced (num_local_blocks > 0)."""
    block, n = case.shape.block_size, case.shape.num_selected_blocks
    return sum((min(n, t // block + 1) - 1) * block + t % block + 1 for t in range(case.length))


def window_pairs(case: Case) -> int:
    w = min(case.shape.window_size, case.length)
    return w * (w + 1) // 2 + (case.length - w) * w


def attention_flops(case: Case, pairs: int) -> dict[str, float]:
    """Two products forward; five backward (S and dP again, dV, dQ, dK)."""
    shape = case.shape
    unit = 2.0 * shape.num_heads_q * pairs
    return {
        "forward": unit * (shape.head_dim_qk + shape.head_dim_v),
        "backward": unit * (3 * shape.head_dim_qk + 2 * shape.head_dim_v),
    }


def score_flops(case: Case) -> float:
    return 2.0 * case.shape.num_heads_q * case.shape.head_dim_qk * compressed_pairs(case)


def compress_flops(case: Case, head_dim: int) -> dict[str, float]:
    shape = case.shape
    blocks = max(0, (case.length - shape.compress_block_size) // shape.compress_stride + 1)
    per_block = 2.0 * shape.compress_hidden_size * head_dim * (shape.compress_block_size + 1)
    forward = blocks * shape.num_heads_kv * per_block
    return {"forward": forward, "backward": 2 * forward}


# ---- nsa: this library ----


def load_nsa_ext() -> ModuleType:
    """Loaded on first use, so that baselines run without it. An installed one wins over this tree."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("nsa_ext")


def nsa_ops():
    load_nsa_ext()
    return torch.ops.nsa


class _Inputs:
    """The tensors of one case, as the operators take them (one sequence, no offsets)."""

    def __init__(self, case: Case):
        self.case, self.make = case, case.generator()
        self.seqlens = (None, None, case.length, case.length)
        self.compress = (case.shape.compress_block_size, case.shape.compress_stride)

    def query(self, requires_grad: bool = True) -> Tensor:
        s = self.case.shape
        return self.make(self.case.length, s.num_heads_q, s.head_dim_qk, requires_grad=requires_grad)

    def key_value(self, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
        s = self.case.shape
        make = functools.partial(self.make, self.case.length, s.num_heads_kv, requires_grad=requires_grad)
        return make(s.head_dim_qk), make(s.head_dim_v)

    def compressed_key_value(self, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
        s = self.case.shape
        stride = s.compress_stride
        sizes = (self.case.length // stride, s.num_heads_kv)
        make = functools.partial(self.make, *sizes, spacing=stride, requires_grad=requires_grad)
        return make(s.head_dim_qk), make(s.head_dim_v)

    def gate_logits(self) -> Tensor:
        return self.make(self.case.length, self.case.shape.num_heads_q, 3)


@implementation("attention", "nsa")
def nsa_attention(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), _Inputs(case), case.shape
    tensors = (
        inputs.query(),
        *inputs.compressed_key_value(),
        *inputs.key_value(),
        *inputs.key_value(),
        inputs.gate_logits(),
    )
    selection = (s.block_size, s.num_selected_blocks, s.num_initial_blocks, s.num_local_blocks)
    settings = (*inputs.seqlens, *inputs.compress, *selection, s.window_size, case.softmax_scale)
    flops = attention_flops(case, compressed_pairs(case) + selected_pairs(case) + window_pairs(case))
    flops["forward"] += score_flops(case)
    return Workload(tensors, lambda: ops.attention(*tensors, *settings)[:1], flops)


@implementation("compress", "nsa")
def nsa_compress(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), _Inputs(case), case.shape
    streams = []
    for x in inputs.key_value():
        dim, fan_in = x.shape[-1], s.compress_block_size * x.shape[-1]
        pe, w1, b1, w2, b2 = (
            torch.randn(1, *size, device=case.device).mul(std).to(x.dtype).requires_grad_()
            for size, std in (
                ((s.compress_block_size, dim), 0.1),
                ((fan_in, s.compress_hidden_size), fan_in**-0.5),
                ((s.compress_hidden_size,), 0.1),
                ((s.compress_hidden_size, dim), s.compress_hidden_size**-0.5),
                ((dim,), 0.1),
            )
        )
        streams.append((x, pe, w1, b1, w2, b2))
    settings = (None, case.length, *inputs.compress, "mlp")
    tensors = tuple(x for stream in streams for x in stream)
    flops = {
        direction: sum(compress_flops(case, dim)[direction] for dim in (s.head_dim_qk, s.head_dim_v))
        for direction in ("forward", "backward")
    }
    variant = f"K and V, mlp, hidden {s.compress_hidden_size}"

    def forward() -> tuple[Tensor, ...]:
        return tuple(ops.compress(*stream, *settings) for stream in streams)

    return Workload(tensors, forward, flops, variant)


@implementation("compressed_attention", "nsa")
def nsa_compressed_attention(case: Case) -> Workload:
    ops, inputs = nsa_ops(), _Inputs(case)
    tensors = (inputs.query(), *inputs.compressed_key_value())
    settings = (*inputs.seqlens, *inputs.compress, case.softmax_scale)
    flops = attention_flops(case, compressed_pairs(case))
    return Workload(tensors, lambda: ops.compressed_attention(*tensors, *settings)[:1], flops)


def _scoring_inputs(ops, inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, (k_cmp, v_cmp) = inputs.query(requires_grad=False), inputs.compressed_key_value(requires_grad=False)
    settings = (*inputs.seqlens, *inputs.compress, inputs.case.softmax_scale)
    return q, k_cmp, ops.compressed_attention(q, k_cmp, v_cmp, *settings)[1]


@implementation("block_scores", "nsa")
def nsa_block_scores(case: Case) -> Workload:
    ops, inputs = nsa_ops(), _Inputs(case)
    tensors = _scoring_inputs(ops, inputs)
    settings = (*inputs.seqlens, *inputs.compress, case.shape.block_size, case.softmax_scale)
    flops = {"forward": score_flops(case)}
    return Workload(tensors, lambda: (ops.block_scores(*tensors, *settings),), flops)


@implementation("select_blocks", "nsa")
def nsa_select_blocks(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), _Inputs(case), case.shape
    tensors = _scoring_inputs(ops, inputs)
    selection = (s.block_size, s.num_selected_blocks, s.num_initial_blocks, s.num_local_blocks)
    settings = (*inputs.seqlens, *inputs.compress, *selection, case.softmax_scale)
    flops = {"forward": score_flops(case)}
    return Workload(tensors, lambda: (ops.select_blocks(*tensors, *settings),), flops)


@implementation("selected_attention", "nsa")
def nsa_selected_attention(case: Case) -> Workload:
    """The blocks are those that the compressed branch chooses on the same data."""
    ops, inputs, s = nsa_ops(), _Inputs(case), case.shape
    q, k_cmp, lse = _scoring_inputs(ops, inputs)
    selection = (s.block_size, s.num_selected_blocks, s.num_initial_blocks, s.num_local_blocks)
    settings = (*inputs.seqlens, *inputs.compress, *selection, case.softmax_scale)
    block_indices = ops.select_blocks(q, k_cmp, lse, *settings)
    tensors = (q.requires_grad_(), *inputs.key_value(), block_indices)
    settings = (*inputs.seqlens, s.block_size, case.softmax_scale)
    flops = attention_flops(case, selected_pairs(case))
    return Workload(tensors, lambda: ops.selected_attention(*tensors, *settings)[:1], flops)


@implementation("sliding_window_attention", "nsa")
def nsa_sliding_window_attention(case: Case) -> Workload:
    ops, inputs = nsa_ops(), _Inputs(case)
    tensors = (inputs.query(), *inputs.key_value())
    settings = (*inputs.seqlens, case.shape.window_size, case.softmax_scale)
    flops = attention_flops(case, window_pairs(case))
    return Workload(tensors, lambda: ops.sliding_window_attention(*tensors, *settings)[:1], flops)


@implementation("gated_combine", "nsa")
def nsa_gated_combine(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), _Inputs(case), case.shape
    branches = tuple(inputs.make(case.length, s.num_heads_q, s.head_dim_v) for _ in range(3))
    tensors = (*branches, inputs.gate_logits())
    return Workload(tensors, lambda: (ops.gated_combine(*tensors),))


# ---- sdpa: dense causal attention of PyTorch ----

SDPA_TRIAL_LENGTH = 8192
SDPA_VARIANTS = (
    "head-major, expanded KV",
    "head-major, enable_gqa",
    "token-major, expanded KV",
    "token-major, enable_gqa",
)


def _sdpa(case: Case) -> Workload:
    """Heads or tokens outermost (tokens: as the operators here); KV heads expanded before, or within sdpa."""
    inputs, s = _Inputs(case), case.shape
    layout, kv = case.variant.split(", ")
    head_major = layout == "head-major"
    q, k, v = tensors = tuple(
        (x.detach().transpose(0, 1).contiguous() if head_major else x.detach()).requires_grad_()
        for x in (inputs.query(), *inputs.key_value())
    )
    group = s.num_heads_q // s.num_heads_kv

    def heads_first(x: Tensor) -> Tensor:
        return (x if head_major else x.transpose(0, 1)).unsqueeze(0)

    def key_or_value(x: Tensor) -> Tensor:
        x = heads_first(x)
        if kv == "enable_gqa":
            return x
        return x.expand(-1, group, -1, -1) if s.num_heads_kv == 1 else x.repeat_interleave(group, dim=1)

    def forward() -> tuple[Tensor, ...]:
        o = torch.nn.functional.scaled_dot_product_attention(
            heads_first(q),
            key_or_value(k),
            key_or_value(v),
            is_causal=True,
            scale=case.softmax_scale,
            enable_gqa=kv == "enable_gqa",
        )
        return (o,)

    return Workload(tensors, forward, attention_flops(case, dense_pairs(case)), case.variant)


@functools.cache
def _fastest_sdpa_variant(case: Case) -> str:
    def best_of_two(variant: str) -> float:
        step, seconds = _sdpa(replace(case, variant=variant)).step, []
        for _ in range(2):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return min(SDPA_VARIANTS, key=best_of_two)


@implementation("attention", "sdpa")
def sdpa_attention(case: Case) -> Workload:
    """In whichever variant torch is fastest, found by a short trial."""
    trial = replace(case, length=min(case.length, SDPA_TRIAL_LENGTH))
    return _sdpa(case if case.variant else replace(case, variant=_fastest_sdpa_variant(trial)))


def _sdpa_backend(case: Case, backend: SDPBackend) -> Workload:
    """One backend of sdpa on CUDA, head-major, with the KV heads expanded beforehand."""
    inputs, s = _Inputs(case), case.shape
    group = s.num_heads_q // s.num_heads_kv
    q, k, v = inputs.query().detach(), *(x.detach() for x in inputs.key_value())
    expanded = (x.repeat_interleave(group, dim=1) for x in (k, v))
    tensors = tuple(x.transpose(0, 1).contiguous()[None].requires_grad_() for x in (q, *expanded))

    def forward() -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return (
                torch.nn.functional.scaled_dot_product_attention(
                    *tensors, is_causal=True, scale=case.softmax_scale
                ),
            )

    variant = "head-major, KV expanded beforehand"
    return Workload(tensors, forward, attention_flops(case, dense_pairs(case)), variant)


@implementation("attention", "sdpa_flash")
def sdpa_flash_attention(case: Case) -> Workload:
    return _sdpa_backend(case, SDPBackend.FLASH_ATTENTION)


@implementation("attention", "sdpa_cudnn")
def sdpa_cudnn_attention(case: Case) -> Workload:
    return _sdpa_backend(case, SDPBackend.CUDNN_ATTENTION)


# ---- Suites ----


@dataclass(frozen=True)
class Suite:
    """Which ops, implementations and lengths run together; speed-ups are measured against `baseline`."""

    name: str
    device: str
    dtype: str
    shape: Shape
    ops: dict[str, tuple[str, ...]]  # op -> implementations
    baseline: str
    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    threads: int | None = None
    directions: tuple[str, ...] = ("forward", "backward", "step")


_SUITES = (
    Suite(
        name="cpu",
        device="cpu",
        dtype="float32",
        shape=Shape(),
        ops={
            "attention": ("nsa", "sdpa"),
            "compress": ("nsa",),
            "compressed_attention": ("nsa",),
            "block_scores": ("nsa",),
            "select_blocks": ("nsa",),
            "selected_attention": ("nsa",),
            "sliding_window_attention": ("nsa",),
            "gated_combine": ("nsa",),
        },
        baseline="sdpa",
        lengths=(2048, 4096, 8192, 16384, 32768),
        quick_lengths=(512, 1024),
        threads=2,
    ),
    Suite(
        name="training",
        device="cuda",
        dtype="bfloat16",
        shape=Shape(64, 4, 128, 128, compress_hidden_size=256),
        ops={
            "attention": ("nsa", "sdpa_flash", "sdpa_cudnn"),
            "compress": ("nsa",),
            "compressed_attention": ("nsa",),
            "select_blocks": ("nsa",),
            "selected_attention": ("nsa",),
            "sliding_window_attention": ("nsa",),
            "gated_combine": ("nsa",),
        },
        baseline="sdpa_cudnn",
        lengths=(2048, 4096, 8192, 16384, 32768, 65536, 131072),
        quick_lengths=(2048,),
        directions=("forward",),  # the backward has no CUDA kernels yet
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
