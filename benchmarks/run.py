"""Runs a suite: a table on the terminal, and {"machine": {...}, "rows": [...]} as JSON.

The JSON is what compare.py, plot.py and table.py read. Examples:

    python benchmarks/run.py --suite cpu --json results.json
    python benchmarks/run.py --suite cpu --lengths 8192 16384 --ops attention --data smooth
    python benchmarks/run.py --suite cpu --quick

"""

import argparse
import datetime
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from machine import describe_machine, device_name, git_revision
from registry import REGISTRY, SUITES, Case, Suite
from timing import METHODS, Method, measure, peak_memory

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = {"rounds": 2, "min_rounds": 1, "burst_ms": 5, "pause_ms": 0}
HEADINGS = ("length", "data", "op", "impl", "direction", "ms", "p10 .. p90", "TFLOP/s", "peak MiB")
COLUMNS = "{:>7}  {:<7} {:<25} {:<11} {:<9} {:>11} {:>23} {:>9} {:>9} {:>7}"


def main() -> int:
    args = parse_arguments()
    suite = SUITES[args.suite]
    threads = args.threads or suite.threads
    if threads:
        torch.set_num_threads(threads)
    method = replace(METHODS[suite.device], **(QUICK if args.quick else {}))
    lengths = args.lengths or (suite.quick_lengths if args.quick else suite.lengths)

    result = {"machine": describe_machine(suite.device) | {"command": command_line(args)}, "rows": []}
    print("  ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    print(COLUMNS.format(*HEADINGS, f"x {suite.baseline}"))
    path = save_path(args, suite.device)
    for data in args.data:
        for length in lengths:
            for op in args.ops or suite.ops:
                case = Case(length, suite.shape, data, suite.dtype, suite.device)
                rows = measure_op(suite, op, case, args.impls, method, threads)
                print_rows(rows, suite.baseline)
                result["rows"] += rows
                if path:  # after every op, so that an interrupted run keeps what it has
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--save", action="store_true", help="... or to results/<device>/<date>-<sha>.json")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T")
    parser.add_argument("--ops", nargs="+", metavar="OP", choices=sorted(REGISTRY))
    parser.add_argument("--impls", nargs="+", metavar="IMPL", help="only these implementations")
    parser.add_argument("--data", nargs="+", choices=["random", "smooth"], default=["random"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: the suite's)")
    parser.add_argument(
        "--quick", action="store_true", help="short lengths and few calls: does it run at all"
    )
    return parser.parse_args()


def measure_op(
    suite: Suite, op: str, case: Case, impls: list[str] | None, method: Method, threads: int | None
) -> list[dict]:
    """All implementations of one op on one case, in every direction, in turn."""
    chosen = [impl for impl in suite.ops[op] if impls is None or impl in impls]
    workloads = {impl: REGISTRY[op][impl](case) for impl in chosen}
    directions = {
        impl: [d for d in work.directions() if d in suite.directions] for impl, work in workloads.items()
    }
    calls = {(impl, d): workloads[impl].call(d) for impl, ds in directions.items() for d in ds}
    timings = measure(calls, case.device, method)
    del calls  # with the graphs that the backward calls hold

    rows = []
    for impl, work in workloads.items():
        peaks = peak_memory(op, impl, replace(case, variant=work.variant), threads, suite.directions)
        traffic = work.compulsory_bytes()
        for direction in directions[impl]:
            timing = timings[impl, direction]
            flops = work.flops.get(direction)
            rows.append(
                {
                    "suite": suite.name,
                    "op": op,
                    "impl": impl,
                    "direction": direction,
                    "length": case.length,
                    "data": case.data,
                    "dtype": case.dtype,
                    "ms": timing.ms,
                    "p10_ms": timing.p10_ms,
                    "p90_ms": timing.p90_ms,
                    "calls": timing.calls,
                    "tflops": flops / timing.ms / 1e9 if flops else None,
                    "tbps": traffic[direction] / timing.ms / 1e9,
                    "flops": flops,
                    "bytes": traffic[direction],
                    "peak_bytes": peaks[direction],
                    "variant": work.variant,
                    **asdict(case.shape),
                }
            )
    return rows


def print_rows(rows: list[dict], baseline: str) -> None:
    baseline_ms = {row["direction"]: row["ms"] for row in rows if row["impl"] == baseline}
    for row in rows:
        reference = baseline_ms.get(row["direction"]) if row["impl"] != baseline else None
        print(
            COLUMNS.format(
                row["length"],
                row["data"],
                row["op"],
                row["impl"],
                row["direction"],
                f"{row['ms']:.3f}",
                f"{row['p10_ms']:.3f} .. {row['p90_ms']:.3f}",
                "" if row["tflops"] is None else f"{row['tflops']:.3f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                "" if reference is None else f"{reference / row['ms']:.2f}",
            ),
            flush=True,
        )


def save_path(args: argparse.Namespace, device: str) -> Path | None:
    if args.json or not args.save:
        return args.json
    return RESULTS / device_name(device) / f"{datetime.date.today().isoformat()}-{git_revision()}.json"


def command_line(args: argparse.Namespace) -> str:
    """The command that measures this again; where its results went does not matter."""
    words = [word for word in sys.argv[1:] if word != "--save"]
    if args.json:
        position = next(i for i, word in enumerate(words) if word.split("=")[0] == "--json")
        del words[position : position + (1 if "=" in words[position] else 2)]
    return " ".join(["python benchmarks/run.py", *words])


if __name__ == "__main__":
    sys.exit(main())
