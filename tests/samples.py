"""A small legal call of every operator: what tests of errors, schemas and tracing start from."""

import torch
from attention_case import attention_rest, attention_tensors
from cases import Case, Inputs
from harness import exact_lse
from test_compress import phi
from tolerance import accumulator

FORWARD = (
    "compress",
    "compressed_attention",
    "block_scores",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
    "attention",
    "attention_forward",
)
DIFFERENTIABLE = tuple(name for name in FORWARD if name not in ("block_scores", "select_blocks"))
ATTENTION = tuple(name for name in FORWARD if name not in ("compress", "gated_combine"))

SMALL = Case("small", (45, 38), heads=(4, 2), dims=(8, 6), compress=(8, 4), block_size=8, window=9)


def argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.nsa, name).default._schema.arguments]


def sample(name: str, dtype: torch.dtype = torch.float64, case: Case = SMALL, device: str = "cpu") -> dict:
    x = Inputs(case, dtype, device)
    length_stride, scale = case.compress, x.scale
    if name == "compress":
        hidden = 8 if device == "cuda" else 5  # CUDA reads eight at a time
        tensors = phi(x, "mlp", per_head=False, hidden=hidden)
        values = [*tensors.values(), x.cu[1], x.cu[3], *length_stride, "mlp"]
    elif name == "gated_combine":
        values = [x.output_like(20), x.output_like(21), x.output_like(22), x.gate_logits()]
    elif name in ("attention", "attention_forward"):
        values = [*attention_tensors(x).values(), *attention_rest(x)]
    elif name == "compressed_attention":
        values = [x.q, x.keys("cmp"), x.values("cmp"), *x.cu, *length_stride, scale]
    elif name == "selected_attention":
        values = [x.q, x.keys("slc"), x.values("slc"), x.block_indices(), *x.cu, case.block_size, scale]
    elif name == "sliding_window_attention":
        values = [x.q, x.keys("swa"), x.values("swa"), *x.cu, case.window, scale]
    else:
        k_cmp = x.keys("cmp")
        lse = exact_lse(x, k_cmp).to(accumulator(dtype)).to(device)
        selection = case.select if name == "select_blocks" else ()
        values = [x.q, k_cmp, lse, *x.cu, *length_stride, case.block_size, *selection, scale]
    return dict(zip(argument_names(name), values, strict=True))


def floating(arguments: dict) -> list[str]:
    """The arguments that can be differentiated."""
    return [
        key
        for key, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "lse"
    ]


def call(name: str, arguments: dict):
    return getattr(torch.ops.nsa, name)(**arguments)
