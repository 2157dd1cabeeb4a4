"""Between the layouts of a call (batched, padded, packed) and the packed layout of the operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Packing"]


@dataclass
class Packing:
    """How a call's tokens lie in the packed layout [T, ...]. Made of shapes and tensors: it never waits
    for a device.

    A padding mask moves the real tokens to the front, in order, by a permutation: all T = B * S rows
    stay, the padding behind the last sequence, where the operators ignore it. So the shapes do not depend
    on the mask's values.
    """

    cu_seqlens: Tensor | None  # [B + 1] int32, None = one sequence of all rows
    max_seqlen: int
    batch: tuple[int, int] | None = None  # (B, S) of a batched call
    order: Tensor | None = None  # [T] token of each packed row
    inverse: Tensor | None = None  # [T] packed row of each token

    @classmethod
    def of(
        cls,
        name: str,
        leading: torch.Size,
        device: torch.device,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Packing:
        """leading: the token dims [B, S] or [T] of the argument called name."""
        batch = (leading[0], leading[1]) if len(leading) == 2 else None
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("cu_seqlens and a padding mask exclude each other; give one of them")
            if (
                cu_seqlens.ndim != 1
                or cu_seqlens.shape[0] < 1
                or cu_seqlens.dtype not in (torch.int32, torch.int64)
            ):
                found = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
                raise ValueError(f"cu_seqlens is {found}; it must be int32 [B + 1]")
            if batch is not None and batch[0] != 1:
                raise ValueError(
                    f"{name} has {batch[0]} rows; with cu_seqlens it must be packed (no rows, or one)"
                )
            tokens = leading[-1]
            return cls(cu_seqlens.to(torch.int32), tokens if max_seqlen is None else max_seqlen, batch)
        if mask is not None:
            if batch is None or mask.shape != leading:
                expected = "[B, S] = " + str(list(leading)) if batch else f"None, since {name} is packed"
                raise ValueError(f"the padding mask has shape {list(mask.shape)}; it must be {expected}")
            real = mask.to(device=device, dtype=torch.bool)
            order = torch.argsort((~real).flatten().to(torch.uint8), stable=True)
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=device))
            ends = real.sum(1).cumsum(0)
            return cls(nn.functional.pad(ends, (1, 0)).to(torch.int32), leading[1], batch, order, inverse)
        if batch is None or batch[0] == 1:
            return cls(None, leading[-1], batch)
        offsets = torch.arange(batch[0] + 1, dtype=torch.int32, device=device) * batch[1]
        return cls(offsets, batch[1], batch)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] or [T, ...] -> [T, ...]"""
        x = x if self.batch is None else x.flatten(0, 1)
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of pack."""
        x = x if self.inverse is None else x.index_select(0, self.inverse)
        return x if self.batch is None else x.unflatten(0, self.batch)

    def zero_padding(self, x: Tensor) -> Tensor:
        """Zeroes the rows of packed x behind the last sequence, whatever they held."""
        if self.cu_seqlens is None or (self.batch is not None and self.order is None and self.batch[0] != 1):
            return x  # every row belongs to a sequence
        padding = torch.arange(x.shape[0], device=x.device) >= self.cu_seqlens[-1]
        return x.masked_fill(padding.view(-1, *(1,) * (x.ndim - 1)), 0)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Position [T] of each packed row in its own sequence; behind the last sequence, any legal one."""
        rows = torch.arange(tokens, device=device)
        if self.cu_seqlens is None:
            return rows
        begin = self.cu_seqlens[self._sequence_of(rows, 1)]
        return rows - begin

    def block_starts(self, tokens: int, stride: int, device: torch.device) -> Tensor:
        """Packed row of the first token of each compressed row's block, [T // stride]; rows of no block:
        any row."""
        blocks = torch.arange(tokens // stride, device=device)
        if self.cu_seqlens is None:
            return blocks * stride
        begin = self.cu_seqlens[self._sequence_of(blocks, stride)]
        first = begin + (blocks - begin // stride) * stride
        return first.clamp(max=tokens - 1)

    def _sequence_of(self, rows: Tensor, stride: int) -> Tensor:
        """The last sequence that begins at or before each row of a packed tensor with a row per stride
        tokens.

        Sequences shorter than a stride may begin at the same row as the next one, but own no row.
        """
        first_rows = self.cu_seqlens // stride
        return torch.searchsorted(first_rows, rows.to(first_rows.dtype), right=True) - 1
