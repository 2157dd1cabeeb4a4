"""What a model's sparse attention does: gates, selected blocks, how much of the dense attention they hold,
tokens read.

Each number is a function of plain tensors; `collect` computes all of them for one forward pass of a model,
layer by layer, without keeping activations. The `plot_*` functions draw on a matplotlib Axes; matplotlib is
imported only by `save_figure`. Layouts and names are those of `nsa_ext.ops`: packed tokens, positions count
from 0 inside a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from nsa_ext.config import NSAConfig

BRANCHES = ("cmp", "slc", "swa")
QUERY_TILE = 128  # queries whose dense probabilities `selection_recall` holds at once


@dataclass(frozen=True)
class TokensRead:
    """Rows of K that the last query of a sequence reads in each branch, and with full attention."""

    compressed: int
    selected: int
    window: int
    full: int

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.window

    @property
    def share(self) -> float:
        """Part of what full attention reads."""
        return self.total / self.full


def tokens_read(config: NSAConfig, length: int) -> TokensRead:
    """Tokens read per query at the end of `length` tokens; with the defaults 4,096 + 1,024 + 512 of 65,536.

    The compressed rows are those that the tensor has, length // stride, as the paper counts them.
    """
    return TokensRead(
        compressed=length // config.compress_stride if length >= config.compress_block_size else 0,
        selected=min(config.num_selected_blocks * config.block_size, length),
        window=min(config.window_size, length),
        full=length,
    )


def gate_means(gate_logits: Tensor) -> Tensor:
    """Mean gate of each branch (cmp, slc, swa) and head, [3, Hq], from logits [T, Hq, 3]."""
    return gate_logits.float().sigmoid().mean(0).t()


def query_positions(cu_seqlens: Tensor | None, total: int) -> Tensor:
    """Position of each of `total` tokens inside its sequence, int64 [T]; -1 behind the last sequence."""
    if cu_seqlens is None:
        return torch.arange(total)
    bounds = cu_seqlens.long()
    token = torch.arange(total, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], token, right=True)  # a zero-length sequence owns no token
    positions = token - bounds[sequence.clamp(max=len(bounds) - 2)]
    return positions.masked_fill(sequence >= len(bounds) - 1, -1)


def forced_blocks(
    block_indices: Tensor, positions: Tensor, block_size: int, num_initial_blocks: int, num_local_blocks: int
) -> Tensor:
    """Which entries of block_indices [T, Hkv, n] are forced (first or local blocks), as a mask."""
    own = (positions // block_size)[:, None, None].to(block_indices.device)
    is_forced = (block_indices < num_initial_blocks) | (block_indices > own - num_local_blocks)
    return (block_indices >= 0) & is_forced


def forced_share(block_indices: Tensor, forced: Tensor) -> float:
    """Share of the selected blocks that were forced, whatever their scores; `forced`: see forced_blocks."""
    return forced.sum().item() / max((block_indices >= 0).sum().item(), 1)


def selection_entropy(block_indices: Tensor) -> float:
    """Entropy in nats of the distribution of selected blocks, mean over the KV heads; unused entries (-1) do
    not count.

    0: every query selects the same block; ln(blocks): all blocks are selected equally often.
    """
    entropies = []
    for chosen in block_indices.transpose(0, 1).flatten(1):
        counts = torch.bincount(chosen[chosen >= 0]).double()
        p = counts[counts > 0] / counts.sum()
        entropies.append(-(p * p.log()).sum().item())
    return sum(entropies) / max(len(entropies), 1)


def selection_map(block_indices: Tensor, block_size: int) -> Tensor:
    """How often each block is selected from where, for one sequence: block_indices [Tq, Hkv, n], Tq = S.

    Entry [i, j] in 0 .. 1 of the result [blocks, blocks] is the share of the queries of block i, over the KV
    heads, that select block j.
    """
    num_blocks = -(-block_indices.shape[0] // block_size)
    chosen = _block_mask(block_indices, num_blocks).float().mean(1)  # [Tq, blocks]
    return torch.stack([rows.mean(0) for rows in chosen.split(block_size)])


def _block_mask(block_indices: Tensor, num_blocks: int) -> Tensor:
    """Sets of blocks as a mask [T, Hkv, num_blocks]."""
    slots = block_indices.long().masked_fill((block_indices < 0) | (block_indices >= num_blocks), num_blocks)
    mask = torch.zeros(*slots.shape[:2], num_blocks + 1, dtype=torch.bool, device=slots.device)
    return mask.scatter_(-1, slots, True)[..., :num_blocks]


def selection_recall(
    q: Tensor, k: Tensor, block_indices: Tensor, block_size: int, softmax_scale: float
) -> Tensor:
    """Share of the dense causal attention mass that lies in the selected blocks, fp32 [T, Hq], for one
    sequence.

    q [T, Hq, D], k [T, Hkv, D] as the selected branch sees them. Probabilities of 128 queries exist at a
    time.
    """
    total, num_heads = q.shape[:2]
    group = num_heads // k.shape[1]
    keys = k.float()
    recall = q.new_empty(total, num_heads, dtype=torch.float32)
    for begin in range(0, total, QUERY_TILE):
        end = min(begin + QUERY_TILE, total)
        num_blocks = -(-end // block_size)
        tile = q[begin:end].float().unflatten(1, (-1, group))
        logits = softmax_scale * torch.einsum("tgqd,sgd->tgqs", tile, keys[:end])
        later = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
        p = logits.masked_fill(later[:, None, None], -math.inf).softmax(-1)
        padded = nn.functional.pad(p, (0, num_blocks * block_size - end))
        mass = padded.unflatten(-1, (num_blocks, block_size)).sum(-1)
        selected = _block_mask(block_indices[begin:end], num_blocks)[:, :, None]
        recall[begin:end] = (mass * selected).sum(-1).flatten(1)
    return recall


@dataclass(frozen=True)
class LayerReport:
    """Numbers of one layer and forward pass."""

    gate_means: Tensor  # [3, Hq]
    selection_map: Tensor  # [blocks, blocks], of the longest sequence
    forced_share: float
    entropy: float  # nats, of the blocks that were not forced
    recall: Tensor  # [Hq], over the queries that had more blocks than they could select; 1 if there are none


def collect(model: nn.Module, *args: Any, **kwargs: Any) -> list[LayerReport]:
    """Runs model(*args, **kwargs) once, without gradients, and reports on each call of nsa::attention in it,
    in order.

    The model must not be compiled. Queries must be the keys' tokens (no cache).
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        model(*args, **kwargs)
    return recorder.reports


class _Recorder(TorchDispatchMode):
    """Sees the inputs and the selection of every nsa::attention, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[LayerReport] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name in ("nsa::attention", "nsa::attention_forward"):
            names = [argument.name for argument in schema.arguments]
            call = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.reports.append(_layer_report(call, block_indices=outputs[1]))
        return outputs


def _layer_report(call: dict[str, Any], block_indices: Tensor) -> LayerReport:
    q, k, cu_seqlens, block_size = call["q"], call["k_slc"], call["cu_seqlens_k"], call["block_size"]
    positions = query_positions(cu_seqlens, len(q)).to(q.device)
    forced = forced_blocks(
        block_indices, positions, block_size, call["num_initial_blocks"], call["num_local_blocks"]
    )
    bounds = [0, len(q)] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = [slice(begin, end) for begin, end in pairwise(bounds) if begin < end]
    recalls = [
        selection_recall(q[rows], k[rows], block_indices[rows], block_size, call["softmax_scale"])
        for rows in sequences
    ]
    had_to_choose = positions // block_size + 1 > block_indices.shape[-1]
    recall = torch.cat(recalls)[had_to_choose[: bounds[-1]]]
    longest = max(sequences, key=lambda rows: rows.stop - rows.start)
    return LayerReport(
        gate_means=gate_means(call["gate_logits"][positions >= 0]).cpu(),
        selection_map=selection_map(block_indices[longest], block_size).cpu(),
        forced_share=forced_share(block_indices, forced),
        entropy=selection_entropy(block_indices.masked_fill(forced, -1)),
        recall=recall.mean(0).cpu() if len(recall) else torch.ones(q.shape[1]),
    )


def format_table(reports: list[LayerReport]) -> str:
    """The numbers of each layer as lines of text."""
    lines = ["layer  g_cmp  g_slc  g_swa  forced  entropy  recall"]
    for layer, report in enumerate(reports):
        gates = "  ".join(f"{gate:5.3f}" for gate in report.gate_means.mean(1).tolist())
        values = f"{report.forced_share:6.1%}  {report.entropy:7.3f}  {report.recall.mean().item():6.1%}"
        lines.append(f"{layer:5d}  {gates}  {values}")
    return "\n".join(lines)


def plot_gates(axes: Axes, reports: list[LayerReport]) -> None:
    """Mean gate per layer and branch as bars; each dot is a head."""
    for branch, name in enumerate(BRANCHES):
        heads = torch.stack([report.gate_means[branch] for report in reports])  # [layers, Hq]
        x = torch.arange(len(reports)) + (branch - 1) * 0.27
        axes.bar(x.tolist(), heads.mean(1).tolist(), width=0.25, label=f"g_{name}")
        axes.plot(x.tolist(), heads.tolist(), "k.", markersize=3, alpha=0.6)
    axes.set(title="mean gate (dots: heads)", xlabel="layer", xticks=range(len(reports)))
    axes.margins(y=0.15)  # room for the legend
    axes.legend(ncols=3, loc="upper right", fontsize="small")


def plot_selection(axes: Axes, report: LayerReport, title: str = "selected blocks") -> Any:
    """Heat map: from which block of queries how often which block is selected. Returns the image, for a
    colour bar.
    """
    image = axes.imshow(report.selection_map.numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    axes.set(title=title, xlabel="selected block", ylabel="block of the query")
    return image


def save_figure(reports: list[LayerReport], path: str | Path) -> None:
    """One PNG (or what the path's suffix says): gates, and the selection of each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 + 3.2 * len(reports), 3.6), layout="constrained")
    axes = figure.subplots(1, len(reports) + 1)
    plot_gates(axes[0], reports)
    for layer, report in enumerate(reports):
        image = plot_selection(axes[layer + 1], report, f"layer {layer}: selected blocks")
    figure.colorbar(image, ax=axes[-1], label="share of queries")
    figure.savefig(path, dpi=150)
