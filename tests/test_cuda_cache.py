"""NSACache on a GPU: steps of any kind against one forward, and decoding in a CUDA graph."""

import gc

import pytest
import torch
from test_cache import poison

from nsa_ext import NativeSparseAttention, NSACache, NSAConfig

pytestmark = pytest.mark.gpu

BASE = NSAConfig(
    hidden_size=128,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    num_selected_blocks=6,
    window_size=70,
    block_size=32,
)
LAYOUTS = {"contiguous": {}, "paged": {"page_block_size": 64}}
by_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def make(dtype: torch.dtype = torch.bfloat16, **changes) -> NativeSparseAttention:
    module = NativeSparseAttention(NSAConfig(**(BASE.to_dict() | changes)))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return module.to("cuda", dtype)


def inputs(*lengths: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(n, BASE.hidden_size, device="cuda", dtype=dtype) for n in lengths]


def make_cache(module: NativeSparseAttention, batch_size: int, max_seqlen: int, **options) -> NSACache:
    dtype = module.q_proj.weight.dtype
    cache = NSACache(module.config, 1, batch_size, max_seqlen, dtype=dtype, device="cuda", **options)
    poison(cache)
    return cache


def assert_follows(outputs, indices, expected, expected_indices) -> None:
    """Where the selection is that of training; where it is not, it is a near-tie."""
    same = (indices == expected_indices).flatten(1).all(1)
    assert same.float().mean() > 0.95
    error = (outputs - expected)[same].abs().max().item()
    assert error < 0.02 * expected.abs().max().item(), error


@torch.no_grad()
def feed(module, cache, xs, schedule) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Feeds whole sequences by steps of counts; outputs and block_indices per sequence."""
    outputs, indices = ([[] for _ in xs] for _ in range(2))
    for counts in schedule:
        starts = cache.lengths
        x = torch.cat([x[s : s + n] for x, s, n in zip(xs, starts, counts, strict=True)])
        with cache.append(counts):
            output, info = module(x, cache=cache, return_info=True)
        for parts, whole in ((outputs, output), (indices, info.block_indices)):
            for part, piece in zip(parts, whole.split(list(counts)), strict=True):
                part.append(piece)
    return [torch.cat(part) for part in outputs], [torch.cat(part) for part in indices]


SCHEDULE = [
    [100, 250, 3],
    *[[1, 1, 1]] * 20,
    [40, 0, 5],
    [16, 4, 9],
    [1, 0, 0],
    [300, 17, 1],
    *[[1, 0, 2]] * 8,
]
LENGTHS = [sum(counts[b] for counts in SCHEDULE) for b in range(3)]


@by_layout
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_kv": True},
        {"compress_kind": "mean"},
        {"compress_kind": "linear", "compress_per_head": True},
    ],
    ids=["base", "share_kv", "mean", "linear"],
)
def test_any_steps_follow_training(layout, changes):
    module, xs = make(**changes), inputs(*LENGTHS)
    outputs, indices = feed(module, make_cache(module, 3, 600, **layout), xs, SCHEDULE)
    with torch.no_grad():
        for x, output, chosen in zip(xs, outputs, indices, strict=True):
            expected, info = module(x, return_info=True)
            assert_follows(output, chosen, expected, info.block_indices)


@by_layout
def test_roll_back_and_fork(layout):
    module, xs = make(), inputs(300, 300)
    xs[1][:120] = xs[0][:120]
    cache = make_cache(module, 2, 320, **layout)
    feed(module, cache, xs, [[120, 0]])
    cache.fork(0, 1)
    drafts = [torch.cat([x[:120], torch.randn_like(x[:8])]) for x in xs]
    feed(module, cache, drafts, [[8, 5]])
    cache.roll_back([8, 5])
    outputs, indices = feed(module, cache, xs, [[1, 1]] * 40 + [[140, 140]])
    with torch.no_grad():
        for x, output, chosen in zip(xs, outputs, indices, strict=True):
            expected, info = module(x, return_info=True)
            assert_follows(output, chosen, expected[120:], info.block_indices[120:])


@by_layout
def test_a_graph_replayed_while_lengths_grow_equals_eager_steps(layout):
    module, xs = make(), inputs(250, 250, 250)
    caches = [make_cache(module, 3, 256, **layout) for _ in range(2)]
    for cache in caches:
        feed(module, cache, xs, [[100, 63, 0], [1, 1, 1]])
    static, graph = (
        torch.empty(3, BASE.hidden_size, device="cuda", dtype=torch.bfloat16),
        torch.cuda.CUDAGraph(),
    )
    with torch.no_grad():
        for step in range(120):
            new = torch.stack([x[n] for x, n in zip(xs, caches[0].lengths, strict=True)])
            static.copy_(new)
            with caches[0].append(1):
                expected = module(new, cache=caches[0])
            with caches[1].append(1):
                if step == 0:
                    with torch.cuda.graph(graph):
                        output = module(static, cache=caches[1])
                graph.replay()
            assert torch.equal(output, expected), step


def test_no_synchronisation_and_no_growing_memory():
    module, xs = make(), inputs(200, 200)
    cache = make_cache(module, 2, 256, page_block_size=64)
    feed(module, cache, xs, [[100, 50], [1, 1]])
    x = xs[0][:2].clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(3):
                with cache.append(1):
                    module(x, cache=cache)
            with cache.append([30, 20]):
                module(xs[0][:50], cache=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        for i in range(30):
            if i == 2:
                gc.collect()  # what earlier tests have left must not go meanwhile
                before = torch.cuda.memory_allocated()
            with cache.append(1):
                module(x, cache=cache)
    assert torch.cuda.memory_allocated() == before
