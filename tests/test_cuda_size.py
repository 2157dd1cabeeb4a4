"""Long sequences on a GPU, on both paths: peak memory, repeatability, and offsets beyond 2^31 elements."""

import math

import pytest
import torch
from attention_case import attention_reference
from choice_case import scores_of_chosen
from harness import op, to
from tolerance import SelectionRule, assert_close, assert_selection_valid

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_path")]

HEADS, KV_HEADS, DIM, SCALE = 64, 4, 128, 1 / math.sqrt(128)


def long_inputs(length: int, requires_grad: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(rows: int, *shape: int) -> torch.Tensor:
        x = torch.randn(rows, *shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        return x.requires_grad_(requires_grad)

    tensors = {"q": random(length, HEADS, DIM)}
    for branch, rows in (("cmp", length // 16), ("slc", length), ("swa", length)):
        tensors |= {f"{name}_{branch}": random(rows, KV_HEADS, DIM) for name in "kv"}
    return tensors | {"gate_logits": random(length, HEADS, 3)}


def long_arguments(length_q: int, length_k: int) -> tuple:
    return (None, None, length_q, length_k, 32, 16, 64, 16, 1, 2, 512, SCALE)


def test_peak_memory() -> None:
    """65,536 tokens: 5 GiB beyond the inputs with all that the backward needs, 10 GiB in all with it."""
    length, gib = 65_536, 2**30
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    tensors = long_inputs(length, requires_grad=True)
    inputs = torch.cuda.memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    o, indices = op("attention")(*tensors.values(), *long_arguments(length, length))
    forward = torch.cuda.max_memory_allocated() - start - inputs
    assert forward <= 5 * gib, f"forward: {forward / gib:.2f} GiB beyond the inputs"
    held = torch.cuda.memory_allocated() - start - inputs
    element = 2 * HEADS * DIM
    documented = 4 * element + 12 * HEADS + 4 * KV_HEADS * 16  # o, three branches; three lse; the selection
    assert held <= 1.01 * length * documented, f"{held / length:.0f} bytes a token are kept"
    torch.autograd.grad(o, list(tensors.values()), o)
    total = torch.cuda.max_memory_allocated() - start
    assert total <= 10 * gib, f"forward and backward: {total / gib:.2f} GiB in all"
    del o, indices
    assert torch.cuda.memory_allocated() - start == inputs, "something stays allocated"


def test_peak_memory_without_gradients() -> None:
    """Three outputs of a branch's size: o, into which the selected branch goes too, and the two others'."""
    length = 65_536
    tensors = long_inputs(length)
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o, indices = op("attention")(*tensors.values(), *long_arguments(length, length))
    peak = torch.cuda.max_memory_allocated() - start
    small = 12 * HEADS * length + indices.nbytes + 2**28  # lse, the selection, a workspace
    assert peak <= 3 * o.nbytes + small, f"{peak / length:.0f} bytes a token at the peak"
    assert torch.cuda.memory_allocated() - start <= 1.01 * (o.nbytes + indices.nbytes), "more is kept"


@pytest.mark.parametrize("length", [8_192, 16_384])
def test_many_runs_repeat_bitwise(length: int) -> None:
    """With all of a GPU at work a slot of a ring that is filled again too early shows now and then, in a few
    outputs of millions; so many runs are compared."""
    tensors = long_inputs(length, requires_grad=True)
    d_o = torch.randn(length, HEADS, DIM, device="cuda", dtype=torch.bfloat16)

    def run() -> dict[str, torch.Tensor]:
        o, indices = op("attention")(*tensors.values(), *long_arguments(length, length))
        grads = torch.autograd.grad(o, list(tensors.values()), d_o)
        return {"o": o, "block_indices": indices} | dict(zip(tensors, grads, strict=True))

    first = run()
    for i in range(1, 50):
        differing = [name for name, t in run().items() if not torch.equal(t, first[name])]
        assert not differing, f"run {i}: {differing} differ from the first run"


def reference_on_one_query(
    tensors: dict[str, torch.Tensor], row: int, chosen: torch.Tensor, d_o: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """o, the branches and the gradients of the one query and its gates; of every group the first head."""
    seen = {"cmp": max(0, (row + 1 - 32) // 16 + 1), "slc": row + 1, "swa": row + 1}
    keys = {name: to(t[: seen[name[2:]]], dtype) for name, t in tensors.items() if name[2:] in seen}
    one = {name: to(tensors[name][row : row + 1, ::16], dtype) for name in ("q", "gate_logits")}
    for t in one.values():
        t.requires_grad_()
    settings = long_arguments(1, row + 1)
    o, *rest = attention_reference(chosen, every_output=True)(
        one["q"], *keys.values(), one["gate_logits"], *settings
    )
    d_q, d_gate = torch.autograd.grad(o, [one["q"], one["gate_logits"]], to(d_o[:, ::16], dtype))
    branches = dict(zip(("o_cmp", "o_slc", "o_swa"), rest[1:4], strict=True))
    return {"o": o, **branches, "d_q": d_q, "d_gate_logits": d_gate}


LONG = 266_240  # with 64 heads of dim 128: more than 2^31 elements
LONG_ROWS = (31, 131_071, 262_145, LONG - 1)


@pytest.mark.slow
def test_offsets_beyond_2_to_the_31() -> None:
    """Sampled queries of nsa::attention_forward against the reference on their own keys."""
    tensors = long_inputs(LONG)
    o, indices, *branches = op("attention_forward")(*tensors.values(), *long_arguments(LONG, LONG))
    actual = {"o": o, **dict(zip(("o_cmp", "o_slc", "o_swa"), branches, strict=False))}
    for row in LONG_ROWS:
        chosen = indices[row : row + 1]
        assert_valid_row(chosen, row)
        exact, baseline = (
            reference_on_one_query(tensors, row, chosen, o[row : row + 1], dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        for name, t in actual.items():
            assert_close(f"{name}[{row}]", t[row : row + 1, ::16], exact[name], baseline[name])


@pytest.mark.slow
def test_few_queries_behind_millions_of_keys() -> None:
    """Where blocks are chosen inside compressed attention, it keeps more than 2^31 bytes of sums."""
    queries, keys = 396, 2_700_000
    generator = torch.Generator("cuda").manual_seed(0)

    def random(rows: int, *shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, gates = random(queries, HEADS, DIM), random(queries, HEADS, 3)
    cmp, others = [random(keys // 16, KV_HEADS, DIM) for _ in "kv"], [random(keys, KV_HEADS, DIM)] * 4
    o, indices, *branches = op("attention_forward")(q, *cmp, *others, gates, *long_arguments(queries, keys))
    rest = (None, None, queries, keys, 32, 16)
    o_cmp, lse = op("compressed_attention")(q, *cmp, *rest, SCALE)
    torch.testing.assert_close(branches[0].float(), o_cmp.float(), atol=2**-6, rtol=2**-6)
    scores = op("block_scores")(q, cmp[0], lse, *rest, 64, SCALE)
    best = op("select_blocks")(q, cmp[0], lse, *rest, 64, 16, 1, 2, SCALE)
    own = torch.arange(keys - queries, keys) // 64
    assert_selection_valid(indices, own, SelectionRule(16, 1, 2))
    assert (scores_of_chosen(scores, indices) >= scores_of_chosen(scores, best) * (1 - 1e-5)).all()
    assert torch.equal(o, op("gated_combine")(*branches[:3], gates))


def assert_valid_row(chosen: torch.Tensor, row: int) -> None:
    own = torch.tensor([row // 64])
    assert_selection_valid(chosen, own, SelectionRule(16, 1, 2))


@pytest.mark.slow
def test_gradients_beyond_2_to_the_31() -> None:
    """Sampled rows of dq and of the gates' gradient; dk and dv of the last tokens, which few queries see."""
    tensors = {name: t.requires_grad_() for name, t in long_inputs(LONG).items()}
    o, indices = op("attention")(*tensors.values(), *long_arguments(LONG, LONG))
    d_o = torch.randn(1, HEADS, DIM, device="cuda", dtype=torch.bfloat16).expand_as(o)
    grads = dict(zip(tensors, torch.autograd.grad(o, list(tensors.values()), d_o), strict=True))
    del o
    for row in LONG_ROWS:
        chosen = indices[row : row + 1]
        exact, baseline = (
            reference_on_one_query(tensors, row, chosen, d_o[row : row + 1], dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        for name in ("q", "gate_logits"):
            actual = grads[name][row : row + 1, ::16]
            assert_close(f"d_{name}[{row}]", actual, exact[f"d_{name}"], baseline[f"d_{name}"])
    # The same last tokens as the end of a short sequence: the window branch sees nothing else.
    tail, window = 64, 512
    q, k, v = tensors["q"], tensors["k_swa"], tensors["v_swa"]
    short = [t[-window - tail :].detach().requires_grad_() for t in (q, k, v)]
    both = []
    for leaves in ([q, k, v], short):
        rows = leaves[0].shape[0]
        o, _ = op("sliding_window_attention")(*leaves, None, None, rows, rows, window, SCALE)
        both.append(torch.autograd.grad(o, leaves, d_o[:rows]))
    for name, whole, alone in zip(("dq", "dk", "dv"), *both, strict=True):
        torch.testing.assert_close(whole[-tail:], alone[-tail:], rtol=2**-6, atol=2**-6, msg=name)
