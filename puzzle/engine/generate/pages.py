"""Who holds which page of a key/value cache: numbers, the same on all ranks that make the same calls."""

from __future__ import annotations

from collections.abc import Iterable

NOBODY = 0
"""A page that no sequence ever holds: rows without one write there, and nobody reads it."""


class PagePool:
    """Pages 1 to `pages` of a cache, and how many hold each; a page that nobody holds is free."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.holders = [0] * (pages + 1)
        self._free = list(range(pages, 0, -1))

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, held once from now on; ValueError if there are fewer."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holds each of these pages; ValueError if one is free."""
        for page in pages:
            if not self.holders[page]:
                raise ValueError(f"page {page} is free")
            self.holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One less holds each of these pages; ValueError if one is free."""
        for page in pages:
            if not self.holders[page]:
                raise ValueError(f"page {page} is free")
            self.holders[page] -= 1
            if not self.holders[page]:
                self._free.append(page)
