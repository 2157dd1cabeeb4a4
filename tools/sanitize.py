"""Runs small CUDA tests under compute-sanitizer: memcheck, synccheck and racecheck. Needs a GPU.

    python tools/sanitize.py [tool ...] [--only pytest|catch2] [--catch2 build/dev/nsa_cuda_tests]

memcheck and synccheck see operators on both paths through pytest, then the C++ tests of kernels and
instructions, where they are built. racecheck sees kernels one by one, through these C++ tests.
docs/kernels/racecheck.md says what it reports wrongly, and how that is known; anything else is a failure.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "synccheck", "racecheck")
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


@dataclass(frozen=True)
class Races:
    """A kernel under racecheck: its C++ test, and pairs of functions whose accesses it reports wrongly.

    The accesses of a pair are ordered by the named mbarriers, where lane 0 arrives for its warp behind
    __syncwarp. Flags are volatile on both sides, which to PTX is a relaxed atomic.
    """

    kernel: str
    test: str
    accepted: frozenset[frozenset[str]] = frozenset()
    launches: int = 12

    def unexpected(self, output: str) -> Counter:
        """Reported pairs that are not accepted."""
        return Counter(pair for pair in reported_pairs(output) if pair not in self.accepted)


def pairs(*names: tuple[str, str]) -> frozenset[frozenset[str]]:
    return frozenset(frozenset(pair) for pair in names)


RACES = (
    # rows_full, rows_empty: the logarithms and limits of an item's rows.
    Races(
        "block_scores_sm90",
        "Hopper scores and selection: one sequence",
        pairs(("fill_rows", "consume")),
    ),
    Races(
        "selected_attention_fwd_sm90",
        "selected attention on Hopper equals the naive loops for every group",
        pairs(
            # list_full, list_empty: the union of a tile.
            ("build_union", "load_keys"),
            ("build_union", "clear_unseen_values"),
            ("build_union", "warps"),
            # v_full, v_empty: zeros in place of values that no token sees.
            ("store_shared_16", "load_matrices_transposed"),
            # The flags k_issued, v_issued.
            ("load_keys", "wait_for"),
        ),
    ),
    Races(
        "selected_attention_bwd_keys_sm90",
        "gradients of selected attention for every size of a group",
        pairs(
            # full, empty: what a tile's rows need beside their data.
            ("produce", "finish_scores"),
            # The same, and keys_full, keys_empty: the item.
            ("produce", "consume"),
        ),
    ),
    Races(
        "selected_attention_bwd_queries_sm90",
        "gradients of selected attention for every size of a group",
        pairs(
            # plan_full, plan_empty: the plan of a tile.
            ("make_plan", "bring_keys"),
            ("make_plan", "clear_unseen_keys"),
            ("make_plan", "next"),
            ("make_plan", "OwnParts"),
            ("make_plan", "selected_attention_bwd_queries_sm90"),
            # full, empty: zeros in place of keys that no token sees.
            ("store_shared_16", "load_matrices_transposed"),
            # The flag `issued`.
            ("bring_keys", "selected_attention_bwd_queries_sm90"),
        ),
    ),
    Races("banded_attention_fwd_sm90", "Hopper banded attention at the ends of its tiles"),
    Races("banded_attention_bwd", "banded backward of chunks\\, padding\\, short and empty sequences"),
    Races("compress_fwd_sm90", "phi equals the naive loops"),
    Races("selected_blocks", "block_indices turned around are the lists of who chose which block"),
)

ACCESS = re.compile(
    r"(?:Error|Warning): Race reported between \w+ access at (.*) in \S+|"
    r"and \w+ access at (.*) in \S+ \[\d+ hazards\]"
)


def function_name(signature: str) -> str:
    """The bare name of a demangled function: a lambda has that of its function."""
    text = signature.replace("<unnamed>", "unnamed").partition("+0x")[0]
    while (shorter := re.sub(r"<[^<>]*>", "", text)) != text:
        text = shorter
    return re.split(r"[\s:]+", text.partition("(")[0].strip())[-1]


def reported_pairs(output: str) -> list[frozenset[str]]:
    """Pairs of functions between whose accesses racecheck reports races."""
    found, first = [], ""
    for line in output.splitlines():
        match = ACCESS.search(line)
        if match is None:
            continue
        if match[1]:
            first = function_name(match[1])
        else:
            found.append(frozenset((first, function_name(match[2]))))
    return found


def understands(output: str) -> bool:
    """Whether racecheck came to its end and all races that it counts were read: its text may change."""
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    races = sum(bool(match and match[1]) for match in map(ACCESS.search, output.splitlines()))
    return summary is not None and int(summary[1]) == races and len(reported_pairs(output)) >= races


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=TOOLS, metavar="tool", help="default: all three")
    parser.add_argument("--only", choices=("pytest", "catch2"))
    parser.add_argument("--catch2", type=Path, default=Path("build/dev/nsa_cuda_tests"))
    parser.add_argument("--filter", default="~[slow]", help="which C++ tests, in Catch2's words")
    parser.add_argument("--kernel", default="", help="racecheck: only kernels with this in their names")
    args = parser.parse_args()

    programs = {
        "pytest": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        "catch2": [str(args.catch2), args.filter],
    }
    if not args.catch2.exists():
        print(f"without the C++ tests: there is no {args.catch2}")
        del programs["catch2"]
    failed = []
    for name, program in programs.items():
        if args.only not in (None, name):
            continue
        for tool in args.tools:
            if tool != "racecheck":
                failed += [] if passes(tool, name, program) else [f"{tool} of {name}"]
            elif name == "catch2":
                chosen = [races for races in RACES if args.kernel in races.kernel]
                failed += [f"racecheck of {r.kernel}" for r in chosen if not free_of(r, args.catch2)]
    print(f"failed: {', '.join(failed)}" if failed else "no errors")
    return bool(failed)


def sanitizer(tool: str, kernel: str, *options: str) -> list[str]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return [program, "--tool", tool, "--kernel-name", f"kernel_substring={kernel}", *options]


def passes(tool: str, name: str, program: list[str]) -> bool:
    print(f"== {tool}: {name}", flush=True)
    return subprocess.run([*sanitizer(tool, "nsa", "--error-exitcode", "9"), *program]).returncode == 0


def free_of(races: Races, catch2: Path) -> bool:
    """Whether the test passes and racecheck reports nothing but what is accepted."""
    print(f"== racecheck: {races.kernel}", flush=True)
    options = ("--print-limit", "100000", "--launch-count", str(races.launches))
    command = [*sanitizer("racecheck", races.kernel, *options), str(catch2), races.test]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reported, unexpected = reported_pairs(result.stdout), races.unexpected(result.stdout)
    ran = understands(result.stdout) and result.returncode == 0
    print(f"{len(reported)} reports, {sum(unexpected.values())} of them unexpected; exit {result.returncode}")
    for pair, count in unexpected.items():
        print(f"  {count} x between {' and '.join(sorted(pair))}")
    if not ran or unexpected:
        print(result.stdout[-2000:])
    return ran and not unexpected


if __name__ == "__main__":
    sys.exit(main())
