"""Random shapes and parameters (hypothesis, derandomized) against the fp64 reference."""

import torch
from attention_case import attention_tensors, check_attention
from cases import Case, Inputs
from harness import branch_check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_compress import check_compress, phi
from tolerance import SelectionRule, assert_selection_valid

bounded = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    database=None,
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    keys = draw(st.lists(st.integers(0, 90), min_size=0, max_size=4))
    packed = len(keys) != 1 or draw(st.booleans())
    queries = [draw(st.one_of(st.just(n), st.integers(0, n))) for n in keys]
    stride = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    num_initial, num_local = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    heads_kv = draw(st.integers(1, 3))
    return Case(
        "random",
        tuple(keys),
        queries=tuple(queries),
        packed=packed,
        heads=(heads_kv * draw(st.sampled_from([1, 2, 3, 4, 7, 16])), heads_kv),
        dims=(draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        compress=(stride * draw(st.integers(1, 4)), stride),
        block_size=stride * draw(st.integers(1, 6)),
        select=(max(1, num_initial + num_local + draw(st.integers(0, 4))), num_initial, num_local),
        window=draw(st.integers(1, 100)),
        pad=(draw(st.integers(0, 9)) if packed else 0, draw(st.integers(0, 9))),
        slack=draw(st.sampled_from([0, 1, 50])) if packed else 0,
    )


@bounded
@given(case=cases(), dtype=dtypes, seed=st.integers(0, 1000))
def test_attention(case: Case, dtype: torch.dtype, seed: int) -> None:
    x = Inputs(case, dtype, seed=seed)
    _, indices = check_attention(x, attention_tensors(x), compare_selection=True)
    assert_selection_valid(indices, case.own_blocks(), SelectionRule(*case.select))


@bounded
@given(case=cases(), dtype=dtypes, seed=st.integers(0, 1000))
def test_branches(case: Case, dtype: torch.dtype, seed: int) -> None:
    x = Inputs(case, dtype, seed=seed)
    branch_check("compressed_attention", x, "cmp", case.compress)
    branch_check("sliding_window_attention", x, "swa", (case.window,))
    indices = {"block_indices": x.block_indices()}
    branch_check("selected_attention", x, "slc", (case.block_size,), extra=indices)


@bounded
@given(
    case=cases(),
    dtype=dtypes,
    kind=st.sampled_from(["mlp", "linear", "mean"]),
    per_head=st.booleans(),
    hidden=st.integers(1, 40),
    without=st.sets(st.sampled_from(["pe", "b1", "b2"])),
)
def test_compress(
    case: Case, dtype: torch.dtype, kind: str, per_head: bool, hidden: int, without: set[str]
) -> None:
    x = Inputs(case, dtype)
    check_compress(x, kind, phi(x, kind, per_head=per_head, hidden=hidden, without=tuple(without)))
