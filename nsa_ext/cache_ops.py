"""The operators on an inference cache, with types and documentation; :class:`nsa_ext.NSACache` calls them.

A cache stream is ``[num_pages, rows, Hkv, D]``. With a block_table (int32 ``[B, W]``) token s of sequence b
is row ``s % page_block_size`` of page ``block_table[b, s // page_block_size]``; without one, page b is
sequence b's. Compressed block i is row ``i + l // d - 1`` of its sequence's ``page_block_size // d`` rows
per page. A ring ``[B, R, Hkv, D]`` keeps token s of sequence b in row ``s % R``.

``cache_seqlens``: int32 ``[B]``, the tokens of each sequence *before* the step, in both operators: the
step's tokens stand at ``cache_seqlens[b] + 0, 1, ...``. ``cu_seqlens_q``: int32 ``[B + 1]``, their offsets
in T (None: T / B for each sequence); a sequence without tokens is left alone, and rows behind the last
offset are padding. ``max_seqlen_q``: an upper bound of a sequence's tokens. Nothing reads the lengths on
the host, and no shape depends on them: both operators can be captured in a CUDA graph. Not differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append_kv", "decode_attention"]


def append_kv(
    k_cmp_cache: Tensor,
    v_cmp_cache: Tensor,
    k_slc_cache: Tensor,
    v_slc_cache: Tensor,
    k_swa_cache: Tensor | None,
    v_swa_cache: Tensor | None,
    k_tail: Tensor,
    v_tail: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
    k_pe: Tensor | None = None,
    k_w1: Tensor | None = None,
    k_b1: Tensor | None = None,
    k_w2: Tensor | None = None,
    k_b2: Tensor | None = None,
    v_pe: Tensor | None = None,
    v_w1: Tensor | None = None,
    v_b1: Tensor | None = None,
    v_w2: Tensor | None = None,
    v_b2: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    compress_kind: str = "mlp",
) -> None:
    """Writes T new tokens ``[T, Hkv, D]`` to the caches, and the compressed blocks that they complete.

    k_cmp, v_cmp: what phi sees (compress's x); k_slc, v_slc, k_swa, v_swa: the branches' keys and values,
    with positions encoded. k_tail, v_tail: rings of what phi sees, at least l - 1 tokens. k_swa, v_swa and
    their rings are None where the window reads slc. k_pe .. v_b2: the weights of phi, as in compress.
    rotary_cos, rotary_sin ``[positions, Dk]`` (float32; float64 in double): compressed key i is rotated by
    row ``i * d``. The work is that of the new tokens and blocks, whatever the cache holds.
    """
    phi = (k_pe, k_w1, k_b1, k_w2, k_b2, v_pe, v_w1, v_b1, v_w2, v_b2)
    torch.ops.nsa.append_kv(
        *(k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, k_swa_cache, v_swa_cache, k_tail, v_tail),
        *(k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, *phi, rotary_cos, rotary_sin),
        *(cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q),
        *(compress_block_size, compress_stride, compress_kind),
    )


def decode_attention(
    q: Tensor,
    k_cmp_cache: Tensor,
    v_cmp_cache: Tensor,
    k_slc_cache: Tensor,
    v_slc_cache: Tensor,
    k_swa_cache: Tensor | None,
    v_swa_cache: Tensor | None,
    gate_logits: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    window_size: int = 512,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole of ops.attention for a step's tokens, which append_kv has written: at most 16 per sequence.

    q ``[T, Hq, Dk]``, gate_logits ``[T, Hq, 3]`` -> o ``[T, Hq, Dv]``, block_indices int32 ``[T, Hkv, n]``,
    lse ``[3, T, Hq]`` of cmp, slc, swa. k_swa_cache, v_swa_cache: rings of at least window_size - 1 +
    max_seqlen_q tokens, or None where the window reads slc. Every token has its own selection.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.ops.nsa.decode_attention(
        *(q, k_cmp_cache, v_cmp_cache, k_slc_cache, v_slc_cache, k_swa_cache, v_swa_cache, gate_logits),
        *(cache_seqlens, block_table, cu_seqlens_q, max_seqlen_q),
        *(compress_block_size, compress_stride, block_size),
        *(num_selected_blocks, num_initial_blocks, num_local_blocks, window_size, scale),
    )
