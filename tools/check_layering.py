"""Checks that the includes of csrc/ follow the arrows of docs/architecture.md:

ops, bindings -> nsa (the contract) <- cpu | cuda/{portable, sm90} -> cuda/common;
cuda/common -> cuda/{host, tile} -> cuda/ptx; torch only in ops.
"""

import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# What a folder may include: of ours (in quotes), and of others (in angle brackets, as a regular expression).
STANDARD = r"[a-z_0-9]+(\.h)?"
CUDA_TOOLKIT = rf"{STANDARD}|cudaTypedefs\.h|cuda/.*|cooperative_groups/.*"
TORCH = rf"{STANDARD}|(torch|ATen|c10)/.*"
PYBIND = rf"{STANDARD}|pybind11/.*"
FORBIDDEN_STANDARD = {"nsa": r"(cuda|cublas|nv).*|.*intrin\.h|omp\.h", "cpu": r"(cuda|cublas|nv).*|omp\.h"}
CUDA_BASE = ["nsa", "cuda/ptx", "cuda/tile", "cuda/host"]
LAYERS = {
    "nsa": (["nsa"], STANDARD),
    "cpu": (["nsa", "cpu"], STANDARD),
    "cuda/ptx": (["nsa", "cuda/ptx"], CUDA_TOOLKIT),
    "cuda/tile": (["nsa", "cuda/ptx", "cuda/tile"], CUDA_TOOLKIT),
    "cuda/host": (["nsa", "cuda/host"], CUDA_TOOLKIT),
    "cuda/common": ([*CUDA_BASE, "cuda/common"], CUDA_TOOLKIT),
    "cuda/portable": ([*CUDA_BASE, "cuda/common", "cuda/portable"], CUDA_TOOLKIT),
    "cuda/sm90": ([*CUDA_BASE, "cuda/common", "cuda/sm90"], CUDA_TOOLKIT),
    "cuda": (["nsa", "cuda"], CUDA_TOOLKIT),
    "ops": (["nsa", "ops"], TORCH),
    "bindings": (["nsa", "bindings"], PYBIND),
}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')


def layer_of(path: str) -> str | None:
    """The longest layer name that is a folder of ``path`` (relative to csrc/)."""
    return max((layer for layer in LAYERS if path.startswith(f"{layer}/")), key=len, default=None)


def problem(layer: str, ours: str | None, others: str | None) -> str | None:
    allowed, pattern = LAYERS[layer]
    if ours is not None:
        if not any(ours.startswith(f"{prefix}/") for prefix in allowed):
            return f'{layer}/ may not include "{ours}", only {", ".join(f"{prefix}/" for prefix in allowed)}'
    elif others is not None:
        forbidden = FORBIDDEN_STANDARD.get(layer)
        if not re.fullmatch(pattern, others) or (forbidden and re.fullmatch(forbidden, others)):
            return f"{layer}/ may not include <{others}>"
    return None


def main() -> int:
    failures = 0
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        relative = path.relative_to(CSRC).as_posix()
        layer = layer_of(relative)
        if layer is None:
            print(f"csrc/{relative}:1: no layer is called {path.parent.name}")
            failures += 1
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if (match := INCLUDE.match(line)) and (message := problem(layer, *match.groups())):
                print(f"csrc/{relative}:{number}: {message}")
                failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
