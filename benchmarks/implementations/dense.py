"""Dense causal attention of PyTorch (scaled_dot_product_attention): its fastest way, and by backend."""

import functools
import time
from dataclasses import replace

import torch
from case import Case, Workload
from registry import implementation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from work import attention_flops, dense_pairs

from implementations.inputs import Inputs

TRIAL_LENGTH = 8192
VARIANTS = (
    "head-major, expanded KV",
    "head-major, enable_gqa",
    "token-major, expanded KV",
    "token-major, enable_gqa",
)


def _sdpa(case: Case) -> Workload:
    """Heads or tokens outermost (tokens: as the operators here); KV heads expanded before, or within sdpa."""
    inputs, s = Inputs(case), case.shape
    layout, kv = case.variant.split(", ")
    head_major = layout == "head-major"
    q, k, v = tensors = tuple(
        (x.detach().transpose(0, 1).contiguous() if head_major else x.detach()).requires_grad_()
        for x in (inputs.query(), *inputs.key_value())
    )

    def heads_first(x: Tensor) -> Tensor:
        return (x if head_major else x.transpose(0, 1)).unsqueeze(0)

    def key_or_value(x: Tensor) -> Tensor:
        x = heads_first(x)
        if kv == "enable_gqa":
            return x
        return x.expand(-1, s.group, -1, -1) if s.num_heads_kv == 1 else x.repeat_interleave(s.group, dim=1)

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
def _fastest_variant(case: Case) -> str:
    def best_of_two(variant: str) -> float:
        step, seconds = _sdpa(replace(case, variant=variant)).step, []
        for _ in range(2):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return min(VARIANTS, key=best_of_two)


@implementation("attention", "sdpa", depends_on_data=False, growth=2)
def sdpa(case: Case) -> Workload:
    """In whichever variant torch is fastest, found by a short trial."""
    trial = replace(case, length=min(case.length, TRIAL_LENGTH))
    return _sdpa(case if case.variant else replace(case, variant=_fastest_variant(trial)))


def _by_backend(case: Case, backend: SDPBackend) -> Workload:
    """Head-major, with the KV heads expanded beforehand: what is fastest for dense attention."""
    inputs, s = Inputs(case), case.shape
    q, k, v = inputs.query().detach(), *(x.detach() for x in inputs.key_value())
    expanded = (x.repeat_interleave(s.group, dim=1) for x in (k, v))
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


@implementation("prefill", "sdpa_flash", depends_on_data=False, growth=2)
@implementation("attention", "sdpa_flash", depends_on_data=False, growth=2)
def sdpa_flash(case: Case) -> Workload:
    return _by_backend(case, SDPBackend.FLASH_ATTENTION)


@implementation("prefill", "sdpa_cudnn", depends_on_data=False, growth=2)
@implementation("attention", "sdpa_cudnn", depends_on_data=False, growth=2)
def sdpa_cudnn(case: Case) -> Workload:
    return _by_backend(case, SDPBackend.CUDNN_ATTENTION)
