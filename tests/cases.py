"""The one table of shapes and parameters, and the inputs made from a row of it.

Everything here is written out from the specification by loops over sequences, independent of the library
under test.
"""

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

CUDA_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # keys of every sequence
    heads: tuple[int, int] = (4, 1)  # query heads, KV heads
    dims: tuple[int, int] = (32, 32)  # head dim of q and k, of v and o
    compress: tuple[int, int] = (32, 16)  # block length, stride
    block_size: int = 64
    select: tuple[int, int, int] = (4, 1, 2)  # blocks in all, forced first ones, forced local ones
    window: int = 40
    queries: tuple[int, ...] | None = None  # None: as many as keys
    pad: tuple[int, int] = (0, 0)  # rows behind the last sequence, of q and of k
    packed: bool = True  # False: cu_seqlens is None
    slack: int = 0  # how far max_seqlen lies above the longest sequence

    @property
    def query_lengths(self) -> tuple[int, ...]:
        return self.lengths if self.queries is None else self.queries

    @property
    def num_queries(self) -> int:
        return sum(self.query_lengths) + self.pad[0]

    @property
    def num_keys(self) -> int:
        return sum(self.lengths) + self.pad[1]

    @property
    def max_seqlens(self) -> tuple[int, int]:
        return max(self.query_lengths, default=0) + self.slack, max(self.lengths, default=0) + self.slack

    @property
    def num_score_blocks(self) -> int:
        return -(-self.max_seqlens[1] // self.block_size)

    def cu_seqlens(self, device: str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        if not self.packed:
            return None, None

        def offsets(lengths: tuple[int, ...]) -> Tensor:
            return torch.tensor(
                [sum(lengths[:b]) for b in range(len(lengths) + 1)], dtype=torch.int32, device=device
            )

        return offsets(self.query_lengths), offsets(self.lengths)

    def queries_and_positions(self) -> list[tuple[int, int, int]]:
        """(row of q, sequence, position) of every query."""
        rows, begin = [], 0
        for b, (num_q, num_k) in enumerate(zip(self.query_lengths, self.lengths, strict=True)):
            rows += [(begin + i, b, num_k - num_q + i) for i in range(num_q)]
            begin += num_q
        return rows

    def own_blocks(self) -> Tensor:
        own = torch.full((self.num_queries,), -1)
        for row, _, t in self.queries_and_positions():
            own[row] = t // self.block_size
        return own

    def num_compressed(self, b: int) -> int:
        length, stride = self.compress
        return max(0, (self.lengths[b] - length) // stride + 1)

    def first_compressed_row(self, b: int) -> int:
        return sum(self.lengths[:b]) // self.compress[1]

    def seen(self, branch: str) -> Tensor:
        """Bool [rows of the branch's keys]: visible to a query through the band, or causally (slc)."""
        length, stride = self.compress
        mask = torch.zeros(self.num_keys // stride if branch == "cmp" else self.num_keys, dtype=torch.bool)
        for _, b, t in self.queries_and_positions():
            begin = sum(self.lengths[:b])
            if branch == "cmp":
                first = self.first_compressed_row(b)
                mask[first : first + max(0, min(self.num_compressed(b), (t - length + 1) // stride + 1))] = (
                    True
                )
            else:
                low = max(0, t - self.window + 1) if branch == "swa" else 0
                mask[begin + low : begin + t + 1] = True
        return mask

    def compressible(self) -> Tensor:
        """Bool [S]: tokens that lie in a compression block."""
        length, stride = self.compress
        mask = torch.zeros(self.num_keys, dtype=torch.bool)
        for b in range(len(self.lengths)):
            begin = sum(self.lengths[:b])
            if self.num_compressed(b):
                mask[begin : begin + (self.num_compressed(b) - 1) * stride + length] = True
        return mask

    def on_cuda(self) -> "Case":
        """The nearest shape with native kernels: lengths, heads, chunks and paddings stay."""
        length, stride = self.compress
        if length % 8 or stride % 8 or length > 64:
            length, stride = 32, 16
        dims = self.dims if self.dims in CUDA_HEAD_DIMS else (64, 64)
        block_size = self.block_size if self.block_size in (32, 64, 128) else 64
        return dataclasses.replace(self, dims=dims, compress=(length, stride), block_size=block_size)


CASES = (
    Case("one_sequence", (300,), packed=False),
    Case("defaults_g16", (260,), heads=(16, 1), dims=(64, 64), select=(16, 1, 2), window=512, packed=False),
    Case("ragged_with_empty", (130, 0, 77, 211), heads=(6, 2), dims=(40, 20)),
    Case("shorter_than_a_block", (5, 31, 32, 33, 1, 17), heads=(2, 1)),
    Case("chunked_prefill", (200, 97, 40), queries=(37, 50, 0), heads=(4, 2), dims=(64, 64)),
    Case("chunk_without_offsets", (233,), queries=(61,), packed=False, pad=(0, 13)),
    Case("decode", (150, 31, 1, 64), queries=(1, 1, 1, 1), heads=(5, 1)),
    Case("padding_rows", (90, 45), pad=(19, 23), heads=(4, 2)),
    Case("max_seqlen_slack", (70, 101), slack=77, heads=(2, 2)),
    Case("mha_g1", (111, 60), heads=(3, 3), dims=(16, 24)),
    Case("gqa_g5", (143,), heads=(10, 2), dims=(24, 72)),
    Case("gqa_g8", (95, 120), heads=(8, 1), dims=(20, 40)),
    Case("dims_192_128", (129,), heads=(2, 1), dims=(192, 128)),
    Case("dims_1_3", (99, 66), heads=(3, 1), dims=(1, 3)),
    Case("dims_128", (130, 70), heads=(4, 1), dims=(128, 128)),
    Case("dims_33_65", (100,), heads=(2, 1), dims=(33, 65)),
    Case("l_over_block_size", (190, 100), compress=(64, 16), block_size=32, select=(4, 1, 1)),
    Case("l_equals_d", (187, 64), compress=(16, 16), block_size=32, select=(5, 1, 2)),
    Case("odd_strides", (101, 59), compress=(9, 3), block_size=15, select=(3, 1, 1), window=7, heads=(4, 2)),
    Case("stride_one", (61, 30), compress=(4, 1), block_size=3, select=(6, 2, 1), window=5),
    Case("forced_only", (300,), select=(3, 1, 2)),
    Case("no_initial", (310,), select=(3, 0, 2), block_size=32),
    Case("no_local", (310,), select=(3, 1, 0), block_size=32),
    Case("nothing_forced", (270,), select=(2, 0, 0), block_size=32),
    Case("one_block", (200,), select=(1, 0, 0), block_size=32),
    Case("more_blocks_than_exist", (150, 70), select=(12, 2, 3), block_size=32),
    Case("window_one", (75, 20), window=1),
    Case("window_beyond_sequence", (75, 20), window=1000),
    Case("window_63", (200,), window=63),
    Case("block_size_96", (301,), block_size=96, select=(2, 1, 1)),
    Case("block_size_128", (400,), block_size=128, select=(2, 0, 1)),
    Case("block_size_16", (163,), block_size=16, compress=(32, 8), select=(6, 1, 2)),
    # More queries, keys and blocks than a kernel works on at a time: several chunks and units.
    Case("several_chunks", (600, 5, 150), heads=(16, 1), dims=(24, 16), select=(16, 1, 2), window=130),
    Case("nothing", (), heads=(4, 2)),
    Case("only_empty_sequences", (0, 0), heads=(4, 2)),
    Case("only_padding", (0,), pad=(5, 40), heads=(4, 2)),
)


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
# The best path of the GPU, and the one that the marker `portable` forces.
CUDA_PATHS = ("cuda", pytest.param("portable", marks=pytest.mark.portable))
_CUDA_MARKS = {"cuda": (pytest.mark.gpu,), "portable": (pytest.mark.gpu, pytest.mark.portable)}
TARGETS = tuple(pytest.param("cpu", dtype, id=f"cpu-{str(dtype)[6:]}") for dtype in CPU_DTYPES) + tuple(
    pytest.param("cuda", dtype, id=f"{name}-{str(dtype)[6:]}", marks=marks)
    for name, marks in _CUDA_MARKS.items()
    for dtype in CUDA_DTYPES
)
DEVICES = (
    pytest.param("cpu", id="cpu"),
    *(pytest.param("cuda", id=name, marks=marks) for name, marks in _CUDA_MARKS.items()),
)

by_target = pytest.mark.parametrize(("device", "dtype"), TARGETS)
by_device = pytest.mark.parametrize("device", DEVICES)


def by_case(*names: str) -> pytest.MarkDecorator:
    chosen = [case(name) for name in names] if names else CASES
    return pytest.mark.parametrize("case", chosen, ids=lambda c: c.name)


def default_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@dataclasses.dataclass
class Inputs:
    """Random inputs of every operator for one case; cu: (cu_seqlens_q, cu_seqlens_k, max_q, max_k)."""

    case: Case
    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0
    q_scale: float = 1.0

    def random(self, stream: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype).to(self.device)

    @functools.cached_property
    def cu(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        return (*self.case.cu_seqlens(self.device), *self.case.max_seqlens)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.case.dims[0])

    @functools.cached_property
    def q(self) -> Tensor:
        return self.random(1, self.case.num_queries, self.case.heads[0], self.case.dims[0]) * self.q_scale

    def keys(self, branch: str) -> Tensor:
        rows = self.case.num_keys // (self.case.compress[1] if branch == "cmp" else 1)
        return self.random(
            2 + ("cmp", "slc", "swa").index(branch), rows, self.case.heads[1], self.case.dims[0]
        )

    def values(self, branch: str) -> Tensor:
        rows = self.case.num_keys // (self.case.compress[1] if branch == "cmp" else 1)
        return self.random(
            5 + ("cmp", "slc", "swa").index(branch), rows, self.case.heads[1], self.case.dims[1]
        )

    def output_like(self, stream: int = 8) -> Tensor:
        return self.random(stream, self.case.num_queries, self.case.heads[0], self.case.dims[1])

    def gate_logits(self) -> Tensor:
        return self.random(12, self.case.num_queries, self.case.heads[0], 3)

    def block_indices(self) -> Tensor:
        """Rows with what a set may hold beside own blocks: repeats, disorder, -1, numbers out of range."""
        own, n = self.case.own_blocks(), self.case.select[0]
        generator = torch.Generator().manual_seed(1000 * self.seed + 13)
        shape = (self.case.num_queries, self.case.heads[1], n)
        indices = (torch.rand(shape, generator=generator) * (own.clamp(min=0) + 1)[:, None, None]).int()
        odd = torch.rand(shape, generator=generator)
        wild = torch.tensor([-1, -7, 2**31 - 1, -(2**31)], dtype=torch.int32)
        wild = wild[torch.randint(0, 4, shape, generator=generator)]
        indices = torch.where(odd < 0.15, wild, indices)
        indices = torch.where(
            odd > 0.9, (own[:, None, None] + 1).int(), indices
        )  # the block past the query's own
        indices[::7] = -1
        return indices.contiguous().to(self.device)
