"""Pages of a cache: who owns them, and how many sequences share one."""

from __future__ import annotations

__all__ = ["PageAllocator"]


class PageAllocator:
    """Hands out the pages 0 .. num_pages - 1. A page has as many owners as it was allocated and shared
    for; it is free again when the last one releases it. Host only.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages = {num_pages} is not allowed; it must be at least 0")
        self._owners = [0] * num_pages
        self._free = list(range(num_pages))[::-1]  # the lowest number first, then the one freed last

    @property
    def num_pages(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many owners the page has; 0 = free."""
        return self._owners[page]

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one owner each; all or nothing (ValueError)."""
        if count < 0 or count > len(self._free):
            raise ValueError(
                f"count = {count} pages are not to be had: {len(self._free)} of {self.num_pages} are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more owner for each of the pages."""
        self._check_owned(pages)
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: list[int]) -> None:
        """One owner less for each of the pages."""
        self._check_owned(pages)
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _check_owned(self, pages: list[int]) -> None:
        for page in pages:
            times = pages.count(page)
            if not 0 <= page < self.num_pages or self._owners[page] < times:
                raise ValueError(f"page {page} has fewer than {times} owners, or is none of {self.num_pages}")
