"""Which implementations exist: functions Case -> Workload, entered with @implementation.

The modules of `implementations` fill it. A new op or baseline is one entry there and one in suites.py;
run.py, compare.py, plot.py and table.py know none of them by name.
"""

from collections.abc import Callable

import torch
from case import Case, Workload

Builder = Callable[[Case], Workload]
REGISTRY: dict[str, dict[str, Builder]] = {}
# (op, impl) whose time is the same for all data of one distribution: run.py measures them once.
DATA_INDEPENDENT: set[tuple[str, str]] = set()
# How the time grows with the length, roughly, by (op, impl): length ** this.
GROWTH: dict[tuple[str, str], float] = {}

# How an operation says that it does not exist for these inputs on this machine.
_ABSENT = ("no CUDA kernel", "there is no kernel", "No available kernel", "No viable backend", "does not fit")


def implementation(
    op: str, impl: str, depends_on_data: bool = True, growth: float = 1.2
) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        REGISTRY.setdefault(op, {})[impl] = builder
        GROWTH[op, impl] = growth
        if not depends_on_data:
            DATA_INDEPENDENT.add((op, impl))
        return builder

    return register


def why_absent(error: Exception) -> str | None:
    """The reason when an error means that there is no such kernel or package, or not enough memory; None for
    any other error."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text.splitlines()[0]}"
    if isinstance(error, ImportError) or any(phrase in text for phrase in _ABSENT):
        return text.splitlines()[0]
    return None
