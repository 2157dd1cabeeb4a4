"""The operators of ``torch.ops.nsa`` with types, defaults and documentation.

Packed layout, everywhere: q ``[T, Hq, Dk]``, k ``[S, Hkv, Dk]``, v ``[S, Hkv, Dv]``, all of one dtype
(CPU: float32, float64, bfloat16; CUDA: bfloat16, float16); query head h reads KV head ``h // (Hq //
Hkv)``. T and S count the tokens of all sequences.

``cu_seqlens_q``, ``cu_seqlens_k``: int32 ``[B + 1]``, the sequences' offsets into T and S, given both or
neither. ``max_seqlen_q``, ``max_seqlen_k``: any upper bounds of their lengths (unit: tokens; default: all
rows). Without offsets there is one sequence of T queries and ``max_seqlen_k`` keys (default S; T where
the operator sees no token keys). The queries of a sequence stand at its end. Rows behind the last
sequence are padding: o = 0, lse = -inf, block_indices = -1, zero gradients.

``softmax_scale`` multiplies q . k; default ``Dk ** -0.5``. ``lse`` is the natural logarithm of the sum of
exponentials, float32 ``[T, Hq]`` (float64 in double), not differentiable. A query with no visible key has
o = 0, lse = -inf and no gradient. Compressed block i of sequence b is row ``cu_seqlens_k[b] // d + i`` of
k_cmp, v_cmp (``d`` = compress_stride, ``l`` = compress_block_size).

A wrong shape, dtype, device or value is a ValueError that names the argument, its value and what is
allowed. Equations are those of "Native Sparse Attention", arXiv 2502.11089; :mod:`nsa_ext.reference`
holds the same functions in plain PyTorch. All of them work under torch.compile, torch.export and
autocast, and never wait for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_ext.cache_ops import append_kv, decode_attention
from nsa_ext.reference import AttentionOutputs

__all__ = [
    "AttentionOutputs",
    "append_kv",
    "attention",
    "attention_forward",
    "block_scores",
    "compress",
    "compressed_attention",
    "decode_attention",
    "gated_combine",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale


def _rows(x: Tensor, max_seqlen: int | None) -> int:
    return x.shape[0] if max_seqlen is None else max_seqlen


def _tokens(
    q: Tensor, k_cmp: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None, stride: int
) -> int:
    """An upper bound of the key tokens of a sequence, where only compressed keys are at hand."""
    if max_seqlen_k is not None:
        return max_seqlen_k
    return q.shape[0] if cu_seqlens_k is None else (k_cmp.shape[0] + 1) * stride - 1


def compress(
    x: Tensor,
    pe: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    block_size: int = 32,
    stride: int = 16,
    kind: str = "mlp",
) -> Tensor:
    """phi of every compression block ``[i*d, i*d + l)`` (Eq. 7): x ``[S, H, D]`` -> ``[S // d, H, D]``.

    kind ``"mlp"``: ``w2 . silu(w1 . vec(x + pe) + b1) + b2``; ``"linear"``: ``w1 . vec(x + pe) + b1``;
    ``"mean"``: the blocks' mean, without parameters. vec is token-major. pe ``[h, l, D]``, w1 ``[h, l*D,
    F]``, b1 ``[h, F]``, w2 ``[h, F, D]``, b2 ``[h, D]`` with h = 1 (shared by the heads) or H. Without
    cu_seqlens: one sequence of max_seqlen tokens (default S). Rows of no block are zero. Differentiable
    in x and every parameter.
    """
    max_seqlen = _rows(x, max_seqlen)
    return torch.ops.nsa.compress(x, pe, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, stride, kind)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed blocks whose last token has been seen, ``i*d + l - 1 <= t`` (Section
    3.3.1).

    k_cmp ``[S // d, Hkv, Dk]``, v_cmp ``[S // d, Hkv, Dv]`` -> o ``[T, Hq, Dv]``, lse. Differentiable in
    q, k_cmp, v_cmp.
    """
    tokens = _tokens(q, k_cmp, cu_seqlens_k, max_seqlen_k, compress_stride)
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), tokens)
    blocks = (compress_block_size, compress_stride)
    return torch.ops.nsa.compressed_attention(q, k_cmp, v_cmp, *seqlens, *blocks, _scale(q, softmax_scale))


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    softmax_scale: float | None = None,
) -> Tensor:
    """Importance of every selection block for every query (Eq. 9 and 10, weighted by the tokens that
    blocks share).

    lse is that of compressed_attention. Result: float32 (float64 in double) ``[T, Hkv, ceil(max_seqlen_k
    / l')]`` with l' = block_size, summed over the heads of a group, unnormalised. Not differentiable. It
    is O(T * S) in memory: select_blocks gives the selection without it.
    """
    tokens = _tokens(q, k_cmp, cu_seqlens_k, max_seqlen_k, compress_stride)
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), tokens)
    blocks = (compress_block_size, compress_stride, block_size)
    return torch.ops.nsa.block_scores(q, k_cmp, lse, *seqlens, *blocks, _scale(q, softmax_scale))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    softmax_scale: float | None = None,
) -> Tensor:
    """The blocks that every query attends (Eq. 11 and 12): int32 ``[T, Hkv, n]``, ascending, -1 = unused.

    Forced are the first num_initial_blocks and the last num_local_blocks up to the query's own block; the
    other of the n = num_selected_blocks slots go to the highest block_scores, equal ones to the lower
    block. Not differentiable.
    """
    tokens = _tokens(q, k_cmp, cu_seqlens_k, max_seqlen_k, compress_stride)
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), tokens)
    blocks = (compress_block_size, compress_stride, block_size)
    selection = (num_selected_blocks, num_initial_blocks, num_local_blocks)
    scale = _scale(q, softmax_scale)
    return torch.ops.nsa.select_blocks(q, k_cmp, lse, *seqlens, *blocks, *selection, scale)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_size: int = 64,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the keys of each query's blocks (Section 3.3.2) -> o ``[T, Hq, Dv]``, lse.

    block_indices int32 ``[T, Hkv, n]``: a set per row, in any order; a repeated block counts once,
    numbers below 0 or past the query's own block are ignored. Differentiable in q, k, v.
    """
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), _rows(k, max_seqlen_k))
    scale = _scale(q, softmax_scale)
    return torch.ops.nsa.selected_attention(q, k, v, block_indices, *seqlens, block_size, scale)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    window_size: int = 512,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the last window_size keys, the query's own included (Section 3.3.3) -> o ``[T, Hq,
    Dv]``, lse.

    Differentiable in q, k, v.
    """
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), _rows(k, max_seqlen_k))
    return torch.ops.nsa.sliding_window_attention(q, k, v, *seqlens, window_size, _scale(q, softmax_scale))


def gated_combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, gate_logits: Tensor) -> Tensor:
    """``sum of sigmoid(gate_logits[..., c]) * o_c`` over the branches c = cmp, slc, swa (Eq. 5), summed
    in float32.

    o_c ``[T, Hq, Dv]``; gate_logits ``[T, Hq, 3]``, in o's dtype or float32. Differentiable in all four.
    """
    return torch.ops.nsa.gated_combine(o_cmp, o_slc, o_swa, gate_logits)


def attention_forward(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_swa: Tensor,
    v_swa: Tensor,
    gate_logits: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    window_size: int = 512,
    softmax_scale: float | None = None,
) -> AttentionOutputs:
    """The whole of native sparse attention with its intermediates, as one autograd node; see attention."""
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), _rows(k_slc, max_seqlen_k))
    blocks = (compress_block_size, compress_stride, block_size)
    selection = (num_selected_blocks, num_initial_blocks, num_local_blocks)
    keys = (k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa)
    options = (*seqlens, *blocks, *selection, window_size, _scale(q, softmax_scale))
    return AttentionOutputs(*torch.ops.nsa.attention_forward(q, *keys, gate_logits, *options))


def attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_swa: Tensor,
    v_swa: Tensor,
    gate_logits: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    window_size: int = 512,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Native sparse attention (Eq. 5): compressed, selected and sliding-window attention and their gated
    sum.

    k_cmp ``[S // d, Hkv, Dk]`` and v_cmp come from compress; the pairs of the branches may be the same
    tensor. gate_logits ``[T, Hq, 3]`` for cmp, slc, swa, in q's dtype or float32. Result: o ``[T, Hq,
    Dv]`` and block_indices int32 ``[T, Hkv, n]`` (no gradient flows through the selection). One autograd
    node; memory is linear in T and S. Without offsets and gradients k_swa and v_swa may be the last T +
    window_size - 1 or more keys alone.
    """
    seqlens = (cu_seqlens_q, cu_seqlens_k, _rows(q, max_seqlen_q), _rows(k_slc, max_seqlen_k))
    blocks = (compress_block_size, compress_stride, block_size)
    selection = (num_selected_blocks, num_initial_blocks, num_local_blocks)
    keys = (k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa)
    options = (*seqlens, *blocks, *selection, window_size, _scale(q, softmax_scale))
    return torch.ops.nsa.attention(q, *keys, gate_logits, *options)
