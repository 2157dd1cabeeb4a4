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

    def __post_init__(self) -> None:
        self._rotary: PositionEmbeddings | None = None

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """Each sequence's pages."""
        return tuple(map(tuple, self.cache._tables))

    @property
    def total(self) -> int:
        """New tokens of all sequences."""
        return sum(self.counts)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.counts)

    @property
    def keys(self) -> list[int]:
        """Tokens of each sequence that the step's tokens may attend: of those without any, none."""
        return [start + count if count else 0 for start, count in zip(self.starts, self.counts, strict=True)]

    @property
    def seen(self) -> list[int]:
        """How many of them lie in the rings of the window and are seen."""
        reach = 0 if self.cache.config.share_kv else self.cache.config.window_size - 1
        return [
            min(start, reach) if count else 0 for start, count in zip(self.starts, self.counts, strict=True)
        ]

    @property
    def decodes(self) -> bool:
        """Whether the step is small enough for decode_attention."""
        return self.max_seqlen_q <= min(MAX_DECODE_TOKENS, self.cache.max_rollback)

    def rotary(self, rows: int) -> PositionEmbeddings:
        """cos and sin [rows, head_dim] of the step's tokens; behind the last one, of any position."""
        if self._rotary is None or self._rotary[0].shape[0] != rows:
            tables = self.cache.rotary
            # A graph of a decoding step has to find the lengths on the device.
            if not self.decodes and (sequence := self._only_sequence(rows)) is not None:
                start = self.starts[sequence]
                self._rotary = tuple(table[start : start + rows] for table in tables)
                return self._rotary
            offsets, starts = self.cache.cu_seqlens_q, self.cache.cache_seqlens
            row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
            sequence = torch.searchsorted(offsets[1:], row, right=True)
            sequence = sequence.clamp(max=self.cache.batch_size - 1)
            positions = starts[sequence] + row - offsets[sequence]
            positions = positions.clamp(max=tables[0].shape[0] - 1)
            self._rotary = tuple(table.index_select(0, positions) for table in tables)
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
        if self.decodes:
            self._append(layer, streams, phi)
            caches = (layer.k_cmp, layer.v_cmp, layer.k_slc, layer.v_slc, layer.k_swa, layer.v_swa)
            o, indices, lse = decode_attention(q, *caches, gate_logits, **self._arguments, **options)
            info = (indices, *lse.unbind(0))
        else:
            where = self._packed if self._only_sequence(q.shape[0]) is None else self._one
            window = None if layer.k_swa is None else where.window(layer, streams)  # before it is overwritten
            self._append(layer, streams, phi)
            slc = where.tokens(layer, streams)
            keys = (*where.blocks(layer), *slc, *(slc if window is None else window))
            if not return_info:
                return ops.attention(q, *keys, gate_logits, *where.seqlens, **options)[0], None
            outputs = ops.attention_forward(q, *keys, gate_logits, *where.seqlens, **options)
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

    def _only_sequence(self, rows: int) -> int | None:
        """The sequence whose tokens the rows are, if they are all of one and none is padding."""
        total = self.total
        return self.counts.index(total) if total == rows and total in self.counts else None

    @cached_property
    def _one(self) -> _OneSequence:
        return _OneSequence(self, self.counts.index(self.total))

    @cached_property
    def _packed(self) -> _PackedSequences:
        return _PackedSequences(self)


class _OneSequence:
    """The keys that the tokens of one sequence attend, in the packed operators' layout: slices of a cache."""

    def __init__(self, step: CacheStep, sequence: int) -> None:
        self.cache, self.sequence, self.start = step.cache, sequence, step.starts[sequence]
        self.length, self.seen = step.keys[sequence], step.seen[sequence]
        self.seqlens = (None, None, step.total, self.length)
        self.pages: Tensor | None = None
        if self.cache.block_table is not None:
            num_pages = -(-self.length // self.cache.page_block_size)
            self.pages = self.cache.block_table[sequence, :num_pages].long()

    def window(self, layer: LayerCache, streams: Streams) -> tuple[Tensor, ...]:
        """The last keys and values alone, all that is seen."""
        if not self.seen:
            return streams.swa
        size = layer.k_swa.shape[1]
        begin = (self.start - self.seen) % size
        end = begin + self.seen  # the ring may end between them
        window = []
        for stream, new in zip((layer.k_swa, layer.v_swa), streams.swa, strict=True):
            ring = stream[self.sequence]
            parts = [ring[begin:end], new] if end <= size else [ring[begin:], ring[: end - size], new]
            window.append(torch.cat(parts))
        return tuple(window)

    def tokens(self, layer: LayerCache, streams: Streams) -> tuple[Tensor, ...]:
        return tuple(self._rows(stream)[: self.length] for stream in (layer.k_slc, layer.v_slc))

    def blocks(self, layer: LayerCache) -> tuple[Tensor, ...]:
        config = self.cache.config
        first = config.compress_block_size // config.compress_stride - 1
        end = max(first, self.length // config.compress_stride)
        return tuple(self._rows(stream)[first:end] for stream in (layer.k_cmp, layer.v_cmp))

    def _rows(self, stream: Tensor) -> Tensor:
        if self.pages is None:
            return stream[self.sequence]
        return stream.index_select(0, self.pages).flatten(0, 1)


class _PackedSequences:
    """The same of several sequences: gathered by index tensors, which the device makes of the lengths."""

    def __init__(self, step: CacheStep) -> None:
        cache, config = step.cache, step.cache.config
        keys, offsets, starts = step.keys, cache.cu_seqlens_k, cache.cache_seqlens
        self.total, self.num_tokens = step.total, sum(keys)
        self.seqlens = (cache.cu_seqlens_q, offsets, step.max_seqlen_q, max(keys))
        self.from_the_start = self.num_tokens == self.total
        self.block_table = cache.block_table

        stride = config.compress_stride
        extra = config.compress_block_size // stride - 1
        page_rows = cache.layers[0].k_slc.shape[1]
        sequence, block = _place(offsets // stride, self.num_tokens // stride)
        self._blocks = self._in_pages(sequence, block + extra, page_rows // stride)
        if self.from_the_start:
            return
        self._tokens = self._in_pages(*_place(offsets, self.num_tokens), page_rows)
        if config.share_kv:
            return
        ring, num_seen = cache.layers[0].k_swa.shape[1], sum(step.seen)
        sequence, place = _place(cache.cu_seqlens_ring, num_seen)
        position = place + starts[sequence] - cache.cu_seqlens_ring.diff()[sequence]
        self._ring_rows = sequence * ring + position % ring
        target = offsets[sequence] + position
        sequence, place = _place(cache.cu_seqlens_q, self.total)
        self._target = torch.cat([target, (offsets[:-1] + starts)[sequence] + place]).long()

    def window(self, layer: LayerCache, streams: Streams) -> tuple[Tensor, ...]:
        """As many rows as there are tokens; those that no token sees are not filled."""
        if self.from_the_start:
            return streams.swa
        window = []
        for stream, new in zip((layer.k_swa, layer.v_swa), streams.swa, strict=True):
            seen = stream.flatten(0, 1).index_select(0, self._ring_rows)
            rows = new.new_empty(self.num_tokens, *new.shape[1:])
            rows[self._target] = torch.cat([seen, new[: self.total]])
            window.append(rows)
        return tuple(window)

    def tokens(self, layer: LayerCache, streams: Streams) -> tuple[Tensor, ...]:
        if self.from_the_start:
            return streams.slc
        return tuple(t.flatten(0, 1).index_select(0, self._tokens) for t in (layer.k_slc, layer.v_slc))

    def blocks(self, layer: LayerCache) -> tuple[Tensor, ...]:
        return tuple(t.flatten(0, 1).index_select(0, self._blocks) for t in (layer.k_cmp, layer.v_cmp))

    def _in_pages(self, sequence: Tensor, row: Tensor, page_rows: int) -> Tensor:
        """Where row `row` of a sequence lies; of rows that it does not have, anywhere."""
        if self.block_table is None:
            return sequence * page_rows + row.clamp(max=page_rows - 1)
        width = self.block_table.shape[1]
        pages = self.block_table[sequence, (row // page_rows).clamp(max=width - 1)].clamp(min=0)
        return (pages * page_rows + row % page_rows).long()


def _place(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sequence, and place in it, of the packed rows 0 .. rows - 1."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    sequence = torch.searchsorted(offsets[1:], row, right=True)
    return sequence, row - offsets[sequence]
