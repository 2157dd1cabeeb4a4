"""Native Sparse Attention in plain PyTorch: what every kernel of this package is compared with.

One function per operator of ``torch.ops.nsa``, with the operator's argument names and the packed layout. Each
loops over the sequences and works with dense masks inside one: slow and O(T * S) in memory, but short,
differentiable by autograd, and right in any dtype on any device (float64 is the reference; a lower one shows
what plain PyTorch loses). Sections and equations are those of the paper, "Native Sparse Attention"
(arXiv 2502.11089).

Notation: T, S query and key tokens over all sequences; Hq, Hkv heads; Dk, Dv head dims; l, d block length and
stride of the compression; l' the selection block; n the selected blocks. Inside a sequence of Tq queries and
S keys, query i stands at the position t = S - Tq + i.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "AttentionOutputs",
    "attention",
    "attention_forward",
    "block_scores",
    "compress",
    "compressed_attention",
    "gated_combine",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]


class _Sequence(NamedTuple):
    q: slice  # its rows of the query side
    k: slice  # its tokens of the key side
    positions: Tensor  # [Tq], of its queries
    length: int  # its key tokens

    def blocks(self, block_size: int, stride: int) -> tuple[slice, Tensor]:
        """Rows of its compressed blocks, and the position of each block's last token."""
        count = max(0, (self.length - block_size) // stride + 1)
        row = self.k.start // stride
        first = torch.arange(count, device=self.positions.device) * stride
        return slice(row, row + count), first + block_size - 1


def _sequences(
    q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_k: int | None
) -> Iterator[_Sequence]:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given both or neither")
    if cu_seqlens_q is None:
        bounds_q, bounds_k = [0, q.shape[0]], [0, q.shape[0] if max_seqlen_k is None else int(max_seqlen_k)]
    else:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for (begin_q, end_q), (begin_k, end_k) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        queries, length = end_q - begin_q, end_k - begin_k
        if not 0 <= queries <= length:
            raise ValueError(f"a sequence has {queries} queries and {length} keys; need 0 <= queries <= keys")
        positions = torch.arange(length - queries, length, device=q.device)
        yield _Sequence(slice(begin_q, end_q), slice(begin_k, end_k), positions, length)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _zero_unseen(k: Tensor, visible: Tensor) -> Tensor:
    """Zeroes the rows of k [S, Hkv, D] that no query sees: 0 * NaN would be NaN. visible [Tq, Hkv, S]."""
    return torch.where(visible.any(0).t().unsqueeze(-1), k, k.new_zeros(()))


def _logits(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits [Tq, Hq, S], -inf where invisible, and the mask per query head (h reads KV head h // G)."""
    group = q.shape[1] // k.shape[1]
    k = _zero_unseen(k, visible).repeat_interleave(group, dim=1)
    visible = visible.repeat_interleave(group, dim=1)
    logits = scale * torch.einsum("thd,shd->ths", q, k)
    return logits.masked_fill(~visible, float("-inf")), visible


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One sequence over its visible keys; (0, -inf) for a query without any. visible [Tq, Hkv, S]."""
    logits, visible_q = _logits(q, k, visible, scale)
    empty = ~visible_q.any(-1, keepdim=True)
    finite = logits.masked_fill(empty, 0)  # an empty row would have NaN gradients
    p = torch.softmax(finite, dim=-1).masked_fill(empty, 0)
    v = _zero_unseen(v, visible).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    o = torch.einsum("ths,shd->thd", p, v)
    lse = torch.logsumexp(finite.detach(), dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return o, lse


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What rows of no sequence hold: o = 0, lse = -inf."""
    shape = (q.shape[0], q.shape[1])
    return q.new_zeros(*shape, v.shape[2]), q.new_full(shape, float("-inf"), dtype=_lse_dtype(q))


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
    """phi of every block [i*d, i*d + l) (Eq. 7): x [S, H, D] -> [S // d, H, D]; rows of no block are zero.

    pe [h, l, D], w1 [h, l*D, F], b1 [h, F], w2 [h, F, D], b2 [h, D] with h = 1 or H.
    """
    heads, dim = x.shape[1:]
    out = x.new_zeros(x.shape[0] // stride, heads, dim)
    one = x.new_empty(x.shape[0] if max_seqlen is None else int(max_seqlen), 0)
    for seq in _sequences(one, cu_seqlens, cu_seqlens, one.shape[0]):
        rows, ends = seq.blocks(block_size, stride)
        if not len(ends):
            continue
        blocks = x[seq.k].unfold(0, block_size, stride).transpose(2, 3)  # [N, H, l, D]
        if kind == "mean":
            out[rows] = blocks.mean(2)
            continue
        y = (blocks if pe is None else blocks + pe).flatten(2)
        y = torch.einsum("nhx,hxf->nhf", y, w1.expand(heads, -1, -1))
        y = y if b1 is None else y + b1
        if kind == "mlp":
            y = torch.einsum("nhf,hfd->nhd", nn.functional.silu(y), w2.expand(heads, -1, -1))
            y = y if b2 is None else y + b2
        out[rows] = y
    return out


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
    """Attention over the blocks that end at or before t (Section 3.3.1) -> o [T, Hq, Dv], lse [T, Hq]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = _empty_outputs(q, v_cmp)
    for seq in _sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
        rows, ends = seq.blocks(compress_block_size, compress_stride)
        visible = (ends <= seq.positions[:, None])[:, None].expand(-1, k_cmp.shape[1], -1)
        o[seq.q], lse[seq.q] = _attend(q[seq.q], k_cmp[rows], v_cmp[rows], visible, scale)
    return o, lse


@torch.no_grad()
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
    """Importance of the selection blocks (Eq. 9 and 10, by overlap) -> [T, Hkv, ceil(max_seqlen_k / l')]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    num_heads_kv = k_cmp.shape[1]
    sequences = list(_sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k))
    bound = max((seq.length for seq in sequences), default=0) if max_seqlen_k is None else int(max_seqlen_k)
    scores = lse.new_zeros(q.shape[0], num_heads_kv, -(-bound // block_size))
    j = torch.arange(scores.shape[2], device=q.device)
    for seq in sequences:
        rows, ends = seq.blocks(compress_block_size, compress_stride)
        visible = (ends <= seq.positions[:, None])[:, None].expand(-1, num_heads_kv, -1)
        logits, visible_q = _logits(q[seq.q], k_cmp[rows], visible, scale)
        p = torch.where(visible_q, torch.exp(logits - lse[seq.q].unsqueeze(-1)), 0)
        first, last = (ends - compress_block_size + 1)[:, None], ends[:, None]  # of the compressed blocks
        shared = torch.minimum(last, (j + 1) * block_size - 1) - torch.maximum(first, j * block_size) + 1
        weights = shared.clamp(min=0).to(p.dtype) / compress_stride  # [N, blocks]
        scores[seq.q] = torch.einsum("tghi,ij->tgj", p.unflatten(1, (num_heads_kv, -1)), weights)
    return scores


@torch.no_grad()
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
    """Forced blocks, then the best scores (Eq. 11) -> int32 [T, Hkv, n], ascending, -1 = unused."""
    seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    blocks = (compress_block_size, compress_stride, block_size)
    scores = block_scores(q, k_cmp, lse, *seqlens, *blocks, softmax_scale)
    num_blocks = scores.shape[2]
    j = torch.arange(num_blocks, device=q.device)
    indices = torch.full((*scores.shape[:2], num_selected_blocks), -1, dtype=torch.int32, device=q.device)
    for seq in _sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
        own = (seq.positions // block_size)[:, None, None]
        candidate = j <= own
        forced = candidate & ((j < num_initial_blocks) | (j > own - num_local_blocks))
        rank = scores[seq.q].masked_fill(forced, float("inf")).masked_fill(~candidate, float("-inf"))
        # A stable sort keeps the lower of two blocks with equal scores first.
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        chosen = order.masked_fill(order > own, num_blocks)[..., :num_selected_blocks].sort(dim=-1).values
        indices[seq.q, :, : chosen.shape[2]] = chosen.masked_fill(chosen == num_blocks, -1).to(torch.int32)
    return indices


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
    """Causal attention over the set of blocks in a row of block_indices [T, Hkv, n] (Section 3.3.2)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = _empty_outputs(q, v)
    max_seqlen_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    for seq in _sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
        s = torch.arange(seq.length, device=q.device)
        visible = torch.zeros(len(seq.positions), k.shape[1], seq.length, dtype=torch.bool, device=q.device)
        for slot in block_indices[seq.q].unbind(-1):
            visible |= slot.unsqueeze(-1) == s // block_size
        visible &= (s <= seq.positions[:, None])[:, None]
        o[seq.q], lse[seq.q] = _attend(q[seq.q], k[seq.k], v[seq.k], visible, scale)
    return o, lse


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
    """Attention over the last window_size keys, the query's own included (Section 3.3.3)."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    o, lse = _empty_outputs(q, v)
    max_seqlen_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    for seq in _sequences(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_k):
        s, t = torch.arange(seq.length, device=q.device), seq.positions[:, None]
        visible = ((s <= t) & (s > t - window_size))[:, None].expand(-1, k.shape[1], -1)
        o[seq.q], lse[seq.q] = _attend(q[seq.q], k[seq.k], v[seq.k], visible, scale)
    return o, lse


def gated_combine(o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor, gate_logits: Tensor) -> Tensor:
    """Sum of the branches, each times its sigmoid gate (Eq. 5); gate_logits [T, Hq, 3] for cmp, slc, swa."""
    sum_dtype = torch.promote_types(o_cmp.dtype, torch.float32)
    gates = torch.sigmoid(gate_logits.to(sum_dtype)).unsqueeze(-2)
    return (torch.stack((o_cmp, o_slc, o_swa), dim=-1).to(sum_dtype) * gates).sum(-1).to(o_cmp.dtype)


class AttentionOutputs(NamedTuple):
    """What nsa::attention_forward returns; gradients flow through o only."""

    o: Tensor  # [T, Hq, Dv]
    block_indices: Tensor  # [T, Hkv, n], int32
    o_cmp: Tensor  # [T, Hq, Dv]
    o_slc: Tensor
    o_swa: Tensor
    lse_cmp: Tensor  # [T, Hq]
    lse_slc: Tensor
    lse_swa: Tensor


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
    """The three branches and their gated sum; no gradient flows through the selection."""
    max_seqlen_k = k_slc.shape[0] if max_seqlen_k is None else max_seqlen_k
    seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    blocks = (compress_block_size, compress_stride)
    selection = (block_size, num_selected_blocks, num_initial_blocks, num_local_blocks)
    o_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, *seqlens, *blocks, softmax_scale)
    block_indices = select_blocks(q, k_cmp, lse_cmp, *seqlens, *blocks, *selection, softmax_scale)
    o_slc, lse_slc = selected_attention(q, k_slc, v_slc, block_indices, *seqlens, block_size, softmax_scale)
    o_swa, lse_swa = sliding_window_attention(q, k_swa, v_swa, *seqlens, window_size, softmax_scale)
    # Not even a NaN among the gates of the rows behind the last sequence may reach an output.
    end = q.shape[0] if cu_seqlens_q is None else int(cu_seqlens_q[-1])
    o = torch.zeros_like(o_cmp)
    o[:end] = gated_combine(o_cmp[:end], o_slc[:end], o_swa[:end], gate_logits[:end])
    return AttentionOutputs(o, block_indices, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa)


def attention(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """Native sparse attention -> (o, block_indices); the arguments are those of attention_forward."""
    return attention_forward(*args, **kwargs)[:2]
