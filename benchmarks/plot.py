"""Draws milliseconds and speed-up against length, one column per direction (decoding: per batch), as PNG.

    python benchmarks/plot.py results.json --output results.png
    python benchmarks/plot.py results.json --op selected_attention

Dashed lines: smooth data; dotted ones: flat data.
"""

import argparse
from pathlib import Path

import matplotlib
import results_file
from suites import DIRECTIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--op", help="default: the first of the file")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the results")
    args = parser.parse_args()

    result = results_file.load(args.results)
    op = args.op or next((row["op"] for row in result["rows"]), "attention")
    rows = [row for row in result["rows"] if row["op"] == op]
    if not rows:
        raise SystemExit(f"no rows of {op}")
    if len({results_file.shape_of(row) for row in rows}) > 1:
        raise SystemExit(f"{args.results} has several shapes: table.py shows them")
    columns = columns_of(rows)
    size = (5.5 * len(columns), 8)
    figure, axes = plt.subplots(2, len(columns), figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(f"{op}: {results_file.caption(result['machine'], rows)}", fontsize=9)
    for (title, labels), (time_axes, speedup_axes) in zip(columns.items(), axes.T, strict=True):
        draw(rows, title, labels, time_axes, speedup_axes)
    figure.savefig(args.output or args.results.with_suffix(".png"), dpi=130)


def columns_of(rows: list[dict]) -> dict[str, dict]:
    """Title -> labels of its rows: a column per batch of decoding, else one per direction."""
    if any(row["direction"] == "mean" for row in rows):
        batches = sorted({row["batch"] for row in rows})
        return {f"batch {batch}": {"direction": "mean", "batch": batch} for batch in batches}
    return {d: {"direction": d} for d in DIRECTIONS if any(row["direction"] == d for row in rows)}


def draw(rows: list[dict], title: str, labels: dict, time_axes: Axes, speedup_axes: Axes) -> None:
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    colors = {impl: f"C{i}" for i, impl in enumerate(impls)}
    for data in dict.fromkeys(row["data"] for row in rows):
        table = results_file.by_impl(rows, data=data, **labels)
        nsa = table.get("nsa", {})
        for impl, by_length in table.items():
            line = {"color": colors[impl], "marker": "o", "markersize": 4}
            line["linestyle"] = {"random": "-", "smooth": "--"}.get(data, ":")
            lengths = sorted(by_length)
            label = impl if data == "random" else f"{impl}, {data}"
            time_axes.plot(lengths, [by_length[t]["ms"] for t in lengths], label=label, **line)
            shared = [t for t in lengths if t in nsa]
            if impl != "nsa" and shared:
                ratios = [by_length[t]["ms"] / nsa[t]["ms"] for t in shared]
                speedup_axes.plot(shared, ratios, label=f"over {label}", **line)
    time_axes.set(title=title, ylabel="ms", yscale="log")
    speedup_axes.set(ylabel="speed-up of nsa")
    speedup_axes.axhline(1, color="gray", linewidth=0.8)
    ticks = sorted({row["length"] for row in rows})
    for axes in (time_axes, speedup_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in ticks])
        axes.set_xlabel("sequence length")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
