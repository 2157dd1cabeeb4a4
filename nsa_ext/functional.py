"""nsa_attention: native sparse attention as one function, on batched, padded or packed sequences."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_ext import ops
from nsa_ext.packing import Packing

__all__ = ["NSAInfo", "nsa_attention", "packed_attention"]

CompressionFn = Callable[..., tuple[Tensor, Tensor]]
SelectionFn = Callable[[Tensor, Tensor, Tensor, Callable[[], Tensor]], Tensor]


@dataclass
class NSAInfo:
    """What happened inside a call. ``...`` is the call's own layout, [B, S] or [T]; padding holds -1,
    -inf and 0."""

    block_indices: Tensor  # [..., Hkv, n] int32: selected blocks of the token's sequence, -1 = unused
    lse_cmp: Tensor  # [..., Hq] natural log, -inf where the branch had no visible key
    lse_slc: Tensor
    lse_swa: Tensor
    gates: Tensor  # [..., Hq, 3]: sigmoid of the logits, in the order cmp, slc, swa


torch.export.register_dataclass(NSAInfo, serialized_type_name="nsa_ext.NSAInfo")


def packed_attention(
    tensors: tuple[Tensor, ...],
    packing_q: Packing,
    packing_k: Packing,
    options: dict[str, Any],
    selection_fn: SelectionFn | None = None,
    return_info: bool = False,
) -> tuple[Tensor, NSAInfo | None]:
    """The operators on packed tensors (q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits).

    options: the keyword arguments of ops.attention. The NSAInfo is in the call's own layout, o is packed.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_swa, v_swa, gate_logits = tensors
    seqlens = (packing_q.cu_seqlens, packing_k.cu_seqlens, packing_q.max_seqlen, packing_k.max_seqlen)
    if selection_fn is None and not return_info:
        return ops.attention(*tensors, *seqlens, **options)[0], None
    if selection_fn is None:
        outputs = ops.attention_forward(*tensors, *seqlens, **options)
        o, block_indices = outputs.o, outputs.block_indices
        lses = (outputs.lse_cmp, outputs.lse_slc, outputs.lse_swa)
    else:
        scale = {"softmax_scale": options["softmax_scale"]}
        blocks = {name: options[name] for name in ("compress_block_size", "compress_stride")}
        o_cmp, lse_cmp = ops.compressed_attention(q, k_cmp, v_cmp, *seqlens, **blocks, **scale)

        def scores_fn() -> Tensor:
            block_size = options["block_size"]
            return ops.block_scores(q, k_cmp, lse_cmp, *seqlens, **blocks, block_size=block_size, **scale)

        with torch.no_grad():
            block_indices = selection_fn(q, k_cmp, lse_cmp, scores_fn)
        if block_indices.ndim != 3 or block_indices.shape[:2] != (q.shape[0], k_slc.shape[1]):
            expected = f"[T, Hkv, n] = [{q.shape[0]}, {k_slc.shape[1]}, n]"
            raise ValueError(
                f"selection_fn returned {list(block_indices.shape)}; block_indices must be {expected}"
            )
        block_indices = block_indices.to(torch.int32)
        o_slc, lse_slc = ops.selected_attention(
            q, k_slc, v_slc, block_indices, *seqlens, block_size=options["block_size"], **scale
        )
        o_swa, lse_swa = ops.sliding_window_attention(
            q, k_swa, v_swa, *seqlens, window_size=options["window_size"], **scale
        )
        o = ops.gated_combine(o_cmp, o_slc, o_swa, packing_q.zero_padding(gate_logits))
        lses = (lse_cmp, lse_slc, lse_swa)
    if not return_info:
        return o, None
    gates = packing_q.zero_padding(torch.sigmoid(gate_logits.detach()))
    return o, NSAInfo(*(packing_q.unpack(x) for x in (block_indices, *lses, gates)))


def nsa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    compression_fn: CompressionFn | tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
    selection_fn: SelectionFn | None = None,
    window_size: int = 512,
    *,
    gate_logits: Tensor | None = None,
    key_slc: Tensor | None = None,
    value_slc: Tensor | None = None,
    key_swa: Tensor | None = None,
    value_swa: Tensor | None = None,
    key_cmp: Tensor | None = None,
    value_cmp: Tensor | None = None,
    compress_block_size: int = 32,
    compress_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_initial_blocks: int = 1,
    num_local_blocks: int = 2,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, NSAInfo]:
    """Causal native sparse attention (arXiv 2502.11089) -> o ``[..., Hq, Dv]``, or (o, NSAInfo) with
    return_info.

    query ``[..., Hq, Dk]``, key ``[..., Hkv, Dk]``, value ``[..., Hkv, Dv]``, where ``...`` is ``[B,
    S]``, or ``[T]`` for packed sequences with the int32 offsets cu_seqlens ``[B + 1]`` (None: one
    sequence) and max_seqlen, any upper bound of their lengths in tokens. Positions must already be
    encoded in query and key. mask: bool ``[B, S]``, True = real token, padding on any side; o is zero at
    the padding. Without mask and cu_seqlens there may be fewer queries than keys: the queries are then
    the last tokens of their sequences.

    * key_slc, value_slc, key_swa, value_swa, key_cmp, value_cmp: the branches' own keys and values where
      they are not key and value; those of cmp are *uncompressed*.
    * compression_fn(key, value) -> (k_cmp, v_cmp): packed ``[S, Hkv, D]`` -> ``[S // d, Hkv, D]``, block
      i of sequence b in row ``cu_seqlens[b] // d + i``; it also gets ``cu_seqlens=`` and ``max_seqlen=``
      if its signature has them. A pair of BlockCompression is one as well. Default: the mean of each
      block.
    * selection_fn(query, k_cmp, lse, scores_fn) -> block_indices replaces the selection: packed tensors,
      block_indices ``[T, Hkv, n]`` as in ops.selected_attention; scores_fn() returns ops.block_scores.
    * gate_logits ``[..., Hq, 3]`` in the order cmp, slc, swa. Default: each branch weighs 1/3.
    * The sizes are those of ops.attention; softmax_scale defaults to ``Dk ** -0.5``.
    """
    packed_keys = {"cmp": (key_cmp, value_cmp), "slc": (key_slc, value_slc), "swa": (key_swa, value_swa)}
    _check_shapes(query, key, value, packed_keys, gate_logits)
    leading_q, leading_k = query.shape[:-2], key.shape[:-2]
    same_tokens = leading_q == leading_k
    if not same_tokens and (mask is not None or cu_seqlens is not None):
        raise ValueError(
            f"query has the tokens {list(leading_q)} and key {list(leading_k)}; "
            "with a mask or cu_seqlens they must agree"
        )
    packing_q = Packing.of("query", leading_q, query.device, mask, cu_seqlens, max_seqlen)
    packing_k = packing_q if same_tokens else Packing.of("key", leading_k, key.device)

    q, k, v = packing_q.pack(query), packing_k.pack(key), packing_k.pack(value)
    branches: dict[str, tuple[Tensor, Tensor]] = {}
    for branch, (own_key, own_value) in packed_keys.items():
        branches[branch] = (
            k if own_key is None else packing_k.pack(own_key),
            v if own_value is None else packing_k.pack(own_value),
        )
    if gate_logits is None:
        gate_dtype = torch.promote_types(q.dtype, torch.float32)
        gates = q.new_full(
            (q.shape[0], q.shape[1], 3), -math.log(2.0), dtype=gate_dtype
        )  # sigmoid of it is 1/3
    else:
        gates = packing_q.pack(gate_logits)
    k_cmp, v_cmp = _compress(
        compression_fn, *branches["cmp"], packing_k, compress_block_size, compress_stride
    )
    options = {
        "compress_block_size": compress_block_size,
        "compress_stride": compress_stride,
        "block_size": block_size,
        "num_selected_blocks": num_selected_blocks,
        "num_initial_blocks": num_initial_blocks,
        "num_local_blocks": num_local_blocks,
        "window_size": window_size,
        "softmax_scale": softmax_scale,
    }
    tensors = (q, k_cmp, v_cmp, *branches["slc"], *branches["swa"], gates)
    o, info = packed_attention(tensors, packing_q, packing_k, options, selection_fn, return_info)
    o = packing_q.unpack(o)
    return o if info is None else (o, info)


def _compress(
    compression_fn: Any, key: Tensor, value: Tensor, packing: Packing, block_size: int, stride: int
) -> tuple[Tensor, Tensor]:
    seqlens = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}
    if compression_fn is None:
        options = {"block_size": block_size, "stride": stride, "kind": "mean"}
        return ops.compress(key, **seqlens, **options), ops.compress(value, **seqlens, **options)
    if isinstance(compression_fn, (tuple, list, nn.ModuleList)):
        compress_key, compress_value = compression_fn
        k_cmp = compress_key(key, **_accepted(compress_key, seqlens))
        v_cmp = compress_value(value, **_accepted(compress_value, seqlens))
    else:
        k_cmp, v_cmp = compression_fn(key, value, **_accepted(compression_fn, seqlens))
    for name, compressed, x in (("k_cmp", k_cmp, key), ("v_cmp", v_cmp, value)):
        expected = (x.shape[0] // stride, *x.shape[1:])
        if compressed.shape != expected:
            raise ValueError(
                f"compression_fn returned {name} {list(compressed.shape)}; it must be {list(expected)}"
            )
    return k_cmp, v_cmp


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function.forward if isinstance(function, nn.Module) else function).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: dict[str, tuple[Tensor | None, Tensor | None]],
    gate_logits: Tensor | None,
) -> None:
    if query.ndim not in (3, 4):
        raise ValueError(f"query has shape {list(query.shape)}; it must be [B, S, Hq, Dk] or [T, Hq, Dk]")
    key_shape = (*query.shape[:-3], *key.shape[-3:-1], query.shape[-1]) if key.ndim == query.ndim else None
    if key.shape != key_shape:
        raise ValueError(
            f"key has shape {list(key.shape)}; with query {list(query.shape)} it must have as many dims, "
            "and the same batch size and head dim"
        )
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"query has {query.shape[-2]} heads; key has {key.shape[-2]}, which must divide them"
        )
    if query.shape[-3] > key.shape[-3]:
        raise ValueError(f"query has {query.shape[-3]} tokens; there may be at most key's {key.shape[-3]}")
    if value.shape[:-1] != key.shape[:-1] or value.ndim != key.ndim:
        raise ValueError(
            f"value has shape {list(value.shape)}; it must agree with key {list(key.shape)} but for Dv"
        )
    for branch, (own_key, own_value) in branches.items():
        for name, own, like in ((f"key_{branch}", own_key, key), (f"value_{branch}", own_value, value)):
            if own is not None and own.shape != like.shape:
                raise ValueError(f"{name} has shape {list(own.shape)}; it must be {list(like.shape)}")
    if gate_logits is not None and gate_logits.shape != (*query.shape[:-1], 3):
        expected = [*query.shape[:-1], 3]
        raise ValueError(f"gate_logits has shape {list(gate_logits.shape)}; it must be {expected}")
