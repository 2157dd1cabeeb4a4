"""A cache with the keys of a case, written by plain indexing: what tests of its operators start from."""

import dataclasses

import torch
from cases import Case, Inputs
from torch import Tensor

CACHE_CASES = (
    Case("decode", (150, 31, 1, 64), queries=(1, 1, 1, 1), heads=(5, 1)),
    Case("verify", (300, 60, 77, 520), queries=(16, 0, 5, 3), heads=(8, 2), dims=(64, 64)),
    Case("verify_padded", (210, 33, 500), queries=(2, 1, 7), heads=(4, 2), dims=(20, 36), pad=(3, 0)),
    Case(
        "defaults_g16",
        (700, 1030),
        queries=(1, 2),
        heads=(16, 1),
        dims=(128, 128),
        select=(16, 1, 2),
        window=512,
    ),
    Case("dims_192_128", (330,), queries=(1,), heads=(8, 2), dims=(192, 128), window=100),
    Case("dims_256_256", (200, 140), queries=(1, 4), heads=(6, 2), dims=(256, 256), window=64),
    Case("dims_96_96", (200, 140), queries=(9, 4), heads=(2, 1), dims=(96, 96), window=64),
    Case("g64", (260,), queries=(3,), heads=(64, 1), dims=(64, 64), block_size=32, select=(5, 1, 1)),
    Case("g1", (190, 120), queries=(1, 1), heads=(3, 3), dims=(64, 64)),
    Case(
        "g3_long", (2500, 900), queries=(1, 2), heads=(6, 2), dims=(64, 64), block_size=32, select=(16, 1, 2)
    ),
    Case("l_over_block_size", (190, 100), queries=(2, 2), compress=(64, 16), block_size=32, select=(4, 1, 1)),
    Case("l_equals_d", (187, 64), queries=(1, 3), compress=(16, 16), dims=(64, 64), block_size=32),
    Case("d_8", (187, 64), queries=(1, 3), compress=(32, 8), dims=(64, 64), block_size=128, select=(2, 1, 1)),
    Case("odd", (101, 59), queries=(4, 1), compress=(9, 3), block_size=15, select=(3, 1, 1), window=7),
    Case("forced_only", (300,), queries=(2,), select=(3, 1, 2), dims=(64, 64)),
    Case("nothing_forced", (270,), queries=(2,), select=(2, 0, 0), block_size=32, dims=(64, 64)),
    Case("shorter_than_a_block", (5, 31, 32, 33, 1, 17), queries=(5, 1, 1, 2, 1, 16), dims=(64, 64)),
    Case("window_one", (75, 20), queries=(1, 2), window=1, dims=(64, 64)),
    Case("window_beyond", (75, 20), queries=(1, 2), window=1000, dims=(64, 64)),
    Case("idle", (40, 50), queries=(0, 0), pad=(2, 0), dims=(64, 64)),
    # Several splits and tiles a warp; more tokens and heads than a GPU has room for clusters.
    Case("long", (7000, 3100), queries=(1, 3), heads=(16, 1), dims=(64, 64), select=(16, 1, 2), window=512),
    Case("crowd", tuple(range(40, 240, 10)), queries=(2,) * 20, heads=(6, 3), dims=(64, 64)),
    Case("larger_crowd", tuple(range(40, 240, 5)), queries=(2,) * 40, heads=(8, 4), dims=(64, 64)),
    # Thread blocks without a cluster at the head dims of Hopper kernels; two and four slabs of heads.
    Case("crowd_128", tuple(range(40, 215, 5)), queries=(2,) * 35, heads=(4, 2), dims=(128, 128), pad=(9, 0)),
    Case("crowd_192", tuple(range(40, 210, 5)), queries=(1,) * 34, heads=(2, 2), dims=(192, 128)),
    Case("crowd_g20", tuple(range(40, 210, 5)), queries=(2,) * 34, heads=(20, 1), dims=(64, 64)),
    Case("g48", (300, 90), queries=(2, 1), heads=(48, 1), dims=(128, 128), block_size=32),
    Case("n64", (2200,), queries=(1,), heads=(2, 1), dims=(64, 64), block_size=32, select=(64, 1, 2)),
    Case("pair", (300, 2000), queries=(1, 1), heads=(16, 4), dims=(128, 128), select=(16, 1, 2)),
    Case("half_dozen", (500,) * 6, queries=(1,) * 6, heads=(8, 4), dims=(128, 128), select=(7, 1, 2)),
)
# So many tokens and KV heads that a GPU of about 130 multiprocessors has room for clusters whose size is no
# power of two: their last parts have fewer rows of the output, or none.
CROWDS = tuple(
    Case(
        f"pairs_{tokens * heads}_g{group}",
        (1500, 700, 90)[: tokens % 3 + 1],
        queries=(tokens - tokens % 3, *(1,) * (tokens % 3)),
        heads=(group * heads, heads),
        dims=(128, 128) if group in (16, 48) else (64, 64),
        select=(6, 1, 2),
        window=200,
    )
    for tokens, heads, group in (
        (4, 2, 16),
        (3, 3, 4),
        (4, 3, 6),
        (5, 2, 32),
        (12, 1, 48),
        (3, 3, 64),
        (9, 2, 16),
        (9, 2, 32),
        (11, 2, 1),
        (12, 3, 6),
        (10, 4, 16),
    )
)
LAYOUTS = ("contiguous", "paged", "ring", "paged_ring")


@dataclasses.dataclass
class CacheCase:
    """Tensors of a cache whose unwritten rows hold NaN; it holds the first `held` tokens of each sequence."""

    x: Inputs
    layout: str
    held: tuple[int, ...]

    def __post_init__(self) -> None:
        case, device = self.x.case, self.x.device
        self.paged, self.has_ring = "paged" in self.layout, "ring" in self.layout
        unit = case.block_size * (1 if self.paged else 4)
        unit = unit if unit % case.compress[1] == 0 else unit * case.compress[1]
        longest = max(1, *case.lengths)
        self.page = unit if self.paged else -(-longest // unit) * unit
        self.width = -(-longest // self.page)
        self.num_pages = len(case.lengths) * self.width + 3 if self.paged else len(case.lengths)
        self.block_table = None
        if self.paged:
            order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(5))
            table = order[: len(case.lengths) * self.width].view(len(case.lengths), self.width)
            used = torch.tensor(case.lengths)[:, None] > self.page * torch.arange(self.width)
            self.table = torch.where(used, table, -1).int()
            self.block_table = self.table.to(device)
        most = max(case.query_lengths)
        self.ring = min(self.page * self.width, case.window - 1 + max(most, 1))
        self.tail = min(self.page * self.width, case.compress[0] - 1 + max(most, 1))
        slc = [self.pages(self.x.keys("slc")), self.pages(self.x.values("slc"))]
        cmp = [self.pages(rows, case.compress[1]) for rows in (self.x.keys("cmp"), self.x.values("cmp"))]
        swa = [None, None]
        if self.has_ring:
            swa = [self.ring_of(rows, self.ring) for rows in (self.x.keys("swa"), self.x.values("swa"))]
        names = ("k_cmp_cache", "v_cmp_cache", "k_slc_cache", "v_slc_cache", "k_swa_cache", "v_swa_cache")
        self.streams: dict[str, Tensor | None] = dict(zip(names, (*cmp, *slc, *swa), strict=True))

    def step(self) -> dict:
        case = self.x.case
        starts = [n - q for n, q in zip(case.lengths, case.query_lengths, strict=True)]
        return {
            "cache_seqlens": torch.tensor(starts, dtype=torch.int32, device=self.x.device),
            "block_table": self.block_table,
            "cu_seqlens_q": self.x.cu[0],
            "max_seqlen_q": max(case.query_lengths),
        }

    def row(self, b: int, s: int, page: int) -> tuple[int, int]:
        """Page and row of row s of sequence b, with `page` rows per page."""
        return (int(self.table[b, s // page]) if self.paged else b), s % page

    def pages(self, rows: Tensor, stride: int | None = None) -> Tensor:
        """Tokens or, with a stride, compressed rows as pages."""
        case, page, device, rows = self.x.case, self.page // (stride or 1), rows.device, rows.cpu()
        out = torch.full((self.num_pages, page, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
        extra = case.compress[0] // stride - 1 if stride else 0
        for b, held in enumerate(self.held):
            first = case.first_compressed_row(b) if stride else sum(case.lengths[:b])
            count = max(0, (held - case.compress[0]) // stride + 1) if stride else held
            for i in range(count):
                out[self.row(b, i + extra, page)] = rows[first + i]
        return out.to(device)

    def ring_of(self, rows: Tensor, size: int) -> Tensor:
        device, rows = rows.device, rows.cpu()
        out = torch.full((len(self.held), size, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
        for b, held in enumerate(self.held):
            for s in range(max(0, held - size), held):
                out[b, s % size] = rows[sum(self.x.case.lengths[:b]) + s]
        return out.to(device)
