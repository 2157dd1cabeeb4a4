"""NaN and Inf in memory that no query of the call sees never reach an output or a gradient."""

import pytest
import torch
from attention_case import attention_rest, attention_tensors, check_attention
from cases import Case, Inputs, by_case, by_target
from harness import branch_check, check, exact_lse, op, rows_of_no_query, with_garbage, zero_rows
from test_compress import check_compress, phi
from tolerance import accumulator

pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")

with_gaps = by_case(
    "ragged_with_empty",
    "shorter_than_a_block",
    "chunked_prefill",
    "chunk_without_offsets",
    "decode",
    "padding_rows",
    "only_padding",
    "odd_strides",
    "window_one",
)


def band_garbage(case: Case, branch: str) -> dict[str, torch.Tensor]:
    unseen, unused = ~case.seen(branch), rows_of_no_query(case)
    return {"q": unused, "d_o": unused, "k": unseen, "v": unseen}


def selected_keys(case: Case, indices: torch.Tensor) -> torch.Tensor:
    """Bool [S]: keys that some query of some KV head attends to."""
    seen = torch.zeros(case.num_keys, dtype=torch.bool)
    for row, b, t in case.queries_and_positions():
        begin = sum(case.lengths[:b])
        for j in indices[row].flatten().tolist():
            if 0 <= j <= t // case.block_size:
                seen[begin + j * case.block_size : begin + min(t + 1, (j + 1) * case.block_size)] = True
    return seen


@by_target
@with_gaps
def test_compressed_attention(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    branch_check("compressed_attention", x, "cmp", case.compress, garbage=band_garbage(case, "cmp"))


@by_target
@with_gaps
def test_sliding_window_attention(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    branch_check("sliding_window_attention", x, "swa", (case.window,), garbage=band_garbage(case, "swa"))


@by_target
@with_gaps
def test_selected_attention(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    indices = x.block_indices()
    garbage = band_garbage(case, "slc")
    garbage["k"] = garbage["v"] = ~selected_keys(case, indices.cpu())
    extra = {"block_indices": indices}
    branch_check("selected_attention", x, "slc", (case.block_size,), extra=extra, garbage=garbage)


@by_target
@with_gaps
@pytest.mark.parametrize("kind", ["mlp", "linear", "mean"])
def test_compress(case: Case, kind: str, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    rows = torch.ones(case.num_keys // case.compress[1], dtype=torch.bool)
    for b in range(len(case.lengths)):
        first = case.first_compressed_row(b)
        rows[first : first + case.num_compressed(b)] = False
    garbage = {"x": ~case.compressible(), "d_o": rows}
    check_compress(x, kind, phi(x, kind, per_head=False, hidden=24), garbage=garbage)


@by_target
@with_gaps
def test_scores_and_selection(case: Case, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    unused, unseen = rows_of_no_query(case), ~case.seen("cmp")
    q, k = x.q, x.keys("cmp")
    lse = exact_lse(x, k).to(accumulator(dtype)).to(device)
    blocks = (*case.compress, case.block_size)

    def both(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = op("block_scores")(q, k, lse, *x.cu, *blocks, x.scale)
        return scores, op("select_blocks")(q, k, lse, *x.cu, *blocks, *case.select, x.scale)

    scores, indices = both(with_garbage(q, unused), with_garbage(k, unseen), with_garbage(lse, unused))
    clean_scores, clean_indices = both(zero_rows(q, unused), zero_rows(k, unseen), lse)
    assert torch.equal(scores, clean_scores) and torch.equal(indices, clean_indices)
    assert not scores[unused].any() and (indices[unused] == -1).all()


@by_target
@with_gaps
def test_attention(case: Case, device: str, dtype: torch.dtype) -> None:
    """Everything at once; the gates of rows of no query too (0 * sigmoid(NaN) is the hole there)."""
    x = Inputs(case, dtype, device)
    tensors = attention_tensors(x)
    _, indices = op("attention")(*tensors.values(), *attention_rest(x))
    unused = rows_of_no_query(case)
    unseen = {branch: ~case.seen(branch) for branch in ("cmp", "swa")}
    unseen["slc"] = ~selected_keys(case, indices.cpu())
    garbage = {name: unused for name in ("q", "gate_logits", "d_o")}
    for branch, rows in unseen.items():
        garbage |= {f"k_{branch}": rows, f"v_{branch}": rows}
    o, _ = check_attention(x, tensors, garbage=garbage)
    assert not o[unused].any()


@by_target
def test_keys_of_sequences_without_queries(device: str, dtype: torch.dtype) -> None:
    """A sequence with keys and no query between two others: its memory may be an unwritten cache slot."""
    case = Case("", (70, 130, 33), queries=(70, 0, 33), heads=(4, 2), dims=(64, 64))
    x = Inputs(case, dtype, device)
    tensors = attention_tensors(x)
    rows = torch.zeros(case.num_keys, dtype=torch.bool)
    rows[70:200] = True
    compressed = ~case.seen("cmp")
    garbage = {f"{kv}_{branch}": rows for kv in "kv" for branch in ("slc", "swa")}
    check_attention(x, tensors, garbage=garbage | {"k_cmp": compressed, "v_cmp": compressed})


@by_target
def test_gated_combine_keeps_garbage_in_its_row(device: str, dtype: torch.dtype) -> None:
    """The gate is elementwise over rows: a NaN row changes no other row."""
    x = Inputs(Case("", (40,), heads=(4, 2), dims=(64, 64), packed=False), dtype, device)
    rows = torch.zeros(40, dtype=torch.bool)
    rows[[3, 17]] = True
    tensors = {f"o_{branch}": x.output_like(20 + i) for i, branch in enumerate(("cmp", "slc", "swa"))}
    tensors["gate_logits"] = x.gate_logits()
    clean = op("gated_combine")(*tensors.values())
    dirty = op("gated_combine")(*[with_garbage(t, rows) for t in tensors.values()])
    assert torch.equal(clean[~rows], dirty[~rows])
    check("gated_combine", tensors, (), tuple(tensors), x.output_like())
