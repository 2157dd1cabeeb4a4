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
    limit_s: float = float("inf")  # shorter bursts and fewer rounds where even min_rounds would take longer


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


@dataclass(frozen=True)
class Burst:
    calls: int
    warm_up: bool  # begins with an untimed call, which brings caches and clocks back


Call = Callable[[], object]


def measure(
    prepare: dict[Hashable, Callable[[], Call]],
    device: str,
    method: Method,
    estimate_ms: dict[Hashable, float] | None = None,
) -> tuple[dict[Hashable, Timing], dict[Hashable, Exception]]:
    """Times what every prepare() returns by bursts in turn; what runs out of memory is left out, and returned
    with its error. Each has run once before: lazy initialisation. estimate_ms: of a call, where known.

    On a GPU a call is prepared for each burst and dropped afterwards: the graphs that backward calls hold
    would not fit all at once.
    """
    begin, budget_s = time.perf_counter(), min(method.budget_s, method.limit_s)
    is_cuda = device == "cuda"
    time_calls = _time_cuda_calls if is_cuda else _time_cpu_calls
    samples: dict[Hashable, list[float]] = {key: [] for key in prepare}
    clocks: dict[Hashable, list[int]] = {key: [] for key in prepare}
    estimates, kept, failures = dict(estimate_ms or {}), {}, {}

    def burst_of(key: Hashable, burst: Burst) -> list[float]:
        """[] when the memory does not suffice, now or before."""
        if key in failures:
            return []
        call = None
        try:
            call = kept.get(key) or prepare[key]()
            if not is_cuda:
                kept[key] = call
            if burst.warm_up:
                time_calls(call, 1)
            return time_calls(call, burst.calls, clocks[key])
        except torch.OutOfMemoryError as error:
            failures[key] = error.with_traceback(None)  # whose frames hold tensors
        del call  # which may hold a graph
        gc.collect()
        torch.cuda.empty_cache()
        return []

    for key in prepare:
        if key not in estimates and (sample := burst_of(key, Burst(1, False))):
            estimates[key] = sample[0]
            clocks[key].clear()
    bursts, min_rounds = plan({key: estimates[key] for key in prepare if key not in failures}, method)
    gc.collect()
    gc.disable()
    rounds = 0
    try:
        first_round = time.perf_counter()
        while rounds < method.rounds:
            now = time.perf_counter()
            if rounds >= min_rounds and now - begin + (now - first_round) / rounds > budget_s:
                break
            for key, burst in bursts.items():
                samples[key] += burst_of(key, burst)
                time.sleep(method.pause_ms / 1e3)
            rounds += 1
    finally:
        gc.enable()
    timings = {key: summarize(ms, rounds, clocks[key]) for key, ms in samples.items() if ms}
    return timings, failures


def plan(estimate_ms: dict[Hashable, float], method: Method) -> tuple[dict[Hashable, Burst], int]:
    """The burst of each, and the least number of rounds. Where min_rounds of the bursts as `method` has them
    exceed its limit, a call that is as long as a burst is one, without another before it, and a round is
    enough.
    """

    def burst(ms: float, min_calls: int) -> Burst:
        calls = max(min_calls, round(method.burst_ms / max(ms, 1e-3)))
        return Burst(calls, warm_up=calls > 1)

    def seconds(bursts: dict[Hashable, Burst]) -> float:
        return (
            sum((b.calls + b.warm_up) * estimate_ms[key] + method.pause_ms for key, b in bursts.items()) / 1e3
        )

    full = {key: burst(ms, method.min_calls) for key, ms in estimate_ms.items()}
    if method.min_rounds * seconds(full) <= method.limit_s:
        return full, method.min_rounds
    return {key: burst(ms, 1) for key, ms in estimate_ms.items()}, 1


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
