"""nsa_ext.ops: the wrappers have the names of the schemas and the defaults of the reference."""

import inspect

import pytest
import torch

from nsa_ext import ops, reference

CACHE = {"append_kv", "decode_attention"}  # need lengths and caches: nothing to leave to defaults
WRAPPERS = sorted(set(ops.__all__) - {"AttentionOutputs"} - CACHE)
HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 8, 6


@pytest.mark.parametrize("name", WRAPPERS)
def test_arguments_are_those_of_the_schema_and_of_the_reference(name):
    parameters = inspect.signature(getattr(ops, name)).parameters
    schema = getattr(torch.ops.nsa, name).default._schema
    assert list(parameters) == [argument.name for argument in schema.arguments]
    reference_name = "attention_forward" if name == "attention" else name
    expected = inspect.signature(getattr(reference, reference_name)).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        (p.name, p.default) for p in expected.values()
    ]


def arguments(name: str, tokens: int) -> list[torch.Tensor]:
    """The tensors of a call on one sequence, all of whose other arguments are left to the defaults."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    q, o = random(tokens, HEADS, DIM), random(tokens, HEADS, DIM_V)
    k, v = random(tokens, KV_HEADS, DIM), random(tokens, KV_HEADS, DIM_V)
    k_cmp, v_cmp = random(tokens // 16, KV_HEADS, DIM), random(tokens // 16, KV_HEADS, DIM_V)
    gate_logits = random(tokens, HEADS, 3)
    lse = reference.compressed_attention(q, k_cmp, v_cmp)[1]
    weights = [random(1, 32, DIM), random(1, 32 * DIM, 5), random(1, 5), random(1, 5, DIM), random(1, DIM)]
    block_indices = torch.arange(4, dtype=torch.int32).expand(tokens, KV_HEADS, 4).contiguous()
    attention = [q, k_cmp, v_cmp, k, v, k, v, gate_logits]
    return {
        "compress": [k, *weights],
        "compressed_attention": [q, k_cmp, v_cmp],
        "block_scores": [q, k_cmp, lse],
        "select_blocks": [q, k_cmp, lse],
        "selected_attention": [q, k, v, block_indices],
        "sliding_window_attention": [q, k, v],
        "gated_combine": [o, o, o, gate_logits],
        "attention_forward": attention,
        "attention": attention,
    }[name]


@pytest.mark.parametrize("name", WRAPPERS)
def test_defaults_compute_what_the_reference_computes(name):
    inputs = arguments(name, 1500)  # more blocks than are selected, more keys than the window
    actual, expected = getattr(ops, name)(*inputs), getattr(reference, name)(*inputs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted(set(WRAPPERS) - {"gated_combine", "block_scores"}))
def test_offsets_need_no_lengths(name):
    inputs, offsets = arguments(name, 300), torch.tensor([0, 100, 100, 290], dtype=torch.int32)
    kwargs = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    if name == "compress":
        kwargs = {"cu_seqlens": offsets}
    actual, expected = (getattr(module, name)(*inputs, **kwargs) for module in (ops, reference))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_block_scores_without_lengths_has_room_for_the_longest_sequence():
    inputs, offsets = arguments("block_scores", 300), torch.tensor([0, 100, 100, 290], dtype=torch.int32)
    actual, expected = (m.block_scores(*inputs, offsets, offsets) for m in (ops, reference))
    blocks = expected.shape[-1]
    torch.testing.assert_close(actual[..., :blocks], expected, rtol=1e-9, atol=1e-11)
    assert not actual[..., blocks:].any()
