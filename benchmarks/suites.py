"""The suites: which ops, implementations, shapes, batches and lengths are measured together."""

from dataclasses import dataclass, field
from itertools import product

from case import DATA, Shape

DIRECTIONS = ("forward", "backward", "step")
DECODE_DIRECTIONS = ("mean", "ordinary", "compressing")  # see implementations/decode.py


@dataclass(frozen=True)
class Suite:
    """Speed-ups are against `baseline`; ops stand in the order in which they are measured."""

    name: str
    device: str
    dtype: str
    shapes: tuple[Shape, ...]
    ops: dict[str, tuple[str, ...]]  # op -> implementations
    baseline: str
    lengths: tuple[int, ...]
    quick_lengths: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    directions: tuple[str, ...] = DIRECTIONS
    data: tuple[str, ...] = DATA
    method: dict[str, float] = field(default_factory=dict)  # what differs from timing.METHODS


SINGLE_OPS = (
    "compress",
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
)

STANDARD = Shape(64, 4, 128, 128, compress_hidden_size=256)
# (query heads, KV heads). 16 query heads where the group divides them.
GROUPS = ((16, 16), (16, 8), (16, 4), (12, 2), (16, 2), (16, 1), (32, 1))
GROUP_HEAD_DIMS = ((64, 64), (128, 128), (192, 128))

_SUITES = (
    Suite(
        name="cpu",
        device="cpu",
        dtype="float32",
        shapes=(Shape(),),
        ops={"attention": ("nsa", "sdpa")} | {op: ("nsa",) for op in ("block_scores", *SINGLE_OPS)},
        baseline="sdpa",
        lengths=(2048, 4096, 8192, 16384, 32768),
        quick_lengths=(512, 1024),
        threads=2,
    ),
    Suite(
        name="training",
        device="cuda",
        dtype="bfloat16",
        shapes=(STANDARD,),
        ops={"attention": ("nsa", "nsa_portable", "sdpa_flash", "sdpa_cudnn", "fla")}
        | {op: ("nsa",) for op in SINGLE_OPS},
        baseline="sdpa_cudnn",
        lengths=(2048, 4096, 8192, 16384, 32768, 65536, 131072),
        quick_lengths=(2048,),
        directions=("forward", "backward"),
    ),
    Suite(
        name="gqa",
        device="cuda",
        dtype="bfloat16",
        shapes=tuple(Shape(*heads, *dims) for dims, heads in product(GROUP_HEAD_DIMS, GROUPS)),
        ops={"attention": ("nsa", "sdpa_cudnn")},
        baseline="sdpa_cudnn",
        lengths=(32768,),
        quick_lengths=(2048,),
        directions=("forward", "backward"),
    ),
    Suite(
        name="decode",
        device="cuda",
        dtype="bfloat16",
        shapes=(STANDARD,),
        ops={"decode": ("nsa", "nsa_paged", "sdpa_flash", "sdpa_cudnn")},
        baseline="sdpa_cudnn",
        lengths=(4096, 8192, 16384, 65536, 262144),
        quick_lengths=(4096,),
        batches=(1, 8, 32, 128),
        directions=DECODE_DIRECTIONS,
        data=("random",),
        # Bound by memory and latency, not by the power cap: short bursts and pauses do.
        method={"burst_ms": 20, "pause_ms": 20},
    ),
    Suite(
        name="prefill",
        device="cuda",
        dtype="bfloat16",
        shapes=(STANDARD,),
        ops={
            "prefill": (
                "nsa",
                "nsa_chunks_8192",
                "nsa_chunks_2048",
                "nsa_training",
                "sdpa_flash",
                "sdpa_cudnn",
            )
        },
        baseline="sdpa_cudnn",
        lengths=(8192, 16384, 32768, 65536),
        quick_lengths=(4096,),
        directions=("forward",),
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}
