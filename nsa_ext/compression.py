"""phi: the learned map from a block of tokens to one compressed token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_ext import ops
from nsa_ext.config import COMPRESS_KINDS

__all__ = ["BlockCompression"]

_SILU_SECOND_MOMENT = 0.3558  # E[silu(z)^2] for z ~ N(0, 1)


class BlockCompression(nn.Module):
    """phi of one stream (the keys or the values): x ``[S, H, D]`` -> ``[S // stride, H, D]``.

    Block i of a sequence covers its tokens ``[i*stride, i*stride + block_size)``. ``kind``:

    * ``"mlp"``: ``w2 . silu(w1 . vec(x + pe) + b1) + b2``, hidden width ``hidden_size`` (None: head_dim),
    * ``"linear"``: ``w1 . vec(x + pe) + b1``,
    * ``"mean"``: the mean over the block, without parameters.

    Parameters (None where the kind has none), with h = num_heads if ``per_head`` else 1: pe ``[h,
    block_size, D]``, w1 ``[h, block_size*D, F]``, b1 ``[h, F]``, w2 ``[h, F, D]``, b2 ``[h, D]``; F = D
    for "linear".

    Initialisation keeps the variance: for tokens of unit variance, whatever their correlation inside a
    block, the compressed token has unit variance too, as a token of its own and not as an average (whose
    variance would be 1 / block_size, which would starve the compressed branch and flatten its scores).
    Fan-in rule: ``w1 ~ N(0, 1 / (block_size * D))`` makes the pre-activations N(0, 1), and since
    ``E[silu(z)^2] = 0.3558`` for such z, ``w2 ~ N(0, 1 / (0.3558 * F))``. pe and the biases start at
    zero: w1 already tells the positions apart.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        block_size: int,
        stride: int,
        kind: str = "mlp",
        hidden_size: int | None = None,
        per_head: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in COMPRESS_KINDS:
            raise ValueError(f"kind = {kind!r} is not allowed; it must be one of {COMPRESS_KINDS}")
        sizes = {"num_heads": num_heads, "head_dim": head_dim, "block_size": block_size, "stride": stride}
        if hidden_size is not None:
            sizes["hidden_size"] = hidden_size
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} = {size} is not allowed; it must be at least 1")
        if block_size % stride:
            raise ValueError(f"stride = {stride} is not allowed; it must divide block_size = {block_size}")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.block_size, self.stride = block_size, stride
        self.kind, self.per_head = kind, per_head
        self.hidden_size = (hidden_size or head_dim) if kind == "mlp" else head_dim

        h, width = num_heads if per_head else 1, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        if kind != "mean":
            shapes = {
                "pe": (h, block_size, head_dim),
                "w1": (h, block_size * head_dim, width),
                "b1": (h, width),
            }
        if kind == "mlp":
            shapes |= {"w2": (h, width, head_dim), "b2": (h, head_dim)}
        for name in ("pe", "w1", "b1", "w2", "b2"):
            shape = shapes.get(name)
            value = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, value)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights by the rule of the class documentation."""
        for zero in (self.pe, self.b1, self.b2):
            if zero is not None:
                zero.zero_()
        if self.w1 is not None:
            self.w1.normal_(std=(self.block_size * self.head_dim) ** -0.5)
        if self.w2 is not None:
            self.w2.normal_(std=(_SILU_SECOND_MOMENT * self.hidden_size) ** -0.5)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """Compresses the packed sequences of x ``[S, H, D]`` -> ``[S // stride, H, D]``.

        cu_seqlens: their int32 offsets ``[B + 1]`` (None: one sequence of max_seqlen tokens, by default S).
        Block i of sequence b is row ``cu_seqlens[b] // stride + i``; rows of no block are zero.
        """
        if x.ndim != 3 or x.shape[1:] != (self.num_heads, self.head_dim):
            expected = f"[S, {self.num_heads}, {self.head_dim}]"
            raise ValueError(f"x has shape {list(x.shape)}; it must be {expected} (packed sequences)")
        parameters = (self.pe, self.w1, self.b1, self.w2, self.b2)
        return ops.compress(x, *parameters, cu_seqlens, max_seqlen, self.block_size, self.stride, self.kind)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, block_size={self.block_size}, "
            f"stride={self.stride}, kind={self.kind!r}, hidden_size={self.hidden_size}, "
            f"per_head={self.per_head}"
        )
