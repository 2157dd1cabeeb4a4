"""The tensors of one case, as the operators take them (one sequence, no offsets)."""

import functools

from case import Case
from torch import Tensor


def attention_options(case: Case) -> dict[str, float]:
    """The keyword arguments of nsa_ext.ops.attention and decode_attention."""
    s = case.shape
    return {
        "compress_block_size": s.compress_block_size,
        "compress_stride": s.compress_stride,
        "block_size": s.block_size,
        "num_selected_blocks": s.num_selected_blocks,
        "num_initial_blocks": s.num_initial_blocks,
        "num_local_blocks": s.num_local_blocks,
        "window_size": s.window_size,
        "softmax_scale": case.softmax_scale,
    }


class Inputs:
    def __init__(self, case: Case):
        self.case, self.make = case, case.generator()
        self.seqlens = (None, None, case.length, case.length)
        self.compress = (case.shape.compress_block_size, case.shape.compress_stride)
        s = case.shape
        self.selection = (s.block_size, s.num_selected_blocks, s.num_initial_blocks, s.num_local_blocks)

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
