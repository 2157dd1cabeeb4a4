"""Runs small CUDA tests under compute-sanitizer: memcheck, racecheck and synccheck in turn. Needs a GPU.

python tools/sanitize.py [tool ...]
"""

import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
# One shape of every kernel, ragged and padded, and offsets that lie.
TESTS = (
    "tests/test_cuda_forward.py::test_attention[ragged_with_empty-bf16]",
    "tests/test_cuda_forward.py::test_attention[padding_rows-fp16]",
    "tests/test_cuda_forward.py::test_attention[d192_128-bf16]",
    "tests/test_cuda_forward.py::test_attention[g6-bf16]",
    "tests/test_cuda_forward.py::test_attention[g48-bf16]",
    "tests/test_cuda_forward.py::test_block_scores[l_over_block_size-bf16]",
    "tests/test_cuda_forward.py::test_compress[mlp-ragged_with_empty-bf16]",
    "tests/test_cuda_forward.py::test_compress[mean-padding_rows-bf16]",
    "tests/test_cuda_forward.py::test_wild_offsets_touch_nothing_outside",
)


def main() -> int:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    failed = []
    for tool in sys.argv[1:] or TOOLS:
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--kernel-name",
            "kernel_substring=portable",
        ]
        print(f"== {tool}", flush=True)
        if subprocess.run([*command, sys.executable, "-m", "pytest", "-q", *TESTS]).returncode:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else "no errors")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
