"""A runner whose model is a hash: it keeps tokens where a real one keeps keys and values.

It reads every context back through the block table and the pages, so a page that is lost, shared wrongly or reused too
early changes the tokens that come out. `expected_output` says what must come out, by no pages at all.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine
from quire.worker.page_pool import PagePool
from quire.worker.plan import MemoryBytes, Move, Moved, MoveKind, NewSequence, Sampled, StepPlan, StepResult
from quire.worker.protocol import ModelInfo
from quire.worker.scheduler import Scheduler
from quire.worker.snapshot import SequenceSnapshot

VOCAB = 50
Page = list[int | None]
EOS = 0


def next_token(context: Tokens[int], seed: int) -> int:
    """The hash model: a token in [0, VOCAB) from the whole context and the seed."""
    return int.from_bytes(blake2b(repr((list(context), seed)).encode(), digest_size=4).digest(), "little") % VOCAB


def expected_output(prompt: Tokens[int], seed: int, max_tokens: int, ignore_eos: bool = False) -> list[int]:
    """What the hash model generates for `prompt`, undisturbed."""
    context = list(prompt)
    while len(context) - len(prompt) < max_tokens:
        context.append(next_token(context, seed))
        if context[-1] == EOS and not ignore_eos:
            break
    return context[len(prompt) :]


@dataclass
class _Known:
    tokens: list[int]
    pages: list[int]
    seed: int


class PagedMemory:
    """Runs plans on the hash model over `pages` pages of `page_size` slots.

    Moves read and write at their end, `delay` polls after their start, and until then what IN and RECEIVE write holds garbage: so whoever
    reuses or reads a page too early gets wrong tokens. `wires` (link -> what has been sent on it and not received) is shared by the
    memories that send to each other.
    """

    def __init__(self, pages: int, page_size: int, host_pages: int = 0, wires: dict[str, deque[list[Page]]] | None = None) -> None:
        self.memory: list[Page] = [[None] * page_size for _ in range(pages)]
        self.host: list[Page] = [[None] * page_size for _ in range(host_pages)]
        self.wires = {} if wires is None else wires
        self.files: dict[str, list[Page]] = {}
        self.delay = 1
        self.failing: int | None = None  # every so many moves, one fails and leaves garbage
        self.moving: list[tuple[int, Move]] = []  # (polls that are left, move)
        self.open_links: set[str] = set()
        self.page_size = page_size
        self.known: dict[int, _Known] = {}
        self.ahead = False  # begins the next step before it tells of the present one, as a GPU does
        self.issued: list[StepResult] = []
        self.computed_tokens = 0
        self.largest_step = 0

    def run(self, plan: StepPlan) -> StepResult:
        for seq in plan.forget:
            del self.known[seq]
        for source, destination in plan.copies:
            self.memory[destination] = list(self.memory[source])
        self._start_moves(plan)
        for new in plan.new:
            self._learn(new)
        for seq, pages in plan.pages:
            self.known[seq].pages.extend(pages)
        # All rows write before any reads, as a batch on a GPU does: a row that wrote into a neighbour's page would show.
        for row in plan.rows:
            s = self.known[row.seq]
            if row.samples:
                del s.tokens[row.start + row.num_tokens :]  # what a row that was dropped has drawn
            for position in range(row.start, row.start + row.num_tokens):
                self.memory[s.pages[position // self.page_size]][position % self.page_size] = s.tokens[position]
        self.computed_tokens += sum(row.num_tokens for row in plan.rows)
        self.largest_step = max(self.largest_step, sum(row.num_tokens for row in plan.rows))
        return StepResult(plan.step, tuple(self._sample(row.seq, row.start + row.num_tokens) for row in plan.rows if row.samples))

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        result = self.issued.pop() if self.issued else self.run(plan)
        assert result.step == plan.step
        after = following() if self.ahead else None
        if after is not None:
            self.issued.append(self.run(after))
        return result

    def prepare(self, grammar: str) -> None:
        """The hash model draws what it likes."""

    def reset(self) -> None:
        self.known.clear()
        self.issued.clear()

    def memory_bytes(self) -> MemoryBytes:
        return MemoryBytes(weights=3, pool=len(self.memory) * self.page_size)

    def poll(self) -> tuple[Moved, ...]:
        ended: list[Moved] = []
        left: list[tuple[int, Move]] = []
        for polls, move in self.moving:
            stuck = move.kind is MoveKind.RECEIVE and not self.wires.get(move.link)
            if move.link and move.link not in self.open_links:
                ended.append(Moved(move.move, error="the link was closed"))
            elif polls > 1 or stuck:
                left.append((max(polls - 1, 1), move))
            elif self.failing is not None and move.move % self.failing == self.failing - 1:
                for host in move.host_pages if move.kind is MoveKind.OUT else ():
                    self.host[host] = [-2] * self.page_size
                ended.append(Moved(move.move, error="told to fail"))
            else:
                ended.append(Moved(move.move, self._end_move(move), 0.001))
        self.moving = left
        return tuple(ended)

    def watch(self, wake: Callable[[], None]) -> None:
        """Whoever steps this engine polls it."""

    def addresses(self) -> tuple[str, ...]:
        return ("memory:0",)

    def _start_moves(self, plan: StepPlan) -> None:
        self.open_links.update(end.link for end in plan.links)
        for move in plan.moves:
            if move.kind in (MoveKind.IN, MoveKind.RECEIVE, MoveKind.LOAD):
                for page in move.pages:
                    self.memory[page] = [-1] * self.page_size
            self.moving.append((self.delay, move))
        self.open_links.difference_update(plan.closed)

    def _end_move(self, move: Move) -> int:
        match move.kind:
            case MoveKind.OUT:
                for page, host in zip(move.pages, move.host_pages, strict=True):
                    self.host[host] = list(self.memory[page])
            case MoveKind.IN:
                for page, host in zip(move.pages, move.host_pages, strict=True):
                    self.memory[page] = list(self.host[host])
            case MoveKind.SAVE:
                assert SequenceSnapshot.from_bytes(move.snapshot).num_computed <= len(move.pages) * self.page_size
                self.files[move.file] = [list(self.memory[page]) for page in move.pages]
            case MoveKind.LOAD:
                for page, ordinal in zip(move.pages, move.host_pages, strict=True):
                    self.memory[page] = list(self.files[move.file][ordinal])
            case MoveKind.ERASE:
                self.files.pop(move.file, None)
            case MoveKind.SEND:
                self.wires.setdefault(move.link, deque()).append([list(self.memory[page]) for page in move.pages])
            case MoveKind.RECEIVE:
                came = self.wires[move.link].popleft()
                for page, content in zip(move.pages, came, strict=False):
                    self.memory[page] = content
                return len(came)
        return len(move.pages)

    def _learn(self, new: NewSequence) -> None:
        if new.seq in self.known:
            raise AssertionError(f"sequence {new.seq} was sent twice")
        self.known[new.seq] = _Known(list(new.tokens), list(new.pages), new.seed)

    def _sample(self, seq: int, end: int) -> Sampled:
        s = self.known[seq]
        context = [self.memory[s.pages[i // self.page_size]][i % self.page_size] for i in range(end)]
        if context != s.tokens:
            raise AssertionError(f"the pages of sequence {seq} hold {context}, not {s.tokens}")
        s.tokens.append(next_token(s.tokens, s.seed))
        return Sampled(seq, s.tokens[-1])


def hash_engine(
    pages: int = 16,
    page_size: int = 4,
    max_batch_tokens: int = 16,
    max_running: int = 8,
    max_waiting: int = 1000,
    prefix_cache: bool = True,
    max_model_len: int = 10_000,
    limits: LimitOptions | None = None,
    clock: Callable[[], float] = time.monotonic,
    host_pages: int = 0,
    preemption: str = "recompute",
    disk_pages: int = 0,
    wires: dict[str, deque[list[Page]]] | None = None,
) -> Engine:
    """A real engine around the hash model."""
    max_running = min(max_running, max_batch_tokens)
    pool = PagePool(pages, page_size, b"key", prefix_cache)
    scheduler = Scheduler(pool, max_batch_tokens, max_running, (EOS,), host_pages, preemption, disk_pages)
    info = ModelInfo(
        "hash", "", max_model_len, VOCAB, (EOS,), 0, page_size, pages * page_size, max_running + max_waiting, max_running=max_running
    )
    memory = PagedMemory(pages, page_size, host_pages, wires)
    return Engine(scheduler, memory, Door.of(info, limits or LimitOptions()), info, max_waiting, clock=clock)
