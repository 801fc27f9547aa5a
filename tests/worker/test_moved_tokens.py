"""Real models, copies and links: requests are swapped out at random, suspended at random, and sent from replica to replica every few
tokens, between tensor-parallel degrees of 1, 2 and 4; every text is that of a run in which nothing moved."""

from __future__ import annotations

import queue
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
from disturbing import swap_at_random
from ranks import WAIT_S, ranks, tiny_options
from test_engine import prompt
from test_migration_links import Cluster, verified
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.config import EngineOptions
from quire.worker.engine import Engine
from quire.worker.plan import MoveKind
from quire.worker.protocol import FinishReason, GenerateRequest, MigrationResult, Outcome, SamplingParams, SequenceOutput

OPEN = 14  # at once
STAY_TOKENS = 2  # between two moves of a request
REPLICAS = {"A": 1, "B": 2, "C": 4}


def requests() -> Iterator[GenerateRequest]:
    """Greedy and seeded by turns, some with two choices, some with penalties; without end."""
    for i in count():
        sampled = {"temperature": 1.0, "seed": i, "top_p": 0.95, "n": 1 + (i % 6 == 1)} if i % 2 else {"temperature": 0.0}
        penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.2} if i % 5 == 0 else {}
        params = SamplingParams(max_tokens=9 + i % 9, ignore_eos=True, **sampled, **penalties)
        yield GenerateRequest(f"r{i}", (tuple(prompt(i % 7, 5 + i % 20)),), params)


@dataclass
class Live:
    """A request that has not ended."""

    here: str
    left: int  # choices
    since: int = 0  # tokens
    to: str = ""
    move: Future[MigrationResult] | None = None


@dataclass
class Traffic:
    """Requests, at most `OPEN` at once, that move if `moving`."""

    cluster: Cluster
    moving: bool
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    live: dict[str, Live] = field(default_factory=dict)
    texts: dict[tuple[str, int], list[SequenceOutput]] = field(default_factory=dict)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    ways: set[tuple[str, str]] = field(default_factory=set)
    sent: int = 0

    def run(self, least: int, enough: Callable[[], bool] = lambda: True) -> dict[tuple[str, int], list[int]]:
        """The tokens of every choice of the first requests: `least` of them, and as many more as come until there have been `enough`."""
        upcoming, names = requests(), list(self.cluster.loops)
        more = True
        while more or self.live:
            while len(self.live) < OPEN and (more := self.sent < least or not enough()):
                self.sent, request, here = self.sent + 1, next(upcoming), self.draw.choice(names)
                self.live[request.request_id] = Live(here, len(request.choices))
                self.cluster.loops[here].submit("ingress/1", request, WAIT_S)
            try:
                self.take(self.cluster.outputs.get(timeout=0.05))
                while True:
                    self.take(self.cluster.outputs.get_nowait())
            except queue.Empty:
                pass
            for name in list(self.live):
                self.look_at(name, self.live[name])
        found = {}
        for key, outputs in self.texts.items():
            outputs.sort(key=lambda o: o.index)
            found[key] = [t for o in outputs for t in o.tokens]
            assert [o.index for o in outputs if o.tokens] == list(range(len(found[key]))), key
        return found

    def take(self, output: SequenceOutput) -> None:
        request = self.live.get(output.request_id)
        if request is None:  # it ended where it had gone before its source was heard
            assert (output.finish, output.tokens) == (FinishReason.MOVED, ()), output
            return
        assert output.finish in (None, FinishReason.LENGTH, FinishReason.MOVED), output
        self.texts.setdefault((output.request_id, output.choice), []).append(output)
        request.since += len(output.tokens)
        request.left -= output.finish is FinishReason.LENGTH

    def look_at(self, name: str, request: Live) -> None:
        if request.move is not None and request.move.done():
            outcome = request.move.result().outcome
            self.outcomes[outcome] += 1
            if outcome is Outcome.MOVED:
                self.ways.add((request.here, request.to))
                request.here = request.to
            request.move, request.since = None, 0
        if request.move is None and not request.left:
            del self.live[name]
        elif request.move is None and self.moving and request.since >= STAY_TOKENS:
            request.to = self.draw.choice([other for other in self.cluster.loops if other != request.here])
            request.move = self.cluster.loops[request.here].migrate(name, self.cluster.peers[request.to])


def disturb(engine: Engine, seed: int) -> None:
    """Sequences are swapped out and suspended at random between its steps, on its own thread."""
    draw, step = random.Random(seed), engine.step

    def swap_and_step() -> list[SequenceOutput]:
        swap_at_random(engine, draw, 0.02)
        return step()

    engine.step = swap_and_step


def options(model: Path, tp: int, disk: Path) -> EngineOptions:
    plain = verified(tiny_options(model, tp))
    return replace(plain, cache=replace(plain.cache, kv_pages=80, host_memory=2**20, disk_path=str(disk), disk_memory=2**20))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LlamaConfig(**SIZES | {"max_position_embeddings": 256})).save_pretrained(path)
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("least", [120, pytest.param(500, marks=pytest.mark.slow)])
def test_every_text_is_the_same_whatever_moves_and_whereto(least: int, model: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        engines = {name: stack.enter_context(ranks(options(model, tp, tmp_path))).engine for name, tp in REPLICAS.items()}
        alone = Cluster({"A": stack.enter_context(ranks(tiny_options(model, 1))).engine})
        for seed, engine in enumerate(engines.values()):
            disturb(engine, seed)
        cluster = Cluster(engines)
        stack.callback(cluster.stop)
        traffic = Traffic(cluster, moving=True)

        def everything_has_moved() -> bool:  # how many requests that takes depends on how fast the machine is
            moved = [engine.scheduler.moves.moved_pages for engine in engines.values()]
            kinds = all(pages[kind] for pages in moved for kind in MoveKind if kind is not MoveKind.ERASE)
            return kinds and len(traffic.ways) == len(REPLICAS) * (len(REPLICAS) - 1) and traffic.outcomes[Outcome.MOVED] > least // 4

        found = traffic.run(least, everything_has_moved)
        cluster.rest()
        undisturbed = Traffic(alone, moving=False).run(traffic.sent)
        alone.stop()
        assert found == undisturbed
        assert not traffic.outcomes[Outcome.LOST]
        for engine in engines.values():
            engine.scheduler.check()
