"""Peak extra memory grows linearly in T, and offsets beyond 2^31 elements are addressed correctly."""

import os
import subprocess
import sys

import pytest
import torch
from attention_case import attention_rest, attention_tensors
from cases import Case, Inputs
from harness import op, run

PROBE = """
import sys

import torch

import nsa_ext

name, lengths = sys.argv[1], [int(tokens) for tokens in sys.argv[2:]]
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator).requires_grad_()


def work(tokens):
    cu = (None, None, tokens, tokens)
    q, k, v = random(tokens, 2, 32), random(tokens, 1, 32), random(tokens, 1, 32)
    k_cmp, v_cmp = random(tokens // 16, 1, 32), random(tokens // 16, 1, 32)
    scale = 32**-0.5
    nsa = torch.ops.nsa
    if name == "compressed_attention":
        return nsa.compressed_attention(q, k_cmp, v_cmp, *cu, 32, 16, scale)[0]
    if name == "sliding_window_attention":
        return nsa.sliding_window_attention(q, k, v, *cu, 512, scale)[0]
    if name == "select_blocks":
        lse = nsa.compressed_attention(q, k_cmp, v_cmp, *cu, 32, 16, scale)[1].detach()
        return nsa.select_blocks(q, k_cmp, lse, *cu, 32, 16, 64, 16, 1, 2, scale)
    if name == "selected_attention":
        indices = torch.arange(16, dtype=torch.int32).expand(tokens, 1, 16).contiguous()
        return nsa.selected_attention(q, k, v, indices, *cu, 64, scale)[0]
    if name == "compress":
        w1, w2 = random(1, 32 * 32, 64), random(1, 64, 32)
        return nsa.compress(k, None, w1, None, w2, None, None, tokens, 32, 16, "mlp")
    gate = random(tokens, 2, 3)
    rest = (*cu, 32, 16, 64, 16, 1, 2, 512, scale)
    return nsa.attention(q, k_cmp, v_cmp, k, v, k, v, gate, *rest)[0]


def step(tokens):
    o = work(tokens)
    if o.requires_grad:
        o.sum().backward()


def kib(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))


step(64)  # thread pools and code pages
for tokens in lengths:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from now
    before = kib("VmRSS:")
    step(tokens)
    print((kib("VmHWM:") - before) / 1024)
"""

OPERATORS = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "attention",
)


def peak_mib(name: str, lengths: list[int]) -> list[float]:
    """Peak of inputs, outputs, gradients and workspaces for each length."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    command = [sys.executable, "-c", PROBE, name, *map(str, lengths)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back at once
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [float(line) for line in result.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_peak_memory_is_linear(name: str) -> None:
    """Each doubling of T doubles what is added (T^2 would add four times as much)."""
    tokens = 4096
    once, twice, four_times = peak_mib(name, [tokens, 2 * tokens, 4 * tokens])
    sizes = f"{name}: {once:.1f}, {twice:.1f}, {four_times:.1f} MiB"
    assert once > 1, f"{sizes}: nothing was measured"
    assert four_times - twice < 2.5 * (twice - once) + 4, sizes
    assert four_times < 4.5 * once + 4, sizes


def spread(t: torch.Tensor, stride: int) -> torch.Tensor:
    """A copy whose rows lie `stride` elements apart; pages in between are never touched."""
    memory = torch.empty((t.shape[0] - 1) * stride + t[0].numel(), dtype=t.dtype)
    view = memory.as_strided(t.shape, (stride, t.shape[2], 1))
    return view.copy_(t)


def test_offsets_beyond_32_bits_on_the_cpu() -> None:
    """Few rows with gaps of 2^25 elements: the last one starts behind element 2^31."""
    x = Inputs(Case("", (70,), packed=False, heads=(2, 1), dims=(64, 64)), torch.bfloat16)
    rest, tensors = attention_rest(x), attention_tensors(x)
    wanted = ("q", "k_slc", "v_slc", "k_swa", "v_swa")
    expected, expected_grads = run(op("attention"), tensors, rest, wanted, x.output_like())
    far = {name: spread(t, 2**25) if name in wanted else t for name, t in tensors.items()}
    assert far["q"].stride(0) * 69 > 2**31
    actual, grads = run(op("attention"), far, rest, wanted, spread(x.output_like(), 2**25))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(torch.equal(grads[name], expected_grads[name]) for name in wanted)
    tokens = spread(x.keys("slc"), 2**25)
    mean = (None, None, None, None, None, None, 70, 32, 16, "mean")
    assert torch.equal(op("compress")(tokens, *mean), op("compress")(tokens.contiguous(), *mean))


def sampled_rows_are_right(name: str, heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """T = 266,240: a few rows of the whole against the same rows as the last ones of their prefix."""
    tokens = 266_240
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, dim, generator=generator, dtype=dtype, device=device)

    q, k, v = random(tokens, heads), random(tokens, 1), random(tokens, 1)
    scale = dim**-0.5
    if name == "selected_attention":
        indices = torch.tensor([0, 1, 2000, 4159], dtype=torch.int32, device=device)
        extra = (indices.expand(tokens, 1, 4).contiguous(),)
        rest = (64, scale)
    else:
        extra, rest = (), (512, scale)
    whole, _ = op(name)(q, k, v, *extra, None, None, tokens, tokens, *rest)
    for row in (0, 131_072, 262_144, tokens - 1):
        few = [t[row : row + 1] for t in extra]
        alone, _ = op(name)(q[row : row + 1], k, v, *few, None, None, 1, row + 1, *rest)
        torch.testing.assert_close(whole[row], alone[0], rtol=2**-6, atol=2**-6)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_path")
@pytest.mark.parametrize("name", ["selected_attention", "sliding_window_attention"])
def test_offsets_beyond_32_bits_on_the_gpu(name: str) -> None:
    sampled_rows_are_right(name, 64, 128, torch.bfloat16, "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selected_attention", "sliding_window_attention"])
def test_the_same_length_with_one_head_on_the_cpu(name: str) -> None:
    sampled_rows_are_right(name, 1, 8, torch.float32, "cpu")
