"""Draws milliseconds and speed-up against length, as PNG.

python benchmarks/plot.py results.json --output results.png

"""

import argparse
from pathlib import Path

import matplotlib
import results_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DIRECTIONS = ("forward", "backward", "step")
STYLES = dict(zip(DIRECTIONS, ("--", ":", "-"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--op", default="attention")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the results")
    args = parser.parse_args()

    result = results_file.load(args.results)
    rows = [row for row in result["rows"] if row["op"] == args.op]
    if not rows:
        raise SystemExit(f"no rows of {args.op}")
    figure, (time_axes, speedup_axes) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(f"{args.op}: {results_file.caption(result['machine'], rows)}", fontsize=9)
    draw(rows, args.op, time_axes, speedup_axes)
    figure.savefig(args.output or args.results.with_suffix(".png"), dpi=130)


def draw(rows: list[dict], op: str, time_axes: Axes, speedup_axes: Axes) -> None:
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    colors = {impl: f"C{i}" for i, impl in enumerate(impls)}
    for data in dict.fromkeys(row["data"] for row in rows):
        marker = "o" if data == "random" else "s"
        for direction in DIRECTIONS:
            table = results_file.by_impl(rows, op, direction, data)
            for impl, by_length in table.items():
                style = {
                    "color": colors[impl],
                    "linestyle": STYLES[direction],
                    "marker": marker,
                    "markersize": 4,
                }
                lengths = sorted(by_length)
                label = f"{impl} {direction}" + ("" if data == "random" else f", {data}")
                time_axes.plot(lengths, [by_length[t]["ms"] for t in lengths], label=label, **style)
                nsa = table.get("nsa", {})
                shared = [t for t in lengths if t in nsa]
                if impl != "nsa" and shared:
                    ratios = [by_length[t]["ms"] / nsa[t]["ms"] for t in shared]
                    speedup_axes.plot(shared, ratios, label=f"over {label}", **style)
    time_axes.set(ylabel="ms", yscale="log")
    speedup_axes.set(ylabel="speed-up of nsa")
    speedup_axes.axhline(1, color="gray", linewidth=0.8)
    ticks = sorted({row["length"] for row in rows})
    for axes in (time_axes, speedup_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel("sequence length")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
