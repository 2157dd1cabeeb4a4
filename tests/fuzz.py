"""Random shapes of every operator, forward and backward, against the fp64 reference, in bounded time.

    python tests/fuzz.py                            500 shapes, on both paths of a GPU, else on the CPU
    python tests/fuzz.py --reference cpu            on a GPU, but the reference on the CPU: many times as long
    python tests/fuzz.py --device cpu --shapes 50 --seconds 60
    python tests/fuzz.py --seed 1234 --shapes 1     one shape again
    python tests/fuzz.py --long                     on a GPU, the choice of blocks on long sequences

A shape is a pure function of its seed. The first failure of each seed is printed with its shape and the seed
that repeats it. Where an error is too large against that of the baseline, it has to repeat as it was, and
DRAWS draws of the inputs decide together: in thousands of comparisons, many of few numbers, some baselines
are exact by luck.
"""

import argparse
import dataclasses
import os
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # an installed nsa_ext wins

import harness
import torch
from attention_case import attention_tensors, check_attention
from cache_case import LAYOUTS
from cases import CPU_DTYPES, CUDA_DTYPES, CUDA_HEAD_DIMS, Case, Inputs
from choice_case import UNUSUAL_SCORES, check_choice, long_case
from harness import branch_check, rows_of_no_query
from test_cache_ops import KINDS, test_append_kv, test_decode_attention
from test_compress import check_compress, phi
from test_edge_garbage import band_garbage
from tolerance import OutsideError, SelectionRule, assert_selection_valid, measuring, outside

PAIRS = 2e6  # of queries, keys and heads: what the dense reference can do in about a second on a CPU
DRAWS = 8  # of the inputs of a shape
MOST_TOKENS = 16  # of a sequence in a step of decoding


def draw_case(rng: random.Random, device: str) -> Case:
    """A legal shape; on a GPU one that has native kernels."""
    heads_kv = rng.choice([1, 1, 2, 3])
    if device == "cuda":
        group = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, rng.randint(1, 64)])
        dims, stride = rng.choice(CUDA_HEAD_DIMS), rng.choice([8, 16, 32])
        length = stride * rng.randint(1, 64 // stride)
        block_size = rng.choice([size for size in (32, 64, 128) if size % stride == 0])
    else:
        group = rng.choice([1, 2, 3, 4, 7, 16])
        dims, stride = (rng.randint(1, 80), rng.randint(1, 80)), rng.choice([1, 2, 3, 4, 8, 16])
        length, block_size = stride * rng.randint(1, 4), stride * rng.randint(1, 6)
    longest = int((PAIRS / (heads_kv * group)) ** 0.5)
    keys = [rng.choice([0, 1, rng.randint(0, 70), rng.randint(0, longest)]) for _ in range(rng.randint(1, 4))]
    queries = [rng.choice([n, n, rng.randint(0, n), min(n, 1)]) for n in keys]
    packed = len(keys) > 1 or rng.random() < 0.5
    initial, local = rng.choice([0, 1, 1, 2]), rng.choice([0, 1, 2, 2, 3])
    most = 64 - initial - local
    others = rng.choice([0, 1, 3, 13, rng.randint(0, most)])
    return Case(
        "random",
        tuple(keys),
        queries=tuple(queries),
        packed=packed,
        heads=(heads_kv * group, heads_kv),
        dims=dims,
        compress=(length, stride),
        block_size=block_size,
        select=(max(1, initial + local + others), initial, local),
        window=rng.choice([1, rng.randint(1, 100), rng.randint(1, 1000), 512]),
        pad=(rng.choice([0, rng.randint(0, 40)]) if packed else 0, rng.choice([0, rng.randint(0, 40)])),
        slack=rng.choice([0, 0, 1, 500]) if packed else 0,
    )


def draw_long_case(rng: random.Random) -> Case:
    """On which compressed attention chooses the blocks, or nearly."""
    keys = rng.choice(
        [rng.randint(16_000, 40_000), rng.randint(32_000, 70_000), 65_536, rng.randint(60_000, 140_000)]
    )
    queries = rng.choice([1, rng.randint(1, 400), rng.randint(400, 6_000), min(keys, 12_000)])
    blocks, initial = rng.choice([16, 16, rng.randint(1, 24)]), rng.choice([0, 1, 2])
    local, heads_kv = rng.randint(1, 3), rng.choice([1, 1, 2, 3, 4])
    return long_case(queries, keys, heads_kv, (max(blocks, initial + local), initial, local))


def decoding(rng: random.Random, case: Case) -> Case:
    """A step of decoding over the sequences of a shape."""
    queries = tuple(min(n, rng.choice([0, 1, 1, rng.randint(1, MOST_TOKENS)])) for n in case.lengths)
    return dataclasses.replace(case, queries=queries, packed=True, pad=(case.pad[0], 0), slack=0)


def checks(rng: random.Random, x: Inputs) -> dict[str, object]:
    """name -> a call that compares one operator, with its gradients, on these inputs."""
    case = x.case
    kind, per_head, hidden = (
        rng.choice(["mlp", "mlp", "linear", "mean"]),
        rng.random() < 0.3,
        rng.randint(1, 40),
    )
    hidden = 8 * hidden if x.device == "cuda" else hidden
    dirty = rng.random() < 0.5  # NaN and Inf where nobody looks
    step = (decoding(rng, case), x.device, x.dtype)
    layout, cache_kind = rng.choice(LAYOUTS), rng.choice(KINDS)
    rotary = case.dims[0] % 2 == 0 and rng.random() < 0.7

    def attention() -> None:
        garbage = {"q": rows_of_no_query(case), "gate_logits": rows_of_no_query(case)}
        for branch in ("cmp", "slc", "swa"):
            garbage |= {f"{name}_{branch}": ~case.seen(branch) for name in "kv"}
        tensors = attention_tensors(x)
        _, indices = check_attention(x, tensors, garbage=garbage if dirty else None, compare_selection=True)
        assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))

    def branch(name: str, suffix: str, parameters: tuple) -> None:
        garbage = band_garbage(case, suffix) if dirty else None
        extra = {"block_indices": x.block_indices()} if suffix == "slc" else None
        branch_check(name, x, suffix, parameters, extra=extra, garbage=garbage)

    return {
        "attention": attention,
        "compressed_attention": lambda: branch("compressed_attention", "cmp", case.compress),
        "selected_attention": lambda: branch("selected_attention", "slc", (case.block_size,)),
        "sliding_window_attention": lambda: branch("sliding_window_attention", "swa", (case.window,)),
        "compress": lambda: check_compress(x, kind, phi(x, kind, per_head, hidden)),
        "decode_attention": lambda: test_decode_attention(*step, layout),
        "append_kv": lambda: test_append_kv(*step, layout, cache_kind, per_head, rotary),
    }


def run_shape(seed: int, device: str, reference: str, long: bool = False) -> str | None:
    """None, or what failed."""
    harness.reference_device = reference
    # The baseline's products are to err no more than those of a CPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    paths = ("cpu",) if device == "cpu" else ("cuda",) if long else ("cuda", "portable")
    for path in paths:
        os.environ["NSA_CUDA_PATH"] = path
        x, named = long_shape_of(seed) if long else shape_of(seed, device)
        for name, check in named.items():
            try:
                try:
                    check()
                except OutsideError as error:
                    first = str(error)
                    print(f"--seed {seed} --shapes 1: {name} on the path {path}: {first}", file=sys.stderr)
                    check_draws(seed, device, name, first)
            except Exception as error:
                traceback.print_exc()
                what = (str(error) or repr(error)).splitlines()[0]
                return f"{name} on the path {path}, {x.dtype}, {x.case}: {what}"
    return None


def shape_of(seed: int, device: str, draw: int = 0) -> tuple[Inputs, dict[str, object]]:
    """The shape of a seed with one draw of its inputs, and its checks."""
    rng = random.Random(seed)
    case = draw_case(rng, device)
    dtype = rng.choice(CUDA_DTYPES if device == "cuda" else CPU_DTYPES)
    q_scale = rng.choice([1.0, 1.0, 3.0])
    x = Inputs(case, dtype, device, seed=seed + 1_000_003 * draw, q_scale=q_scale)
    return x, checks(rng, x)


def long_shape_of(seed: int) -> tuple[Inputs, dict[str, object]]:
    """The same of long sequences."""
    rng = random.Random(seed)
    case, dtype = draw_long_case(rng), rng.choice(CUDA_DTYPES)
    kind = rng.choice(["random", "random", *UNUSUAL_SCORES])
    q_scale = rng.choice([0.1, 0.2, 0.4, 0.7, 1, 2, 4])
    x = Inputs(case, dtype, "cuda", seed=seed, q_scale=q_scale)
    return x, {f"{kind} scores, queries times {q_scale}": lambda: check_choice(x, kind)}


def check_draws(seed: int, device: str, name: str, first: str) -> None:
    """What `first` says again, word by word, and then DRAWS draws of the inputs together."""
    try:
        shape_of(seed, device)[1][name]()
    except OutsideError as error:
        if str(error) != first:
            raise AssertionError(f"the same inputs, first {first}, then {error}") from error
    else:
        raise AssertionError(f"did not repeat: {first}")
    with measuring() as measured:
        for draw in range(DRAWS):
            shape_of(seed, device, draw)[1][name]()
    for failure in (failures := outside(measured)):
        print(failure, file=sys.stderr)
    if failures:
        raise AssertionError("; ".join(failures))


def run_shapes(args: argparse.Namespace) -> Iterator[tuple[int, str | None]]:
    """(seed, what failed) of every shape that began before the time was over."""
    last = time.monotonic() + args.seconds
    seeds = iter(range(args.seed, args.seed + args.shapes))
    if args.jobs == 1:
        for seed in seeds:
            if time.monotonic() > last:
                return
            yield seed, run_shape(seed, args.device, args.reference, args.long)
        return
    threads = max(1, torch.get_num_threads() // args.jobs)
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    with pool:
        running: dict = {}
        while True:
            while len(running) < args.jobs and time.monotonic() < last:
                seed = next(seeds, None)
                if seed is None:
                    break
                running[pool.submit(run_shape, seed, args.device, args.reference, args.long)] = seed
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=540, help="no shape begins later than this")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, on a GPU at most 16)")
    parser.add_argument("--reference", choices=("cpu", "cuda"), help="where it computes (default: --device)")
    parser.add_argument("--seed", type=int, default=0, help="of the first shape; the next ones count up")
    parser.add_argument("--long", action="store_true", help="long sequences, on a GPU alone")
    args = parser.parse_args()
    if args.long and args.device != "cuda":
        parser.error("--long needs --device cuda")
    args.reference = args.reference or args.device
    cores = len(os.sched_getaffinity(0))
    # A process on a GPU holds half a gigabyte of its memory, and what its kernels need.
    args.jobs = args.jobs or min(cores, args.shapes, 16 if args.device == "cuda" else cores)

    begin, done, failed = time.monotonic(), 0, []
    for seed, failure in run_shapes(args):
        done += 1
        if failure:
            failed.append(seed)
            print(f"FAILED --seed {seed} --shapes 1: {failure}", flush=True)
    seconds = time.monotonic() - begin
    print(
        f"{done} of {args.shapes} shapes on {args.device} in {seconds:.0f} s, from seed {args.seed}: ", end=""
    )
    print(f"{len(failed)} failed: {failed}" if failed else "all equal the reference")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
