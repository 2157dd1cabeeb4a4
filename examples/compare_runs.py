"""Compares finished runs of pretrain.py: a table, and their curves as JSON and PNG.

    python examples/pretrain.py --run-dir runs/nsa-8k --attention nsa ...
    python examples/pretrain.py --run-dir runs/full-8k --attention full ...
    python examples/compare_runs.py runs/nsa-8k runs/full-8k --json docs/training/8k.json --plot 8k.png
    python examples/compare_runs.py --from docs/training/8k.json --plot 8k.png

The speed of a run is the median over the logged intervals of its second half, behind compilation and warm-up.
Runs that shared a GPU have none: --concurrent leaves everything out that depends on time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from demo_report import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What a run is, beside its corpus and its files.
OPTIONS = (
    "attention", "context", "batch_size", "accumulation", "document_bytes", "steps", "warmup", "lr", "seed",
    "compile", "autocast", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
)  # fmt: skip
SERIES = ("loss", "val_loss")  # as [step, seconds of training, value]


def load_run(folder: Path) -> dict:
    """Options, size, curves and speed of a run, from run.json and metrics.jsonl in its folder."""
    description = json.loads((folder / "run.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    intervals = [record for record in records if "tokens_per_s" in record]
    settled = intervals[len(intervals) // 2 :]
    curves = {
        name: [
            [record["step"], round(record["seconds"], 3), round(record[name], 5)]
            for record in records
            if name in record
        ]
        for name in SERIES
    }
    return {
        "machine": description["machine"],
        "options": {name: description["options"][name] for name in OPTIONS},
        "parameters": description["parameters"],
        "corpus_tokens": description["corpus_tokens"],
        "training_tokens": intervals[-1]["tokens"],
        "seconds": intervals[-1]["seconds"],
        "compile_seconds": next((r["compile_seconds"] for r in records if "compile_seconds" in r), None),
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in settled),
        "peak_bytes": max(
            (record["peak_bytes"] for record in intervals if "peak_bytes" in record), default=None
        ),
        **curves,
    }


def without_times(run: dict) -> dict:
    """A run that shared its GPU: what depends on time says nothing about it."""
    timed = dict.fromkeys(("seconds", "compile_seconds", "tokens_per_s"))
    return run | timed | {name: [[step, None, value] for step, _, value in run[name]] for name in SERIES}


def print_table(runs: list[dict]) -> None:
    rows = {
        "attention": lambda run: run["options"]["attention"],
        "parameters": lambda run: f"{run['parameters']:,}",
        "training tokens": lambda run: f"{run['training_tokens']:,}",
        "first validation loss": lambda run: f"{run['val_loss'][0][2]:.4f}",
        "last validation loss": lambda run: f"{run['val_loss'][-1][2]:.4f}",
        "tokens/s": lambda run: shown(run["tokens_per_s"], ",.0f"),
        "peak GiB": lambda run: shown(run["peak_bytes"] and run["peak_bytes"] / 2**30, ".2f"),
    }
    for label, show in rows.items():
        print(f"{label:>22}" + "".join(f"{show(run):>16}" for run in runs))


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def save_plot(report: dict, path: Path) -> None:
    """Losses against steps and, of runs with times, against time, with speed as bars."""
    runs, options = report["runs"], report["runs"][0]["options"]
    timed = all(run["tokens_per_s"] is not None for run in runs)
    figure = Figure(figsize=(15 if timed else 7, 4.5), layout="constrained")
    by_step, *others = figure.subplots(1, 3, width_ratios=(3, 3, 1)) if timed else (figure.subplots(),)
    figure.suptitle(f"context {options['context']:,}; {runs[0]['machine']['device']}", fontsize=10)
    plot_losses(by_step, runs, 0, "step")
    if timed:
        plot_losses(others[0], runs, 1, "seconds of training")
        plot_speed(others[1], runs)
    figure.savefig(path, dpi=120)


def plot_speed(axes: Axes, runs: list[dict]) -> None:
    names = [run["options"]["attention"] for run in runs]
    bars = axes.bar(names, [run["tokens_per_s"] for run in runs], color=[COLOURS[name] for name in names])
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set(title="tokens/s in training")


def plot_losses(axes: Axes, runs: list[dict], column: int, label: str) -> None:
    for run in runs:
        name = run["options"]["attention"]
        color = COLOURS[name]
        loss, val_loss = (list(zip(*run[series], strict=True)) for series in SERIES)
        axes.plot(loss[column], loss[2], color=color, alpha=0.35)
        last = f"{name}: {val_loss[2][-1]:.3f}"
        axes.plot(val_loss[column], val_loss[2], "o-", color=color, label=last, markersize=4)
    axes.set(xlabel=label, ylabel="nats per byte", yscale="log")
    axes.set(title="validation loss (dots), training loss (pale)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of pretrain.py")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="an earlier --json instead")
    parser.add_argument("--concurrent", action="store_true", help="the runs shared a GPU: leave times out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.source):
        parser.error("give run folders, or --from an earlier report")

    if args.source:
        report = json.loads(args.source.read_text())
    else:
        runs = [load_run(folder) for folder in args.runs]
        report = {"runs": [without_times(run) for run in runs] if args.concurrent else runs}
    print_table(report["runs"])
    for path in (args.json, args.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        save_plot(report, args.plot)


if __name__ == "__main__":
    main()
