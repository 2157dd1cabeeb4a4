"""nsa::append_kv and nsa::decode_attention against the reference, on caches written by plain indexing."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from attention_case import (
    assert_selection_like_reference,
    attention_reference,
    attention_rest,
    attention_tensors,
)
from cache_case import CACHE_CASES, CROWDS, LAYOUTS, CacheCase
from cases import Case, Inputs, by_device, by_target
from harness import largest_logit, to
from tolerance import accumulator, assert_close, assert_lse_close
from torch import Tensor

from nsa_ext import ops, reference
from nsa_ext.modules import apply_rope, rope_tables

by_case = pytest.mark.parametrize("case", CACHE_CASES, ids=lambda case: case.name)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)


def decode(cache: CacheCase) -> tuple[Tensor, Tensor, Tensor]:
    x, case = cache.x, cache.x.case
    n, initial, local = case.select
    return ops.decode_attention(
        x.q,
        *cache.streams.values(),
        x.gate_logits(),
        **cache.step(),
        compress_block_size=case.compress[0],
        compress_stride=case.compress[1],
        block_size=case.block_size,
        num_selected_blocks=n,
        num_initial_blocks=initial,
        num_local_blocks=local,
        window_size=case.window,
        softmax_scale=x.scale,
    )


@by_layout
@by_target
@by_case
def test_decode_attention(case: Case, device: str, dtype: torch.dtype, layout: str) -> None:
    x = Inputs(case, dtype, device)
    assert_decodes_like_reference(x, CacheCase(x, layout, case.lengths))


def assert_decodes_like_reference(x: Inputs, cache: CacheCase) -> None:
    o, indices, lse = decode(cache)
    tensors = attention_tensors(x)
    if not cache.has_ring:
        tensors |= {"k_swa": tensors["k_slc"], "v_swa": tensors["v_slc"]}
    results = []
    for precision in (torch.float64, None):
        arguments = [to(t, precision) for t in tensors.values()]
        rest = [to(r) for r in attention_rest(x)]
        results.append(attention_reference(indices, every_output=True)(*arguments, *rest))
    exact, baseline = results
    logit = max(largest_logit(x.q, tensors[f"k_{branch}"], x.scale) for branch in ("cmp", "slc", "swa"))
    assert_close("o", o, exact[0], baseline[0], largest_logit=logit)
    for name, actual, wanted in zip(("lse_cmp", "lse_slc", "lse_swa"), lse, exact[-3:], strict=True):
        assert_lse_close(name, actual, wanted, logit)
    assert_selection_like_reference(x, tensors, indices)
    again = decode(cache)
    assert all(torch.equal(a, b) for a, b in zip((o, indices, lse), again, strict=True))


@by_target
@pytest.mark.parametrize(
    ("name", "capacity"), [("g1", 1 << 19), ("crowd", 1 << 19), ("g48", 1 << 19), ("decode", 1 << 22)]
)
def test_room_for_many_more_tokens(name: str, capacity: int, device: str, dtype: torch.dtype) -> None:
    """What a kernel keeps for each block that a sequence may have does not always fit where it is fastest."""
    case = next(c for c in CACHE_CASES if c.name == name)
    x = Inputs(case.on_cuda() if device == "cuda" else case, dtype, device)
    cache = CacheCase(x, "paged_ring", case.lengths)
    room = capacity // cache.page - cache.width
    cache.block_table = torch.nn.functional.pad(cache.block_table, (0, room), value=-1)
    assert_decodes_like_reference(x, cache)


@by_target
@pytest.mark.parametrize("length", [200, 9000])
def test_equal_scores_go_to_the_lower_blocks(length: int, device: str, dtype: torch.dtype) -> None:
    case = Case("ties", (length, 70), queries=(2, 1), dims=(64, 64), block_size=32, select=(16, 1, 2))
    x = Inputs(case, dtype, device)
    cache = CacheCase(x, "paged", case.lengths)
    cache.streams["k_cmp_cache"].zero_()
    _, indices, _ = decode(cache)
    for row, _, t in case.queries_and_positions():
        own = t // case.block_size
        expected = range(own + 1) if own < 16 else (*range(14), own - 1, own)
        expected = [*expected, *[-1] * 16][:16]
        assert (indices[row].cpu() == torch.tensor(expected)).all(), (row, indices[row])


class GrowingKeys(Inputs):
    """Logits that grow along the cache: running maxima do too, and what is relative to them shrinks."""

    def keys(self, branch: str) -> Tensor:
        rows = super().keys(branch)
        ramp = torch.linspace(0.1, 8.0, len(rows), dtype=rows.dtype, device=rows.device)
        return rows * ramp[:, None, None]


# More tokens and heads than a GPU has room for clusters, and several tiles of compressed keys for each warp.
LONG_CROWD = Case(
    "long_crowd", (4201,), queries=(16,), heads=(10, 5), dims=(128, 128), select=(16, 1, 2), window=512
)


@by_target
@pytest.mark.parametrize("layout", ["contiguous", "paged_ring"])
@pytest.mark.parametrize("inputs", [Inputs, GrowingKeys])
@pytest.mark.parametrize(
    "case",
    [LONG_CROWD, *(case for case in CACHE_CASES if case.name in ("pair", "long", "g3_long"))],
    ids=lambda case: case.name,
)
def test_logits_that_grow(
    case: Case, inputs: type[Inputs], layout: str, device: str, dtype: torch.dtype
) -> None:
    x = inputs(case, dtype, device)
    assert_decodes_like_reference(x, CacheCase(x, layout, case.lengths))


@by_target
@pytest.mark.parametrize("layout", ["contiguous", "paged_ring"])
@pytest.mark.parametrize("case", CROWDS, ids=lambda case: case.name)
def test_any_number_of_tokens_and_heads(case: Case, layout: str, device: str, dtype: torch.dtype) -> None:
    x = Inputs(case, dtype, device)
    assert_decodes_like_reference(x, CacheCase(x, layout, case.lengths))


@dataclasses.dataclass
class OneFarKey(Inputs):
    """A key in each branch that no query gives any weight."""

    far: float = 1e4

    @functools.cached_property
    def q(self) -> Tensor:
        q = Inputs.q.func(self)
        q[..., 0] = -q[..., 0].abs() - 0.5
        return q

    def keys(self, branch: str) -> Tensor:
        rows = super().keys(branch)
        rows[len(rows) // 2, :, 0] = self.far
        return rows


@by_target
@pytest.mark.parametrize("heads", [(12, 2), (12, 1), (20, 1)], ids=["g6", "g12", "g20"])
def test_an_infinitely_far_key_has_no_weight(heads: tuple[int, int], device: str, dtype: torch.dtype) -> None:
    """Nor has its product with what a kernel keeps in place of heads that there are not."""
    case = Case("far", (1500,), queries=(2,), heads=heads, dims=(64, 64), select=(6, 1, 2))
    x = OneFarKey(case, dtype, device)
    cache = CacheCase(x, "paged_ring", case.lengths)
    assert_decodes_like_reference(x, cache)
    infinite = CacheCase(OneFarKey(case, dtype, device, far=float("inf")), "paged_ring", case.lengths)
    assert all(torch.equal(a, b) for a, b in zip(decode(infinite), decode(cache), strict=True))


KINDS = ("mlp", "linear", "mean")


@by_device
def test_without_a_sequence_all_rows_are_padding(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    given = arguments("decode_attention", "paged_ring", dtype, SMALL if device == "cpu" else SMALL.on_cuda())
    for name in ("cache_seqlens", "block_table", "k_swa_cache", "v_swa_cache"):
        given[name] = given[name][:0]
    given["cu_seqlens_q"] = torch.zeros(1, dtype=torch.int32)
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    o, block_indices, lse = torch.ops.nsa.decode_attention(**on_device)
    assert o.shape[0] == given["q"].shape[0] > 0
    assert (o == 0).all() and (block_indices == -1).all() and (lse == -float("inf")).all()


def weights(x: Inputs, kind: str, per_head: bool, hidden: int, dim: int, seed: int) -> list[Tensor | None]:
    length, heads = x.case.compress[0], x.case.heads[1] if per_head else 1
    hidden = {"mlp": hidden, "linear": dim, "mean": 0}[kind]
    shapes = (
        (heads, length, dim),
        (heads, length * dim, hidden),
        (heads, hidden),
        (heads, hidden, dim),
        (heads, dim),
    )
    scales = (0.5, (length * dim) ** -0.5, 0.5, max(hidden, 1) ** -0.5, 0.5)
    count = {"mlp": 5, "linear": 3, "mean": 0}[kind]
    return [
        x.random(seed + i, *shape) * scale if i < count else None
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


@dataclasses.dataclass
class Append:
    """A call of append_kv for the last tokens of a case, and what it must leave behind."""

    x: Inputs
    layout: str
    kind: str = "mlp"
    per_head: bool = False
    rotary: bool = True
    hidden: int = 64
    short_tail: bool = False  # so that a token takes the place of one that phi still reads

    def __post_init__(self) -> None:
        case, x = self.x.case, self.x
        self.held = tuple(n - q for n, q in zip(case.lengths, case.query_lengths, strict=True))
        self.cache = CacheCase(x, self.layout, self.held)
        rows = [x.random(60 + i, case.num_keys, case.heads[1], case.dims[i % 2]) for i in range(2)]
        self.raw = rows
        if self.short_tail:
            self.cache.tail = case.compress[0] - 1
        self.tails = [self.cache.ring_of(r, self.cache.tail) for r in rows]
        self.phis = [
            weights(x, self.kind, self.per_head, self.hidden, case.dims[i], 70 + 10 * i) for i in range(2)
        ]
        self.tables: list[Tensor | None] = [None, None]
        if self.rotary:
            positions = torch.arange(self.cache.page * self.cache.width)
            self.tables = list(rope_tables(positions, case.dims[0], 100.0, accumulator(x.dtype)))
            self.tables = [t.to(x.device) for t in self.tables]

    def new(self, rows: Tensor) -> Tensor:
        """The rows of the step's tokens, and what stands for padding."""
        lengths, begins = self.x.case.lengths, [sum(self.x.case.lengths[:b]) for b in range(len(self.held))]
        parts = [rows[a + h : a + n] for a, h, n in zip(begins, self.held, lengths, strict=True)]
        return torch.cat([*parts, torch.full_like(rows[: self.x.case.pad[0]], float("nan"))])

    def prepared(self, held: Sequence[int] | None = None) -> Callable[[], None]:
        """The call. held: tokens before the step, if others than there are."""
        x, step = self.x, self.cache.step()
        if held is not None:
            step["cache_seqlens"] = torch.tensor(held, dtype=torch.int32, device=x.device)
        swa = (x.keys("swa"), x.values("swa"))
        return functools.partial(
            ops.append_kv,
            *self.cache.streams.values(),
            *self.tails,
            *(self.new(r) for r in (*self.raw, x.keys("slc"), x.values("slc"))),
            *(self.new(r) if self.cache.has_ring else None for r in swa),
            *self.phis[0],
            *self.phis[1],
            *self.tables,
            **step,
            compress_block_size=x.case.compress[0],
            compress_stride=x.case.compress[1],
            compress_kind=self.kind,
        )

    def run(self, held: Sequence[int] | None = None) -> None:
        self.prepared(held)()

    def compressed(self, stream: int, dtype: torch.dtype) -> Tensor:
        """Every compressed row [S // d, Hkv, D] by the reference."""
        case = self.x.case
        phi = [to(w, dtype) for w in self.phis[stream]]
        cu, longest = to(self.x.cu[1]), max(case.lengths)
        out = reference.compress(to(self.raw[stream], dtype), *phi, cu, longest, *case.compress, self.kind)
        if stream == 0 and self.rotary:
            starts = torch.zeros(len(out), dtype=torch.int64)
            for b in range(len(self.held)):
                first, count = case.first_compressed_row(b), case.num_compressed(b)
                starts[first : first + count] = torch.arange(count) * case.compress[1]
            out = apply_rope(out, *(to(t, torch.promote_types(dtype, t.dtype))[starts] for t in self.tables))
        return out


@pytest.mark.parametrize(
    ("kind", "per_head", "rotary"), [(k, k == "linear", k == "mlp") for k in KINDS], ids=KINDS
)
@by_layout
@by_target
@by_case
def test_append_kv(
    case: Case, device: str, dtype: torch.dtype, layout: str, kind: str, per_head: bool, rotary: bool
) -> None:
    if rotary and case.dims[0] % 2:
        pytest.skip("rotary embeddings need an even head dim")
    assert_appends_like_reference(Append(Inputs(case, dtype, device), layout, kind, per_head, rotary))


@pytest.mark.parametrize("per_head", [(True, False), (False, True)], ids=["k", "v"])
@by_target
def test_append_kv_where_one_phi_is_per_head(
    device: str, dtype: torch.dtype, per_head: tuple[bool, bool]
) -> None:
    case = Case("one_per_head", (48, 64, 50), heads=(4, 4), dims=(64, 64), queries=(1, 1, 1))
    call = Append(Inputs(case, dtype, device), "ring")
    call.phis = [weights(call.x, call.kind, per_head[i], call.hidden, 64, 90 + 10 * i) for i in range(2)]
    assert_appends_like_reference(call)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 2304), (1, 2312), (40, 2304)])
@by_target
def test_append_kv_of_a_wide_hidden_layer(device: str, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    case = Case("wide", (48, 64, 50), heads=(2, 2), dims=(64, 64), queries=(tokens,) * 3)
    assert_appends_like_reference(Append(Inputs(case, dtype, device), "ring", hidden=hidden))


@by_target
def test_append_kv_without_a_tail(device: str, dtype: torch.dtype) -> None:
    """A compressed block of one token needs none of the tokens before."""
    case = Case("no_tail", (48, 1, 50), heads=(4, 4), dims=(64, 64), compress=(1, 1), queries=(1, 1, 3))
    assert_appends_like_reference(Append(Inputs(case, dtype, device), "ring", "mean", short_tail=True))


def assert_appends_like_reference(call: Append) -> None:
    call.run()
    case, layout, dtype = call.x.case, call.layout, call.x.dtype
    after = CacheCase(call.x, layout, case.lengths)
    for name in ("k_slc_cache", "v_slc_cache", "k_swa_cache", "v_swa_cache"):
        if after.streams[name] is not None:
            assert_same_bits(name, call.cache.streams[name], after.streams[name])
    for name, tail, raw in zip(("k_tail", "v_tail"), call.tails, call.raw, strict=True):
        assert_same_bits(name, tail, after.ring_of(raw, call.cache.tail))
    for stream, name in enumerate(("k_cmp_cache", "v_cmp_cache")):
        exact, baseline = call.compressed(stream, torch.float64), call.compressed(stream, dtype)
        written, before = (c.streams[name].cpu() for c in (call.cache, CacheCase(call.x, layout, call.held)))
        for b, held in enumerate(call.held):
            first, count = case.first_compressed_row(b), case.num_compressed(b)
            old = max(0, (held - case.compress[0]) // case.compress[1] + 1)
            page, extra = after.page // case.compress[1], case.compress[0] // case.compress[1] - 1
            at = [after.row(b, i + extra, page) for i in range(count)]
            for i, where in enumerate(at):
                if i < old:
                    assert_same_bits(name, written[where], before[where])
            if count > old:
                new = slice(first + old, first + count)
                actual = torch.stack([written[where] for where in at[old:]])
                assert_close(name, actual, exact[new], baseline[new])
            for where in at:
                before[where] = written[where]
        assert_same_bits(name, written, before)  # nothing else was written


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name} differs at {(~same).nonzero()[0].tolist()}"


# Schemas, registrations, errors.

SMALL = Case(
    "small", (45, 38), queries=(3, 2), heads=(4, 2), dims=(8, 6), compress=(8, 4), block_size=8, window=9
)
STEP = "Tensor cache_seqlens, Tensor? block_table, Tensor? cu_seqlens_q, SymInt max_seqlen_q"


def names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.nsa, op).default._schema.arguments]


def arguments(op: str, layout: str, dtype: torch.dtype = torch.float32, case: Case = SMALL) -> dict:
    x = Inputs(case, dtype)
    if op == "decode_attention":
        cache = CacheCase(x, layout, case.lengths)
        streams = [t.nan_to_num() if t is not None else None for t in cache.streams.values()]
        values = [x.q, *streams, x.gate_logits(), *cache.step().values(), *case.compress]
        values += [case.block_size, *case.select, case.window, x.scale]
    else:
        call = Append(x, layout)
        caches = [
            t.nan_to_num() if t is not None else None for t in (*call.cache.streams.values(), *call.tails)
        ]
        new = [call.new(r) for r in (*call.raw, x.keys("slc"), x.values("slc"))]
        new += [call.new(r) if call.cache.has_ring else None for r in (x.keys("swa"), x.values("swa"))]
        values = [*caches, *new, *call.phis[0], *call.phis[1], *call.tables, *call.cache.step().values()]
        values += [*case.compress, "mlp"]
    return dict(zip(names(op), values, strict=True))


by_op = pytest.mark.parametrize("op", ["append_kv", "decode_attention"])


def test_schema_of_the_step_is_the_same() -> None:
    for op in ("append_kv", "decode_attention"):
        assert STEP in str(getattr(torch.ops.nsa, op).default._schema)
    mutated = [a.name for a in torch.ops.nsa.append_kv.default._schema.arguments if a.is_write]
    assert mutated == [*names("decode_attention")[1:7], "k_tail", "v_tail"]


@by_op
@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(op: str, layout: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.nsa, op).default, (), arguments(op, layout, dtype))


@by_op
def test_meta_shapes(op: str) -> None:
    given = arguments(op, "paged_ring")
    real = getattr(torch.ops.nsa, op)(**given)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    result = getattr(torch.ops.nsa, op)(**meta)
    assert (real is None) == (result is None)
    for a, b in zip(real or (), result or (), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@by_op
def test_autocast_lowers_all_but_the_caches(op: str) -> None:
    given = arguments(op, "ring")
    lowered = arguments(op, "ring")
    caches = [*names("decode_attention")[1:7], "k_tail", "v_tail"]
    for key, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not key.startswith("rotary"):
            lowered[key] = value.bfloat16()
            if key in caches:
                given[key] = value.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = getattr(torch.ops.nsa, op)(**given)
    expected = getattr(torch.ops.nsa, op)(**lowered)
    for key in caches:
        if key in given:
            assert torch.equal(given[key], lowered[key])
    assert actual is None or all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@by_op
def test_gradients_are_refused(op: str) -> None:
    given = arguments(op, "contiguous")
    name = "q" if op == "decode_attention" else "k_w1"
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} is for inference and not differentiable"):
        getattr(torch.ops.nsa, op)(**given)
    with torch.no_grad():
        getattr(torch.ops.nsa, op)(**given)


INT = torch.int32
ERRORS = {
    "lengths_dtype": ("both", {"cache_seqlens": torch.tensor([1, 2])}, "cache_seqlens has dtype int64"),
    "too_long": (
        "both",
        {"cache_seqlens": torch.tensor([42, 63], dtype=INT)},
        r"cache_seqlens\[1\] = 63 with 2 new tokens; expected at least 0, and together at most the 64",
    ),
    "negative": ("both", {"cache_seqlens": torch.tensor([-1, 2], dtype=INT)}, r"cache_seqlens\[0\] = -1"),
    "offsets": (
        "both",
        {"cu_seqlens_q": torch.tensor([0, 3, 2], dtype=INT)},
        "cu_seqlens_q decreases from 3 to 2",
    ),
    "offsets_end": ("both", {"cu_seqlens_q": torch.tensor([0, 3, 6], dtype=INT)}, r"cu_seqlens_q\[-1\] = 6"),
    "offsets_max": ("both", {"max_seqlen_q": 2}, "sequence 0 of cu_seqlens_q has 3 tokens; max_seqlen_q = 2"),
    "offsets_shape": ("both", {"cu_seqlens_q": torch.zeros(2, dtype=INT)}, r"cu_seqlens_q has shape \[2\]"),
    "uneven": (
        "both",
        {"cu_seqlens_q": None},
        "5 rows; without cu_seqlens_q their number must be a multiple",
    ),
    "page": (
        "both",
        {"block_table": torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 15, -1]], dtype=INT)},
        r"block_table\[1, 4\] = 15; expected a page from 0 to 14",
    ),
    "table_shape": ("both", {"block_table": torch.zeros(3, 6, dtype=INT)}, r"block_table has shape \[3, 6\]"),
    "stride": ("both", {"compress_stride": 3}, "compress_stride = 3 does not divide compress_block_size = 8"),
    "kind": ("append_kv", {"compress_kind": "max"}, 'kind = "max"'),
    "new_rows": ("append_kv", {"v_slc": torch.zeros(4, 2, 6)}, r"v_slc has shape \[4, 2, 6\].*\[5, 2, 6\]"),
    "ring_alone": ("append_kv", {"k_swa": None}, "k_swa is None but k_swa_cache is not"),
    "tail": ("append_kv", {"k_tail": torch.zeros(2, 6, 2, 8)}, "k_tail keeps 6 tokens; expected at least 7"),
    "rotary": ("append_kv", {"rotary_sin": None}, "rotary_sin is None"),
    "rotary_rows": (
        "append_kv",
        {"rotary_cos": torch.zeros(9, 8), "rotary_sin": torch.zeros(9, 8)},
        "rotary_cos has 9 rows; a cache of 64 tokens",
    ),
    "tokens": ("decode_attention", {"max_seqlen_q": 17}, "max_seqlen_q = 17; expected at most 16"),
    "ring": (
        "decode_attention",
        {"k_swa_cache": torch.zeros(2, 10, 2, 8), "v_swa_cache": torch.zeros(2, 10, 2, 6)},
        "k_swa_cache keeps 10 tokens; expected at least 11",
    ),
    "cmp": (
        "decode_attention",
        {"k_cmp_cache": torch.zeros(2, 5, 2, 8)},
        r"k_cmp_cache has shape \[2, 5, 2, 8\]",
    ),
    "gate": ("decode_attention", {"gate_logits": torch.zeros(5, 4, 2)}, "gate_logits has shape"),
    "dtype": (
        "decode_attention",
        {"q": torch.zeros(5, 4, 8).double()},
        "k_slc_cache has dtype float32; expected",
    ),
    "half": ("decode_attention", {"q": torch.zeros(5, 4, 8).half()}, "q has dtype float16"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    which, changes, message = ERRORS[name]
    for op in ("append_kv", "decode_attention") if which == "both" else (which,):
        given = arguments(op, "paged_ring" if "block_table" in changes else "ring")
        before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.nsa, op)(**(given | changes))
        assert all(torch.equal(v, given[k]) for k, v in before.items())
