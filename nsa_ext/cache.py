"""NSACache: what inference keeps of the sequences it has seen, contiguous or in pages."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from nsa_ext.cache_step import MAX_DECODE_TOKENS, CacheStep
from nsa_ext.config import NSAConfig
from nsa_ext.paging import PageAllocator
from nsa_ext.rope import PositionEmbeddings, rope_tables

__all__ = ["LayerCache", "NSACache"]


@dataclass
class LayerCache:
    """The tensors of one layer, as nsa_ext.cache_ops describes them; pass it to a layer as ``cache=``."""

    cache: NSACache
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_swa: Tensor | None  # None: the window reads slc
    v_swa: Tensor | None
    k_tail: Tensor
    v_tail: Tensor

    @property
    def pages(self) -> tuple[Tensor, ...]:
        """The streams of every token: in pages, or a row of each sequence."""
        return self.k_slc, self.v_slc, self.k_cmp, self.v_cmp

    @property
    def rings(self) -> tuple[Tensor, ...]:
        """The streams of the last tokens: a row of each sequence."""
        return tuple(t for t in (self.k_swa, self.v_swa, self.k_tail, self.v_tail) if t is not None)


class NSACache:
    """The cache of num_layers layers of one config for batch_size sequences of at most max_seqlen tokens.

    Each layer (``cache.layers[i]``) holds per sequence: keys and values of the selected branch, compressed
    rows, the window's last tokens in a ring (config.share_kv: the window reads the selected branch's), and
    the last tokens that the compression has yet to see, also in a ring. Lengths are known to the host, and
    nothing here ever waits for a device.

        with cache.append([7, 1, 0]) as step:      # tokens that each sequence gets; checks, takes pages
            for layer, layer_cache in zip(layers, cache.layers):
                x = layer(x, cache=layer_cache)    # x [T, C]: the tokens of all sequences, packed

    The lengths grow when the block ends. Steps of any size mix: prompts, chunks of them, single tokens,
    drafts to verify. All results are those of one forward over the whole sequence.

    * page_block_size (a multiple of config.block_size): keep the streams of every token in num_pages pages
      of that many tokens (default: enough for every sequence), shared by all sequences.
    * max_rollback: how many of the last tokens roll_back can take back.
    * position_embeddings: (cos, sin), each ``[max_seqlen, head_dim]``; default: from config.rope_theta.
    * dtype: that of the layers' keys and values (under autocast: its dtype).
    """

    def __init__(
        self,
        config: NSAConfig,
        num_layers: int = 1,
        batch_size: int = 1,
        max_seqlen: int = 4096,
        *,
        page_block_size: int | None = None,
        num_pages: int | None = None,
        max_rollback: int = MAX_DECODE_TOKENS,
        position_embeddings: PositionEmbeddings | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "batch_size": batch_size, "max_seqlen": max_seqlen}
        for name, size in (sizes | {"max_rollback": max_rollback}).items():
            if size < 1:
                raise ValueError(f"{name} = {size} is not allowed; it must be at least 1")
        self.config, self.max_seqlen, self.max_rollback = config, max_seqlen, max_rollback
        self.batch_size, self.page_block_size = batch_size, page_block_size
        self.step: CacheStep | None = None
        self._lengths = [0] * batch_size
        self._written = [0] * batch_size  # one past the last token that was ever in the rings
        self._tables: list[list[int]] = [[] for _ in range(batch_size)]
        stride = config.compress_stride
        if page_block_size is None:
            if num_pages is not None:
                raise ValueError(f"num_pages = {num_pages} needs a page_block_size")
            self.allocator = None
            width, rows, page_rows = 1, batch_size, -(-max_seqlen // stride) * stride
        else:
            if page_block_size < 1 or page_block_size % config.block_size:
                raise ValueError(
                    f"page_block_size = {page_block_size} is not allowed; it must be a multiple of "
                    f"block_size = {config.block_size}"
                )
            width = -(-max_seqlen // page_block_size)
            rows, page_rows = batch_size * width if num_pages is None else num_pages, page_block_size
            self.allocator = PageAllocator(rows)
        self._room = width * page_rows  # tokens that a sequence has room for

        # What the device knows of a step lies in one tensor, at fixed addresses: it takes one copy.
        sizes = [batch_size, *[batch_size + 1] * 3, batch_size * width if self.allocator is not None else 0]
        self._numbers = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.cache_seqlens, self.cu_seqlens_q, self.cu_seqlens_k, self.cu_seqlens_ring, table = (
            self._numbers.split(sizes)
        )
        self.block_table = None if self.allocator is None else table.fill_(-1).view(batch_size, width)
        self._table_width = width
        self._host_table = array("i", [-1]) * sizes[-1]
        self._changed: set[int] = set()  # sequences whose pages are not those of the tables

        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.rotary = _rotary(config, max_seqlen, self._room, position_embeddings, dtype, device)

        def stream(num_rows: int, length: int, dim: int) -> Tensor:
            return torch.empty(num_rows, length, config.num_kv_heads, dim, dtype=dtype, device=device)

        def layer() -> LayerCache:
            dims = (config.head_dim, config.value_dim)
            cmp = [stream(rows, page_rows // stride, dim) for dim in dims]
            slc = [stream(rows, page_rows, dim) for dim in dims]
            window = [None, None]
            if not config.share_kv:
                window = [stream(batch_size, self._ring(config.window_size), dim) for dim in dims]
            tail = [stream(batch_size, self._ring(config.compress_block_size), dim) for dim in dims]
            return LayerCache(self, *cmp, *slc, *window, *tail)

        self.layers = [layer() for _ in range(num_layers)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has; contiguous: 0."""
        return 0 if self.allocator is None else self.allocator.num_free

    def pages_needed(self, counts: int | Sequence[int]) -> int:
        """Pages that append(counts) would take."""
        counts = self._per_sequence("counts", counts)
        return sum(len(plan) for plan in self._plan_pages(counts).values())

    @contextmanager
    def append(self, counts: int | Sequence[int]) -> Iterator[CacheStep]:
        """A step that gives every sequence its number of new tokens (one number: each that many).

        ValueError, before anything has changed, if a sequence or the pages are full. If the block raises,
        the lengths stay as they were.
        """
        counts = self._per_sequence("counts", counts)
        if self.step is not None:
            raise ValueError("append: another step of this cache is in progress")
        for b, count in enumerate(counts):
            if self._lengths[b] + count > self.max_seqlen:
                raise ValueError(
                    f"counts[{b}] = {count} is too much: sequence {b} has {self._lengths[b]} tokens, and the "
                    f"cache holds max_seqlen = {self.max_seqlen} per sequence"
                )
            if count and not self._is_whole(b, self._lengths[b]):
                raise ValueError(
                    f"counts[{b}] = {count}: a failed step has overwritten what sequence {b} needs; reset it"
                )
        self._take_pages(counts)
        step = CacheStep(self, tuple(counts), self.lengths)
        self._send(step)
        self.step = step
        done = False
        try:
            yield self.step
            done = True
        finally:
            self.step = None
            for b, count in enumerate(counts):
                self._written[b] = max(self._written[b], self._lengths[b] + count)
                self._lengths[b] += count if done else 0
                self._trim(b)

    def roll_back(self, tokens: int | Sequence[int]) -> None:
        """Takes back the last tokens of every sequence (one number: of each that many), at most max_rollback
        beyond the most that the sequence ever had.
        """
        tokens = self._per_sequence("tokens", tokens)
        for b, count in enumerate(tokens):
            if count > self._lengths[b]:
                raise ValueError(f"tokens[{b}] = {count}: sequence {b} has only {self._lengths[b]} tokens")
            if count and not self._is_whole(b, self._lengths[b] - count):
                raise ValueError(
                    f"tokens[{b}] = {count} is too much: sequence {b} had {self._written[b]} tokens, of "
                    f"which max_rollback = {self.max_rollback} can be taken back"
                )
        for b, count in enumerate(tokens):
            self._lengths[b] -= count
            self._trim(b)

    def fork(self, source: int, target: int) -> None:
        """Makes the empty sequence `target` a copy of `source`: pages are shared until one of them writes."""
        self._check_sequence("source", source)
        self._check_sequence("target", target)
        if self._lengths[target]:
            raise ValueError(
                f"target = {target} has {self._lengths[target]} tokens; it must be empty: reset it"
            )
        if self.allocator is not None:
            self.allocator.share(self._tables[source])
            self._tables[target] = list(self._tables[source])
            self._changed.add(target)
        for layer in self.layers:
            for stream in layer.rings if self.allocator is not None else (*layer.rings, *layer.pages):
                stream[target] = stream[source]
        self._lengths[target], self._written[target] = self._lengths[source], self._written[source]

    def reset(self, sequences: Sequence[int] | None = None) -> None:
        """Empties the given sequences (default: all) and frees their pages."""
        for b in range(self.batch_size) if sequences is None else sequences:
            self._check_sequence("sequences", b)
            self._lengths[b] = self._written[b] = 0
            self._trim(b)

    def _ring(self, reach: int) -> int:
        """Tokens of a ring behind which a token looks back at reach - 1 others."""
        return min(self._room, reach - 1 + self.max_rollback)

    def _is_whole(self, b: int, length: int) -> bool:
        """Whether the rings hold what a sequence of this length needs."""
        config, written = self.config, self._written[b]
        reaches = [config.compress_block_size] + ([] if config.share_kv else [config.window_size])
        return all(max(0, length - (reach - 1)) >= written - self._ring(reach) for reach in reaches)

    def _plan_pages(self, counts: Sequence[int]) -> dict[int, list[int]]:
        """Positions in the tables of the sequences that need pages; of a shared page, if it is written to,
        first."""
        size, plans = self.page_block_size, {}
        if self.allocator is None:
            return plans
        left: dict[int, int] = {}  # owners of a shared page that have not taken a copy in this step
        for b, count in enumerate(counts):
            length, table = self._lengths[b], self._tables[b]
            if not count:
                continue
            plan = list(range(len(table), -(-(length + count) // size)))
            if length % size:
                page = table[length // size]
                if left.setdefault(page, self.allocator.owners(page)) > 1:
                    left[page] -= 1
                    plan.insert(0, length // size)
            plans[b] = plan
        return plans

    def _take_pages(self, counts: Sequence[int]) -> None:
        plans = self._plan_pages(counts)
        needed = sum(len(plan) for plan in plans.values())
        if needed > self.num_free_pages:
            raise ValueError(
                f"counts = {list(counts)} need {needed} pages, but the cache is full: "
                f"{self.num_free_pages} of num_pages = {self.allocator.num_pages} are free"
            )
        copies = []
        for b, plan in plans.items():
            if plan:
                self._changed.add(b)
            for at, page in zip(plan, self.allocator.allocate(len(plan)), strict=True):
                if at < len(self._tables[b]):
                    copies.append((self._tables[b][at], page))
                    self.allocator.release([self._tables[b][at]])
                    self._tables[b][at] = page
                else:
                    self._tables[b].append(page)
        if copies:
            old, new = torch.tensor(copies, device=self.cache_seqlens.device).unbind(1)
            for layer in self.layers:
                for stream in layer.pages:
                    stream[new] = stream[old]

    def _send(self, step: CacheStep) -> None:
        """Tells the device of a step, without waiting for it."""
        offsets = (accumulate(counts, initial=0) for counts in (step.counts, step.keys, step.seen))
        numbers = array("i", [*step.starts, *chain(*offsets)])
        if self._changed:
            for b in self._changed:
                table, width = self._tables[b], self._table_width
                row = array("i", table) + array("i", [-1]) * (width - len(table))
                self._host_table[b * width : (b + 1) * width] = row
            self._changed.clear()
            numbers += self._host_table
        source = torch.frombuffer(numbers, dtype=torch.int32)
        if self._numbers.is_cuda:
            source = source.pin_memory()
        self._numbers[: len(source)].copy_(source, non_blocking=True)

    def _trim(self, b: int) -> None:
        """Releases the pages behind the last token."""
        if self.allocator is not None:
            keep = -(-self._lengths[b] // self.page_block_size)
            if keep < len(self._tables[b]):
                self.allocator.release(self._tables[b][keep:])
                del self._tables[b][keep:]
                self._changed.add(b)

    def _per_sequence(self, name: str, values: int | Sequence[int]) -> list[int]:
        values = [values] * self.batch_size if isinstance(values, int) else list(values)
        if len(values) != self.batch_size or any(value < 0 for value in values):
            raise ValueError(f"{name} = {values}; expected {self.batch_size} numbers of at least 0")
        return values

    def _check_sequence(self, name: str, sequence: int) -> None:
        if not 0 <= sequence < self.batch_size:
            raise ValueError(f"{name} = {sequence}; expected a sequence from 0 to {self.batch_size - 1}")
        if self.step is not None:
            raise ValueError(f"{name} = {sequence}: a step of this cache is in progress")


def _rotary(
    config: NSAConfig,
    max_seqlen: int,
    rows: int,
    given: PositionEmbeddings | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> PositionEmbeddings:
    """cos and sin of every position that the streams have room for."""
    dtype = torch.promote_types(dtype, torch.float32)
    if given is None:
        positions = torch.arange(rows, device=device)
        return rope_tables(positions, config.head_dim, float(config.rope_theta), dtype)
    for name, table in zip(("cos", "sin"), given, strict=True):
        if table.ndim != 2 or table.shape[0] < max_seqlen or table.shape[1] != config.head_dim:
            raise ValueError(
                f"position_embeddings: {name} has shape {list(table.shape)}; it must be "
                f"[max_seqlen, head_dim] = [{max_seqlen}, {config.head_dim}]"
            )
    padding = (0, 0, 0, rows)  # rows that no token ever reads
    cos, sin = (torch.nn.functional.pad(t.to(device, dtype), padding)[:rows] for t in given)
    return cos.contiguous(), sin.contiguous()
