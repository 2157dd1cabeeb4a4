"""The first calls of an implementation: what runs, what it reads and writes, how long it takes, and its peak
memory beyond the inputs (outputs, saved tensors, gradients and workspaces count)."""

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch
from case import Case, Workload
from implementations import REGISTRY
from memory import CpuMeter, CudaMeter

LONG_S = 1.0
SMALL = 256  # tokens, of a case that is run beforehand


@dataclass
class Trial:
    """By direction. Those in `errors` do not run; peak_bytes: None where the system does not tell."""

    errors: dict[str, Exception] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    ms: dict[str, float] = field(default_factory=dict)  # of a call, as far as forward and backward tell


def try_out(
    op: str, impl: str, case: Case, work: Workload, directions: tuple[str, ...], threads: int | None = None
) -> Trial:
    if case.device != "cuda":
        trial = _run(work, directions, None)
        running = tuple(direction for direction in directions if direction not in trial.errors)
        case = replace(case, variant=work.variant)
        trial.peak_bytes = _peak_on_cpu(op, impl, case, running, threads)
        return trial
    _initialize(op, impl, replace(case, length=min(case.length, SMALL), batch=1), directions)
    begin = time.perf_counter()
    trial = _run(work, directions, CudaMeter())
    if not trial.errors and time.perf_counter() - begin < LONG_S:
        trial = _run(work, directions, CudaMeter())  # without what is initialised for this very size
    return trial


@functools.cache
def _initialize(op: str, impl: str, small: Case, directions: tuple[str, ...]) -> None:
    """Libraries load and compile at the first call, for seconds, which a long case must not pay for twice."""
    with contextlib.suppress(Exception):  # the case itself will tell
        _run(REGISTRY[op][impl](small), directions, None)


def _run(work: Workload, directions: tuple[str, ...], meter: CpuMeter | CudaMeter | None) -> Trial:
    """Forward, and backward where a direction needs it."""
    trial, peaks, seconds = Trial(), {}, {}
    start = meter.reset() if meter else 0

    def call(name: str, run: Callable[[], tuple]) -> tuple:
        begin = time.perf_counter()
        outputs = run()
        if outputs and outputs[0].is_cuda:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begin
        return outputs

    failing = directions
    try:
        outputs = call("forward", work.forward)
        peaks["forward"] = meter.peak() - start if meter else None
        trial.bytes = work.least_bytes(outputs)
        failing = tuple(direction for direction in directions if direction in ("backward", "step"))
        if failing:
            held = meter.reset() - start if meter else 0
            work.grad_outputs(outputs)  # the caller's memory
            before = meter.reset() if meter else 0
            call("backward", lambda: work.backward(outputs))
            peaks["backward"] = meter.peak() - before if meter else None
            peaks["step"] = max(peaks["forward"], held + peaks["backward"]) if meter else None
            seconds["step"] = seconds["forward"] + seconds["backward"]
    except Exception as error:
        trial.errors = dict.fromkeys(failing, error.with_traceback(None))  # whose frames hold tensors
    # Directions of one's own are steps whose memory does not depend on what they do.
    trial.peak_bytes = {direction: peaks.get(direction, peaks.get("forward")) for direction in directions}
    trial.ms = {} if work.units else {direction: 1e3 * s for direction, s in seconds.items()}
    return trial


def _peak_on_cpu(
    op: str, impl: str, case: Case, directions: tuple[str, ...], threads: int | None
) -> dict[str, int | None]:
    """In a process of its own: nothing that earlier calls left to the allocator hides what this one needs."""
    if not directions or not CpuMeter.is_supported():
        return dict.fromkeys(directions)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trial"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_on_cpu, args=(op, impl, case, directions, threads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        message = (
            f"the process that measures the peak memory of {op} by {impl} exited with {process.exitcode}"
        )
        raise RuntimeError(message) from None
    finally:
        process.join()


def _measure_on_cpu(
    op: str, impl: str, case: Case, directions: tuple[str, ...], threads: int | None, sender: Connection
) -> None:
    if threads:
        torch.set_num_threads(threads)
    meter = CpuMeter()
    # Code, thread stacks and library tables become resident with a small case, and are not counted.
    _run(REGISTRY[op][impl](replace(case, length=min(case.length, SMALL))), directions, None)
    sender.send(_run(REGISTRY[op][impl](case), directions, meter).peak_bytes)
