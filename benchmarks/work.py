"""The work of an operation: query-key pairs, the matrix products over them, bytes, and the floor they set."""

import functools
from dataclasses import dataclass

import torch
from case import Case, Workload
from torch import Tensor

# ---- Query-key pairs of each branch ----


def dense_pairs(case: Case) -> int:
    return case.length * (case.length + 1) // 2


@functools.cache
def compressed_pairs(case: Case) -> int:
    block, stride = case.shape.compress_block_size, case.shape.compress_stride
    visible = range(block - 1, case.length)  # query t sees (t + 1 - block) // stride + 1 blocks
    return sum((t + 1 - block) // stride + 1 for t in visible)


@functools.cache
def selected_pairs(case: Case) -> int:
    """Assumes that the own block is forced (num_local_blocks > 0)."""
    block, n = case.shape.block_size, case.shape.num_selected_blocks
    return sum((min(n, t // block + 1) - 1) * block + t % block + 1 for t in range(case.length))


def window_pairs(case: Case) -> int:
    w = min(case.shape.window_size, case.length)
    return w * (w + 1) // 2 + (case.length - w) * w


# ---- Matrix products ----


def attention_flops(case: Case, pairs: int) -> dict[str, float]:
    """Two products forward; five backward (S and dP again, dV, dQ, dK)."""
    shape = case.shape
    unit = 2.0 * shape.num_heads_q * pairs
    return {
        "forward": unit * (shape.head_dim_qk + shape.head_dim_v),
        "backward": unit * (3 * shape.head_dim_qk + 2 * shape.head_dim_v),
    }


def score_flops(case: Case) -> float:
    return 2.0 * case.shape.num_heads_q * case.shape.head_dim_qk * compressed_pairs(case)


def compress_flops(case: Case, head_dim: int) -> dict[str, float]:
    shape = case.shape
    blocks = max(0, (case.length - shape.compress_block_size) // shape.compress_stride + 1)
    per_block = 2.0 * shape.compress_hidden_size * head_dim * (shape.compress_block_size + 1)
    forward = blocks * shape.num_heads_kv * per_block
    return {"forward": forward, "backward": 2 * forward}


# ---- Bytes ----

ADJACENT_TOKENS = 16  # that share one fetch of a block: more of them do not fit an SM


def gathered_bytes(block_indices: Tensor, case: Case) -> int:
    """K and V of the distinct blocks of every ADJACENT_TOKENS tokens and KV head."""
    shape = case.shape
    tokens = len(block_indices) // ADJACENT_TOKENS * ADJACENT_TOKENS
    tiles = block_indices[:tokens].unflatten(0, (-1, ADJACENT_TOKENS)).transpose(1, 2).flatten(2)
    blocks = tiles.sort(dim=-1).values
    first = torch.nn.functional.pad(blocks[..., 1:] != blocks[..., :-1], (1, 0), value=True)
    distinct = int((first & (blocks >= 0)).sum())
    element = getattr(torch, case.dtype).itemsize
    return distinct * shape.block_size * (shape.head_dim_qk + shape.head_dim_v) * element


def row_bytes(case: Case) -> int:
    """Of one row of K and V of every KV head."""
    shape = case.shape
    return shape.num_heads_kv * (shape.head_dim_qk + shape.head_dim_v) * getattr(torch, case.dtype).itemsize


def decode_rows(case: Case) -> int:
    """That a decoding step must read: compressed ones, those of the selected blocks, and the window."""
    shape, length = case.shape, case.length
    selected = min(length, shape.num_selected_blocks * shape.block_size)
    return case.batch * (length // shape.compress_stride + selected + min(length, shape.window_size))


# ---- The floor ----


@dataclass(frozen=True)
class Ceilings:
    """Rates per second that a GPU sustains: bf16 products under its power cap, gathers of 16 KiB that hit L2,
    and memory traffic.
    """

    flops: float
    l2_bytes: float
    hbm_bytes: float


CEILINGS = {
    "H200": Ceilings(flops=675e12, l2_bytes=9.06e12, hbm_bytes=4.2e12),
    "H100": Ceilings(flops=675e12, l2_bytes=9.06e12, hbm_bytes=3.35e12),
}


def ceilings_of(gpu: str) -> Ceilings | None:
    return next((ceilings for name, ceilings in CEILINGS.items() if name in gpu), None)


def floor_ms(work: Workload, direction: str, compulsory_bytes: int, ceilings: Ceilings) -> float:
    """The time that the busiest unit needs, if the others hide behind it."""
    gathers = 2 if direction == "step" else 1
    return 1e3 * max(
        work.flops.get(direction, 0.0) / ceilings.flops,
        gathers * work.gathered_bytes / ceilings.l2_bytes,
        compulsory_bytes / ceilings.hbm_bytes,
    )
