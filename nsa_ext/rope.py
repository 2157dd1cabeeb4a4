"""Rotary position embeddings, as in transformers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PositionEmbeddings", "apply_rope", "rope_tables"]

PositionEmbeddings = tuple[Tensor, Tensor]  # cos, sin


def rope_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> PositionEmbeddings:
    """cos and sin ``[T, head_dim]`` of the rotary embedding at integer positions ``[T]``."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).to(dtype) / head_dim
    angles = positions.to(dtype).unsqueeze(-1) * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x ``[T, H, D]`` by cos and sin ``[T, D]``: channel c is paired with channel c + D/2."""
    first, second = x.chunk(2, dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    return (x * cos.unsqueeze(1) + rotated_half * sin.unsqueeze(1)).to(x.dtype)
