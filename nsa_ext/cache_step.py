"""One step of a cache: which tokens it adds, where everything lies, and attention through the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_ext import ops
from nsa_ext.cache_ops import append_kv, decode_attention
from nsa_ext.functional import NSAInfo
from nsa_ext.rope import PositionEmbeddings

if TYPE_CHECKING:
    from nsa_ext.cache import LayerCache, NSACache
    from nsa_ext.compression import BlockCompression

__all__ = ["MAX_DECODE_TOKENS", "CacheStep", "Streams"]

MAX_DECODE_TOKENS = 16  # of a sequence in ops.decode_attention


@dataclass
class Streams:
    """Keys and values of a step's tokens, [T, Hkv, D]: what phi sees, and with positions encoded."""

    cmp: tuple[Tensor, Tensor]
    slc: tuple[Tensor, Tensor]
    swa: tuple[Tensor | None, Tensor | None]  # None: the window reads slc


@dataclass
class CacheStep:
    """Made by NSACache.append. Its tensors serve every layer and are computed once."""

    cache: NSACache
    counts: tuple[int, ...]  # new tokens of each sequence
    starts: tuple[int, ...]  # tokens that it had
    tables: tuple[tuple[int, ...], ...]  # its pages

    def __post_init__(self) -> None:
        self._rotary: PositionEmbeddings | None = None

    @property
    def total(self) -> int:
        """New tokens of all sequences."""
        return sum(self.counts)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.counts)

    @property
    def decodes(self) -> bool:
        """Whether the step is small enough for decode_attention."""
        return self.max_seqlen_q <= min(MAX_DECODE_TOKENS, self.cache.max_rollback)

    def rotary(self, rows: int) -> PositionEmbeddings:
        """cos and sin [rows, head_dim] of the step's tokens; behind the last one, of any position."""
        if self._rotary is None or self._rotary[0].shape[0] != rows:
            offsets, starts = self.cache.cu_seqlens_q, self.cache.cache_seqlens
            row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
            sequence = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
            sequence = sequence.clamp(max=self.cache.batch_size - 1)
            positions = starts[sequence] + row - offsets[sequence]
            positions = positions.clamp(max=self.cache.rotary[0].shape[0] - 1)
            self._rotary = tuple(table.index_select(0, positions) for table in self.cache.rotary)
        return self._rotary

    def attend(
        self,
        layer: LayerCache,
        q: Tensor,
        streams: Streams,
        gate_logits: Tensor,
        phi: tuple[BlockCompression, BlockCompression],
        options: dict[str, Any],
        return_info: bool = False,
    ) -> tuple[Tensor, NSAInfo | None]:
        """Appends the streams to the layer's cache -> o [T, Hq, Dv] of q [T, Hq, Dk].

        options: the keyword arguments of ops.attention.
        """
        window = None if self.decodes else self._window(layer, streams)  # before it is overwritten
        self._append(layer, streams, phi)
        if self.decodes:
            caches = (layer.k_cmp, layer.v_cmp, layer.k_slc, layer.v_slc, layer.k_swa, layer.v_swa)
            o, indices, lse = decode_attention(q, *caches, gate_logits, **self._arguments, **options)
            info = (indices, *lse.unbind(0))
        else:
            gather = self._gather
            slc = streams.slc
            if not gather.from_the_start:
                slc = tuple(
                    t.flatten(0, 1).index_select(0, gather.tokens) for t in (layer.k_slc, layer.v_slc)
                )
            cmp = (t.flatten(0, 1).index_select(0, gather.blocks) for t in (layer.k_cmp, layer.v_cmp))
            keys = (*cmp, *slc, *(slc if window is None else window))
            seqlens = (self.cache.cu_seqlens_q, gather.cu_seqlens_k, self.max_seqlen_q, gather.max_seqlen_k)
            if not return_info:
                return ops.attention(q, *keys, gate_logits, *seqlens, **options)[0], None
            outputs = ops.attention_forward(q, *keys, gate_logits, *seqlens, **options)
            o, info = outputs.o, (outputs.block_indices, *outputs[-3:])
        return o, NSAInfo(*info, torch.sigmoid(gate_logits)) if return_info else None

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "cache_seqlens": self.cache.cache_seqlens,
            "block_table": self.cache.block_table,
            "cu_seqlens_q": self.cache.cu_seqlens_q,
            "max_seqlen_q": self.max_seqlen_q,
        }

    def _append(
        self, layer: LayerCache, streams: Streams, phi: tuple[BlockCompression, BlockCompression]
    ) -> None:
        config = self.cache.config
        append_kv(
            *(layer.k_cmp, layer.v_cmp, layer.k_slc, layer.v_slc, layer.k_swa, layer.v_swa),
            *(layer.k_tail, layer.v_tail, *streams.cmp, *streams.slc, *streams.swa),
            *(weight for f in phi for weight in (f.pe, f.w1, f.b1, f.w2, f.b2)),
            *(self.cache.rotary if config.compress_rope == "after" else (None, None)),
            **self._arguments,
            compress_block_size=config.compress_block_size,
            compress_stride=config.compress_stride,
            compress_kind=config.compress_kind,
        )

    def _window(self, layer: LayerCache, streams: Streams) -> tuple[Tensor, Tensor] | None:
        """The window's keys and values of every sequence; rows that no token sees are not filled."""
        if layer.k_swa is None:
            return None
        gather = self._gather
        if gather.from_the_start:
            return streams.swa
        window = []
        for ring, new in zip((layer.k_swa, layer.v_swa), streams.swa, strict=True):
            rows = new.new_empty(gather.num_tokens, *new.shape[1:])
            rows[gather.ring_target] = ring.flatten(0, 1).index_select(0, gather.ring_source)
            rows[gather.new_target] = new[: self.total]
            window.append(rows)
        return window[0], window[1]

    @cached_property
    def _gather(self) -> _Gather:
        return _Gather(self)


class _Gather:
    """Where the keys of a step lie, for the packed operators: index tensors, made of lengths on the host."""

    def __init__(self, step: CacheStep) -> None:
        cache, config = step.cache, step.cache.config
        device = cache.cache_seqlens.device
        lengths = [
            start + count if count else 0 for start, count in zip(step.starts, step.counts, strict=True)
        ]
        offsets = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
        self.num_tokens, self.max_seqlen_k = offsets[-1], max(lengths)
        self.from_the_start = lengths == list(step.counts)

        stride, extra = config.compress_stride, config.compress_block_size // config.compress_stride - 1
        page_rows = cache.layers[0].k_slc.shape[1]
        ring = 0 if cache.layers[0].k_swa is None else cache.layers[0].k_swa.shape[1]
        tokens, ring_source, ring_target, new_target = [], [], [], []
        blocks = torch.zeros(self.num_tokens // stride, dtype=torch.int64)
        for b, (length, start, count) in enumerate(zip(lengths, step.starts, step.counts, strict=True)):
            if not count:
                continue
            pages = torch.tensor(step.tables[b] if cache.block_table is not None else (b,))

            def rows(positions: Tensor, page_rows: int, pages: Tensor = pages) -> Tensor:
                return pages[positions // page_rows] * page_rows + positions % page_rows

            tokens.append(rows(torch.arange(length), page_rows))
            num_blocks = max(0, (length - config.compress_block_size) // stride + 1)
            first = offsets[b] // stride
            blocks[first : first + num_blocks] = rows(torch.arange(num_blocks) + extra, page_rows // stride)
            seen = torch.arange(max(0, start - config.window_size + 1), start)
            if ring:
                ring_source.append(b * ring + seen % ring)
                ring_target.append(offsets[b] + seen)
            new_target.append(offsets[b] + torch.arange(start, length))

        def on_device(parts: list[Tensor]) -> Tensor:
            index = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
            return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index

        self.tokens, self.blocks, self.new_target = (on_device(x) for x in (tokens, [blocks], new_target))
        self.ring_source, self.ring_target = on_device(ring_source), on_device(ring_target)
        self.cu_seqlens_k = on_device([torch.tensor(offsets, dtype=torch.int32)])
