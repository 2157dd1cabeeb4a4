"""Runs a suite: a table on the terminal, and {"machine": {...}, "rows": [...], "absent": [...]} as JSON.

The JSON is what compare.py, plot.py and table.py read. Examples:

    python benchmarks/run.py --suite cpu --json results.json
    python benchmarks/run.py --suite cpu --lengths 8192 16384 --ops attention --data smooth
    python benchmarks/run.py --suite training --data random smooth --json results.json
    python benchmarks/run.py --suite gqa --directions forward
    python benchmarks/run.py --suite cpu --quick

An operation that has no kernel on the device, or a baseline that is not installed, is listed as absent. The
ops of a suite come one after the other, attention first; every op, shape, data and length is a point, whose
implementations are measured in turn (timing.py). --budget bounds the seconds of a point, --minutes the whole
run: points that would begin later are left out.
"""

import argparse
import datetime
import itertools
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from case import Case, Workload
from implementations import REGISTRY
from machine import describe_machine, device_name, git_revision
from memory import peak_memory
from registry import why_absent
from suites import DIRECTIONS, SUITES, Suite
from timing import METHODS, Method, Timing, measure
from work import ceilings_of, floor_ms

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = {"rounds": 2, "min_rounds": 1, "burst_ms": 5, "pause_ms": 0}
HEADINGS = ("length", "heads", "dims", "data", "op", "impl", "direction", "ms", "p10 .. p90")
HEADINGS += ("TFLOP/s", "floor", "MHz", "peak MiB")
COLUMNS = "{:>7} {:>5} {:>7} {:<6} {:<24} {:<12} {:<9} {:>10} {:>21} {:>8} {:>6} {:>5} {:>9} {:>7}"


def main() -> int:
    args = parse_arguments()
    suite = SUITES[args.suite]
    threads = args.threads or suite.threads
    if threads:
        torch.set_num_threads(threads)
    begin = time.monotonic()
    result = {
        "machine": describe_machine(suite.device) | {"command": command_line(args)},
        "rows": [],
        "absent": [],
    }
    print("  ".join(f"{key}: {value}" for key, value in result["machine"].items()))
    print(COLUMNS.format(*HEADINGS, f"x {suite.baseline[-6:]}"))
    path = save_path(args, suite.device)
    lengths = args.lengths or (suite.quick_lengths if args.quick else suite.lengths)
    points = itertools.product(args.ops or suite.ops, suite.shapes, args.data, lengths)
    for op, shape, data, length in points:
        if args.minutes and time.monotonic() - begin > 60 * args.minutes:
            print(f"{args.minutes} minutes are over: left out from {op}, {data} data, {length} on")
            break
        case = Case(length, shape, data, suite.dtype, suite.device)
        rows, absent = Point(suite, op, case, args, threads).measure()
        print_rows(rows, absent, suite.baseline)
        result["rows"] += rows
        result["absent"] += absent
        if path:  # after every point, so that an interrupted run keeps what it has
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
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, help="default: the suite's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the suite's)")
    parser.add_argument("--rounds", type=int, help="rounds of bursts at every point, if the budget allows")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of a point, two rounds at least")
    parser.add_argument("--minutes", type=float, metavar="M", help="no point begins later than this")
    parser.add_argument(
        "--quick", action="store_true", help="short lengths and few calls: does it run at all"
    )
    return parser.parse_args()


def method_of(suite: Suite, args: argparse.Namespace) -> Method:
    chosen = {"rounds": args.rounds, "budget_s": args.budget}
    changes = (QUICK if args.quick else {}) | {k: v for k, v in chosen.items() if v is not None}
    method = replace(METHODS[suite.device], **changes)
    return replace(method, min_rounds=min(method.min_rounds, method.rounds))


class Point:
    """All implementations of one op on one case, in every direction."""

    def __init__(
        self, suite: Suite, op: str, case: Case, args: argparse.Namespace, threads: int | None
    ) -> None:
        self.suite, self.op, self.case, self.threads = suite, op, case, threads
        self.method = method_of(suite, args)
        self.directions = args.directions or suite.directions
        self.impls = [impl for impl in suite.ops[op] if args.impls is None or impl in args.impls]
        self.absent: list[dict] = []
        is_cuda = case.device == "cuda"
        self.ceilings = ceilings_of(torch.cuda.get_device_properties().name) if is_cuda else None

    def measure(self) -> tuple[list[dict], list[dict]]:
        workloads = self._available()
        prepare = {
            (impl, direction): lambda work=work, direction=direction: work.call(direction)
            for impl, (work, directions) in workloads.items()
            for direction in directions
        }
        timings = measure(prepare, self.case.device, self.method)
        rows = []
        for impl, (work, directions) in workloads.items():
            case = replace(self.case, variant=work.variant)
            peaks = peak_memory(self.op, impl, case, directions, self.threads)
            traffic = work.compulsory_bytes()
            for direction in directions:
                numbers = self._numbers(work, direction, timings[impl, direction], traffic[direction])
                numbers["peak_bytes"] = peaks[direction]
                rows.append(self._labels(impl, direction) | numbers | {"variant": work.variant})
        return rows, self.absent

    def _available(self) -> dict[str, tuple[Workload, tuple[str, ...]]]:
        """What can be called: implementation -> workload and directions."""
        workloads = {}
        for impl in self.impls:
            try:
                work = REGISTRY[self.op][impl](self.case)
            except (ImportError, ValueError, RuntimeError) as error:
                self._note_absence(impl, self.directions, error)
                continue
            wanted = [direction for direction in self.directions if direction in work.directions()]
            works = tuple(direction for direction in wanted if self._runs(impl, work, direction))
            if works:
                workloads[impl] = work, works
        return workloads

    def _runs(self, impl: str, work: Workload, direction: str) -> bool:
        try:
            work.call(direction)()
        except (ImportError, ValueError, RuntimeError) as error:
            self._note_absence(impl, (direction,), error)
            return False
        return True

    def _note_absence(self, impl: str, directions: tuple[str, ...], error: Exception) -> None:
        reason = why_absent(error)
        if reason is None:
            raise error
        self.absent += [self._labels(impl, direction) | {"reason": reason} for direction in directions]

    def _labels(self, impl: str, direction: str) -> dict:
        return {
            "suite": self.suite.name,
            "op": self.op,
            "impl": impl,
            "direction": direction,
            "length": self.case.length,
            "data": self.case.data,
            "dtype": self.case.dtype,
            **asdict(self.case.shape),
        }

    def _numbers(self, work: Workload, direction: str, timing: Timing, traffic: int) -> dict:
        flops = work.flops.get(direction)
        floor = floor_ms(work, direction, traffic, self.ceilings) if self.ceilings else None
        return {
            "ms": timing.ms,
            "p10_ms": timing.p10_ms,
            "p90_ms": timing.p90_ms,
            "calls": timing.calls,
            "rounds": timing.rounds,
            "sm_mhz": timing.sm_mhz,
            "tflops": flops / timing.ms / 1e9 if flops else None,
            "tbps": traffic / timing.ms / 1e9,
            "floor_ms": floor,
            "floor_share": floor / timing.ms if floor else None,
            "flops": flops,
            "bytes": traffic,
            "gathered_bytes": work.gathered_bytes or None,
        }


def print_rows(rows: list[dict], absent: list[dict], baseline: str) -> None:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    baseline_ms = {row["direction"]: row["ms"] for row in rows if row["impl"] == baseline}
    for row in [*rows, *absent]:
        labels = (
            row["length"],
            f"{row['num_heads_q']}/{row['num_heads_kv']}",
            f"{row['head_dim_qk']}/{row['head_dim_v']}",
            row["data"],
            row["op"],
            row["impl"],
            row["direction"],
        )
        if "reason" in row:
            print(COLUMNS.format(*labels, *[""] * 7).rstrip(), f" absent: {row['reason']}", flush=True)
            continue
        reference = baseline_ms.get(row["direction"]) if row["impl"] != baseline else None
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
        print(
            COLUMNS.format(
                *labels,
                f"{row['ms']:.3f}",
                f"{row['p10_ms']:.3f} .. {row['p90_ms']:.3f}",
                show(row["tflops"], ".2f"),
                show(row["floor_share"], ".2f"),
                show(row["sm_mhz"], ".0f"),
                show(peak, ".1f"),
                show(reference and reference / row["ms"], ".2f"),
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
