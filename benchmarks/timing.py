"""The burst median, and peak memory.

Burst median: rounds in which every implementation in turn gets a burst of back-to-back calls, with a pause
between bursts; the median over all calls of all rounds. So drifts of clocks and temperature meet every
implementation alike. Fully isolated calls would expose launch latency and clock ramps, sustained ones
the power cap.
"""

import ctypes
import gc
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from registry import REGISTRY, Case, Workload


@dataclass(frozen=True)
class Method:
    burst_ms: float = 50  # calls of one burst, in all
    min_calls: int = 3  # of one burst
    pause_ms: float = 100  # between bursts
    rounds: int = 10
    min_rounds: int = 3
    budget_s: float = 1800  # rounds beyond min_rounds stop when they have taken this long


# A CPU call takes seconds at the longest lengths: there a burst is one call, and time limits the rounds.
METHODS = {
    "cuda": Method(),
    "cpu": Method(min_calls=1, pause_ms=20, budget_s=60),
}


@dataclass(frozen=True)
class Timing:
    ms: float
    p10_ms: float
    p90_ms: float
    calls: int


Call = Callable[[], object]


def measure(calls: dict[Hashable, Call], device: str, method: Method) -> dict[Hashable, Timing]:
    """Times every call by bursts in turn."""
    time_calls = _time_cuda_calls if device == "cuda" else _time_cpu_calls
    samples: dict[Hashable, list[float]] = {key: [] for key in calls}
    estimate_ms = {}
    for key, call in calls.items():
        time_calls(call, 1)  # first call: lazy initialisation
        estimate_ms[key] = time_calls(call, 1)[0]
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for completed in range(method.rounds):
            elapsed = time.perf_counter() - begin
            if completed >= method.min_rounds and elapsed + elapsed / completed > method.budget_s:
                break
            for key, call in calls.items():
                count = max(method.min_calls, round(method.burst_ms / estimate_ms[key]))
                if count > 1:
                    time_calls(call, 1)  # untimed: brings caches and clocks back
                samples[key] += time_calls(call, count)
                time.sleep(method.pause_ms / 1e3)
    finally:
        gc.enable()
    return {key: summarize(ms) for key, ms in samples.items()}


def summarize(ms: list[float]) -> Timing:
    values = torch.tensor(ms, dtype=torch.float64)
    p10, median, p90 = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(median, p10, p90, len(ms))


def _time_cpu_calls(call: Call, count: int) -> list[float]:
    ms = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        ms.append((time.perf_counter() - begin) * 1e3)
    return ms


def _time_cuda_calls(call: Call, count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


# ---- Peak memory beyond the inputs (outputs, saved tensors, gradients and workspaces count) ----


def peak_memory(
    op: str,
    impl: str,
    case: Case,
    threads: int | None = None,
    directions: tuple[str, ...] = ("forward", "backward", "step"),
) -> dict[str, int | None]:
    """Bytes per direction; None where the system does not tell."""
    if case.device == "cuda":
        return _peak_by_direction(REGISTRY[op][impl](case), _CudaMeter(), directions)
    if not _CpuMeter.is_supported():
        return dict.fromkeys(("forward", "backward", "step"))
    # A process of its own: nothing that earlier calls left to the allocator can hide what this one needs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timing"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_cpu_memory, args=(op, impl, case, threads, sender))
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


def _peak_by_direction(
    workload: Workload,
    meter: "_CpuMeter | _CudaMeter",
    directions: tuple[str, ...] = ("forward", "backward", "step"),
) -> dict[str, int | None]:
    start = meter.reset()
    outputs = workload.forward()
    peaks = {"forward": meter.peak() - start}
    if "backward" in workload.directions() and "backward" in directions:
        held = meter.reset() - start
        workload.grad_outputs(outputs)  # the caller's memory
        before = meter.reset()
        workload.backward(outputs)
        peaks["backward"] = meter.peak() - before
        peaks["step"] = max(peaks["forward"], held + peaks["backward"])
    return peaks


class _CudaMeter:
    def reset(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class _CpuMeter:
    """Resident set and its high-water mark, as Linux keeps them for a process."""

    M_MMAP_THRESHOLD = -3

    def __init__(self) -> None:
        # glibc: give every large block its own pages, so that freed memory leaves the resident set at once.
        ctypes.CDLL(None).mallopt(self.M_MMAP_THRESHOLD, 64 * 1024)

    @staticmethod
    def is_supported() -> bool:
        return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)

    def reset(self) -> int:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        return self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(name))
        return int(line.split()[1]) * 1024


def _peak_cpu_memory(op: str, impl: str, case: Case, threads: int | None, sender: Connection) -> None:
    if threads:
        torch.set_num_threads(threads)
    meter = _CpuMeter()
    # Code, thread stacks and library tables become resident with a small case, and are not counted.
    small = REGISTRY[op][impl](replace(case, length=min(case.length, 256)))
    small.call(small.directions()[-1])()
    sender.send(_peak_by_direction(REGISTRY[op][impl](case), meter))
