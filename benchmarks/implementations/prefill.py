"""A prompt into an NSACache, whole or in chunks, as one layer does it behind its projections.

Phi, the rotation of compressed keys, attention and gate count, and everything that the cache needs besides:
writing it, gathering keys from it for the chunks behind the first, and the index tensors of a step (made on
the host), which all layers of a model share. `nsa_training` is the forward of training over the same prompt,
saving what a backward needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from case import Case, Workload
from registry import implementation
from torch import Tensor
from work import compress_flops

from implementations.inputs import Inputs, attention_options
from implementations.nsa import load_nsa_ext, whole_flops

if TYPE_CHECKING:
    from nsa_ext import BlockCompression


class Prompt:
    """What the projections of a layer hand over, in the layouts of the operators."""

    def __init__(self, case: Case, requires_grad: bool) -> None:
        s, inputs, nsa_ext = case.shape, Inputs(case), load_nsa_ext()
        self.case, self.nsa_ext = case, nsa_ext
        self.options = attention_options(case)
        self.config = nsa_ext.NSAConfig(
            hidden_size=s.num_heads_q * s.head_dim_qk,
            num_heads=s.num_heads_q,
            num_kv_heads=s.num_heads_kv,
            head_dim=s.head_dim_qk,
            head_dim_v=s.head_dim_v,
            compress_hidden_size=s.compress_hidden_size,
            **self.options,
        )
        self.q = inputs.query(requires_grad)
        self.cmp, self.slc, self.swa = (inputs.key_value(requires_grad) for _ in range(3))
        self.gate_logits = inputs.gate_logits().requires_grad_(requires_grad)
        self.tensors = (self.q, *self.cmp, *self.slc, *self.swa, self.gate_logits)
        self.phi = tuple(self._phi(dim) for dim in (s.head_dim_qk, s.head_dim_v))

    def _phi(self, dim: int) -> BlockCompression:
        s, case = self.case.shape, self.case
        sizes = (s.num_heads_kv, dim, s.compress_block_size, s.compress_stride, "mlp", s.compress_hidden_size)
        dtype = getattr(torch, case.dtype)
        return self.nsa_ext.BlockCompression(*sizes, device=case.device, dtype=dtype)

    def workload(self, forward, variant: str, **options) -> Workload:
        case = self.case
        flops = whole_flops(case)["forward"]
        flops += sum(
            compress_flops(case, dim)["forward"] for dim in (case.shape.head_dim_qk, case.shape.head_dim_v)
        )
        return Workload(self.tensors, forward, {"forward": flops}, variant, **options)


def _into_cache(case: Case, chunk: int) -> Workload:
    prompt = Prompt(case, requires_grad=False)
    step_module = prompt.nsa_ext.cache_step
    cache = prompt.nsa_ext.NSACache(
        prompt.config, max_seqlen=case.length, dtype=prompt.q.dtype, device=prompt.q.device
    )

    def part(pair: tuple[Tensor, Tensor], rows: slice) -> tuple[Tensor, ...]:
        return tuple(x[rows] for x in pair)

    def forward() -> tuple[Tensor, ...]:
        cache.reset()
        outputs = []
        for begin in range(0, case.length, chunk):
            rows = slice(begin, min(begin + chunk, case.length))
            streams = step_module.Streams(
                *(part(pair, rows) for pair in (prompt.cmp, prompt.slc, prompt.swa))
            )
            with cache.append(rows.stop - rows.start) as step:
                arguments = (prompt.q[rows], streams, prompt.gate_logits[rows], prompt.phi, prompt.options)
                outputs.append(step.attend(cache.layers[0], *arguments)[0])
        return tuple(outputs)

    return prompt.workload(forward, f"chunks of {min(chunk, case.length)}", context=torch.no_grad)


@implementation("prefill", "nsa")
def whole(case: Case) -> Workload:
    return _into_cache(case, case.length)


@implementation("prefill", "nsa_chunks_8192")
def chunks_of_8192(case: Case) -> Workload:
    return _into_cache(case, 8192)


@implementation("prefill", "nsa_chunks_2048")
def chunks_of_2048(case: Case) -> Workload:
    return _into_cache(case, 2048)


@implementation("prefill", "nsa_training")
def training_forward(case: Case) -> Workload:
    prompt = Prompt(case, requires_grad=True)
    s, ops, rope = case.shape, prompt.nsa_ext.ops, prompt.nsa_ext.modules
    first = torch.arange(case.length // s.compress_stride, device=case.device) * s.compress_stride
    rope_dtype = torch.promote_types(prompt.q.dtype, torch.float32)
    cos, sin = rope.rope_tables(first, s.head_dim_qk, 10000.0, rope_dtype)

    def forward() -> tuple[Tensor, ...]:
        k_cmp, v_cmp = (f(x) for f, x in zip(prompt.phi, prompt.cmp, strict=True))
        keys = (rope.apply_rope(k_cmp, cos, sin), v_cmp, *prompt.slc, *prompt.swa)
        return (ops.attention(prompt.q, *keys, prompt.gate_logits, **prompt.options)[0],)

    return prompt.workload(forward, "")
