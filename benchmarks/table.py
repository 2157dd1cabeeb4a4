"""Prints a markdown table of a results file, or puts it into a document between its markers.

    python benchmarks/table.py results.json                          the whole beside its baselines
    python benchmarks/table.py results.json --data smooth
    python benchmarks/table.py results.json --view ops               ms of every op of nsa
    python benchmarks/table.py results.json --into README.md

The markers are the lines `<!-- benchmark: NAME -->` and `<!-- end of benchmark -->`. NAME is the suite, then
the view if it is not the suite's first (`decode` of the suite decode, `attention` of others), then the data
if they are not random: `training`, `training smooth`, `training ops`, `decode`.
"""

import argparse
import re
from pathlib import Path

import results_file
from suites import DIRECTIONS

END = "<!-- end of benchmark -->"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--view", choices=sorted(VIEWS), help="default: the suite's first")
    parser.add_argument("--data", default="random")
    parser.add_argument("--impls", nargs="+", help="only these implementations (default: all)")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="replace the table between the markers")
    args = parser.parse_args()

    result = results_file.load(args.results)
    if not result["rows"]:
        raise SystemExit(f"{args.results} has no rows")
    suite = result["rows"][0]["suite"]
    first_view = "decode" if suite == "decode" else "attention"
    view = args.view or first_view
    text = markdown(result, view, args.data, args.impls)
    if args.into is None:
        print(text)
        return
    words = (suite, view if view != first_view else "", args.data if args.data != "random" else "")
    begin = f"<!-- benchmark: {' '.join(word for word in words if word)} -->"
    document = args.into.read_text()
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(document):
        raise SystemExit(f"{args.into} has no lines {begin!r} and {END!r}")
    args.into.write_text(between.sub(lambda _: f"{begin}\n{text}\n{END}", document))


def markdown(result: dict, view: str, data: str, impls: list[str] | None = None) -> str:
    rows = [row for row in result["rows"] if row["data"] == data and (impls is None or row["impl"] in impls)]
    header, lines, shown = VIEWS[view](rows)
    if not lines:
        raise SystemExit(f"no rows on {data} data for the view {view}")
    table = ["| " + " | ".join(cells) + " |" for cells in (header, *lines)]
    table.insert(1, "|" + " ---: |" * len(header))
    caption = f"{data} data; {results_file.caption(result['machine'], shown)}"
    return "\n".join([*table, "", f"{caption}: `{result['machine']['command']}`"])


Table = tuple[list[str], list[list[str]], list[dict]]  # header, lines, the rows that they show


def attention_table(rows: list[dict]) -> Table:
    """Per direction, shape and length: ms of each implementation, nsa's speed-up, peak memory."""
    rows = [row for row in rows if row["op"] in ("attention", "prefill")]
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    others = [impl for impl in impls if impl != "nsa"] if "nsa" in impls else []
    by_point: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        shape = results_file.shape_of(row)
        by_point.setdefault((DIRECTIONS.index(row["direction"]), shape, row["length"]), {})[row["impl"]] = row
    several_shapes = len({shape for _, shape, _ in by_point}) > 1
    has_floor = any(row.get("floor_share") for row in rows)

    header = ["", *(["query / KV heads", "dims"] if several_shapes else []), "T"]
    header += [f"{impl} ms" for impl in impls] + [f"x {impl}" for impl in others]
    header += ["share of the floor"] if has_floor else []
    header += [f"peak, {impl} MiB" for impl in impls]
    lines = []
    for (direction, shape, length), found in sorted(by_point.items(), key=lambda point: point[0]):
        nsa = found.get("nsa")
        cells = [DIRECTIONS[direction]]
        cells += [f"{shape[0]} / {shape[1]}", f"{shape[2]}, {shape[3]}"] if several_shapes else []
        cells += [f"{length:,}", *(_milliseconds(found.get(impl)) for impl in impls)]
        cells += [_speedup(nsa, found.get(impl)) for impl in others]
        cells += [_percent(nsa)] if has_floor else []
        cells += [_mebibytes(found.get(impl)) for impl in impls]
        lines.append(cells)
    return header, lines, rows


def decode_table(rows: list[dict]) -> Table:
    """Per batch and length: microseconds of each implementation, the mean of steps; of nsa also the kinds of
    step, the floor and its share."""
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    others = [impl for impl in impls if not impl.startswith("nsa")]
    header = ["batch", "cache", *(f"{impl} us" for impl in impls), *(f"x {impl}" for impl in others)]
    header += ["no block finished", "every sequence finishes one", "floor us", "share of the floor"]
    lines = []
    for batch, length in sorted({(row["batch"], row["length"]) for row in rows}):
        point = [row for row in rows if (row["batch"], row["length"]) == (batch, length)]
        steps = {(row["impl"], row["direction"]): row for row in point}
        nsa = steps.get(("nsa", "mean"))
        cells = [str(batch), f"{length:,}", *(_microseconds(steps.get((impl, "mean"))) for impl in impls)]
        cells += [_speedup(nsa, steps.get((impl, "mean"))) for impl in others]
        cells += [_microseconds(steps.get(("nsa", kind))) for kind in ("ordinary", "compressing")]
        has_floor = nsa is not None and nsa["floor_ms"] is not None
        cells += [f"{1e3 * nsa['floor_ms']:.1f}" if has_floor else "", _percent(nsa)]
        lines.append(cells)
    return header, lines, rows


def ops_table(rows: list[dict]) -> Table:
    """Per direction and op: ms of nsa at each length."""
    rows = [row for row in rows if row["impl"] == "nsa"]
    lengths = sorted({row["length"] for row in rows})
    lines = []
    for direction in DIRECTIONS:
        for op in dict.fromkeys(row["op"] for row in rows if row["direction"] == direction):
            found = results_file.by_impl(rows, op=op, direction=direction)["nsa"]
            lines.append([direction, op.replace("_", " "), *(_milliseconds(found.get(t)) for t in lengths)])
    return ["", "op", *(f"{length:,} ms" for length in lengths)], lines, rows


VIEWS = {"attention": attention_table, "decode": decode_table, "ops": ops_table}


def _milliseconds(row: dict | None) -> str:
    return "" if row is None else f"{row['ms']:,.{0 if row['ms'] >= 100 else 1 if row['ms'] >= 10 else 3}f}"


def _microseconds(row: dict | None) -> str:
    return "" if row is None else f"{1e3 * row['ms']:,.{0 if row['ms'] >= 1 else 1}f}"


def _speedup(row: dict | None, other: dict | None) -> str:
    return "" if row is None or other is None else f"**{other['ms'] / row['ms']:.2f}**"


def _percent(row: dict | None) -> str:
    return "" if row is None or not row.get("floor_share") else f"{row['floor_share']:.0%}"


def _mebibytes(row: dict | None) -> str:
    return "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"


if __name__ == "__main__":
    main()
