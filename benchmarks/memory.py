"""Peak memory beyond the inputs: outputs, saved tensors, gradients and workspaces count."""

import ctypes
import multiprocessing
import os
import sys
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
from case import Case, Workload
from implementations import REGISTRY


def peak_memory(
    op: str, impl: str, case: Case, directions: tuple[str, ...], threads: int | None = None
) -> dict[str, int | None]:
    """Bytes per direction; None where the system does not tell."""
    if case.device == "cuda":
        return _peak_by_direction(REGISTRY[op][impl](case), _CudaMeter(), directions)
    if not _CpuMeter.is_supported():
        return dict.fromkeys(directions)
    # A process of its own: nothing that earlier calls left to the allocator can hide what this one needs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_cpu_memory, args=(op, impl, case, directions, threads, sender))
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
    workload: Workload, meter: "_CpuMeter | _CudaMeter", directions: tuple[str, ...]
) -> dict[str, int | None]:
    start = meter.reset()
    outputs = workload.forward()
    peaks = {"forward": meter.peak() - start}
    if "backward" in directions or "step" in directions:
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


def _peak_cpu_memory(
    op: str, impl: str, case: Case, directions: tuple[str, ...], threads: int | None, sender: Connection
) -> None:
    if threads:
        torch.set_num_threads(threads)
    meter = _CpuMeter()
    # Code, thread stacks and library tables become resident with a small case, and are not counted.
    small = REGISTRY[op][impl](replace(case, length=min(case.length, 256)))
    small.call(small.directions()[-1])()
    sender.send(_peak_by_direction(REGISTRY[op][impl](case), meter, directions))
