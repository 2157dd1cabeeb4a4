"""Forward kernels on a GPU: every head dim, every G, both paths.

The case table runs on a GPU in the files of the operators, at the nearest shapes with native kernels.
"""

import pytest
import torch
from attention_case import attention_rest, attention_tensors, check_attention
from cases import CUDA_DTYPES, CUDA_HEAD_DIMS, Case, Inputs
from choice_case import UNUSUAL_SCORES, check_choice, long_case
from harness import check, exact_lse, largest_logit, op, to
from test_compress import phi, rest
from tolerance import SelectionRule, accumulator, assert_close, assert_selection_valid

from nsa_ext import reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_path")]

GROUPS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)


SHAPES = tuple(
    Case(f"d{dk}_{dv}", (150, 0, 83), heads=(8, 2), dims=(dk, dv), select=(4, 1, 1))
    for dk, dv in CUDA_HEAD_DIMS
) + tuple(
    Case(f"g{g}", (190, 77), heads=(2 * g, 2), dims=(64, 64), select=(5, 1, 1), block_size=32) for g in GROUPS
)

by_case = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
by_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=["bf16", "fp16"])


@by_dtype
@by_case
def test_compressed_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    tensors = {"q": x.q, "k_cmp": x.keys("cmp"), "v_cmp": x.values("cmp")}
    logit = largest_logit(x.q, tensors["k_cmp"], x.scale)
    arguments = (*x.cu, *case.compress, x.scale)
    check("compressed_attention", tensors, arguments, (), x.output_like(), logit=logit, second_is_lse=True)


@by_dtype
@by_case
def test_sliding_window_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    tensors = {"q": x.q, "k": x.keys("swa"), "v": x.values("swa")}
    logit = largest_logit(x.q, tensors["k"], x.scale)
    arguments = (*x.cu, case.window, x.scale)
    check(
        "sliding_window_attention", tensors, arguments, (), x.output_like(), logit=logit, second_is_lse=True
    )


@by_dtype
@by_case
def test_selected_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    tensors = {"q": x.q, "k": x.keys("slc"), "v": x.values("slc"), "block_indices": x.block_indices()}
    logit = largest_logit(x.q, tensors["k"], x.scale)
    arguments = (*x.cu, case.block_size, x.scale)
    check("selected_attention", tensors, arguments, (), x.output_like(), logit=logit, second_is_lse=True)


@by_dtype
@by_case
def test_block_scores(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    k_cmp, acc = x.keys("cmp"), accumulator(dtype)
    lse = exact_lse(x, k_cmp)
    arguments = (*case.compress, case.block_size, x.scale)
    actual = op("block_scores")(x.q, k_cmp, lse.to(acc).cuda(), *x.cu, *arguments)
    q, k, cu = to(x.q, torch.float64), to(k_cmp, torch.float64), [to(c) for c in x.cu]
    exact = reference.block_scores(q, k, lse, *cu, *arguments)
    baseline = reference.block_scores(q.to(acc), k.to(acc), lse.to(acc), *cu, *arguments)
    assert_close("scores", actual, exact, baseline, acc, largest_logit(x.q, k_cmp, x.scale))


@by_dtype
@by_case
def test_attention(case: Case, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda", q_scale=2.0)
    _, indices = check_attention(x, attention_tensors(x), wanted=(), compare_selection=True)
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))


@by_dtype
@by_case
@pytest.mark.parametrize("gates", ["as_q", "fp32"])
def test_gate_of_attention(case: Case, gates: str, dtype: torch.dtype) -> None:
    """Wherever it is computed, it is gated_combine of the branches bit by bit, gradients wanted or not."""
    x = Inputs(case, dtype, "cuda", q_scale=2.0)
    tensors = attention_tensors(x)
    if gates == "fp32":
        tensors["gate_logits"] = tensors["gate_logits"].float()
    o, indices, *branches = op("attention_forward")(*tensors.values(), *attention_rest(x))
    assert torch.equal(o, op("gated_combine")(*branches[:3], tensors["gate_logits"]))
    kept = op("attention")(*[t.requires_grad_() for t in tensors.values()], *attention_rest(x))
    with torch.no_grad():
        alone = op("attention")(*tensors.values(), *attention_rest(x))
    for results in (kept, alone):
        assert torch.equal(results[0], o) and torch.equal(results[1], indices)


@by_dtype
@pytest.mark.parametrize(
    ("queries", "keys", "kind"),
    [
        (33_000, 33_000, "random"),
        (100, 20_001, "random"),
        (37, 70_000, "random"),
        (33_000, 33_000, "sharp"),
        *((5_000, 41_000, kind) for kind in UNUSUAL_SCORES),
    ],
)
def test_choice_inside_compressed_attention(
    queries: int, keys: int, kind: str, dtype: torch.dtype, cuda_path: str
) -> None:
    x = Inputs(long_case(queries, keys), dtype, "cuda", q_scale=2.0)
    chosen = check_choice(x, kind)
    if kind in ("random", "small") and queries >= 5_000:  # the last items tell what pays for all others
        most = slice(0, queries - 1_000)
        hopper = cuda_path == "cuda" and torch.cuda.get_device_capability() == (9, 0)
        inside = not torch.equal(chosen.o_cmp[most], chosen.alone[most])  # other tiles, other roundings
        assert inside == (hopper and kind == "random")
    if kind == "few zero queries":  # what is left to another kernel does not change what is far from it
        chosen.tensors["q"][1000:1003] = 1
        others = op("attention")(*chosen.tensors.values(), *attention_rest(x))[1]
        assert torch.equal(others[:960], chosen.indices[:960])
        assert torch.equal(others[1040:], chosen.indices[1040:])


def test_a_graph_follows_what_its_data_make_pay() -> None:
    """Which way the blocks of a long sequence are chosen is decided anew by every replay."""
    x = Inputs(long_case(5_000, 41_000), torch.bfloat16, "cuda", q_scale=2.0)
    tensors = attention_tensors(x)
    random = tensors["q"].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, indices = op("attention")(*tensors.values(), *attention_rest(x))
    for scale in (1.0, 0.02, 1.0):
        tensors["q"].copy_(random * scale)
        graph.replay()
        eager = op("attention")(*tensors.values(), *attention_rest(x))
        assert torch.equal(o, eager[0]) and torch.equal(indices, eager[1])


def test_last_kernel_waits_for_the_window() -> None:
    """Selected attention may begin while the window is at work, whose output its gate reads at the end."""
    case = Case("late", (6000,), heads=(32, 2), dims=(128, 128), select=(1, 0, 1), window=6000, packed=False)
    x = Inputs(case, torch.bfloat16, "cuda")
    tensors = attention_tensors(x)
    o, _, *branches = op("attention_forward")(*tensors.values(), *attention_rest(x))
    expected = op("gated_combine")(*branches[:3], tensors["gate_logits"])
    del branches
    for _ in range(10):
        del o
        stale = [torch.full_like(expected, float("nan")) for _ in range(4)]
        del stale  # whose memory the outputs of the branches get
        o = op("attention")(*tensors.values(), *attention_rest(x))[0]
        assert torch.equal(o, expected)


@by_dtype
@by_case
@pytest.mark.parametrize(
    ("kind", "per_head", "hidden"),
    [("mlp", False, 256), ("mlp", True, 40), ("mlp", False, 328), ("linear", False, 8), ("mean", False, 8)],
    ids=["mlp", "per_head", "wide", "linear", "mean"],
)
def test_compress(case: Case, kind: str, per_head: bool, hidden: int, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, "cuda")
    tensors = phi(x, kind, per_head, hidden)
    check("compress", tensors, rest(x, kind), (), x.random(50, 1, 1, 1))


@by_dtype
@pytest.mark.parametrize("n", [1, 2, 31, 40, 64])
def test_many_selected_blocks(n: int, dtype: torch.dtype) -> None:
    case = Case(
        "long", (5000,), heads=(2, 1), dims=(64, 64), compress=(16, 8), block_size=32, select=(n, 0, 1)
    )
    x = Inputs(case, dtype, "cuda", q_scale=3.0)
    _, indices = check_attention(x, attention_tensors(x), wanted=(), compare_selection=True)
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))


def test_wild_offsets_touch_nothing_outside() -> None:
    """cu_seqlens on the device is never read on the host; whatever it says, the process lives."""
    case = Case("wild", (256,), heads=(4, 1), dims=(64, 64))
    x = Inputs(case, torch.bfloat16, "cuda")
    for wild in ([0, 10**9], [-5, 300], [200, 100], [2**31 - 1, -(2**31)]):
        cu = torch.tensor(wild, dtype=torch.int32, device="cuda")
        arguments = (cu, cu, 256, 256, *case.compress, case.block_size, *case.select, case.window, x.scale)
        op("attention")(*attention_tensors(x).values(), *arguments)
        op("compress")(x.keys("slc"), None, None, None, None, None, cu, 256, *case.compress, "mean")
    torch.cuda.synchronize()
