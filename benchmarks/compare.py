"""Compares two results files, or this tree with another revision in one run.

    python benchmarks/compare.py old.json new.json
    python benchmarks/compare.py --base main --suite cpu --lengths 8192 --ops attention

With --base, that revision is checked out in a git worktree and built there; then the two libraries are
measured in turn, several times, by the benchmarks of this tree. Arguments not listed here go to run.py.

A change counts when it exceeds 3 % and the two [p10, p90] ranges (the widest of all repetitions) do not hold
each other's median.

"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import results_file

ROOT = Path(__file__).resolve().parent.parent
SMALLEST_CHANGE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", metavar="REV", help="the revision to compare this tree with")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each side with --base")
    args, rest = parser.parse_known_args()  # FILE FILE, or the arguments of run.py

    if args.base:
        old, new = measure_against(args.base, rest or ["--suite", "cpu"], args.repetitions)
        print_comparison(old, new, args.base, "this tree")
    elif len(rest) == 2 and not any(word.startswith("-") for word in rest):
        old, new = (results_file.by_key(results_file.load(Path(path))["rows"]) for path in rest)
        print_comparison(old, new, *rest)
    else:
        parser.error("give two results files, or --base REV and arguments of run.py")


def print_comparison(old: dict, new: dict, old_name: str, new_name: str) -> None:
    print(f"old: {old_name}   new: {new_name}")
    line = "{:>7} {:>5} {:<13} {:<26} {:<12} {:<9} {:<7} {:>11} {:>11} {:>8}  {}"
    headings = (
        "length",
        "batch",
        "heads, dims",
        "op",
        "impl",
        "direction",
        "data",
        "old ms",
        "new ms",
        "new/old",
    )
    print(line.format(*headings, "verdict"))
    shared = [key for key in old if key in new]
    for key in shared:
        _, op, impl, direction, data, batch, length, *shape = key
        before, after = old[key], new[key]
        ratio = after["ms"] / before["ms"]
        cells = (f"{before['ms']:.3f}", f"{after['ms']:.3f}", f"{ratio:.3f}", verdict(before, after))
        heads_dims = "{}/{} {}/{}".format(*shape)
        print(line.format(length, batch, heads_dims, op, impl, direction, data, *cells))
    slower, faster = (
        [key for key in shared if verdict(old[key], new[key]) == word] for word in ("slower", "faster")
    )
    print(f"{len(shared)} rows compared: {len(slower)} slower, {len(faster)} faster beyond noise", end="")
    print(f"; {len(old.keys() ^ new.keys())} rows in one of them only" if old.keys() != new.keys() else "")


def verdict(old: dict, new: dict) -> str:
    """slower or faster beyond noise, or nothing."""
    ratio = new["ms"] / old["ms"]
    if abs(ratio - 1) <= SMALLEST_CHANGE:
        return ""
    if old["p10_ms"] <= new["ms"] <= old["p90_ms"] or new["p10_ms"] <= old["ms"] <= new["p90_ms"]:
        return ""
    return "slower" if ratio > 1 else "faster"


# ---- Two revisions in one run ----


def measure_against(base: str, run_arguments: list[str], repetitions: int) -> tuple[dict, dict]:
    """Both libraries in turn, each run a process of its own: torch takes operators of one name only once."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), base], check=True)
        try:
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True)
            runs: dict[Path, list[dict]] = {tree: [], ROOT: []}
            for _ in range(repetitions):
                for library, rows in runs.items():
                    rows.append(_measure_library(library, run_arguments, Path(folder) / "rows.json"))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    return pool(runs[tree]), pool(runs[ROOT])


def _measure_library(library: Path, run_arguments: list[str], output: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(library)}
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *run_arguments, "--impls", "nsa"]
    subprocess.run([*command, "--json", str(output)], check=True, env=environment)
    return results_file.by_key(results_file.load(output)["rows"])


def pool(runs: list[dict]) -> dict:
    """The rows of several runs as one: the median of the medians, and the widest range."""
    pooled = {}
    for key in runs[0]:
        rows = [run[key] for run in runs]
        pooled[key] = rows[0] | {
            "ms": statistics.median(row["ms"] for row in rows),
            "p10_ms": min(row["p10_ms"] for row in rows),
            "p90_ms": max(row["p90_ms"] for row in rows),
        }
    return pooled


if __name__ == "__main__":
    main()
