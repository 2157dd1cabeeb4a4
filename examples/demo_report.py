"""The table and the figure of demo.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from data import PackedText
from generate import load_model
from matplotlib.figure import Figure
from model import Decoder, Packing

from nsa_ext import diagnostics

COLOURS = {"nsa": "tab:orange", "full": "tab:blue"}
SMOOTHING = 0.8  # of the training losses in the figure


@dataclass
class Run:
    """A finished run."""

    name: str
    model: Decoder
    records: list[dict[str, float]]
    sample: str
    context: int

    @staticmethod
    def load(folder: Path, records: list[dict[str, float]]) -> Run:
        model, options = load_model(folder)
        sample = (folder / "sample.txt").read_text()
        return Run(model.config.attention, model, records, sample, options["context"])

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        points = [(int(record["step"]), record[name]) for record in self.records if name in record]
        return [step for step, _ in points], [value for _, value in points]

    def tokens_read(self) -> int:
        """Keys that the last query of a sequence reads, per layer and KV head."""
        if self.name == "full":
            return self.context
        return diagnostics.tokens_read(self.model.config.nsa_config(), self.context).total


def describe(run: Run) -> dict[str, str]:
    """A column of the table."""
    losses, tokens, seconds = (run.series(name)[1] for name in ("val_loss", "tokens", "seconds"))
    return {
        "attention": run.name,
        "parameters": f"{run.model.num_parameters():,}",
        "first validation loss": f"{losses[0]:.4f}",
        "last validation loss": f"{losses[-1]:.4f}",
        "tokens read per query": f"{run.tokens_read():,} of {run.context:,}",
        "training tokens": f"{tokens[-1]:,}",
        "training seconds": f"{seconds[-1]:.0f}",
        "tokens/s": f"{tokens[-1] / seconds[-1]:,.0f}",
    }


def print_report(runs: list[Run], reports: list[diagnostics.LayerReport]) -> None:
    """What each run reached, what NSA's attention does, and a sample of each model's text."""
    columns = [describe(run) for run in runs]
    print()
    for label in columns[0]:
        print(f"{label:>22}" + "".join(f"{column[label]:>16}" for column in columns))
    nsa, full = (run.series("val_loss")[1][-1] for run in runs)
    print(f"\nLast validation loss of NSA against full attention: {(nsa / full - 1) * 100:+.2f} %")
    print(f"\nNSA on one validation sequence:\n{diagnostics.format_table(reports)}")
    for run in runs:
        print(f"\n--- {run.name} writes:\n{run.sample}")


def selection_reports(model: Decoder, text: PackedText) -> list[diagnostics.LayerReport]:
    """Diagnostics on the validation sequence with the longest document, so that the map shows many blocks."""
    batches = (text.batch([index]) for index in range(text.num_sequences))
    batch = max(batches, key=lambda candidate: max(candidate.lengths))
    packing = Packing(batch.cu_seqlens, batch.max_seqlen, batch.lengths)
    return diagnostics.collect(model, batch.tokens, batch.positions, packing)


def save_figure(runs: list[Run], text: PackedText, path: Path) -> list[diagnostics.LayerReport]:
    """Writes the PNG and returns the diagnostics of the NSA model that it shows."""
    nsa = next(run for run in runs if run.name == "nsa")
    reports = selection_reports(nsa.model, text)
    figure = Figure(figsize=(13, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    loss_axes, gate_axes = upper.subplots(1, 2)
    plot_losses(loss_axes, runs)
    diagnostics.plot_gates(gate_axes, reports)
    map_axes = lower.subplots(1, len(reports))
    for layer, report in enumerate(reports):
        image = diagnostics.plot_selection(map_axes[layer], report, f"layer {layer}: selected blocks")
    lower.colorbar(image, ax=map_axes, label="share of the queries", shrink=0.8)
    figure.savefig(path, dpi=120)
    return reports


def plot_losses(axes, runs: list[Run]) -> None:
    """Training losses (smoothed, pale) and validation losses (dots) of both runs."""
    for run in runs:
        steps, losses = run.series("loss")
        smooth = torch.tensor(losses)
        for i in range(1, len(smooth)):
            smooth[i] = SMOOTHING * smooth[i - 1] + (1 - SMOOTHING) * smooth[i]
        axes.plot(steps, smooth.tolist(), color=COLOURS[run.name], alpha=0.35)
        val_steps, val_losses = run.series("val_loss")
        label = f"{run.name}: {val_losses[-1]:.3f}"
        axes.plot(val_steps, val_losses, "o-", color=COLOURS[run.name], label=label)
    axes.set(title="validation loss (dots), training loss (pale)", xlabel="step", ylabel="nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
