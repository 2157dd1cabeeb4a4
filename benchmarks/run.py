"""Runs a suite: a table on the terminal, and {"machine": {...}, "rows": [...], "absent": [...]} as JSON.

The JSON is what compare.py, plot.py and table.py read. It is written anew after every point, so that a run
that is cut off leaves the rows it has. Examples:

    python benchmarks/run.py --suite cpu --json results.json
    python benchmarks/run.py --suite cpu --lengths 8192 16384 --ops attention --data smooth
    python benchmarks/run.py --suite training --data random smooth --seconds 120 --json results.json
    python benchmarks/run.py --suite gqa --directions forward --head-dims 128 192
    python benchmarks/run.py --suite decode --batches 1 32 --lengths 8192 65536
    python benchmarks/run.py --suite prefill --quick
    python benchmarks/run.py --suite decode --device cpu --lengths 4096

An operation that has no kernel on the device, a baseline that is not installed and what does not fit into the
memory are listed as absent. The ops of a suite come one after the other, attention first; every op, shape,
batch, data and length is a point, whose implementations are measured in turn (timing.py). Those whose time
does not depend on the data are measured on the first data alone.

--budget bounds the rounds of a point, --seconds the whole run: every point gets a share of the time that is
left, longer sequences a larger one, and points that would begin later are absent.
"""

import argparse
import datetime
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from case import DATA, Case, Workload
from implementations import REGISTRY
from machine import describe_machine, device_name, git_revision
from registry import DATA_INDEPENDENT, GROWTH, why_absent
from suites import DECODE_DIRECTIONS, DIRECTIONS, SUITES, Suite
from timing import METHODS, Method, Timing, measure
from trial import Trial, try_out
from work import ceilings_of, floor_ms

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = {"rounds": 2, "min_rounds": 1, "burst_ms": 5, "pause_ms": 0}
LATE = "its time is over"
HEADINGS = ("length", "batch", "heads", "dims", "data", "op", "impl", "direction", "ms", "p10 .. p90")
HEADINGS += ("TFLOP/s", "floor", "MHz", "peak MiB")
COLUMNS = "{:>7} {:>5} {:>5} {:>7} {:<6} {:<24} {:<15} {:<11} {:>8} {:>18} {:>8} {:>6} {:>5} {:>9} {:>7}"


def main() -> int:
    args = parse_arguments()
    begin = time.monotonic()
    suite = SUITES[args.suite]
    device = args.device or suite.device
    threads = args.threads or (suite.threads if device == "cpu" else None)
    if threads:
        torch.set_num_threads(threads)
    results = Results(describe_machine(device) | {"command": command_line(args)}, save_path(args, device))
    print("  ".join(f"{key}: {value}" for key, value in results.machine.items()))
    print(COLUMNS.format(*HEADINGS, f"x {suite.baseline[-6:]}"), flush=True)
    points = points_of(suite, args, device)
    costs = [cost(suite, op, case, case.data == args.data[0]) for op, case in points]
    for i, (op, case) in enumerate(points):
        left = args.seconds - (time.monotonic() - begin) if args.seconds else None
        point = Point(suite, op, case, args, threads)
        is_late = left is not None and left <= 0
        limit = left * costs[i] / max(1, sum(costs[i:])) if left else None
        share = "" if left is None else f": {LATE}" if is_late else f", {limit:.1f} s"
        where = f"{op}, batch {case.batch}, length {case.length}, {case.data}{share}"
        print(f"[{time.monotonic() - begin:.1f} s] {where}", file=sys.stderr, flush=True)
        rows, absent = ([], point.all_absent(LATE)) if is_late else point.measure(limit, results.rows)
        if not is_late:
            print_rows(rows, absent, suite.baseline)
        results.add(rows, absent)
        del point
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return 1 if results.has_errors() else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--save", action="store_true", help="... or to results/<device>/<date>-<sha>.json")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: the suite's")
    parser.add_argument(
        "--head-dims", type=int, nargs="+", metavar="D", help="only these, of queries and keys"
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", choices=sorted(REGISTRY))
    parser.add_argument("--impls", nargs="+", metavar="IMPL", help="only these implementations")
    parser.add_argument("--data", nargs="+", choices=DATA, default=["random"])
    directions = sorted({*DIRECTIONS, *DECODE_DIRECTIONS})
    parser.add_argument("--directions", nargs="+", choices=directions, help="default: the suite's")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the suite's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the suite's)")
    parser.add_argument("--rounds", type=int, help="rounds of bursts at every point, if the budget allows")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of a point, two rounds at least")
    parser.add_argument("--seconds", type=float, metavar="S", help="seconds of the whole run, shared out")
    parser.add_argument(
        "--quick", action="store_true", help="short lengths and few calls: does it run at all"
    )
    args = parser.parse_args()
    suite = SUITES[args.suite]
    head_dims = sorted({shape.head_dim_qk for shape in suite.shapes})
    for name, allowed in (
        ("ops", suite.ops),
        ("data", suite.data),
        ("directions", suite.directions),
        ("head_dims", head_dims),
    ):
        unknown = [value for value in getattr(args, name) or () if value not in allowed]
        if unknown:
            parser.error(f"--suite {suite.name} has no {name} {listed(unknown)}; it has {listed(allowed)}")
    return args


def listed(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def points_of(suite: Suite, args: argparse.Namespace, device: str) -> list[tuple[str, Case]]:
    lengths = args.lengths or (suite.quick_lengths if args.quick else suite.lengths)
    batches = args.batches or suite.batches
    shapes = [s for s in suite.shapes if args.head_dims is None or s.head_dim_qk in args.head_dims]
    return [
        (op, Case(length, shape, batch, data, suite.dtype, device))
        for op, shape, batch, data, length in itertools.product(
            args.ops or suite.ops, shapes, batches, args.data, lengths
        )
    ]


def cost(suite: Suite, op: str, case: Case, first_data: bool) -> float:
    """How a point's time compares with others', roughly: set-up, and work that grows with the length."""
    measured = [impl for impl in suite.ops[op] if first_data or (op, impl) not in DATA_INDEPENDENT]
    return sum(1 + (case.length / 32768) ** GROWTH[op, impl] for impl in measured)


def method_of(suite: Suite, args: argparse.Namespace, device: str) -> Method:
    chosen = {"rounds": args.rounds, "budget_s": args.budget}
    changes = suite.method | (QUICK if args.quick else {})
    changes |= {name: value for name, value in chosen.items() if value is not None}
    method = replace(METHODS[device], **changes)
    return replace(method, min_rounds=min(method.min_rounds, method.rounds))


class Results:
    """What has been measured so far; its file, if there is one, is always whole."""

    def __init__(self, machine: dict, path: Path | None) -> None:
        self.machine, self.path = machine, path
        self.rows: list[dict] = []
        self.absent: list[dict] = []
        self._write()

    def add(self, rows: list[dict], absent: list[dict]) -> None:
        self.rows += rows
        self.absent += absent
        self._write()

    def has_errors(self) -> bool:
        return any(entry.get("error") for entry in self.absent)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        result = {"machine": self.machine, "rows": self.rows, "absent": self.absent}
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self.path)


class Point:
    """All implementations of one op on one case, in every direction."""

    def __init__(
        self, suite: Suite, op: str, case: Case, args: argparse.Namespace, threads: int | None
    ) -> None:
        self.suite, self.op, self.case, self.threads = suite, op, case, threads
        self.method = method_of(suite, args, case.device)
        self.directions = args.directions or suite.directions
        self.impls = [impl for impl in suite.ops[op] if args.impls is None or impl in args.impls]
        self.absent: list[dict] = []
        is_cuda = case.device == "cuda"
        self.ceilings = ceilings_of(torch.cuda.get_device_properties().name) if is_cuda else None

    def measure(self, limit_s: float | None, earlier: list[dict]) -> tuple[list[dict], list[dict]]:
        """Rows and absent ones, in about limit_s seconds. `earlier` rows of other data serve again where the
        data make no difference."""
        begin = time.monotonic()
        copies = {impl: self._copies(impl, earlier) for impl in self.impls}
        works = self._available([impl for impl in self.impls if not copies[impl]])
        prepare, estimates = {}, {}
        for impl, (work, trial) in works.items():
            for direction in self._running(work, trial):
                prepare[impl, direction] = lambda work=work, direction=direction: work.call(direction)
                if direction in trial.ms:
                    estimates[impl, direction] = trial.ms[direction]
        method = self.method
        if limit_s is not None:
            method = replace(method, limit_s=max(0.0, limit_s - (time.monotonic() - begin)))
        timings, failures = measure(prepare, self.case.device, method, estimates)
        rows = []
        for impl in self.impls:
            rows += copies[impl]
            work, trial = works.get(impl, (None, None))
            for direction in self.directions:
                if (impl, direction) in timings:
                    numbers = self._numbers(work, direction, timings[impl, direction], trial)
                    rows.append(self._labels(impl, direction) | numbers | {"variant": work.variant})
                elif (impl, direction) in failures:
                    self._note_absence(impl, (direction,), failures[impl, direction])
        return rows, self.absent

    def all_absent(self, reason: str) -> list[dict]:
        return [self._labels(i, d) | {"reason": reason} for i in self.impls for d in self.directions]

    def _copies(self, impl: str, earlier: list[dict]) -> list[dict]:
        if (self.op, impl) not in DATA_INDEPENDENT:
            return []
        same = {
            name: value for name, value in self._labels(impl, "").items() if name not in ("direction", "data")
        }
        found = [row for row in earlier if same.items() <= row.items() and "measured_on" not in row]
        return [row | {"data": self.case.data, "measured_on": row["data"]} for row in found]

    def _available(self, impls: list[str]) -> dict[str, tuple[Workload, Trial]]:
        """What can be called."""
        works = {}
        for impl in impls:
            try:
                work = REGISTRY[self.op][impl](self.case)
                wanted = tuple(direction for direction in self.directions if direction in work.directions())
                trial = try_out(self.op, impl, self.case, work, wanted, self.threads)
            except Exception as error:
                self._note_absence(impl, self.directions, error)
                continue
            for direction, error in trial.errors.items():
                self._note_absence(impl, (direction,), error)
            works[impl] = work, trial
        return works

    def _running(self, work: Workload, trial: Trial) -> list[str]:
        return [d for d in self.directions if d in work.directions() and d not in trial.errors]

    def _note_absence(self, impl: str, directions: tuple[str, ...], error: Exception) -> None:
        """Any other error than of something absent is listed too, and fails the run at its end."""
        reason = why_absent(error)
        if reason is None:
            entry = {"reason": f"{type(error).__name__}: {error}".splitlines()[0], "error": True}
        else:
            entry = {"reason": reason}
        self.absent += [self._labels(impl, direction) | entry for direction in directions]

    def _labels(self, impl: str, direction: str) -> dict:
        return {
            "suite": self.suite.name,
            "op": self.op,
            "impl": impl,
            "direction": direction,
            "length": self.case.length,
            "batch": self.case.batch,
            "data": self.case.data,
            "dtype": self.case.dtype,
            **asdict(self.case.shape),
        }

    def _numbers(self, work: Workload, direction: str, timing: Timing, trial: Trial) -> dict:
        units = work.units.get(direction, 1)
        ms, traffic, flops = timing.ms / units, trial.bytes[direction], work.flops.get(direction)
        floor = floor_ms(work, direction, traffic, self.ceilings) if self.ceilings else None
        return {
            "ms": ms,
            "p10_ms": timing.p10_ms / units,
            "p90_ms": timing.p90_ms / units,
            "calls": timing.calls,
            "rounds": timing.rounds,
            "units": units,
            "sm_mhz": timing.sm_mhz,
            "tflops": flops / ms / 1e9 if flops else None,
            "tbps": traffic / ms / 1e9,
            "floor_ms": floor,
            "floor_share": floor / ms if floor else None,
            "flops": flops,
            "bytes": traffic,
            "gathered_bytes": work.gathered_bytes or None,
            "peak_bytes": trial.peak_bytes.get(direction),
        }


def print_rows(rows: list[dict], absent: list[dict], baseline: str) -> None:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def ms(value: float) -> str:
        return f"{value:.4f}" if value < 1 else f"{value:.3f}"

    baseline_ms = {row["direction"]: row["ms"] for row in rows if row["impl"] == baseline}
    for row in [*rows, *absent]:
        labels = (
            row["length"],
            row["batch"],
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
                ms(row["ms"]),
                f"{ms(row['p10_ms'])} .. {ms(row['p90_ms'])}",
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
    suffix = "" if args.suite in ("cpu", "training") else f"-{args.suite}"
    name = f"{datetime.date.today().isoformat()}-{git_revision()}{suffix}.json"
    return RESULTS / device_name(device) / name


def command_line(args: argparse.Namespace) -> str:
    """The command that measures this again; where its results went does not matter."""
    words = [word for word in sys.argv[1:] if word != "--save"]
    if args.json:
        position = next(i for i, word in enumerate(words) if word.split("=")[0] == "--json")
        del words[position : position + (1 if "=" in words[position] else 2)]
    return " ".join(["python benchmarks/run.py", *words])


if __name__ == "__main__":
    sys.exit(main())
