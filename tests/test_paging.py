"""The pages of a cache: none is lost, none has an owner too many or too few."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from nsa_ext import NSACache, NSAConfig
from nsa_ext.paging import PageAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """Against a model: the pages that each holder has."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(9)
        self.pages: dict[int, list[int]] = {}

    @rule(target=holders, count=st.integers(0, 5))
    def allocate(self, count: int) -> int:
        holder = len(self.pages)
        self.pages[holder] = []
        if count > self.allocator.num_free:
            with pytest.raises(ValueError, match=f"count = {count} pages are not to be had"):
                self.allocator.allocate(count)
        else:
            self.pages[holder] = self.allocator.allocate(count)
        return holder

    @rule(target=holders, holder=holders)
    def share(self, holder: int) -> int:
        self.allocator.share(self.pages[holder])
        self.pages[len(self.pages)] = list(self.pages[holder])
        return len(self.pages) - 1

    @rule(holder=holders, keep=st.integers(0, 3))
    def release(self, holder: int, keep: int) -> None:
        self.allocator.release(self.pages[holder][keep:])
        del self.pages[holder][keep:]

    @rule(page=st.integers(-2, 11))
    def release_what_nobody_has(self, page: int) -> None:
        if not any(page in pages for pages in self.pages.values()):
            for method in (self.allocator.release, self.allocator.share):
                with pytest.raises(ValueError, match=f"page {page} has fewer"):
                    method([page])

    @invariant()
    def owners_are_those_of_the_model(self) -> None:
        held = [page for pages in self.pages.values() for page in pages]
        assert [self.allocator.owners(page) for page in range(9)] == [held.count(p) for p in range(9)]
        assert self.allocator.num_free == 9 - len(set(held))


class CacheMachine(RuleBasedStateMachine):
    """Pages of a cache against a model of what each sequence has written: the token numbers in its pages."""

    CONFIG = NSAConfig(
        hidden_size=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        compress_block_size=2,
        compress_stride=1,
        block_size=2,
        num_selected_blocks=3,
        window_size=3,
        compress_kind="mean",
    )
    SEQUENCES = 3

    def __init__(self) -> None:
        super().__init__()
        self.cache = NSACache(
            self.CONFIG, 2, self.SEQUENCES, 24, page_block_size=4, num_pages=11, max_rollback=4
        )
        self.tokens: list[list[float]] = [[] for _ in range(self.SEQUENCES)]
        self.next_token = 1.0

    @rule(counts=st.lists(st.integers(0, 6), min_size=SEQUENCES, max_size=SEQUENCES))
    def append(self, counts: list[int]) -> None:
        free, lengths = self.cache.num_free_pages, self.cache.lengths
        full = any(n + c > 24 for n, c in zip(lengths, counts, strict=True))
        if full or self.cache.pages_needed(counts) > free:
            with pytest.raises(ValueError, match=r"is too much|the cache is full"), self.cache.append(counts):
                pass
            assert (self.cache.num_free_pages, self.cache.lengths) == (free, lengths)
            return
        needed = self.cache.pages_needed(counts)
        with self.cache.append(counts) as step:
            assert self.cache.num_free_pages >= free - needed
            for b, (start, count) in enumerate(zip(step.starts, counts, strict=True)):
                for s in range(start, start + count):
                    page = int(self.cache.block_table[b, s // 4])
                    assert self.cache.allocator.owners(page) == 1, "a step writes to a shared page"
                    for layer in self.cache.layers:
                        layer.k_slc[page, s % 4] = self.next_token
                    self.tokens[b].append(self.next_token)
                    self.next_token += 1

    @rule(tokens=st.lists(st.integers(0, 4), min_size=SEQUENCES, max_size=SEQUENCES))
    def roll_back(self, tokens: list[int]) -> None:
        try:
            self.cache.roll_back(tokens)
        except ValueError:
            return  # the limits are tested in test_cache.py
        self.tokens = [t[: len(t) - n] for t, n in zip(self.tokens, tokens, strict=True)]

    @rule(source=st.integers(0, 2), to=st.integers(0, 2))
    def fork(self, source: int, to: int) -> None:
        if self.tokens[to]:
            with pytest.raises(ValueError, match="must be empty"):
                self.cache.fork(source, to)
        else:
            self.cache.fork(source, to)
            self.tokens[to] = list(self.tokens[source])

    @rule(sequence=st.integers(0, 2))
    def reset(self, sequence: int) -> None:
        self.cache.reset([sequence])
        self.tokens[sequence] = []

    @invariant()
    def every_sequence_finds_its_tokens(self) -> None:
        assert self.cache.lengths == tuple(map(len, self.tokens))
        with self.cache.append(0) as step:
            tables = step.tables
        used = [page for table in tables for page in table]
        assert [len(table) for table in tables] == [-(-len(t) // 4) for t in self.tokens]
        assert self.cache.num_free_pages == 11 - len(set(used))
        for page in set(used):
            assert self.cache.allocator.owners(page) == used.count(page)
        for layer in self.cache.layers:
            for table, tokens in zip(tables, self.tokens, strict=True):
                found = [layer.k_slc[table[s // 4], s % 4, 0, 0].item() for s in range(len(tokens))]
                assert found == tokens


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="num_pages = -1"):
        PageAllocator(-1)
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    with pytest.raises(ValueError, match="fewer than 2 owners"):
        allocator.release([pages[0], pages[0]])
    with pytest.raises(ValueError, match="count = -1"):
        allocator.allocate(-1)
    assert allocator.num_free == 1


def test_the_device_table_is_that_of_the_host():
    cache = NSACache(CacheMachine.CONFIG, 1, 2, 12, page_block_size=4)
    with cache.append([9, 2]) as step:
        assert cache.block_table.tolist() == [[*step.tables[0]], [*step.tables[1], -1, -1]]
        assert cache.cache_seqlens.tolist() == [0, 0] and cache.cu_seqlens_q.tolist() == [0, 9, 11]
    address = cache.block_table.data_ptr(), cache.cache_seqlens.data_ptr()
    with cache.append([0, 5]):
        assert cache.cache_seqlens.tolist() == [9, 2]
        assert torch.equal(cache.block_table < 0, torch.tensor([[False] * 3, [False, False, True]]))
    assert address == (cache.block_table.data_ptr(), cache.cache_seqlens.data_ptr())
