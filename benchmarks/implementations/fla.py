"""NSA of flash-linear-attention (PyPI, Triton), where it is installed: pip install nsa_ext[peers]."""

import importlib

import torch
from case import Case, Workload
from registry import implementation
from torch import Tensor

from implementations.inputs import Inputs


@implementation("attention", "fla")
def attention(case: Case) -> Workload:
    """Its compressed blocks are the selection blocks, without overlap, their means taken within the call; one
    K and V serve all branches. The window, for which it wants the flash_attn package, is torch's own
    FlashAttention, as flash_attn would be called.
    """
    parallel_nsa = importlib.import_module("fla.ops.nsa").parallel_nsa
    inputs, s = Inputs(case), case.shape
    q, k, v = inputs.query(), *inputs.key_value()
    logits = inputs.gate_logits()
    scale = case.softmax_scale

    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, case.length, case.length, 0.0, True, False,
            scale=scale, window_size_left=s.window_size - 1, window_size_right=0,
        )[0]  # fmt: skip

    def forward() -> tuple[Tensor, ...]:
        batch = tuple(x[None] for x in (q, k, v))
        g_cmp, g_slc, g_swa = logits.sigmoid()[None].unbind(-1)
        counts = {"block_counts": s.num_selected_blocks, "block_size": s.block_size}
        o = parallel_nsa(*batch, g_cmp, g_slc, g_swa, **counts, window_size=0, scale=scale)
        return (torch.addcmul(o, window(*batch), g_swa.unsqueeze(-1)),)

    version = importlib.import_module("fla").__version__
    variant = f"flash-linear-attention {version}, compression {s.block_size} / {s.block_size} by means"
    return Workload((q, k, v, logits), forward, variant=variant)
