"""What the CUDA forward promises beside its numbers: streams, graphs, no synchronisation, size."""

import math

import pytest
import torch
from attention_case import attention_tensors
from cases import Case, Inputs
from harness import op, to
from tolerance import assert_close

from nsa_ext import NativeSparseAttention, NSAConfig, reference

pytestmark = pytest.mark.gpu

CASE = Case("runtime", (700, 333), heads=(16, 2), dims=(128, 128), select=(6, 1, 2))


def arguments(x: Inputs) -> tuple:
    case = x.case
    return (*x.cu, *case.compress, case.block_size, *case.select, case.window, x.scale)


def test_no_synchronisation() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, rest, tokens = attention_tensors(x), arguments(x), x.keys("slc")
    op("attention")(*tensors.values(), *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op("attention")(*tensors.values(), *rest)
        op("compress")(tokens, None, None, None, None, None, x.cu[1], x.cu[3], *CASE.compress, "mean")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_equals_eager() -> None:
    first, second = (Inputs(CASE, torch.bfloat16, "cuda", seed=seed) for seed in (1, 2))
    static = {name: t.clone() for name, t in attention_tensors(first).items()}
    rest = arguments(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op("attention")(*static.values(), *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, indices = op("attention")(*static.values(), *rest)
    fresh = attention_tensors(second)
    for name, t in static.items():
        t.copy_(fresh[name])
    graph.replay()
    expected_o, expected_indices = op("attention")(*fresh.values(), *rest)
    assert torch.equal(o, expected_o) and torch.equal(indices, expected_indices)


def test_runs_on_the_current_stream() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors, rest = attention_tensors(x), arguments(x)
    expected = op("attention")(*tensors.values(), *rest)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = {name: t * 1 for name, t in tensors.items()}  # exists only after the sleep
        actual = op("attention")(*late.values(), *rest)[0]
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_strided_and_misaligned_inputs() -> None:
    case = Case("strides", (260,), heads=(4, 1), dims=(64, 64), packed=False)
    x = Inputs(case, torch.bfloat16, "cuda")
    q, k, v = x.q, x.keys("swa"), x.values("swa")
    expected = op("sliding_window_attention")(q, k, v, *x.cu, case.window, x.scale)[0]
    qkv = torch.cat([q, k, v], dim=1)
    split = qkv.split([4, 1, 1], dim=1)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:].view_as(t) for t in (q, k, v)]
    for to_fill, t in zip(shifted, (q, k, v), strict=True):
        to_fill.copy_(t)
    wide = torch.empty(260, 6, 67, dtype=q.dtype, device="cuda")
    wide[..., :64] = qkv
    odd = wide[..., :64].split([4, 1, 1], dim=1)
    for variant in (split, shifted, odd, [t.mT.contiguous().mT for t in (q, k, v)]):
        assert torch.equal(op("sliding_window_attention")(*variant, *x.cu, case.window, x.scale)[0], expected)


def test_module_like_the_cpu() -> None:
    torch.manual_seed(0)
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, window_size=128)
    module = NativeSparseAttention(config)
    hidden = torch.randn(2, 1500, 256)
    with torch.no_grad():
        exact = module.double()(hidden.double())
        baseline = module.bfloat16()(hidden.bfloat16())
        actual = module.cuda()(hidden.bfloat16().cuda())
        assert_close("module", actual, exact, baseline)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert module.float()(hidden.cuda()).dtype == torch.bfloat16


def test_backward_is_a_clear_error() -> None:
    x = Inputs(CASE, torch.bfloat16, "cuda")
    tensors = {name: t.requires_grad_() for name, t in attention_tensors(x).items()}
    o, _ = op("attention")(*tensors.values(), *arguments(x))
    with pytest.raises(ValueError, match=r"attention_backward.*cuda.*support_matrix"):
        o.sum().backward()


@pytest.mark.slow
def test_offsets_beyond_2_to_the_31() -> None:
    """T = 266,240, 64 heads, dim 128; sampled queries against the reference on their own keys."""
    length, heads, dim, scale = 266_240, 64, 128, 1 / math.sqrt(128)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, k, v = random(length, heads, dim), random(length, 4, dim), random(length, 4, dim)
    k_cmp, v_cmp = random(length // 16, 4, dim), random(length // 16, 4, dim)
    cu = (None, None, length, length)
    o_cmp, lse = op("compressed_attention")(q, k_cmp, v_cmp, *cu, 32, 16, scale)
    indices = op("select_blocks")(q, k_cmp, lse, *cu, 32, 16, 64, 16, 1, 2, scale)
    o_slc, _ = op("selected_attention")(q, k, v, indices, *cu, 64, scale)
    o_swa, _ = op("sliding_window_attention")(q, k, v, *cu, 512, scale)
    rows = torch.tensor([0, 31, 1000, 131_071, 262_143, 262_145, length - 1])
    for row in rows.tolist():
        # The reference on the one query, at the end of the keys it may see; of every group the first head.
        seen, blocks = row + 1, max(0, (row + 1 - 32) // 16 + 1)
        one, chosen = (None, None, 1, seen), indices[row : row + 1].cpu()
        for dtype in (torch.float64, torch.bfloat16):
            query = to(q[row : row + 1, ::16], dtype)
            keys, values = to(k[:seen], dtype), to(v[:seen], dtype)
            compressed = [to(t[:blocks], dtype) for t in (k_cmp, v_cmp)]
            results = {
                "cmp": reference.compressed_attention(query, *compressed, *one, 32, 16, scale)[0],
                "slc": reference.selected_attention(query, keys, values, chosen, *one, 64, scale)[0],
                "swa": reference.sliding_window_attention(query, keys, values, *one, 512, scale)[0],
            }
            if dtype == torch.float64:
                exact = results
        for name, actual in (("cmp", o_cmp), ("slc", o_slc), ("swa", o_swa)):
            assert_close(f"o_{name}[{row}]", actual[row : row + 1, ::16], exact[name], results[name])
