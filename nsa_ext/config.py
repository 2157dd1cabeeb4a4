"""The options of a NativeSparseAttention layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["COMPRESS_KINDS", "COMPRESS_ROPES", "NSAConfig"]

COMPRESS_KINDS = ("mlp", "linear", "mean")
COMPRESS_ROPES = ("after", "before", "none")

_POSITIVE = (
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "head_dim_v",
    "compress_block_size",
    "compress_stride",
    "block_size",
    "num_selected_blocks",
    "window_size",
    "compress_hidden_size",
)
_OPTIONAL = ("head_dim_v", "compress_hidden_size")
_FLAGS = ("compress_per_head", "share_kv", "qkv_bias")


@dataclass
class NSAConfig:
    """Sizes and options of one layer. Every violated rule is a ValueError naming the field, its value and
    what is allowed.

    Lengths and positions are in tokens. ``num_heads`` query heads share ``num_kv_heads`` key/value heads
    in groups of ``num_heads // num_kv_heads``; q and k have ``head_dim`` channels (even, for RoPE), v and
    the heads' outputs ``head_dim_v`` (None: head_dim).

    * Compression: blocks of ``compress_block_size`` (l) every ``compress_stride`` (d) tokens, d dividing
      l and block_size. ``compress_kind``: "mlp", "linear" or "mean"; ``compress_hidden_size``: the MLP's
      hidden width (None: the stream's head dim); ``compress_per_head``: own parameters for each KV head.
      ``compress_rope``: whether compressed keys are rotated "after" compression, at their block's first
      position, "before" it, or not at all ("none").
    * Selection: ``num_selected_blocks`` (n) blocks of ``block_size`` (l'), of which
      ``num_initial_blocks`` first and ``num_local_blocks`` last ones are forced.
    * Window: ``window_size`` keys, the query's own included.
    * ``share_kv``: one key and value projection for all three branches instead of three.
    * ``rope_theta``: base of the rotary angles when the caller passes no position_embeddings.
    * ``gate_bias``: initial bias of the gate projection. The default, -ln 2, opens each gate by 1/3: the
      gates sum to 1, so the layer starts at the output scale of one attention, and sigmoid is far from
      saturation.
    * ``softmax_scale``: None means ``head_dim ** -0.5``.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int | None = None
    compress_block_size: int = 32
    compress_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    num_initial_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compress_kind: str = "mlp"
    compress_hidden_size: int | None = None
    compress_per_head: bool = False
    compress_rope: str = "after"
    share_kv: bool = False
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    gate_bias: float = -math.log(2.0)
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not (name in _OPTIONAL and getattr(self, name) is None):
                self._require_int(name, minimum=1)
        self._require_int("num_initial_blocks", minimum=0)
        self._require_int("num_local_blocks", minimum=0)
        for name in _FLAGS:
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        self._require("compress_kind", self.compress_kind in COMPRESS_KINDS, f"one of {COMPRESS_KINDS}")
        self._require("compress_rope", self.compress_rope in COMPRESS_ROPES, f"one of {COMPRESS_ROPES}")

        heads, stride = self.num_heads, self.compress_stride
        self._require("num_kv_heads", heads % self.num_kv_heads == 0, f"a divisor of num_heads = {heads}")
        self._require("head_dim", self.head_dim % 2 == 0, "an even number, for the rotary embedding")
        multiple = f"a multiple of compress_stride = {stride}"
        self._require("compress_block_size", self.compress_block_size % stride == 0, multiple)
        self._require("block_size", self.block_size % stride == 0, multiple)
        forced = self.num_initial_blocks + self.num_local_blocks
        self._require(
            "num_selected_blocks",
            self.num_selected_blocks >= forced,
            f"at least num_initial_blocks + num_local_blocks = {forced}",
        )

        self._require("rope_theta", _is_real(self.rope_theta) and self.rope_theta > 0, "a positive number")
        self._require("gate_bias", _is_real(self.gate_bias), "a finite number")
        if self.softmax_scale is not None:
            scale_is_legal = _is_real(self.softmax_scale) and self.softmax_scale > 0
            self._require("softmax_scale", scale_is_legal, "a positive number or None")

    @property
    def value_dim(self) -> int:
        """head_dim_v, or what stands for it."""
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NSAConfig:
        """The inverse of to_dict; an unknown or missing key is a ValueError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"unknown NSAConfig keys {unknown}; allowed are {sorted(fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"missing NSAConfig keys {missing}; required are {required}")
        return cls(**values)

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{name} = {getattr(self, name)!r} is not allowed; it must be {allowed}")

    def _require_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        optional = " or None" if name in _OPTIONAL else ""
        self._require(name, is_int and value >= minimum, f"an integer >= {minimum}{optional}")


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
