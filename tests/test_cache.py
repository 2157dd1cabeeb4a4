"""NSACache: any way of feeding a sequence gives what one training forward gives, at every position."""

import dataclasses
import random

import pytest
import torch
from test_module import BASE, CONFIGS, assert_equal, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_ext import NativeSparseAttention, NSACache

LENGTHS = (150, 61, 7, 118)
PAGED = {"page_block_size": 16}
LAYOUTS = {"contiguous": {}, "paged": PAGED}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make_cache(module: NativeSparseAttention, **options) -> NSACache:
    defaults = {"batch_size": len(LENGTHS), "max_seqlen": 160, "dtype": torch.float64, "max_rollback": 6}
    cache = NSACache(module.config, 1, **(defaults | options))
    poison(cache)
    return cache


def poison(cache: NSACache) -> None:
    """What no token has written must never reach an output."""
    for layer in cache.layers:
        for stream in (*layer.pages, *layer.rings):
            stream.fill_(float("nan"))


class Fed:
    """Sequences, what training says of them, and a cache that is fed step by step and checked."""

    def __init__(self, module: NativeSparseAttention, lengths: tuple[int, ...] = LENGTHS, **options):
        self.module = module
        self.inputs = [torch.randn(n, BASE.hidden_size, dtype=torch.float64) for n in lengths]
        with torch.no_grad():
            full = [module(x, return_info=True) for x in self.inputs]
        self.expected = [output for output, _ in full]
        self.indices = [info.block_indices for _, info in full]
        self.cache = make_cache(module, batch_size=len(lengths), **options)

    def step(self, counts: list[int], check: bool = True) -> None:
        starts = self.cache.lengths
        slices = [slice(start, start + n) for start, n in zip(starts, counts, strict=True)]
        x = torch.cat([x[s] for x, s in zip(self.inputs, slices, strict=True)])
        with torch.no_grad(), self.cache.append(counts):
            output, info = self.module(x, cache=self.cache, return_info=True)
        assert self.cache.lengths == tuple(s.stop for s in slices)
        if check:
            assert_equal(output, torch.cat([e[s] for e, s in zip(self.expected, slices, strict=True)]))
            expected = torch.cat([i[s] for i, s in zip(self.indices, slices, strict=True)])
            assert torch.equal(info.block_indices, expected)

    def finish(self, most: int) -> None:
        """Feeds what is left in steps of at most `most` tokens a sequence."""
        while any(left := self.left()):
            self.step([min(n, most) for n in left])

    def left(self) -> list[int]:
        return [len(x) - n for x, n in zip(self.inputs, self.cache.lengths, strict=True)]


@by_layout
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_prefill_and_token_by_token(changes, layout):
    fed = Fed(make(**changes), **layout)
    fed.step([100, 61, 0, 17])
    fed.finish(1)


@by_layout
@pytest.mark.parametrize("name", ["base", "share_kv"])
def test_from_the_first_token(name, layout):
    Fed(make(**CONFIGS[name]), **layout).finish(1)


@by_layout
@pytest.mark.parametrize("name", ["base", "share_kv", "share_kv_before", "rope_before", "blocks"])
def test_random_chunks(name, layout):
    choose = random.Random(name)
    fed = Fed(make(**CONFIGS[name]), **layout)
    while any(left := fed.left()):
        most = choose.choice((1, 2, 5, 6, 7, 16, 17, 40))
        fed.step([min(n, choose.randint(0, most)) for n in left])


@by_layout
@pytest.mark.parametrize("name", ["base", "share_kv", "mean"])
def test_drafts_are_verified_and_rolled_back(name, layout):
    choose = random.Random(name)
    fed = Fed(make(**CONFIGS[name]), **layout)
    fed.step([40, 9, 1, 33])
    true_inputs = [x.clone() for x in fed.inputs]
    while any(left := fed.left()):
        counts = [min(n, choose.randint(0, 6)) for n in left]
        accepted = [choose.randint(min(n, 1), n) for n in counts]
        for b, (start, n, good) in enumerate(zip(fed.cache.lengths, counts, accepted, strict=True)):
            fed.inputs[b][start + good : start + n] = 10 * torch.randn(n - good, BASE.hidden_size).double()
        starts = fed.cache.lengths
        x = torch.cat([x[s : s + n] for x, s, n in zip(fed.inputs, starts, counts, strict=True)])
        with torch.no_grad(), fed.cache.append(counts):
            output = fed.module(x, cache=fed.cache)
        for b, part in enumerate(output.split(counts)):
            expected = fed.expected[b][starts[b] : starts[b] + accepted[b]]
            assert_equal(part[: accepted[b]], expected)
        fed.cache.roll_back([n - good for n, good in zip(counts, accepted, strict=True)])
        for x, true in zip(fed.inputs, true_inputs, strict=True):
            x.copy_(true)


def test_roll_back_to_the_limit_and_beyond():
    fed = Fed(make(), (100,))
    fed.step([50])
    fed.step([1])
    fed.cache.roll_back(6)
    assert fed.cache.lengths == (45,)
    with pytest.raises(ValueError, match=r"tokens\[0\] = 1 is too much.*had 51 tokens.*max_rollback = 6"):
        fed.cache.roll_back(1)
    with pytest.raises(ValueError, match=r"tokens\[0\] = 46.*only 45 tokens"):
        fed.cache.roll_back(46)
    fed.step([3])
    with pytest.raises(ValueError, match="is too much"):
        fed.cache.roll_back(4)
    fed.cache.roll_back(3)
    fed.step([30])
    fed.finish(1)


@by_layout
def test_forks_share_pages_until_they_write(layout):
    module = make()
    fed = Fed(module, (90, 90, 90), **layout)
    fed.inputs[1][:37], fed.inputs[2][:37] = fed.inputs[0][:37], fed.inputs[0][:37]
    with torch.no_grad():
        fed.expected = [module(x) for x in fed.inputs]
        fed.indices = [module(x, return_info=True)[1].block_indices for x in fed.inputs]
    fed.step([37, 0, 0])
    free = fed.cache.num_free_pages
    fed.cache.fork(0, 1)
    fed.cache.fork(0, 2)
    assert fed.cache.lengths == (37, 37, 37) and fed.cache.num_free_pages == free
    if layout:
        assert fed.cache.pages_needed(1) == 2  # the last one to write keeps the page
    fed.step([1, 1, 1])
    fed.step([0, 20, 3])
    fed.cache.reset([0])
    fed.finish(5)


@by_layout
def test_slots_are_reused(layout):
    fed = Fed(make(), (80, 60), **layout)
    fed.step([80, 33])
    fed.cache.reset([0])
    fed.step([11, 1])
    fed.step([30, 20])
    fed.cache.reset()
    assert fed.cache.lengths == (0, 0)
    if layout:
        assert fed.cache.num_free_pages == fed.cache.allocator.num_pages
    fed.finish(17)


@by_layout
def test_padding_rows_and_the_batched_layout(layout):
    module = make()
    fed = Fed(module, (40, 40), **layout)
    with torch.no_grad(), fed.cache.append(20):
        output = module(torch.stack([x[:20] for x in fed.inputs]), cache=fed.cache.layers[0])
    assert_equal(output, torch.stack([e[:20] for e in fed.expected]))
    x = torch.cat([fed.inputs[0][20:23], torch.full((4, BASE.hidden_size), float("nan")).double()])
    with torch.no_grad(), fed.cache.append([3, 0]):
        output, info = module(x, cache=fed.cache, return_info=True)
    assert_equal(output[:3], fed.expected[0][20:23])
    assert not output[3:].any() and (info.block_indices[3:] == -1).all()
    assert torch.isneginf(info.lse_cmp[3:]).all()
    fed.finish(9)


@by_layout
@pytest.mark.parametrize("name", ["base", "share_kv"])
def test_padding_behind_a_long_step(name, layout):
    module = make(**CONFIGS[name])
    fed = Fed(module, (90, 70), **layout)
    padding = torch.full((4, BASE.hidden_size), float("nan")).double()
    for counts in ([20, 0], [0, 30], [25, 19], [30, 0]):
        slices = [slice(start, start + n) for start, n in zip(fed.cache.lengths, counts, strict=True)]
        x = torch.cat([x[s] for x, s in zip(fed.inputs, slices, strict=True)] + [padding])
        with torch.no_grad(), fed.cache.append(counts):
            output, info = module(x, cache=fed.cache, return_info=True)
        expected = torch.cat([e[s] for e, s in zip(fed.expected, slices, strict=True)])
        assert_equal(output[:-4], expected)
        assert not output[-4:].any() and (info.block_indices[-4:] == -1).all()
    fed.finish(1)


class Operations(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["base", "share_kv"])
def test_a_chunk_of_one_contiguous_sequence_gathers_nothing(name):
    fed = Fed(make(**CONFIGS[name]), (150, 61), max_seqlen=150)
    fed.step([40, 61])
    with Operations() as operations:
        fed.step([60, 0], check=False)
    assert "nsa::attention_forward" in operations.names
    assert not {name for name in operations.names if "index" in name or "gather" in name}


@by_layout
def test_operations_of_a_step_do_not_grow_with_the_batch(layout):
    """Neither with its lengths: index tensors are not made sequence by sequence."""
    numbers = []
    for batch in (2, 7):
        fed = Fed(make(), (40 * batch,) * batch, max_seqlen=40 * batch, **layout)
        fed.step([20 * batch] * batch)
        x = torch.randn(17 * batch, BASE.hidden_size, dtype=torch.float64)
        with torch.no_grad(), Operations() as operations, fed.cache.append(17):
            fed.module(x, cache=fed.cache)
        numbers.append(len(operations.names))
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("return_info", [False, True])
def test_the_two_paths_report_the_same(return_info):
    module, x = make(), torch.randn(60, BASE.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        _, expected = module(x, return_info=True)
        cache = make_cache(module, batch_size=1)
        for size in (30, 5, 25):
            start = cache.lengths[0]
            with cache.append(size):
                _, info = module(x[start : start + size], cache=cache, return_info=True)
            for field in dataclasses.fields(info):
                actual, wanted = (getattr(i, field.name) for i in (info, expected))
                torch.testing.assert_close(actual, wanted[start : start + size], rtol=1e-8, atol=1e-10)


def test_several_layers_and_given_position_embeddings():
    modules = [make(), make()]
    x = torch.randn(70, BASE.hidden_size, dtype=torch.float64)
    angles = torch.arange(80).double()[:, None] * 500.0 ** (-torch.arange(4).double() / 4)
    tables = tuple(f(torch.cat((angles, angles), dim=-1)) for f in (torch.cos, torch.sin))

    def run(part: Tensor, layers: list) -> Tensor:
        for module, cache in zip(modules, layers, strict=True):
            rope = None if cache is not None else tuple(t[: len(part)] for t in tables)
            part = part + module(part, rope, cache=cache)
        return part

    cache = NSACache(BASE, 2, 1, 80, dtype=torch.float64, position_embeddings=tables)
    poison(cache)
    with torch.no_grad():
        expected, outputs = run(x, [None, None]), []
        for size in (20, 1, 17, 1, 31):
            start = cache.lengths[0]
            with cache.append(size):
                outputs.append(run(x[start : start + size], cache.layers))
    assert_equal(torch.cat(outputs), expected)


@by_layout
def test_bfloat16_and_autocast(layout):
    module = make(torch.float32)
    x = torch.randn(90, BASE.hidden_size)
    cache = make_cache(module, batch_size=1, dtype=torch.bfloat16, **layout)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, info = module(x, return_info=True)
        outputs, indices = [], []
        for size in (40, 1, 1, 5, 20, 1, 22):
            start = cache.lengths[0]
            with cache.append(size):
                output, step_info = module(x[start : start + size], cache=cache, return_info=True)
            outputs.append(output)
            indices.append(step_info.block_indices)
    same = (torch.cat(indices) == info.block_indices).flatten(1).all(1)
    assert same.float().mean() > 0.9  # the others are near-ties
    torch.testing.assert_close(torch.cat(outputs)[same], expected[same], rtol=0.02, atol=0.02)


def test_an_exception_leaves_the_lengths():
    fed = Fed(make(), (60, 60), **PAGED)
    fed.step([20, 30])
    free = fed.cache.num_free_pages
    with pytest.raises(RuntimeError, match="stop"), fed.cache.append([5, 2]):
        raise RuntimeError("stop")
    assert fed.cache.lengths == (20, 30) and fed.cache.num_free_pages == free
    fed.step([6, 0])
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), fed.cache.append([0, 20]):
        fed.module(fed.inputs[1][30:50], cache=fed.cache)
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match=r"counts\[1\] = 1: a failed step has overwritten.*reset it"):
        fed.step([1, 1])
    fed.step([1, 0])
    fed.cache.reset([1])
    fed.finish(8)


def raises(message: str):
    return pytest.raises(ValueError, match=message)


def test_errors_name_the_argument_and_change_nothing():
    module = make()
    fed = Fed(module, (60, 60, 60), max_seqlen=50, num_pages=6, **PAGED)
    cache = fed.cache
    fed.step([30, 30, 0])
    before = cache.lengths, cache.num_free_pages

    def enter(counts) -> None:
        with cache.append(counts):
            raise AssertionError("entered")

    with raises(r"counts\[0\] = 21 is too much: sequence 0 has 30 tokens.*max_seqlen = 50"):
        enter([21, 0, 0])
    with raises(r"counts = \[3, 3, 17\] need 4 pages, but the cache is full: 2 of num_pages = 6 are free"):
        enter([3, 3, 17])
    with raises(r"counts = \[1, 1\]; expected 3 numbers"):
        enter([1, 1])
    with raises(r"counts = \[-1, 0, 0\]; expected 3 numbers of at least 0"):
        enter([-1, 0, 0])
    with raises(r"target = 1 has 30 tokens; it must be empty"):
        cache.fork(0, 1)
    with raises(r"source = 3; expected a sequence from 0 to 2"):
        cache.fork(3, 2)
    x = fed.inputs[0][30:32]
    with raises("cache is in no step"):
        module(x, cache=cache)
    with torch.no_grad(), cache.append([2, 0, 0]):
        with raises(r"hidden_states has shape \[1, 24\].*packed \[2, C\]"):
            module(x[:1], cache=cache)
        with raises(r"hidden_states has shape \[2, 1, 24\]"):
            module(x[:, None], cache=cache)
        for name in ("cu_seqlens", "attention_mask", "max_seqlen"):
            with raises(f"{name} is not None; with a cache"):
                module(x, cache=cache, **{name: torch.zeros(2, dtype=torch.int32)})
        with raises("another config"):
            make(window_size=8)(x, cache=cache)
        with raises("another step of this cache is in progress"):
            enter(1)
        with raises("sequences = 0: a step of this cache is in progress"):
            cache.reset()
        assert_equal(module(x, cache=cache), fed.expected[0][30:32])
    cache.roll_back([2, 0, 0])
    assert (cache.lengths, cache.num_free_pages) == before
    with raises("cache has 2 layers"):
        module(x, cache=NSACache(BASE, 2))
    with pytest.raises(RuntimeError, match=r"append_kv is for inference.*no_grad"), cache.append([2, 0, 0]):
        module(x, cache=cache)
    fed.step([20, 1, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"max_seqlen": 0}, "max_seqlen = 0"),
        ({"max_rollback": 0}, "max_rollback = 0"),
        ({"page_block_size": 12}, "page_block_size = 12.*multiple of block_size = 8"),
        ({"num_pages": 4}, "num_pages = 4 needs a page_block_size"),
        ({"position_embeddings": (torch.ones(5, 8),) * 2}, r"cos has shape \[5, 8\].*\[4096, 8\]"),
    ],
)
def test_wrong_options_are_named(options, message):
    with raises(message):
        NSACache(BASE, **options)
