"""Real models and real links: text that moves between replicas every few tokens is the text of a run that never moved."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import WAIT_S, ranks, tiny_options
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.config import EngineOptions, MigrationOptions
from quire.worker.engine import Engine
from quire.worker.engine_loop import EngineLoop
from quire.worker.migration_wire import Peer
from quire.worker.migrator import Mail
from quire.worker.protocol import FinishReason, GenerateRequest, Outcome, SamplingParams, SequenceOutput, unpack_frame

PROMPTS = ((5, 9, 2, 33, 7), tuple(range(1, 40)))
LONG = {"max_tokens": 90, "ignore_eos": True}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, **LONG),
    "seeded": SamplingParams(seed=3, top_p=0.9, top_k=40, **LONG),
    "n and logprobs": SamplingParams(seed=4, n=3, logprobs=2, **LONG),
    "penalties": SamplingParams(
        seed=5, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2, logit_bias={7: 2.0}, min_tokens=4, **LONG
    ),
    "prompt logprobs": SamplingParams(seed=6, prompt_logprobs=1, logprobs=0, **LONG),
}


class Cluster:
    """Replicas on threads of their own, and one ingress that reads them all."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.loops: dict[str, EngineLoop] = {}
        self.peers = {name: Peer(f"{name}@1", name, 1) for name in engines}
        self.outputs: queue.Queue[SequenceOutput] = queue.Queue()
        numbers = itertools.count()
        for name, engine in engines.items():
            mail = Mail(self.peers[name], self._post, lambda: f"{next(numbers)}", MigrationOptions())
            loop = self.loops[name] = EngineLoop(engine, name, 1, heartbeat_s=0.05, mail=mail)
            loop.start()
            loop.subscribe("ingress/1", self._read)

    def _post(self, actor: str, data: bytes) -> None:
        self.loops[actor.partition("@")[0]].heard(data)

    def _read(self, data: bytes) -> None:
        for output in unpack_frame(data).outputs:
            self.outputs.put(output)

    def rest(self) -> None:
        """Until nobody holds a page, and none is in transit."""
        deadline_s = time.monotonic() + WAIT_S
        while any(s.pages_active or s.pages_reserved for s in (loop.stats() for loop in self.loops.values())):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def stop(self) -> None:
        for loop in self.loops.values():
            loop.stop(WAIT_S)
            assert loop.dead is None

    def run(self, request: GenerateRequest, way: str) -> tuple[list[list[SequenceOutput]], list[Outcome]]:
        """The outputs of each choice, in order, of a request that goes from replica to replica along `way` again and again."""
        choices = len(request.choices)
        found: list[list[SequenceOutput]] = [[] for _ in range(choices)]
        outcomes: list[Outcome] = []
        places = itertools.cycle(way)
        here = there = next(places)
        self.loops[here].submit("ingress/1", request, WAIT_S)
        move, ended, since = None, 0, 0
        while ended < choices or move is not None:
            if move is not None and move.done():
                result = move.result()
                outcomes.append(result.outcome)
                move, since = None, 0
                here = there if result.outcome is Outcome.MOVED else here
            if move is None and since >= 3 and ended < choices and len(way) > 1:
                there = next(places)
                while there == here:
                    there = next(places)
                move = self.loops[here].migrate(request.request_id, self.peers[there])
            try:
                output = self.outputs.get(timeout=0.005)
            except queue.Empty:
                continue
            assert output.request_id == request.request_id
            if output.tokens or (output.finish is not None and output.finish is not FinishReason.MOVED):
                found[output.choice].append(output)
                since += len(output.tokens)
                ended += output.finish is not None
        return [sorted(some, key=lambda o: o.index) for some in found], outcomes


def verified(options: EngineOptions) -> EngineOptions:
    """Every page that arrives is compared with what left."""
    return replace(options, cache=replace(options.cache, verify_moves=True))


@contextmanager
def cluster(model: Path, ways: dict[str, int]) -> Iterator[Cluster]:
    with ExitStack() as stack:
        engines = {name: stack.enter_context(ranks(verified(tiny_options(model, tp)))).engine for name, tp in ways.items()}
        made = Cluster(engines)
        stack.callback(made.stop)
        yield made
        made.rest()
        for engine in engines.values():
            engine.scheduler.check()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LlamaConfig(**SIZES | {"max_position_embeddings": 256})).save_pretrained(path)
    return path


def told(some: list[SequenceOutput], near: float | None = None) -> tuple:
    """All that a client hears of a choice. With `near`, log-probabilities equal what is as near as that."""
    tokens = [t for o in some for t in o.tokens]
    of_tokens = [p for o in some for p in o.logprobs or ()]
    logprobs = [p.logprob for p in of_tokens] + [p.logprob for o in some for p in o.prompt_logprobs or ()]
    best = [(p.token, [t for t, _ in p.top]) for p in of_tokens]
    ends = [o.finish for o in some if o.finish]
    return tokens, best, logprobs if near is None else pytest.approx(logprobs, abs=near), ends, [o.index for o in some]


@pytest.mark.parametrize("ways", [{"A": 1, "B": 1}, {"A": 1, "B": 2}, {"A": 2, "B": 4}], ids=["1 and 1", "1 and 2", "2 and 4"])
def test_text_is_the_same_as_if_it_had_never_moved(model: Path, ways: dict[str, int]) -> None:
    with cluster(model, ways) as both:
        for name, params in PARAMS.items() if ways["B"] < 4 else [("seeded", PARAMS["seeded"])]:
            undisturbed, _ = both.run(GenerateRequest(f"{name} at rest", PROMPTS, params), "A")
            moved, outcomes = both.run(GenerateRequest(name, PROMPTS, params), "AB")
            assert list(map(told, moved)) == [told(choice, near=1e-4) for choice in undisturbed], name
            assert outcomes.count(Outcome.MOVED) >= 3, (name, outcomes)
