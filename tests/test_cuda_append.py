"""nsa::append_kv where a step completes blocks of many sequences, on both paths of a GPU."""

from dataclasses import replace

import pytest
import torch
from cases import CUDA_DTYPES, Case, Inputs
from test_cache_ops import KINDS, Append, assert_appends_like_reference, assert_same_bits, weights

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_path")]

# Steps that complete a block of all, some, one and none of many sequences; more rows and heads than a thread
# block works on at a time; two blocks a sequence; blocks of half a token, of two and of four for each of 16
# thread blocks.
CASES = (
    Case("all", tuple(48 + 16 * (b % 5) for b in range(32)), heads=(4, 4), dims=(128, 128)),
    Case("all_of_130", tuple(32 + 16 * (b % 3) for b in range(130)), heads=(2, 2), dims=(64, 64)),
    Case("some", tuple(range(33, 103)), heads=(4, 4), dims=(64, 64)),
    Case("one", (40,) * 20 + (48,) + (40,) * 20, heads=(8, 8), dims=(192, 128)),
    Case("none", (40,) * 40, heads=(2, 2), dims=(64, 64)),
    Case("many_heads", (48, 64, 50), heads=(56, 56), dims=(64, 64)),
    Case("two_blocks", (64, 96, 70) * 7, heads=(3, 3), compress=(32, 8), dims=(96, 96)),
    Case("short_blocks", (64, 96, 72) * 7, heads=(3, 3), compress=(8, 8), dims=(128, 128)),
    Case("long_blocks", (64, 96, 80) * 7, heads=(3, 3), compress=(64, 16), dims=(256, 256)),
)
CASES = tuple(
    replace(case, queries=(16 if case.name == "two_blocks" else 1,) * len(case.lengths)) for case in CASES
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=["bf16", "fp16"])


@by_case
@by_dtype
@pytest.mark.parametrize(
    ("kind", "per_head", "hidden", "layout"),
    [
        ("mlp", False, 256, "paged"),
        ("mlp", False, 256, "ring"),
        ("mlp", False, 40, "ring"),
        ("mlp", True, 96, "ring"),
        ("mlp", False, 288, "paged_ring"),
        ("linear", False, 0, "ring"),
        ("mean", False, 0, "ring"),
    ],
)
def test_blocks_of_many_sequences(
    case: Case, dtype: torch.dtype, kind: str, per_head: bool, hidden: int, layout: str
) -> None:
    call = Append(
        Inputs(case, dtype, "cuda"), layout, kind, per_head, hidden=hidden, short_tail="ring" in layout
    )
    assert_appends_like_reference(call)


@by_case
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_does_not_depend_on_the_other_sequences(case: Case, kind: str) -> None:
    x = Inputs(case, torch.bfloat16, "cuda")
    calls = [Append(x, "contiguous", kind, hidden=256) for _ in range(3)]
    calls[0].run()
    calls[1].run()
    # Every seventh sequence as before, the others where a token completes no block.
    kept = torch.arange(len(case.lengths)) % 7 == 3
    stride = case.compress[1]
    moved = [n if keep else n - n % stride + 1 for n, keep in zip(calls[2].held, kept, strict=True)]
    calls[2].run(moved)
    for name in ("k_cmp_cache", "v_cmp_cache"):
        first, again, alone = (call.cache.streams[name].cpu() for call in calls)
        assert_same_bits(name, first, again)
        assert_same_bits(name, first[kept], alone[kept])


@pytest.mark.parametrize("per_head", [(False, False), (True, False), (False, True), (True, True)])
def test_a_short_step_on_hopper_needs_no_memory(cuda_path: str, per_head: tuple[bool, bool]) -> None:
    """The portable kernels need some: so this also shows which kernels run."""
    case = Case("memory", (48, 64, 50), heads=(4, 4), dims=(64, 64), queries=(1, 1, 1))
    call = Append(Inputs(case, torch.bfloat16, "cuda"), "ring")
    call.phis = [weights(call.x, call.kind, per_head[i], call.hidden, 64, 90 + 10 * i) for i in range(2)]
    append = call.prepared()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    append()
    on_hopper = cuda_path == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    assert (torch.cuda.max_memory_allocated() == before) == on_hopper


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_hidden_layer_without_a_kernel_is_named(tokens: int) -> None:
    case = Case("odd", (48, 64, 50), heads=(2, 2), dims=(64, 64), queries=(tokens,) * 3)
    call = Append(Inputs(case, torch.bfloat16, "cuda"), "ring", hidden=12)
    with pytest.raises(ValueError, match="append_kv: head dim 64 with hidden size 12 has no CUDA kernel"):
        call.run()
