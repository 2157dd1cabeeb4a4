"""Prints the markdown table of a results file, or puts it into a document between its markers.

    python benchmarks/table.py results.json
    python benchmarks/table.py results.json --into README.md

The markers are the lines `<!-- benchmark: SUITE -->` and `<!-- end of benchmark -->`.

"""

import argparse
import re
from pathlib import Path

import results_file

END = "<!-- end of benchmark -->"
DIRECTIONS = ("forward", "backward", "step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--op", default="attention")
    parser.add_argument("--data", default="random")
    parser.add_argument("--into", type=Path, metavar="FILE.md", help="replace the table between the markers")
    args = parser.parse_args()

    result = results_file.load(args.results)
    text = markdown(result, args.op, args.data)
    if args.into is None:
        print(text)
        return
    begin = f"<!-- benchmark: {result['rows'][0]['suite']} -->"
    document = args.into.read_text()
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
    if not between.search(document):
        raise SystemExit(f"{args.into} has no lines {begin!r} and {END!r}")
    args.into.write_text(between.sub(lambda _: f"{begin}\n{text}\n{END}", document))


def markdown(result: dict, op: str, data: str) -> str:
    """Per length: ms of each implementation, nsa's speed-up, peak memory of the last direction."""
    rows = [row for row in result["rows"] if row["op"] == op and row["data"] == data]
    if not rows:
        raise SystemExit(f"no rows of {op} on {data} data")
    tables = {direction: results_file.by_impl(rows, op, direction, data) for direction in DIRECTIONS}
    tables = {direction: table for direction, table in tables.items() if table}
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    others = [impl for impl in impls if impl != "nsa"] if "nsa" in impls else []

    header = ["T"]
    for direction in tables:
        header += [f"{direction}, {impl} ms" for impl in impls] + [f"x {impl}" for impl in others]
    last = list(tables)[-1]
    header += [f"{last} peak, {impl} MiB" for impl in impls]
    lines = ["| " + " | ".join(header) + " |", "|" + " ---: |" * len(header)]
    for length in sorted({row["length"] for row in rows}):
        cells = [f"{length:,}"]
        for table in tables.values():
            found = {impl: table.get(impl, {}).get(length) for impl in impls}
            cells += [_milliseconds(found[impl]) for impl in impls]
            cells += [_speedup(found["nsa"], found[impl]) for impl in others]
        cells += [_mebibytes(tables[last].get(impl, {}).get(length)) for impl in impls]
        lines.append("| " + " | ".join(cells) + " |")
    caption = results_file.caption(result["machine"], rows)
    return "\n".join([*lines, "", f"{op}, {data} data; {caption}: `{result['machine']['command']}`"])


def _milliseconds(row: dict | None) -> str:
    return "" if row is None else f"{row['ms']:,.{0 if row['ms'] >= 100 else 1 if row['ms'] >= 10 else 3}f}"


def _speedup(row: dict | None, other: dict | None) -> str:
    return "" if row is None or other is None else f"**{other['ms'] / row['ms']:.2f}**"


def _mebibytes(row: dict | None) -> str:
    return "" if row is None or row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"


if __name__ == "__main__":
    main()
