"""NSAConfig: defaults, validation, round trip."""

import json
import math

import pytest

from nsa_ext import NSAConfig

SIZES = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def test_defaults_are_those_of_the_specification():
    config = NSAConfig(**SIZES)
    assert (config.compress_block_size, config.compress_stride, config.block_size) == (32, 16, 64)
    assert (config.num_selected_blocks, config.num_initial_blocks, config.num_local_blocks) == (16, 1, 2)
    assert config.window_size == 512
    assert (config.compress_kind, config.compress_rope, config.compress_per_head) == ("mlp", "after", False)
    assert (config.share_kv, config.qkv_bias, config.rope_theta) == (False, False, 10000.0)
    assert config.head_dim_v is config.compress_hidden_size is config.softmax_scale is None
    assert 1 / (1 + math.exp(-config.gate_bias)) == pytest.approx(1 / 3)


def test_value_dim_follows_head_dim():
    assert NSAConfig(**SIZES).value_dim == 16
    assert NSAConfig(**SIZES, head_dim_v=24).value_dim == 24


def test_round_trip_through_json():
    config = NSAConfig(**SIZES, head_dim_v=8, compress_kind="linear", share_kv=True, softmax_scale=0.5)
    assert NSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_unknown_and_missing_keys():
    with pytest.raises(ValueError, match=r"unknown.*'windows_size'.*allowed.*window_size"):
        NSAConfig.from_dict({**SIZES, "windows_size": 3})
    with pytest.raises(ValueError, match=r"missing.*head_dim.*num_heads"):
        NSAConfig.from_dict({"hidden_size": 64, "num_kv_heads": 2})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("hidden_size", 0, "integer >= 1"),
        ("num_heads", -4, "integer >= 1"),
        ("num_kv_heads", 3, "divisor of num_heads = 4"),
        ("head_dim", 15, "even"),
        ("head_dim", 16.0, "integer"),
        ("head_dim_v", 0, "integer >= 1 or None"),
        ("compress_block_size", 24, "multiple of compress_stride = 16"),
        ("compress_stride", 0, "integer >= 1"),
        ("block_size", 40, "multiple of compress_stride = 16"),
        ("num_selected_blocks", 2, r"num_initial_blocks \+ num_local_blocks = 3"),
        ("num_initial_blocks", -1, "integer >= 0"),
        ("num_local_blocks", True, "integer >= 0"),
        ("window_size", 0, "integer >= 1"),
        ("compress_kind", "conv", "mlp.*linear.*mean"),
        ("compress_hidden_size", 0, "integer >= 1 or None"),
        ("compress_per_head", 1, "True or False"),
        ("compress_rope", "during", "after.*before.*none"),
        ("share_kv", None, "True or False"),
        ("rope_theta", 0.0, "positive"),
        ("qkv_bias", "no", "True or False"),
        ("gate_bias", float("nan"), "finite"),
        ("gate_bias", True, "finite number"),
        ("softmax_scale", -1.0, "positive number or None"),
    ],
)
def test_a_violated_rule_names_the_field_its_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} = {value!r} is not allowed.*{allowed}"):
        NSAConfig(**{**SIZES, field: value})
