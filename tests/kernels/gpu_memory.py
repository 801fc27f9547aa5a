"""What a GPU does with memory, kept as a book: who may touch which bytes when. `pretend_gpu` writes it.

Work on one stream is in order; between streams, and between a stream and the host, only events and waits order anything. So every operation
has a stream and a number on it, and every stream, and every thread of the host, a clock: how far each stream is known to have come. Each
byte remembers the operation that wrote it last, and of each stream the last one that read it. An operation that touches a byte which
another may still be writing or reading is a `Fault`, whether or not it would have gone well this time. So is one outside of all memory, and
so are two programs of one launch of which one writes what the other touches. What a thread knows it tells others by `say` and `hear`.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right, insort
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

ALIGNMENT = 512  # of what torch's allocator hands out
POISON = 0xFF  # NaN, and -1

Which = npt.NDArray[np.int64] | slice  # bytes of a region
Clock = dict[int, int]  # stream -> operations on it that have ended


class Fault(AssertionError):
    """Something that a GPU would not do, or not always in the order that is counted on."""


class Operation(NamedTuple):
    """A kernel, or a copy."""

    index: int  # among all
    stream: int
    number: int  # on the stream
    name: str


class Region:
    """Memory that was allocated at once, for work on `stream`."""

    def __init__(self, base: int, size: int, stream: int) -> None:
        self.base, self.size, self.stream = base, size, stream
        self.written = np.zeros(size, np.int32)  # by which operation
        self.writer = np.zeros(size, np.int32)  # which program of it
        self.read: dict[int, npt.NDArray[np.int32]] = {}  # by which operation of each stream
        self.reader = np.zeros(size, np.int32)  # which program of the last one


class Memory:
    """All that a GPU reaches, and the clocks."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.faults: list[Fault] = []  # of what nobody called, so nobody was there to hear of it
        self._regions: dict[int, Region] = {}
        self._bases: list[int] = []
        self._operations = [Operation(0, 0, 0, "nothing")]
        self._clocks: dict[int, Clock] = {}
        self._threads = threading.local()
        self._host: Clock = {}  # what any thread knows

    # --- who comes after whom ---

    def issue(self, stream: int, name: str) -> Operation:
        """The next operation on a stream, after all that the host knows to have ended."""
        clock = self._clocks.setdefault(stream, {})
        merge(clock, self.say())
        clock[stream] = clock.get(stream, 0) + 1
        self._operations.append(Operation(len(self._operations), stream, clock[stream], name))
        return self._operations[-1]

    def so_far(self, stream: int) -> Clock:
        """Where everything will be when what was issued on the stream has ended."""
        return dict(self._clocks.setdefault(stream, {}))

    def order(self, stream: int, after: Clock) -> None:
        """What is issued on the stream from now on comes after that."""
        merge(self._clocks.setdefault(stream, {}), after)

    def wait(self, until: Clock) -> None:
        """This thread has."""
        merge(self._host, until)
        self.hear(until)

    def wait_for_all(self) -> None:
        """This thread has waited for the device."""
        for clock in self._clocks.values():
            self.wait(clock)

    def say(self) -> Clock:
        """What this thread knows."""
        found: Clock = self._threads.__dict__.setdefault("clock", {})
        return found

    def hear(self, clock: Clock) -> None:
        """This thread knows that, too."""
        merge(self.say(), clock)

    def ended(self, operation: Operation) -> bool:
        """Whether a thread knows that."""
        return operation.number <= self._host.get(operation.stream, 0)

    # --- who touches what ---

    def allocate(self, size: int, stream: int) -> npt.NDArray[np.uint8]:
        """Bytes that nobody has written, for work on that stream. As soon as they are freed the stream may have them again."""
        whole = np.full(size + ALIGNMENT, POISON, np.uint8)
        start = -whole.ctypes.data % ALIGNMENT
        self.reach(whole.ctypes.data + start, size, stream, whole)
        return whole[start : start + size]

    def reach(self, base: int, size: int, stream: int, owner: Any) -> None:
        """A GPU reaches these bytes as long as `owner` lives."""
        with self.lock:
            self._regions[base] = Region(base, size, stream)
            insort(self._bases, base)
        weakref.finalize(owner, self._free, base).atexit = False

    def region(self, address: int, name: str) -> Region:
        """Where this is."""
        at = bisect_right(self._bases, address) - 1
        region = self._regions[self._bases[at]] if at >= 0 else None
        if region is None or address >= region.base + max(region.size, 1):
            raise Fault(f"{name}: nothing is at this address, or nothing that a GPU reaches")
        return region

    def touch(self, by: Operation, region: Region, which: Which, writes: bool, program: int = 0) -> None:
        """An operation reads those bytes, or writes them."""
        does = "writes" if writes else "reads"
        written = region.written[which]
        self._require_after(by, does, written, "writes")
        if np.any((written == by.index) & (region.writer[which] != program)):
            raise Fault(f"{by.name}: a program {does} what another one of the launch has written")
        if not writes:
            region.read.setdefault(by.stream, np.zeros(region.size, np.int32))[which] = by.index
            region.reader[which] = program
            return
        for stream, read in region.read.items():
            self._require_after(by, does, read[which], "reads")
            if stream == by.stream and np.any((read[which] == by.index) & (region.reader[which] != program)):
                raise Fault(f"{by.name}: a program writes what another one of the launch has read")
        region.written[which] = by.index
        region.writer[which] = program

    def _require_after(self, by: Operation, does: str, others: npt.NDArray[np.int32], do: str) -> None:
        clock = self._clocks[by.stream]
        for index in np.unique(others).tolist():
            other = self._operations[index]
            if other.number > clock.get(other.stream, 0):
                raise Fault(
                    f"{by.name} on stream {by.stream} {does} what {other.name} on stream {other.stream} {do}, which nobody waited for"
                )

    def _free(self, base: int) -> None:
        with self.lock:
            region = self._regions.pop(base)
            self._bases.remove(base)
            clock = self.so_far(region.stream)
            merge(clock, self._host)
            for touched in (region.written, *region.read.values()):
                for index in np.unique(touched).tolist():
                    other = self._operations[index]
                    if other.number > clock.get(other.stream, 0):
                        uses = f"{other.name} on stream {other.stream} uses"
                        self.faults.append(Fault(f"memory of stream {region.stream} is freed that {uses}"))


def merge(clock: Clock, other: Clock) -> None:
    """The later of both, for each stream."""
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)
