"""The books of the disk beside the pools: which sequence lies in which file, and how many pages all files hold. Pure.

    suspend -> being written -> there -> bring (as often as it takes) -> drop: erased

A file belongs to one sequence that was swapped out, holds all its pages, and dies with its return or its end. Each rank has a file of that
name for its part. Files are written, read and erased in the order in which that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .page_moves import PageMoves
from .plan import Moved, MoveKind


class DiskTier:
    """Files of pages.

    Args:
        total: pages at most; 0 keeps nothing.
        moves: carries pages there and back.
    """

    def __init__(self, total: int, moves: PageMoves) -> None:
        self.total = total
        self.used = 0
        self._moves = moves
        self._next = 0
        self._pages: dict[str, int] = {}  # file -> pages, until it is erased
        self._writing: set[str] = set()

    def holds(self, pages: int) -> bool:
        """Whether there is room for so many."""
        return 0 < pages <= self.total - self.used

    def suspend(self, snapshot: bytes, pages: Sequence[int], done: Callable[[Moved], None]) -> str:
        """Write device `pages` into a new file, behind `snapshot`; its name. `done` hears of the end of that; if it failed, the file is
        still to be dropped."""
        name = f"{self._next}"
        self._next += 1
        self._pages[name] = len(pages)
        self.used += len(pages)
        self._writing.add(name)
        self._moves.start(MoveKind.SAVE, pages, partial(self._written, name, done), file=name, snapshot=snapshot)
        return name

    def ready(self, name: str) -> bool:
        """Whether a file has been written."""
        return name not in self._writing

    def bring(self, name: str, ordinals: Sequence[int], pages: Sequence[int], done: Callable[[Moved], None]) -> None:
        """Read some of a file's pages into reserved device `pages`."""
        self._moves.start(MoveKind.LOAD, pages, done, host_pages=ordinals, file=name)

    def drop(self, name: str) -> None:
        """Erase a file, after whatever is still done with it."""
        self._moves.start(MoveKind.ERASE, (), partial(self._erased, name), file=name)

    def _written(self, name: str, done: Callable[[Moved], None], moved: Moved) -> None:
        self._writing.remove(name)
        if moved.error is not None:
            self.total = self.used - self._pages[name]  # the disk has no room for more than lies there: nobody tries that again
        done(moved)

    def _erased(self, name: str, moved: Moved) -> None:
        if moved.error is None:  # else it still takes its room
            self.used -= self._pages.pop(name)

    def check(self, held: Sequence[str]) -> None:
        """Count. `held` are the files of the sequences that live.

        Raises:
            RuntimeError: they are not what is written here.
        """
        if self.used != sum(self._pages.values()) or len(set(held)) != len(held) or not set(held) <= self._pages.keys():
            raise RuntimeError(f"{held} are suspended, and the books say {self._pages} in {self.used} pages")
