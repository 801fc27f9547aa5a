"""A runner whose model is a hash: it keeps tokens where a real one keeps keys and values.

It reads every context back through the block table and the pages, so a page that is lost, shared wrongly or reused too
early changes the tokens that come out. `expected_output` says what must come out, by no pages at all.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine
from quire.worker.page_pool import PagePool
from quire.worker.plan import MemoryBytes, NewSequence, Sampled, StepPlan, StepResult
from quire.worker.protocol import ModelInfo
from quire.worker.scheduler import Scheduler

VOCAB = 50
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
    """Runs plans on the hash model over `pages` pages of `page_size` slots."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.memory: list[list[int | None]] = [[None] * page_size for _ in range(pages)]
        self.page_size = page_size
        self.known: dict[int, _Known] = {}
        self.computed_tokens = 0
        self.largest_step = 0

    def run(self, plan: StepPlan) -> StepResult:
        for seq in plan.forget:
            del self.known[seq]
        for source, destination in plan.copies:
            self.memory[destination] = list(self.memory[source])
        for new in plan.new:
            self._learn(new)
        for seq, pages in plan.pages:
            self.known[seq].pages.extend(pages)
        # All rows write before any reads, as a batch on a GPU does: a row that wrote into a neighbour's page would show.
        for row in plan.rows:
            s = self.known[row.seq]
            for position in range(row.start, row.start + row.num_tokens):
                self.memory[s.pages[position // self.page_size]][position % self.page_size] = s.tokens[position]
        self.computed_tokens += sum(row.num_tokens for row in plan.rows)
        self.largest_step = max(self.largest_step, sum(row.num_tokens for row in plan.rows))
        return StepResult(plan.step, tuple(self._sample(row.seq, row.start + row.num_tokens) for row in plan.rows if row.samples))

    def reset(self) -> None:
        self.known.clear()

    def memory_bytes(self) -> MemoryBytes:
        return MemoryBytes(weights=3, pool=len(self.memory) * self.page_size)

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
) -> Engine:
    """A real engine around the hash model."""
    max_running = min(max_running, max_batch_tokens)
    pool = PagePool(pages, page_size, b"key", prefix_cache)
    scheduler = Scheduler(pool, max_batch_tokens, max_running, (EOS,))
    info = ModelInfo(
        "hash", "", max_model_len, VOCAB, (EOS,), 0, page_size, pages * page_size, max_running + max_waiting, max_running=max_running
    )
    return Engine(scheduler, PagedMemory(pages, page_size), Door.of(info, limits or LimitOptions()), info, max_waiting, clock=clock)
