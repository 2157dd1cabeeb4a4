"""This library: nsa::attention and every operator below it."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from case import Case, Workload
from registry import implementation
from torch import Tensor
from work import (
    attention_flops,
    compress_flops,
    compressed_pairs,
    gathered_bytes,
    score_flops,
    selected_pairs,
    window_pairs,
)

from implementations.inputs import Inputs

ROOT = Path(__file__).resolve().parent.parent.parent


def load_nsa_ext() -> ModuleType:
    """Loaded on first use, so that baselines run without it. An installed one wins over this tree."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return importlib.import_module("nsa_ext")


def nsa_ops():
    load_nsa_ext()
    return torch.ops.nsa


@contextlib.contextmanager
def portable_path() -> Iterator[None]:
    """Kernels for sm_80 and newer, whatever the GPU is."""
    before = os.environ.get("NSA_CUDA_PATH")
    os.environ["NSA_CUDA_PATH"] = "portable"
    try:
        yield
    finally:
        if before is None:
            del os.environ["NSA_CUDA_PATH"]
        else:
            os.environ["NSA_CUDA_PATH"] = before


def whole_flops(case: Case) -> dict[str, float]:
    """Of all three branches and the selection."""
    flops = attention_flops(case, compressed_pairs(case) + selected_pairs(case) + window_pairs(case))
    flops["forward"] += score_flops(case)
    return flops


@implementation("attention", "nsa")
def attention(case: Case) -> Workload:
    ops, inputs = nsa_ops(), Inputs(case)
    tensors = (
        inputs.query(),
        *inputs.compressed_key_value(),
        *inputs.key_value(),
        *inputs.key_value(),
        inputs.gate_logits(),
    )
    window = case.shape.window_size
    settings = (*inputs.seqlens, *inputs.compress, *inputs.selection, window, case.softmax_scale)
    flops = whole_flops(case)
    with torch.no_grad():
        gathered = gathered_bytes(ops.attention(*tensors, *settings)[1], case)
    return Workload(tensors, lambda: ops.attention(*tensors, *settings)[:1], flops, gathered_bytes=gathered)


@implementation("attention", "nsa_portable")
def attention_portable(case: Case) -> Workload:
    if case.device == "cpu":
        raise ValueError("there is no kernel of the portable CUDA path on a CPU")
    return replace(attention(case), context=portable_path)


@implementation("compress", "nsa", depends_on_data=False)
def compress(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), Inputs(case), case.shape
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


@implementation("compressed_attention", "nsa", depends_on_data=False)
def compressed_attention(case: Case) -> Workload:
    ops, inputs = nsa_ops(), Inputs(case)
    tensors = (inputs.query(), *inputs.compressed_key_value())
    settings = (*inputs.seqlens, *inputs.compress, case.softmax_scale)
    flops = attention_flops(case, compressed_pairs(case))
    return Workload(tensors, lambda: ops.compressed_attention(*tensors, *settings)[:1], flops)


def _scoring_inputs(ops, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    q, (k_cmp, v_cmp) = inputs.query(requires_grad=False), inputs.compressed_key_value(requires_grad=False)
    settings = (*inputs.seqlens, *inputs.compress, inputs.case.softmax_scale)
    return q, k_cmp, ops.compressed_attention(q, k_cmp, v_cmp, *settings)[1]


@implementation("block_scores", "nsa")
def block_scores(case: Case) -> Workload:
    ops, inputs = nsa_ops(), Inputs(case)
    tensors = _scoring_inputs(ops, inputs)
    settings = (*inputs.seqlens, *inputs.compress, case.shape.block_size, case.softmax_scale)
    flops = {"forward": score_flops(case)}
    return Workload(tensors, lambda: (ops.block_scores(*tensors, *settings),), flops)


@implementation("select_blocks", "nsa")
def select_blocks(case: Case) -> Workload:
    ops, inputs = nsa_ops(), Inputs(case)
    tensors = _scoring_inputs(ops, inputs)
    settings = (*inputs.seqlens, *inputs.compress, *inputs.selection, case.softmax_scale)
    flops = {"forward": score_flops(case)}
    return Workload(tensors, lambda: (ops.select_blocks(*tensors, *settings),), flops)


@implementation("selected_attention", "nsa")
def selected_attention(case: Case) -> Workload:
    """The blocks are those that the compressed branch chooses on the same data."""
    ops, inputs = nsa_ops(), Inputs(case)
    q, k_cmp, lse = _scoring_inputs(ops, inputs)
    settings = (*inputs.seqlens, *inputs.compress, *inputs.selection, case.softmax_scale)
    block_indices = ops.select_blocks(q, k_cmp, lse, *settings)
    tensors = (q.requires_grad_(), *inputs.key_value(), block_indices)
    settings = (*inputs.seqlens, case.shape.block_size, case.softmax_scale)
    flops = attention_flops(case, selected_pairs(case))
    return Workload(
        tensors,
        lambda: ops.selected_attention(*tensors, *settings)[:1],
        flops,
        gathered_bytes=gathered_bytes(block_indices, case),
    )


@implementation("sliding_window_attention", "nsa", depends_on_data=False)
def sliding_window_attention(case: Case) -> Workload:
    ops, inputs = nsa_ops(), Inputs(case)
    tensors = (inputs.query(), *inputs.key_value())
    settings = (*inputs.seqlens, case.shape.window_size, case.softmax_scale)
    flops = attention_flops(case, window_pairs(case))
    return Workload(tensors, lambda: ops.sliding_window_attention(*tensors, *settings)[:1], flops)


@implementation("gated_combine", "nsa", depends_on_data=False)
def gated_combine(case: Case) -> Workload:
    ops, inputs, s = nsa_ops(), Inputs(case), case.shape
    branches = tuple(inputs.make(case.length, s.num_heads_q, s.head_dim_v) for _ in range(3))
    tensors = (*branches, inputs.gate_logits())
    return Workload(tensors, lambda: (ops.gated_combine(*tensors),))
