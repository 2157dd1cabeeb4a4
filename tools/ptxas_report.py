"""Tables what ptxas said about every kernel in a build log; fails on spills and on lost performance.

python tools/ptxas_report.py build/ptxas/ptxas.log
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# setmaxnreg ignored; wgmma serialised (two codes, by cause).
FATAL_CODES = ("C7508", "C7510", "C7519")

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def parse(log: str) -> tuple[list[Kernel], list[str]]:
    """Kernels in the order of the log, and its lines with a fatal code."""
    kernels: list[Kernel] = []
    fatal = []
    in_kernel = False  # "Function properties" of device functions repeat the stack line: only entries count
    for line in log.splitlines():
        if any(code in line for code in FATAL_CODES):
            fatal.append(line.strip())
        if match := COMPILING.search(line):
            kernels.append(Kernel(match[1], match[2]))
            in_kernel = True
        elif "Function properties for" in line and kernels:
            in_kernel = kernels[-1].name in line
        elif in_kernel and (match := STACK.search(line)):
            kernels[-1].stack, kernels[-1].spill_stores, kernels[-1].spill_loads = map(int, match.groups())
        elif kernels and (match := USED.search(line)):
            kernels[-1].registers = int(match[1])
            kernels[-1].shared = int(shared[1]) if (shared := SHARED.search(line)) else 0
    return kernels, fatal


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return names
    result = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def main() -> int:
    kernels, fatal = parse(Path(sys.argv[1]).read_text())
    if not kernels:
        print(f"{sys.argv[1]} names no kernel: was it written by a build from clean, with -Xptxas=-v?")
        return 1
    print(f"{'arch':8} {'regs':>4} {'stack':>6} {'spills':>6} {'smem':>7}  kernel")
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
        short = re.sub(r"\(.*\)$", "", re.sub(r"\(\w+\)(?=-?\d)", "", plain))  # no casts, no parameters
        numbers = f"{kernel.registers:4} {kernel.stack:6} {kernel.spills:6} {kernel.shared:7}"
        print(f"{kernel.arch:8} {numbers}  {short}")
    spilling = sum(kernel.spills > 0 for kernel in kernels)
    print(f"{len(kernels)} kernels, {spilling} with spills, {len(fatal)} lines with {', '.join(FATAL_CODES)}")
    for line in fatal:
        print(line)
    return 1 if spilling or fatal else 0


if __name__ == "__main__":
    sys.exit(main())
