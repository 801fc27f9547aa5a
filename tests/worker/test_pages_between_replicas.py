"""Two engines with real models: pages of a sequence that runs go from one pool into the other, bit by bit, and mean the same there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import WAIT_S, ranks, tiny_options
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker import build
from quire.worker.engine import Engine
from quire.worker.kv_store import KVStore
from quire.worker.plan import LinkEnd, Moved, MoveKind
from quire.worker.protocol import GenerateRequest, SamplingParams
from quire.worker.reslice import heads_of

MAKE_MOVER = build._mover
PROMPT = tuple(range(1, 34))  # eight pages of four tokens, and one token more
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


class Side:
    """An engine, and the pools of its ranks."""

    def __init__(self, engine: Engine, pools: dict[int, KVStore], kv_heads: int) -> None:
        self.engine = engine
        self._pools = pools
        self._kv_heads = kv_heads
        self.woken = threading.Event()
        engine.runner.watch(self.woken.set)
        self.tokens: list[int] = []

    @property
    def tp(self) -> int:
        return self.engine.info.tp

    def step(self) -> None:
        self.woken.clear()
        for output in self.engine.step():
            self.tokens += output.tokens

    def until(self, moves: list[Moved]) -> Moved:
        """Steps until the first of `moves` is there."""
        while not moves:
            self.step()
            if self.engine.resting and not moves:
                assert self.woken.wait(WAIT_S)
        return moves[0]

    def head(self, page: int, head: int) -> list[torch.Tensor]:
        """A head of a page, as every rank has it that holds it."""
        found = []
        for rank in range(self.tp):
            held = heads_of(self._kv_heads, rank, self.tp)
            if head in held:
                found.append(self._pools[rank].pool[page, head - held.start])
        return found


@contextmanager
def side(model: Path, tp: int, kv_heads: int) -> Iterator[Side]:
    pools: dict[int, KVStore] = {}

    def noting(rank: Any, kv: KVStore, options: Any, group: Any, host: Any) -> Any:
        pools[group.rank if group is not None else 0] = kv
        return MAKE_MOVER(rank, kv, options, group, host)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_mover", noting)
        with ranks(tiny_options(model, tp)) as made:
            yield Side(made.engine, pools, kv_heads)


@pytest.mark.parametrize(
    ("kv_heads", "source_tp", "target_tp"), [(2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 4), (2, 4, 2), (4, 2, 4), (1, 2, 1), (1, 2, 4)]
)
def test_pages_of_a_running_sequence_arrive(kv_heads: int, source_tp: int, target_tp: int, tmp_path: Path) -> None:
    random_model(LlamaConfig(**SIZES | {"num_key_value_heads": kv_heads})).save_pretrained(tmp_path)
    with side(tmp_path, source_tp, kv_heads) as source, side(tmp_path, target_tp, kv_heads) as target:
        source.engine.submit(GenerateRequest("r", (PROMPT,), PARAMS))
        while len(source.tokens) < 5:
            source.step()
        (s,) = source.engine.scheduler.running
        full = s.pages[: s.num_computed // 4]
        assert len(full) == 9
        pool, moves = target.engine.scheduler.pool, target.engine.scheduler.moves
        reserved = pool.reserve(len(full) + 1)
        assert reserved is not None
        there = reserved[::-1]  # other pages than at the source, and not in order; room for one more than comes
        arrived: list[Moved] = []
        sent: list[Moved] = []
        moves.open(LinkEnd("link", source_tp, ()))
        moves.start(MoveKind.RECEIVE, there, arrived.append, link="link")
        target.step()
        source.engine.scheduler.moves.open(LinkEnd("link", target_tp, target.engine.runner.addresses()))
        source.engine.scheduler.moves.start(MoveKind.SEND, full, sent.append, link="link")
        known = len(source.tokens)
        assert (source.until(sent).pages, sent[0].error) == (len(full), None)
        assert len(source.tokens) > known  # it went on meanwhile
        assert (target.until(arrived).pages, arrived[0].error) == (len(full), None)

        for here, page in zip(full, there, strict=False):
            for head in range(kv_heads):
                (first, *others) = [*source.head(here, head), *target.head(page, head)]
                assert first.any()
                assert all(torch.equal(first, other) for other in others)
        assert not any(part.any() for part in target.head(there[-1], 0))  # nothing came for it

        # And they mean the same: the request goes on from them.
        pool.cancel(there[len(full) :])
        pool.commit(there[: len(full)])
        parent = pool.root("")
        for i, page in enumerate(there[: len(full)]):
            parent = pool.register(page, parent, s.tokens[i * 4 : i * 4 + 4])
        pool.release(there[: len(full)])
        for some in (source, target):
            some.engine.scheduler.moves.close("link")
        while not source.engine.idle():
            source.step()
        assert len(source.tokens) == 24
        target.engine.submit(GenerateRequest("r", (PROMPT,), PARAMS, resume={0: tuple(source.tokens[:5])}))
        while not target.engine.idle():
            target.step()
        assert target.tokens == source.tokens[5:]
        assert target.engine.stats().recomputed_tokens == len(PROMPT) + 5 - 1 - 9 * 4
        for some in (source, target):
            some.engine.scheduler.check()
