"""Forward kernels on a GPU: every head dim, every G, both paths.

The case table runs on a GPU in the files of the operators, at the nearest shapes with native kernels.
"""

import pytest
import torch
from attention_case import attention_rest, attention_tensors, check_attention
from cases import CUDA_DTYPES, CUDA_HEAD_DIMS, Case, Inputs
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


def unusual_scores(kind: str, x: Inputs, q: torch.Tensor, k_cmp: torch.Tensor) -> None:
    """What makes the choice of blocks hard: scores that are equal or nearly, of all magnitudes, or relative
    to maxima that change often."""
    if kind == "zero queries":
        q[::3] = 0
    elif kind == "few zero queries":
        q[1000:1003] = 0
    elif kind == "not a number":  # in one head of a group
        q[1000:1003, 3] = float("nan")
    elif kind == "small":  # most scores are nearly equal
        q *= 0.02
    elif kind == "sharp":  # one probability, rounded to 16 bits, may decide
        q *= 2
    elif kind == "equal blocks":
        k_cmp[512:] = k_cmp[: k_cmp.shape[0] - 512].clone()
    elif kind == "near ties":
        k_cmp[:] = k_cmp[:8].repeat(k_cmp.shape[0] // 8 + 1, 1, 1)[: k_cmp.shape[0]] + 2.0**-7 * k_cmp
    elif kind == "smooth":
        k_cmp[:] = 0.1 * k_cmp.float().cumsum(0)
    elif kind == "growing":  # towards the oldest keys, which come last
        k_cmp *= torch.linspace(40, 0, k_cmp.shape[0], device=k_cmp.device)[:, None, None].to(k_cmp.dtype)
    elif kind == "peaked":
        q *= 15


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Where torch.equal says that NaN differs from itself."""
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@by_dtype
@pytest.mark.parametrize(
    ("queries", "keys", "kind"),
    [
        (33_000, 33_000, "random"),
        (100, 20_001, "random"),
        (37, 70_000, "random"),
        (33_000, 33_000, "sharp"),
        (5_000, 41_000, "zero queries"),
        (5_000, 41_000, "few zero queries"),
        (5_000, 41_000, "not a number"),
        (5_000, 41_000, "small"),
        (5_000, 41_000, "equal blocks"),
        (5_000, 41_000, "near ties"),
        (5_000, 41_000, "smooth"),
        (5_000, 41_000, "growing"),
        (5_000, 41_000, "peaked"),
    ],
)
def test_choice_inside_compressed_attention(
    queries: int, keys: int, kind: str, dtype: torch.dtype, cuda_path: str
) -> None:
    """On long sequences compressed attention chooses the blocks. They score like those that select_blocks
    chooses, and o is made of them, bit by bit the same in all that runs them."""
    case = Case(
        "long", (keys,), queries=(queries,), heads=(32, 2), dims=(128, 128), select=(16, 1, 2), packed=False
    )
    x = Inputs(case, dtype, "cuda", q_scale=2.0)
    tensors = attention_tensors(x)
    q, k_cmp, v_cmp, k_slc, v_slc, *_, gates = tensors.values()
    unusual_scores(kind, x, q, k_cmp)
    o, indices, *branches = op("attention_forward")(*tensors.values(), *attention_rest(x))
    for _ in range(2):
        again = op("attention")(*tensors.values(), *attention_rest(x))
        assert equal_bits(again[0], o) and torch.equal(again[1], indices)
    assert equal_bits(o, op("gated_combine")(*branches[:3], gates))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op("attention")(*tensors.values(), *attention_rest(x))
    graph.replay()
    assert equal_bits(captured[0], o) and torch.equal(captured[1], indices)

    cu, scale = x.cu, x.scale
    o_cmp, lse_cmp = op("compressed_attention")(q, k_cmp, v_cmp, *cu, *case.compress, scale)
    torch.testing.assert_close(branches[3], lse_cmp, atol=1e-5, rtol=1e-5, equal_nan=True)
    roundings = {"atol": 2.0**-6, "rtol": 2.0**-6, "equal_nan": True}
    torch.testing.assert_close(branches[0].float(), o_cmp.float(), **roundings)
    if kind in ("random", "small") and queries >= 5_000:  # the last items tell what pays for all others
        most = slice(0, queries - 1_000)
        hopper = cuda_path == "cuda" and torch.cuda.get_device_capability() == (9, 0)
        chosen_inside = not torch.equal(branches[0][most], o_cmp[most])  # other tiles, other roundings
        assert chosen_inside == (hopper and kind == "random")
    o_slc = op("selected_attention")(q, k_slc, v_slc, indices, *cu, case.block_size, scale)[0]
    torch.testing.assert_close(branches[1].float(), o_slc.float(), **roundings)
    scores = op("block_scores")(q, k_cmp, lse_cmp, *cu, *case.compress, case.block_size, scale)
    best = op("select_blocks")(q, k_cmp, lse_cmp, *cu, *case.compress, case.block_size, *case.select, scale)
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))
    chosen, expected = (
        torch.where(i < 0, 0, scores.gather(2, i.clamp(min=0).long())).sort(2).values for i in (indices, best)
    )
    # Exponentials have the error of their exponents: large logits times the precision of fp32.
    tolerance = 1e-3 if kind in ("growing", "peaked") else 1e-5
    if kind == "not a number":  # nothing is best: which blocks it gets is as select_blocks has it
        hopeless = scores.isnan().any(2)
        assert torch.equal(indices[hopeless], best[hopeless])
        assert hopeless[1000:1003, 0].all() and hopeless.sum() == 3
        assert o.isnan().any((1, 2)).sum() == 3, "other tokens lose something"
        chosen, expected = chosen[~hopeless], expected[~hopeless]
    assert (chosen >= expected * (1 - tolerance) - 1e-30).all()
    if kind == "few zero queries":  # what is left to another kernel does not change what is far from it
        q[1000:1003] = 1
        others = op("attention")(*tensors.values(), *attention_rest(x))[1]
        assert torch.equal(others[:960], indices[:960]) and torch.equal(others[1040:], indices[1040:])


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
