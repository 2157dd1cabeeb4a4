"""nsa_attention against the reference, in every layout and with every replaceable part."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from nsa_ext import BlockCompression, NSAInfo, nsa_attention, ops, reference

SIZES = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "block_size": 8,
    "num_selected_blocks": 3,
    "num_initial_blocks": 1,
    "num_local_blocks": 1,
    "window_size": 7,
}
BATCH, LENGTH, HEADS, KV_HEADS, DIM, DIM_V = 3, 45, 4, 2, 8, 6


def qkv(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM_V))
    return tuple(torch.randn(*leading, *shape, dtype=torch.float64) for shape in shapes)


def one_sequence(q, k, v, gate_logits=None, keys=None, phi=None) -> reference.AttentionOutputs:
    """The reference for one unpacked sequence [T, H, D]; keys: (k, v) per branch that has its own."""
    pairs = {"cmp": (k, v), "slc": (k, v), "swa": (k, v)} | (keys or {})
    mean = [reference.compress(x, block_size=8, stride=4, kind="mean") for x in pairs["cmp"]]
    k_cmp, v_cmp = mean if phi is None else phi(*pairs["cmp"])
    if gate_logits is None:
        gate_logits = torch.log(torch.full((*q.shape[:2], 3), 0.5, dtype=q.dtype))
    return reference.attention_forward(q, k_cmp, v_cmp, *pairs["slc"], *pairs["swa"], gate_logits, **SIZES)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_batch_and_gradients_equal_the_reference():
    inputs = [
        x.requires_grad_() for x in (*qkv(BATCH, LENGTH), torch.randn(BATCH, LENGTH, HEADS, 3).double())
    ]
    q, k, v, gate_logits = inputs
    actual = nsa_attention(q, k, v, gate_logits=gate_logits, **SIZES)
    expected = torch.stack([one_sequence(q[b], k[b], v[b], gate_logits[b]).o for b in range(BATCH)])
    assert_equal(actual, expected)
    d_o = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, d_o), torch.autograd.grad(expected, inputs, d_o), strict=True
    ):
        assert_equal(a, e)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_packed_sequences(offsets_dtype):
    lengths = (9, 0, 33, 3)
    q, k, v = qkv(sum(lengths))
    cu_seqlens = torch.tensor([0, 9, 9, 42, 45], dtype=offsets_dtype)
    actual = nsa_attention(q, k, v, cu_seqlens=cu_seqlens, **SIZES)
    parts = [one_sequence(*(x[a:b] for x in (q, k, v))).o for a, b in ((0, 9), (9, 42), (42, 45))]
    assert_equal(actual, torch.cat(parts))
    assert torch.equal(actual, nsa_attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=33, **SIZES))
    row = nsa_attention(q[None], k[None], v[None], cu_seqlens=cu_seqlens, **SIZES)
    assert torch.equal(actual[None], row)


def test_one_packed_sequence_without_offsets():
    q, k, v = qkv(LENGTH)
    assert_equal(nsa_attention(q, k, v, **SIZES), one_sequence(q, k, v).o)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_padding_mask_with_garbage_at_the_padding(side, mask_dtype):
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for b, length in enumerate((20, 0, 45)):
        begin = {"left": LENGTH - length, "right": 0, "middle": (LENGTH - length) // 2}[side]
        mask[b, begin : begin + length] = True
    clean = (*qkv(BATCH, LENGTH), torch.randn(BATCH, LENGTH, HEADS, 3, dtype=torch.float64))
    dirty = [x.masked_fill(~mask[..., None, None], float("nan")).requires_grad_() for x in clean]
    q, k, v, gate_logits = dirty
    actual, info = nsa_attention(
        q, k, v, mask.to(mask_dtype), gate_logits=gate_logits, return_info=True, **SIZES
    )
    for b in (0, 2):
        expected = one_sequence(*(x[b, mask[b]] for x in clean))
        assert_equal(actual[b, mask[b]], expected.o)
        assert torch.equal(info.block_indices[b, mask[b]], expected.block_indices)
    assert not actual[~mask].any() and not info.gates[~mask].any()
    assert (info.block_indices[~mask] == -1).all() and torch.isneginf(info.lse_slc[~mask]).all()

    d_o = torch.randn_like(actual)
    grads = torch.autograd.grad(actual, dirty, d_o)
    leaves = [x[2, mask[2]].requires_grad_() for x in clean]
    expected_grads = torch.autograd.grad(one_sequence(*leaves).o, leaves, d_o[2, mask[2]])
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert not grad[~mask].any()
        assert_equal(grad[2, mask[2]], expected_grad)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_fewer_queries_than_keys_are_the_last_tokens(batch):
    q, k, v = qkv(batch, LENGTH)
    whole = nsa_attention(q, k, v, **SIZES)
    assert_equal(nsa_attention(q[:, -5:], k, v, **SIZES), whole[:, -5:])


def test_own_keys_and_values_of_each_branch():
    q, k, v = qkv(LENGTH)
    keys = {branch: qkv(LENGTH)[1:] for branch in ("cmp", "slc", "swa")}
    for branch, (own_key, own_value) in keys.items():
        actual = nsa_attention(q, k, v, **{f"key_{branch}": own_key, f"value_{branch}": own_value}, **SIZES)
        assert_equal(actual, one_sequence(q, k, v, keys={branch: (own_key, own_value)}).o)


def test_gate_logits_default_to_equal_weights():
    q, k, v = qkv(LENGTH)
    parts = one_sequence(q, k, v)
    actual, info = nsa_attention(q, k, v, return_info=True, **SIZES)
    assert_equal(actual, (parts.o_cmp + parts.o_slc + parts.o_swa) / 3)
    torch.testing.assert_close(info.gates, torch.full_like(info.gates, 1 / 3))


def test_info_has_the_layout_of_the_call():
    q, k, v = qkv(BATCH, LENGTH)
    gate_logits = torch.randn(BATCH, LENGTH, HEADS, 3, dtype=torch.float64)
    o, info = nsa_attention(q, k, v, gate_logits=gate_logits, return_info=True, **SIZES)
    assert isinstance(info, NSAInfo)
    assert torch.equal(o, nsa_attention(q, k, v, gate_logits=gate_logits, **SIZES))
    for b in range(BATCH):
        expected = one_sequence(q[b], k[b], v[b], gate_logits[b])
        assert torch.equal(info.block_indices[b], expected.block_indices)
        for name in ("lse_cmp", "lse_slc", "lse_swa"):
            assert_equal(getattr(info, name)[b], getattr(expected, name))
    assert_equal(info.gates, gate_logits.sigmoid())
    assert not any(getattr(info, field.name).requires_grad for field in dataclasses.fields(info))


def test_compression_functions():
    q, k, v = qkv(2, LENGTH)
    cu_seqlens = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    phi_k = BlockCompression(KV_HEADS, DIM, 8, 4, dtype=torch.float64)
    phi_v = BlockCompression(KV_HEADS, DIM_V, 8, 4, "linear", dtype=torch.float64)

    def phi(key, value):
        return phi_k(key), phi_v(value)

    expected = torch.stack([one_sequence(q[b], k[b], v[b], phi=phi).o for b in range(2)])
    seen = {}

    def with_offsets(key, value, cu_seqlens=None, max_seqlen=None):
        seen.update(key=key.shape, cu_seqlens=cu_seqlens.tolist(), max_seqlen=max_seqlen)
        return phi_k(key, cu_seqlens, max_seqlen), phi_v(value, cu_seqlens, max_seqlen)

    def without_offsets(key, value):
        return phi_k(key, cu_seqlens, LENGTH), phi_v(value, cu_seqlens, LENGTH)

    for compression_fn in (with_offsets, without_offsets, (phi_k, phi_v)):
        assert_equal(nsa_attention(q, k, v, compression_fn=compression_fn, **SIZES), expected)
    assert seen == {"key": (90, KV_HEADS, DIM), "cu_seqlens": [0, 45, 90], "max_seqlen": 45}

    def too_short(key, value):
        return key[:3], value[:3]

    with pytest.raises(ValueError, match=r"compression_fn returned k_cmp \[3, 2, 8\].*\[22, 2, 8\]"):
        nsa_attention(q, k, v, compression_fn=too_short, **SIZES)


def test_selection_function_replaces_the_selection():
    inputs = [x.requires_grad_() for x in qkv(LENGTH)]
    q, k, v = inputs
    calls = []

    def last_two_blocks(query, k_cmp, lse, scores_fn):
        calls.append((query.shape, k_cmp.shape, lse.shape, scores_fn()))
        own = torch.arange(LENGTH) // 8
        return torch.stack((own, own - 1), dim=-1)[:, None].expand(-1, KV_HEADS, -1)

    actual, info = nsa_attention(q, k, v, selection_fn=last_two_blocks, return_info=True, **SIZES)
    parts = one_sequence(q, k, v)
    chosen = last_two_blocks(q, parts.o_cmp, parts.lse_cmp, lambda: None)
    o_slc, _ = reference.selected_attention(q, k, v, chosen, block_size=8)
    expected = (parts.o_cmp + o_slc + parts.o_swa) / 3
    assert_equal(actual, expected)
    assert torch.equal(info.block_indices, chosen.int())
    assert calls[0][:3] == ((LENGTH, HEADS, DIM), (LENGTH // 4, KV_HEADS, DIM), (LENGTH, HEADS))
    k_cmp = reference.compress(k, block_size=8, stride=4, kind="mean")
    assert_equal(
        calls[0][3], reference.block_scores(q, k_cmp, parts.lse_cmp, None, None, LENGTH, LENGTH, 8, 4, 8)
    )

    d_o = torch.randn_like(expected)
    for a, e in zip(
        torch.autograd.grad(actual, inputs, d_o), torch.autograd.grad(expected, inputs, d_o), strict=True
    ):
        assert_equal(a, e)


def test_built_in_selection_passed_as_a_selection_function_changes_nothing():
    q, k, v = qkv(LENGTH)

    def built_in(query, k_cmp, lse, scores_fn):
        return ops.select_blocks(query, k_cmp, lse, None, None, LENGTH, LENGTH, 8, 4, 8, 3, 1, 1)

    assert_equal(nsa_attention(q, k, v, selection_fn=built_in, **SIZES), nsa_attention(q, k, v, **SIZES))


def test_softmax_scale():
    q, k, v = qkv(LENGTH)
    assert_equal(nsa_attention(q, k, v, softmax_scale=0.7, **SIZES), one_sequence(q * 0.7 * DIM**0.5, k, v).o)


def test_one_dynamic_graph_for_several_lengths_and_masks():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nsa_attention, backend=counter, fullgraph=True, dynamic=True)
    for length, real in ((48, 40), (61, 13), (90, 77)):
        q, k, v = (x.requires_grad_() for x in qkv(2, length))
        mask = torch.arange(length).expand(2, -1) < torch.tensor([[length], [real]])
        actual, expected = (fn(q, k, v, mask, **SIZES) for fn in (compiled, nsa_attention))
        assert_equal(actual, expected)
        d_o = torch.randn_like(expected)
        for a, e in zip(*(torch.autograd.grad(o, (q, k, v), d_o) for o in (actual, expected)), strict=True):
            assert_equal(a, e)
    assert counter.frame_count == 1


def test_users_functions_compile():
    q, k, v = qkv(2, LENGTH)

    def phi(key, value, cu_seqlens, max_seqlen):
        options = (None, None, None, None, None, cu_seqlens, max_seqlen, 8, 4, "mean")
        return 2 * ops.compress(key, *options), ops.compress(value, *options)

    def best_scores(query, k_cmp, lse, scores_fn):
        return scores_fn().topk(3).indices

    kwargs = {"compression_fn": phi, "selection_fn": best_scores, **SIZES}
    torch._dynamo.reset()
    compiled = torch.compile(nsa_attention, backend="eager", fullgraph=True)
    assert_equal(compiled(q, k, v, **kwargs), nsa_attention(q, k, v, **kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (45, 4)}, r"query has shape \[45, 4\]"),
        ({"key": (2, 45, 2, 7)}, r"key has shape \[2, 45, 2, 7\].*head dim"),
        ({"key": (1, 45, 2, 8)}, "same batch size"),
        ({"key": (45, 2, 8)}, "as many dims"),
        ({"key": (2, 45, 3, 8)}, "query has 4 heads; key has 3"),
        ({"key": (2, 44, 2, 8)}, "query has 45 tokens; there may be at most key's 44"),
        ({"value": (2, 45, 1, 6)}, r"value has shape \[2, 45, 1, 6\]"),
        ({"key_slc": (2, 45, 2, 6)}, r"key_slc has shape.*it must be \[2, 45, 2, 8\]"),
        ({"value_cmp": (2, 44, 2, 6)}, r"value_cmp has shape.*it must be \[2, 45, 2, 6\]"),
        ({"gate_logits": (2, 45, 3)}, r"gate_logits has shape.*it must be \[2, 45, 4, 3\]"),
        ({"mask": (2, 44)}, r"mask has shape \[2, 44\].*\[2, 45\]"),
        ({"cu_seqlens": (3,)}, "cu_seqlens is torch.float64.*int32"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"query": (2, 45, 4, 8), "key": (2, 45, 2, 8), "value": (2, 45, 2, 6)} | change
    with pytest.raises(ValueError, match=message):
        nsa_attention(**{name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()})


def test_layouts_that_exclude_each_other():
    q, k, v = qkv(2, LENGTH)
    cu_seqlens = torch.tensor([0, 45], dtype=torch.int32)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    with pytest.raises(ValueError, match="exclude each other"):
        nsa_attention(q, k, v, mask, cu_seqlens=cu_seqlens, **SIZES)
    with pytest.raises(ValueError, match="query has 2 rows; with cu_seqlens"):
        nsa_attention(q, k, v, cu_seqlens=cu_seqlens, **SIZES)
    with pytest.raises(ValueError, match="with a mask or cu_seqlens they must agree"):
        nsa_attention(q[:, -3:], k, v, mask, **SIZES)
    with pytest.raises(ValueError, match=r"selection_fn returned \[45, 4, 1\].*\[90, 2, n\]"):
        nsa_attention(q, k, v, selection_fn=lambda *_: torch.zeros(45, 4, 1), **SIZES)
