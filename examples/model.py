"""A decoder-only language model: RMSNorm, RoPE, SwiGLU, NSA or full attention; on packed tokens [T, ...]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from sampling import greedy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

import nsa_ext
from nsa_ext.modules import apply_rope, rope_tables

Rope: TypeAlias = tuple[Tensor, Tensor]  # cos, sin [T, head_dim]


@dataclass
class ModelConfig:
    """Shape of the model; `nsa` holds the options of `nsa_ext.NSAConfig` that only NSA has."""

    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    ffn_size: int = 704
    attention: str = "nsa"
    rope_theta: float = 10000.0
    nsa: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attention not in ("nsa", "full"):
            raise ValueError(f"attention={self.attention!r}: allowed are 'nsa' and 'full'")

    def nsa_config(self) -> nsa_ext.NSAConfig:
        """The attention's configuration for nsa_ext."""
        shared = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta")
        return nsa_ext.NSAConfig(**{name: getattr(self, name) for name in shared}, **self.nsa)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed batch lie, see `data.Batch`; lengths may be unknown to the host."""

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class FullAttention(nn.Module):
    """Grouped-query causal attention inside each document: FlashAttention on a GPU in 16 bits, otherwise
    scaled_dot_product_attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope, packing: Packing, mask: Tensor | None) -> Tensor:
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if runs_in_16_bits_on_cuda(x):
            offsets, longest = packing.cu_seqlens, packing.max_seqlen
            out = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))
        elif mask is None:
            # One causal call per document costs less than a masked one over everything.
            pieces = zip(*(t.split(packing.lengths) for t in (q, k, v)), strict=True)
            out = torch.cat([self._attend(*piece, is_causal=True) for piece in pieces])
        else:
            rows = (t.view(-1, packing.max_seqlen, *t.shape[1:]) for t in (q, k, v))
            out = self._attend(*rows, attn_mask=mask)
        return self.o_proj(out.reshape(len(x), -1))

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        if q.dim() == 3:  # the fast kernels want a batch dimension
            q, k, v = q[None], k[None], v[None]
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask).transpose(-3, -2)
        return out.reshape(-1, *out.shape[-2:])


def runs_in_16_bits_on_cuda(x: Tensor) -> bool:
    """What FlashAttention needs: a GPU, and autocast or weights in 16 bits."""
    return x.is_cuda and (torch.is_autocast_enabled("cuda") or x.dtype in (torch.bfloat16, torch.float16))


def document_mask(packing: Packing, total: int) -> Tensor:
    """bool [T / max_seqlen, 1, max_seqlen, max_seqlen]: key in the query's document and not behind it."""
    tokens = torch.arange(total, device=packing.cu_seqlens.device, dtype=packing.cu_seqlens.dtype)
    document = torch.bucketize(tokens, packing.cu_seqlens[1:], right=True).view(-1, 1, packing.max_seqlen)
    same = document[..., :, None] == document[..., None, :]
    return same & same.new_ones(packing.max_seqlen, packing.max_seqlen).tril()


class Layer(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.ffn = SwiGLU(config.hidden_size, config.ffn_size)
        self.is_nsa = config.attention == "nsa"
        if self.is_nsa:
            self.attention = nsa_ext.NativeSparseAttention(config.nsa_config())
        else:
            self.attention = FullAttention(config)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        packing: Packing | None = None,
        mask: Tensor | None = None,
        cache: nsa_ext.LayerCache | None = None,
    ) -> Tensor:
        h = self.attention_norm(x)
        if cache is not None:
            h = self.attention(h, cache=cache)
        elif self.is_nsa:
            h = self.attention(
                h, position_embeddings=rope, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen
            )
        else:
            h = self.attention(h, rope, packing, mask)
        x = x + h
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """The language model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Fan-in initialisation, smaller with depth for what writes to the residual stream.

        The attention of nsa_ext keeps its own, but for its output, which has to follow the depth.
        """
        self.embedding.weight.normal_()
        self.head.weight.zero_()  # the first loss is exactly ln(vocab_size)
        depth_scale = (2 * self.config.num_layers) ** -0.5
        for layer in self.layers:
            attention, ffn = layer.attention, layer.ffn
            linears = [ffn.gate_up, ffn.down, attention.o_proj]
            for linear in linears if layer.is_nsa else [*linears, attention.qkv_proj]:
                linear.weight.normal_(std=linear.in_features**-0.5)
            for linear in (ffn.down, attention.o_proj):
                linear.weight.mul_(depth_scale)

    def forward(
        self, tokens: Tensor, positions: Tensor, packing: Packing, targets: Tensor | None = None
    ) -> Tensor:
        """Logits [T, vocab] or, with targets [T], their mean cross-entropy in nats.

        tokens, positions: int64 [T].
        """
        x = self.embedding(tokens)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta, torch.float32)
        needs_mask = self.config.attention == "full" and packing.lengths is None
        needs_mask = needs_mask and not runs_in_16_bits_on_cuda(x)
        mask = document_mask(packing, len(tokens)) if needs_mask else None
        for layer in self.layers:
            x = layer(x, rope, packing, mask)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets)

    def new_cache(self, batch_size: int, max_seqlen: int, **options: Any) -> nsa_ext.NSACache:
        """An empty cache for this model, on its device and in the dtype that its keys will have here."""
        weight = self.head.weight
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        return nsa_ext.NSACache(
            *(self.config.nsa_config(), self.config.num_layers, batch_size, max_seqlen),
            **({"dtype": dtype, "device": weight.device} | options),
        )

    @torch.no_grad()
    def read_again(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The logits [., vocab] behind the last token of every sequence, without a cache."""
        device = self.head.weight.device
        lengths = tuple(len(tokens) for tokens in sequences)
        offsets = torch.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], device=device)
        packing = Packing(offsets.int(), max(lengths), lengths)
        tokens = torch.tensor([t for tokens in sequences for t in tokens], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        return self(tokens, positions, packing)[offsets[1:] - 1]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        choose: Callable[[int, Tensor], int] = greedy,
        stop: Sequence[int] = (),
        chunk: int = 1024,
        **cache_options: Any,
    ) -> Iterator[tuple[int, int]]:
        """Yields (prompt's number, token) as they come, at most `count` tokens per prompt, none behind one of
        `stop`.

        Prompts of different lengths go together; each is read `chunk` tokens at a time. choose(number,
        logits [vocab]): sampling.greedy or a sampling.Sampler. Full attention has no cache: it reads all
        again for every token.
        """
        prompts = [list(prompt) for prompt in prompts]
        histories: list[list[int]] = [[] for _ in prompts]
        reader = None
        if self.config.attention == "nsa":
            longest = max(map(len, prompts), default=0) + count
            reader = Reader(self, self.new_cache(len(prompts), longest, **cache_options))
        left = {b: count for b, prompt in enumerate(prompts) if prompt and count > 0}
        unread = prompts
        while left:
            new = [tokens[:chunk] if b in left else [] for b, tokens in enumerate(unread)]
            unread = [tokens[len(part) :] for tokens, part in zip(unread, new, strict=True)]
            for history, part in zip(histories, new, strict=True):
                history += part
            read = [b for b in range(len(prompts)) if new[b]]
            logits = reader(new) if reader else self.read_again([histories[b] for b in read])
            for b, row in zip(read, logits.cpu(), strict=True):
                if unread[b]:  # of a long prompt
                    continue
                token = choose(b, row)
                yield b, token
                left[b] -= 1
                unread[b] = [token]
                if token in stop or left[b] == 0:
                    del left[b]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


class Reader:
    """Reads tokens into a cache. On the current GPU, steps of one token a sequence become one CUDA graph:
    else the host would take longer to issue a step's kernels than the GPU to run them.
    """

    EAGER_STEPS = 4  # before the graph, which takes longer to make than a step

    def __init__(self, model: Decoder, cache: nsa_ext.NSACache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.cache_seqlens.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0

    @torch.no_grad()
    def __call__(self, new_tokens: Sequence[Sequence[int]]) -> Tensor:
        """Appends new tokens to each sequence of the cache; the logits [., vocab] behind the last one of
        every sequence that got any. They hold until the next call.
        """
        counts = [len(tokens) for tokens in new_tokens]
        tokens = self._to_device([t for tokens in new_tokens for t in tokens])
        with self.cache.append(counts):
            if max(counts) == 1 and self._is_on_current_gpu():
                if self._eager_steps == self.EAGER_STEPS:
                    return self._replay(tokens)
                self._eager_steps += 1
            x = self._read(tokens)
        if max(counts) > 1:
            x = x[self._to_device([sum(counts[: b + 1]) - 1 for b, count in enumerate(counts) if count])]
        return self.model.head(self.model.norm(x))

    def _is_on_current_gpu(self) -> bool:
        """torch.cuda.graph captures on a stream of the current one."""
        return self.device.type == "cuda" and self.device.index == torch.cuda.current_device()

    def _to_device(self, numbers: list[int]) -> Tensor:
        """Without waiting for it."""
        source = torch.tensor(numbers, dtype=torch.int64)
        if self.device.type == "cuda":
            source = source.pin_memory()
        return source.to(self.device, non_blocking=True)

    def _read(self, tokens: Tensor) -> Tensor:
        x = self.model.embedding(tokens)
        for layer, layer_cache in zip(self.model.layers, self.cache.layers, strict=True):
            x = layer(x, cache=layer_cache)
        return x

    def _replay(self, tokens: Tensor) -> Tensor:
        """The graph's step. It has a row for every sequence; those behind the tokens are padding."""
        if self.graph is None:
            self._tokens = tokens.new_zeros(self.cache.batch_size)
            graph = torch.cuda.CUDAGraph()
            # Weights that autocast has in 16 bits are gone with its context: the graph makes its own.
            with torch.cuda.graph(graph), without_autocast_cache():
                self._logits = self.model.head(self.model.norm(self._read(self._tokens)))
            self.graph = graph  # whole
        self._tokens[: len(tokens)] = tokens
        self.graph.replay()
        return self._logits[: len(tokens)]


def without_autocast_cache() -> torch.autocast:
    """The autocast that is on or off for CUDA, but that casts weights where they are used."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled, cache_enabled=False)
