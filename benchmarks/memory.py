"""Peak memory of a stretch of code: reset() tells what is held now, peak() the most since then."""

import ctypes
import os
import sys

import torch


class CudaMeter:
    def reset(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


class CpuMeter:
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
