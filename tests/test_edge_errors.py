"""Every wrong argument is a ValueError that names the argument, its value and what is allowed."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cases import by_device
from samples import ATTENTION, FORWARD, SMALL, call, floating, sample
from torch import Tensor

Change = Callable[[dict], dict]


def expect_error(name: str, change: Change, *parts: str, device: str = "cpu") -> None:
    """The call fails with all parts in the message; the same call before and after it works."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = (
        SMALL
        if device == "cpu"
        else dataclasses.replace(SMALL, dims=(64, 64), compress=(32, 16), block_size=64)
    )
    arguments = sample(name, dtype, case, device)
    call(name, arguments)
    with pytest.raises(ValueError) as error:
        call(name, arguments | change(arguments))
    for part in (f"nsa::{name.removesuffix('_forward')}", *parts):
        assert part in str(error.value), f"{part!r} is not in: {error.value}"
    call(name, arguments)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


KEYS = {
    "compressed_attention": ("k_cmp", "v_cmp"),
    "block_scores": ("k_cmp",),
    "select_blocks": ("k_cmp",),
    "selected_attention": ("k", "v"),
    "sliding_window_attention": ("k", "v"),
    "attention": ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_swa", "v_swa"),
    "attention_forward": ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_swa", "v_swa"),
}


@by_device
@pytest.mark.parametrize("name", FORWARD)
def test_dtypes(name: str, device: str) -> None:
    keys = floating(sample(name))
    for key in keys[1:]:
        other = torch.float64 if device == "cpu" or key == "gate_logits" else torch.float32
        expect_error(name, lambda a, key=key, to=other: {key: a[key].to(to)}, key, device=device)
    everything_int = lambda a: {key: a[key].int() for key in keys}  # noqa: E731
    expect_error(name, everything_int, keys[0], "int", device=device)


@pytest.mark.parametrize("name", FORWARD)
def test_fp16_has_no_cpu_kernel(name: str) -> None:
    keys = floating(sample(name))
    half = lambda a: {key: a[key].half() for key in keys}  # noqa: E731
    expect_error(name, half, keys[0], "float16", "float32", "float64", "bfloat16")


@by_device
@pytest.mark.parametrize("name", FORWARD)
def test_ranks(name: str, device: str) -> None:
    for key in floating(sample(name)):
        expect_error(name, lambda a, key=key: {key: a[key][0]}, key, "shape", device=device)
        expect_error(name, lambda a, key=key: {key: a[key][None]}, key, "shape", device=device)


@by_device
@pytest.mark.parametrize("name", ATTENTION)
def test_shapes(name: str, device: str) -> None:
    for key in KEYS[name]:
        expect_error(name, lambda a, key=key: {key: a[key].repeat(1, 2, 1)[:, :3]}, key, "3", device=device)
        if key.startswith("k"):
            expect_error(name, lambda a, key=key: {key: a[key][..., 1:]}, key, "shape", device=device)
        else:
            expect_error(name, lambda a, key=key: {key: a[key][1:]}, key, "shape", device=device)
    expect_error(name, lambda a: {"q": a["q"][:, :3]}, "3", "heads", device=device)


@pytest.mark.parametrize("name", ATTENTION)
def test_devices(name: str) -> None:
    for key in (*KEYS[name], "cu_seqlens_k"):
        expect_error(name, lambda a, key=key: {key: a[key].to("meta")}, key, "meta", "cpu")


@pytest.mark.parametrize("name", ATTENTION)
def test_offsets(name: str) -> None:
    for key in ("cu_seqlens_q", "cu_seqlens_k"):
        expect_error(name, lambda a, key=key: {key: None}, key)
        expect_error(name, lambda a, key=key: {key: a[key].long()}, key, "int")
        expect_error(name, lambda a, key=key: {key: a[key][None]}, key, "shape")
        expect_error(name, lambda a, key=key: {key: a[key][:0]}, key)
        expect_error(name, lambda a, key=key: {key: offsets(0, 45)}, "cu_seqlens_k", "shape")
        expect_error(name, lambda a, key=key: {key: offsets(1, 45, 83)}, key, "1")
    both = lambda *v: lambda a: {"cu_seqlens_q": offsets(*v), "cu_seqlens_k": offsets(*v)}  # noqa: E731
    expect_error(name, both(0, 45, 38), "cu_seqlens_q", "45", "38")
    expect_error(name, both(0, -5, 83), "cu_seqlens_q", "-5")
    expect_error(name, both(0, 45, 84), "cu_seqlens_q", "84", "83")
    expect_error(name, lambda a: {"cu_seqlens_k": offsets(0, 45, 40)}, "cu_seqlens_k", "45", "40")
    expect_error(name, lambda a: {"cu_seqlens_k": offsets(0, 44, 83)}, "cu_seqlens_q", "45", "44")


@pytest.mark.parametrize("name", ATTENTION)
def test_maximal_lengths(name: str) -> None:
    expect_error(name, lambda a: {"max_seqlen_q": 44}, "max_seqlen_q", "44", "45")
    expect_error(name, lambda a: {"max_seqlen_k": 44}, "max_seqlen_k", "44", "45")
    expect_error(name, lambda a: {"max_seqlen_k": -1}, "max_seqlen_k", "-1")
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 83, "max_seqlen_k": 83}
    rows = KEYS[name][0]
    expect_error(name, lambda a: none | {"max_seqlen_k": 82}, "max_seqlen_k", "82", "83")
    expect_error(name, lambda a: none | {"max_seqlen_k": 500}, rows, "500")


@pytest.mark.parametrize("name", ATTENTION)
def test_too_few_key_rows(name: str) -> None:
    for key in KEYS[name]:
        if key.startswith("v"):
            continue
        last = 19 if key == "k_cmp" else 83  # the last block of the second sequence is row 11 + 7
        both = {key, key.replace("k", "v", 1)} & set(KEYS[name])
        expect_error(
            name, lambda a, both=both, n=last - 1: {k: a[k][:n] for k in both}, key, f"{last - 1}", f"{last}"
        )


@pytest.mark.parametrize(
    "change,parts",
    [
        ({"compress_stride": 3}, ("compress_stride", "3", "8")),
        ({"compress_stride": 0}, ("compress_stride", "0")),
        ({"compress_stride": -4}, ("compress_stride", "-4")),
        ({"compress_block_size": 0}, ("compress_block_size", "0")),
        ({"block_size": 6}, ("block_size", "6", "4")),
        ({"block_size": 0}, ("block_size", "0")),
        ({"block_size": -8}, ("block_size", "-8")),
        ({"num_selected_blocks": 2}, ("num_initial_blocks", "num_local_blocks", "num_selected_blocks", "2")),
        (
            {"num_selected_blocks": 0, "num_initial_blocks": 0, "num_local_blocks": 0},
            ("num_selected_blocks", "0"),
        ),
        ({"num_initial_blocks": -1}, ("num_initial_blocks", "-1")),
        ({"num_local_blocks": -1}, ("num_local_blocks", "-1")),
        ({"num_local_blocks": 4}, ("num_initial_blocks", "num_local_blocks", "num_selected_blocks", "4")),
        ({"window_size": 0}, ("window_size", "0")),
        ({"window_size": -3}, ("window_size", "-3")),
        ({"softmax_scale": float("nan")}, ("softmax_scale", "nan")),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_numbers(change: dict, parts: tuple[str, ...]) -> None:
    takers = [name for name in ATTENTION if set(change) <= set(sample(name))]
    assert takers
    for name in takers:
        selects = {"num_selected_blocks", "compress_stride"} <= set(sample(name))
        if set(change) == {"block_size"} and not selects and change["block_size"] > 0:
            continue  # selected_attention knows no stride that would have to divide its block size
        expect_error(name, lambda a: change, *parts)


def test_stride_must_divide_the_selection_block() -> None:
    for name in ("block_scores", "select_blocks", "attention", "attention_forward"):
        expect_error(name, lambda a: {"block_size": 10}, "compress_stride", "4", "block_size", "10")


@by_device
@pytest.mark.parametrize("name", ["block_scores", "select_blocks"])
def test_lse(name: str, device: str) -> None:
    expect_error(
        name, lambda a: {"lse": a["lse"].to(torch.bfloat16)}, "lse", "bfloat16", "float32", device=device
    )
    expect_error(name, lambda a: {"lse": a["lse"][1:]}, "lse", "shape", device=device)
    expect_error(name, lambda a: {"lse": a["lse"][:, 1:]}, "lse", "shape", device=device)


@by_device
def test_block_indices(device: str) -> None:
    name = "selected_attention"
    expect_error(
        name,
        lambda a: {"block_indices": a["block_indices"].long()},
        "block_indices",
        "int64",
        "int32",
        device=device,
    )
    expect_error(
        name, lambda a: {"block_indices": a["block_indices"][1:]}, "block_indices", "shape", device=device
    )
    expect_error(
        name, lambda a: {"block_indices": a["block_indices"][:, :1]}, "block_indices", "shape", device=device
    )
    expect_error(
        name, lambda a: {"block_indices": a["block_indices"][0]}, "block_indices", "shape", device=device
    )


@by_device
@pytest.mark.parametrize("name", ["attention", "attention_forward", "gated_combine"])
def test_gate_logits(name: str, device: str) -> None:
    for change in (lambda t: t[..., :2], lambda t: t[1:], lambda t: t[:, :1]):
        expect_error(
            name,
            lambda a, f=change: {"gate_logits": f(a["gate_logits"])},
            "gate_logits",
            "shape",
            device=device,
        )


@by_device
def test_gated_combine_shapes(device: str) -> None:
    for key in ("o_slc", "o_swa"):
        expect_error("gated_combine", lambda a, key=key: {key: a[key][1:]}, key, "shape", device=device)
        expect_error("gated_combine", lambda a, key=key: {key: a[key][..., 1:]}, key, "shape", device=device)


@by_device
def test_compress_parameters(device: str) -> None:
    for key in ("pe", "w1", "b1", "w2", "b2"):
        expect_error("compress", lambda a, key=key: {key: a[key][..., 1:]}, device=device)
        expect_error(
            "compress", lambda a, key=key: {key: a[key].repeat_interleave(3, 0)}, key, "3", device=device
        )
    for key in ("w1", "w2"):
        expect_error("compress", lambda a, key=key: {key: None}, key, "None", device=device)
    expect_error(
        "compress", lambda a: {"kind": "conv"}, "kind", "conv", "mlp", "linear", "mean", device=device
    )
    expect_error("compress", lambda a: {"kind": "mean"}, "pe", "mean", device=device)
    expect_error("compress", lambda a: {"kind": "linear"}, "w2", "linear", device=device)


def test_compress_sequences() -> None:
    expect_error("compress", lambda a: {"stride": 3}, "stride", "3", "8")
    expect_error("compress", lambda a: {"stride": 0}, "stride", "0")
    expect_error("compress", lambda a: {"block_size": -8}, "block_size", "-8")
    expect_error("compress", lambda a: {"cu_seqlens": a["cu_seqlens"].long()}, "cu_seqlens", "int64", "int32")
    expect_error("compress", lambda a: {"cu_seqlens": offsets(0, 45, 38)}, "cu_seqlens", "45", "38")
    expect_error("compress", lambda a: {"cu_seqlens": offsets(0, 45, 84)}, "cu_seqlens", "84", "83")
    expect_error("compress", lambda a: {"max_seqlen": 44}, "max_seqlen", "44", "45")
    expect_error("compress", lambda a: {"cu_seqlens": None, "max_seqlen": 84}, "max_seqlen", "84", "83")
    expect_error("compress", lambda a: {"max_seqlen": -1}, "max_seqlen", "-1")


@pytest.mark.parametrize("name", ATTENTION)
def test_errors_come_before_gradients_too(name: str) -> None:
    """The checks also run where autograd is on."""
    arguments = sample(name, torch.float32)
    arguments["q"].requires_grad_()
    with pytest.raises(ValueError, match="max_seqlen_k"):
        call(name, arguments | {"max_seqlen_k": 44})
