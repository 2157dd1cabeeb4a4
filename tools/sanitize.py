"""Runs small CUDA tests under compute-sanitizer: memcheck, racecheck and synccheck in turn. Needs a GPU.

    python tools/sanitize.py [tool ...] [--only pytest|catch2] [--catch2 build/dev/nsa_cuda_tests]

Operators on both paths through pytest, then the C++ tests of kernels and instructions, where they are built.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
# One shape of every kernel, ragged and padded, forward and backward, and offsets that lie.
TESTS = tuple(
    f"tests/{name}"
    for path in ("cuda", "portable")
    for name in (
        f"test_attention.py::test_equals_reference[ragged_with_empty-{path}-bfloat16]",
        f"test_attention.py::test_equals_reference[padding_rows-{path}-float16]",
        f"test_attention.py::test_equals_reference[dims_192_128-{path}-bfloat16]",
        f"test_attention.py::test_equals_reference[dims_128-{path}-bfloat16]",
        f"test_attention.py::test_equals_reference[gqa_g5-{path}-bfloat16]",
        f"test_cuda_forward.py::test_attention[{path}-g48-bf16]",
        f"test_block_scores.py::test_equals_reference[l_over_block_size-{path}-bfloat16]",
        f"test_compress.py::test_equals_reference[mlp-ragged_with_empty-{path}-bfloat16]",
        f"test_compress.py::test_equals_reference[mean-padding_rows-{path}-bfloat16]",
        f"test_cuda_forward.py::test_wild_offsets_touch_nothing_outside[{path}]",
    )
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=TOOLS, metavar="tool", help="default: all three")
    parser.add_argument("--only", choices=("pytest", "catch2"))
    parser.add_argument("--catch2", type=Path, default=Path("build/dev/nsa_cuda_tests"))
    parser.add_argument("--filter", default="~[slow]", help="which C++ tests, in Catch2's words")
    args = parser.parse_args()

    programs = {
        "pytest": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        "catch2": [str(args.catch2), args.filter],
    }
    if not args.catch2.exists():
        print(f"without the C++ tests: there is no {args.catch2}")
        del programs["catch2"]
    chosen = {name: words for name, words in programs.items() if args.only in (None, name)}
    failed = [
        f"{tool} of {name}"
        for name, program in chosen.items()
        for tool in args.tools
        if not passes(tool, name, program)
    ]
    print(f"failed: {', '.join(failed)}" if failed else "no errors")
    return bool(failed)


def passes(tool: str, name: str, program: list[str]) -> bool:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    only_ours = ["--kernel-name", "kernel_substring=nsa"]
    print(f"== {tool}: {name}", flush=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *only_ours, *program]
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
