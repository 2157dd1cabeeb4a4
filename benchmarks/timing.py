"""The burst median.

Rounds in which every implementation in turn gets a burst of back-to-back calls, with a pause between bursts;
the median over all calls of all rounds. So drifts of clocks and temperature meet every implementation alike.
Fully isolated calls would expose launch latency and clock ramps, sustained ones the power cap.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from clocks import sm_mhz


@dataclass(frozen=True)
class Method:
    burst_ms: float = 50  # calls of one burst, in all
    min_calls: int = 3  # of one burst
    pause_ms: float = 100  # between bursts
    rounds: int = 10
    min_rounds: int = 2
    budget_s: float = 30  # rounds beyond min_rounds stop when they have taken this long


# A CPU call takes seconds at the longest lengths: there a burst is one call, and time limits the rounds.
METHODS = {
    "cuda": Method(),
    "cpu": Method(min_calls=1, pause_ms=20, min_rounds=3, budget_s=60),
}


@dataclass(frozen=True)
class Timing:
    ms: float
    p10_ms: float
    p90_ms: float
    calls: int
    rounds: int
    sm_mhz: float | None  # median over the bursts


Call = Callable[[], object]


def measure(
    prepare: dict[Hashable, Callable[[], Call]], device: str, method: Method
) -> dict[Hashable, Timing]:
    """Times what every prepare() returns by bursts in turn. Each has run once before: lazy initialisation.

    On a GPU a call is prepared for each burst and dropped afterwards: the graphs that backward calls hold
    would not fit all at once.
    """
    is_cuda = device == "cuda"
    time_calls = _time_cuda_calls if is_cuda else _time_cpu_calls
    samples: dict[Hashable, list[float]] = {key: [] for key in prepare}
    clocks: dict[Hashable, list[int]] = {key: [] for key in prepare}
    estimate_ms, kept = {}, {}
    for key, make in prepare.items():
        call = make()
        estimate_ms[key] = time_calls(call, 1)[0]
        if not is_cuda:
            kept[key] = call
        del call
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for completed in range(method.rounds):
            elapsed = time.perf_counter() - begin
            if completed >= method.min_rounds and elapsed + elapsed / completed > method.budget_s:
                break
            for key, make in prepare.items():
                call = kept.get(key) or make()
                count = max(method.min_calls, round(method.burst_ms / estimate_ms[key]))
                if count > 1:
                    time_calls(call, 1)  # untimed: brings caches and clocks back
                samples[key] += time_calls(call, count, clocks[key])
                del call
                time.sleep(method.pause_ms / 1e3)
            rounds = completed + 1
    finally:
        gc.enable()
    return {key: summarize(samples[key], rounds, clocks[key]) for key in prepare}


def summarize(ms: list[float], rounds: int, clocks: list[int]) -> Timing:
    values = torch.tensor(ms, dtype=torch.float64)
    p10, median, p90 = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(median, p10, p90, len(ms), rounds, statistics.median(clocks) if clocks else None)


def _time_cpu_calls(call: Call, count: int, clocks: list[int] | None = None) -> list[float]:
    ms = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        ms.append((time.perf_counter() - begin) * 1e3)
    return ms


def _time_cuda_calls(call: Call, count: int, clocks: list[int] | None = None) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    clock = None if clocks is None else sm_mhz()  # the GPU is still at work
    torch.cuda.synchronize()
    if clock is not None:
        clocks.append(clock)
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
