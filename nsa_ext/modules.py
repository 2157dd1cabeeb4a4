"""NativeSparseAttention: the attention layer of a transformer, from hidden states to hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa_ext.cache import LayerCache, NSACache
from nsa_ext.cache_step import Streams
from nsa_ext.compression import BlockCompression
from nsa_ext.config import NSAConfig
from nsa_ext.functional import NSAInfo, packed_attention
from nsa_ext.packing import Packing
from nsa_ext.rope import PositionEmbeddings, apply_rope, rope_tables

__all__ = ["NativeSparseAttention", "apply_rope", "rope_tables"]

_BRANCHES = ("cmp", "slc", "swa")


class NativeSparseAttention(nn.Module):
    """Causal self-attention with the three gated branches of NSA (arXiv 2502.11089); see NSAConfig for
    the options.

    Initialisation gives every branch a comparable gradient from the first step. For hidden states of unit
    variance (behind a norm), each projection is drawn by the fan-in rule ``N(0, 1 / fan_in)``, so
    queries, keys and values have unit variance and the logits, with the default scale, too;
    BlockCompression keeps that variance, so that compressed keys compete with the same logits. The gate
    projection starts with zero weights (they learn at once: the branches' outputs differ) and the bias
    ``config.gate_bias``: all gates equal, by default 1/3.

    Training with Adam at a high learning rate: Adam moves every weight by about as much, so a layer's output
    moves with its fan-in. A gate then closes before its branch has learnt anything, and phi's first layer
    (fan-in block_size * head_dim) does not settle. Give ``gate_proj`` a tenth of the learning rate and w1 the
    share hidden_size / fan-in of it, as examples/pretrain.py does.
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # As text, because torch.compile makes a float attribute an input of the graph, but guards a string.
        self._rope_theta = repr(float(config.rope_theta))
        self._softmax_scale = repr(float(config.softmax_scale or config.head_dim**-0.5))
        factory = {"device": device, "dtype": dtype}
        width, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads

        def linear(out_features: int, bias: bool) -> nn.Linear:
            return nn.Linear(width, out_features, bias=bias, **factory)

        self.q_proj = linear(heads * config.head_dim, config.qkv_bias)
        for branch in ("",) if config.share_kv else _BRANCHES:
            suffix = f"_{branch}" if branch else ""
            self.add_module(f"k_proj{suffix}", linear(kv_heads * config.head_dim, config.qkv_bias))
            self.add_module(f"v_proj{suffix}", linear(kv_heads * config.value_dim, config.qkv_bias))
        self.gate_proj = linear(heads * 3, True)
        self.o_proj = nn.Linear(heads * config.value_dim, width, bias=False, **factory)

        def compression(head_dim: int) -> BlockCompression:
            return BlockCompression(
                kv_heads,
                head_dim,
                config.compress_block_size,
                config.compress_stride,
                config.compress_kind,
                config.compress_hidden_size,
                config.compress_per_head,
                **factory,
            )

        self.compress_k = compression(config.head_dim)
        self.compress_v = compression(config.value_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights by the rules of the class documentation."""
        for module in self.children():
            if isinstance(module, BlockCompression):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
        self.gate_proj.weight.zero_()
        self.gate_proj.bias.fill_(self.config.gate_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: LayerCache | NSACache | None = None,
        return_info: bool = False,
    ) -> Tensor | tuple[Tensor, NSAInfo]:
        """hidden_states ``[B, S, C]``, or packed ``[T, C]`` -> the same shape, or (output, NSAInfo) with
        return_info.

        cu_seqlens: int32 ``[B + 1]``, the offsets of packed sequences (None: one sequence); max_seqlen:
        any upper bound of their lengths, in tokens. attention_mask: bool or 0/1 ``[B, S]``, True = real
        token, padding on any side; the output is zero at the padding. position_embeddings: (cos, sin),
        each ``[B, S, head_dim]`` or ``[S, head_dim]`` (packed: ``[T, head_dim]``); None computes them,
        positions counting from each sequence's first real token.

        cache: the layer's part of an NSACache, inside ``with cache.append(...)``, under torch.no_grad(). The
        hidden states are then those of the step's new tokens, and the step knows sequences and positions.
        """
        config = self.config
        if hidden_states.ndim not in (2, 3) or hidden_states.shape[-1] != config.hidden_size:
            expected = f"[B, S, {config.hidden_size}] or [T, {config.hidden_size}]"
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}; it must be {expected}")
        if cache is not None:
            others = (position_embeddings, attention_mask, cu_seqlens, max_seqlen)
            return self._forward_cached(hidden_states, cache, others, return_info)
        leading, device = hidden_states.shape[:-1], hidden_states.device
        packing = Packing.of("hidden_states", leading, device, attention_mask, cu_seqlens, max_seqlen)
        x = packing.zero_padding(packing.pack(hidden_states))  # 0 * NaN would reach the weights' gradients
        cos, sin = self._rope(position_embeddings, packing, x)

        q, streams, gate_logits = self._project(x, cos, sin)
        k_cmp = self.compress_k(streams.cmp[0], packing.cu_seqlens, packing.max_seqlen)
        v_cmp = self.compress_v(streams.cmp[1], packing.cu_seqlens, packing.max_seqlen)
        if config.compress_rope == "after":
            first = packing.block_starts(x.shape[0], config.compress_stride, device)
            k_cmp = apply_rope(k_cmp, cos.index_select(0, first), sin.index_select(0, first))
        swa = streams.slc if config.share_kv else streams.swa
        tensors = (q, k_cmp, v_cmp, *streams.slc, *swa, gate_logits)
        o, info = packed_attention(tensors, packing, packing, self._options, return_info=return_info)
        output = packing.unpack(self.o_proj(o.flatten(1)))
        return output if info is None else (output, info)

    def _forward_cached(
        self, hidden_states: Tensor, cache: LayerCache | NSACache, others: tuple, return_info: bool
    ) -> Tensor | tuple[Tensor, NSAInfo]:
        names = ("position_embeddings", "attention_mask", "cu_seqlens", "max_seqlen")
        for name, value in zip(names, others, strict=True):
            if value is not None:
                raise ValueError(f"{name} is not None; with a cache, the step of cache.append(...) knows it")
        if isinstance(cache, NSACache):
            if len(cache.layers) != 1:
                raise ValueError(f"cache has {len(cache.layers)} layers; pass one of them: cache.layers[i]")
            cache = cache.layers[0]
        step, leading = cache.cache.step, hidden_states.shape[:-1]
        if step is None:
            raise ValueError("cache is in no step; call the layer inside `with cache.append(...)`")
        if cache.cache.config != self.config:
            raise ValueError("cache was made for another config than this layer's")
        evenly = len(leading) == 1 or step.counts == (leading[1],) * leading[0]
        if leading.numel() < step.total or not evenly:
            expected = f"the step's tokens, packed [{step.total}, C], or [B, S, C] with S for each sequence"
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}; it must be {expected}")
        x = hidden_states if len(leading) == 1 else hidden_states.flatten(0, 1)
        q, streams, gate_logits = self._project(x, *step.rotary(x.shape[0]))
        phi = (self.compress_k, self.compress_v)
        o, info = step.attend(cache, q, streams, gate_logits, phi, self._options, return_info)
        output = self.o_proj(o.flatten(1)).unflatten(0, leading)
        if info is None:
            return output
        return output, NSAInfo(**{name: t.unflatten(0, leading) for name, t in vars(info).items()})

    @property
    def _options(self) -> dict[str, float]:
        """The keyword arguments of ops.attention."""
        config = self.config
        return {
            "compress_block_size": config.compress_block_size,
            "compress_stride": config.compress_stride,
            "block_size": config.block_size,
            "num_selected_blocks": config.num_selected_blocks,
            "num_initial_blocks": config.num_initial_blocks,
            "num_local_blocks": config.num_local_blocks,
            "window_size": config.window_size,
            "softmax_scale": float(self._softmax_scale),
        }

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Streams, Tensor]:
        """Queries, keys and values and gate logits of the tokens x [T, C] at their positions."""
        config = self.config
        q = apply_rope(self._heads(self.q_proj, x, config.head_dim), cos, sin)
        k_slc, v_slc = self._key_value("slc", x)
        rotated_slc = apply_rope(k_slc, cos, sin)
        if config.share_kv:
            k_cmp = rotated_slc if config.compress_rope == "before" else k_slc
            streams = Streams((k_cmp, v_slc), (rotated_slc, v_slc), (None, None))
        else:
            k_swa, v_swa = self._key_value("swa", x)
            k_cmp, v_cmp = self._key_value("cmp", x)
            k_cmp = apply_rope(k_cmp, cos, sin) if config.compress_rope == "before" else k_cmp
            streams = Streams((k_cmp, v_cmp), (rotated_slc, v_slc), (apply_rope(k_swa, cos, sin), v_swa))
        return q, streams, self.gate_proj(x).unflatten(-1, (config.num_heads, 3))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.to_dict().items())

    def _heads(self, projection: nn.Module, x: Tensor, head_dim: int) -> Tensor:
        return projection(x).unflatten(-1, (-1, head_dim))

    def _key_value(self, branch: str, x: Tensor) -> tuple[Tensor, Tensor]:
        suffix = "" if self.config.share_kv else f"_{branch}"
        k_proj, v_proj = getattr(self, f"k_proj{suffix}"), getattr(self, f"v_proj{suffix}")
        return self._heads(k_proj, x, self.config.head_dim), self._heads(v_proj, x, self.config.value_dim)

    def _rope(
        self, position_embeddings: PositionEmbeddings | None, packing: Packing, x: Tensor
    ) -> PositionEmbeddings:
        """cos and sin of every packed row, [T, head_dim]."""
        dim = self.config.head_dim
        if position_embeddings is None:
            dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot count past 256
            return rope_tables(packing.positions(x.shape[0], x.device), dim, float(self._rope_theta), dtype)
        leading = (x.shape[0],) if packing.batch is None else packing.batch
        tables = []
        for name, table in zip(("cos", "sin"), position_embeddings, strict=True):
            shape = list(table.shape)
            if packing.batch is None and table.ndim == 3:
                table = table.squeeze(0)
            rows = table.shape[:-2]
            if table.shape[-2:] != (leading[-1], dim) or (rows and rows not in ((1,), leading[:-1])):
                expected = [*leading, dim]
                raise ValueError(f"position_embeddings: {name} has shape {shape}; it must be {expected}")
            tables.append(packing.pack(table.expand(*leading, dim)))
        return tables[0], tables[1]
