"""The same text with real models and real copies, whoever is swapped out and when."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from disturbing import swap_at_random
from test_engine import engine, prompt, submit
from test_scheduler import tokens
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.engine import Engine
from quire.worker.protocol import SequenceOutput


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LlamaConfig(**SIZES | {"max_position_embeddings": 256})).save_pretrained(path)
    return path


def serve(served: Engine, requests: int, often: float) -> dict[tuple[str, int], list[int]]:
    """The output tokens of `requests` requests, greedy and sampled, with forks, while running sequences are swapped out at random."""
    draw = random.Random(1)
    for i in range(requests):
        sampled = {"temperature": 1.0, "seed": i, "repetition_penalty": 1.1, "n": 2} if i % 2 else {}
        submit(served, f"r{i}", prompt(i % 7, 10 + i % 50), max_tokens=20 + i % 17, **sampled)
    outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
    while not served.idle():
        swap_at_random(served, draw, often)
        for o in served.step():
            outputs.setdefault((o.request_id, o.choice), []).append(o)
    served.scheduler.check()
    return {key: tokens(some) for key, some in outputs.items()}


@pytest.mark.parametrize(
    ("requests", "prefix_cache"), [(60, True), (60, False), pytest.param(500, True, marks=pytest.mark.slow)]
)
def test_text_is_the_same_when_sequences_are_swapped_at_random(model: Path, requests: int, prefix_cache: bool) -> None:
    undisturbed = serve(engine(model, kv_pages=200, page_size=8, prefix_cache=prefix_cache), requests, 0.0)
    options = {"page_size": 8, "max_batch_tokens": 48, "prefix_cache": prefix_cache, "host_memory": "16MiB", "verify_moves": True}
    for preemption, kv_pages in (("swap", 30), ("decide", 60)):
        swapped = engine(model, kv_pages=kv_pages, preemption=preemption, **options)
        assert serve(swapped, requests, 0.05) == undisturbed
        stats = swapped.stats()
        assert stats.moved_bytes["out"] > 0
        assert stats.moved_bytes["in"] > 0
        assert stats.pages_active == stats.host_pages_active == 0


def test_text_is_the_same_when_sequences_are_suspended_to_disk_at_random(model: Path, tmp_path: Path) -> None:
    undisturbed = serve(engine(model, kv_pages=200, page_size=8), 60, 0.0)
    options = {"page_size": 8, "max_batch_tokens": 48, "host_memory": "64KiB", "disk_path": str(tmp_path), "disk_memory": "4MiB"}
    for preemption, kv_pages in (("swap", 30), ("decide", 60)):
        suspended = engine(model, kv_pages=kv_pages, preemption=preemption, **options)
        assert serve(suspended, 60, 0.05) == undisturbed
        stats = suspended.stats()
        assert stats.moved_bytes["save"] > 0
        assert stats.moved_bytes["load"] > 0
        assert stats.pages_active == stats.host_pages_active == 0
        while suspended.scheduler.moves.under_way() or suspended.scheduler.moves.pending():
            suspended.step()
        assert suspended.stats().disk_pages == 0
        assert [list(own.iterdir()) for own in tmp_path.iterdir()] == [[]]
        suspended.runner.close()


def test_a_prefix_from_host_memory_gives_the_same_text(model: Path) -> None:
    """A working set of prefixes three times the device pool: the second time round they come from host memory."""
    prompts = [prompt(k, 100) for k in range(9)]
    found = {}
    for host_memory in (0, "16MiB"):
        served = engine(model, kv_pages=40, page_size=8, host_memory=host_memory, preemption="decide")
        for turn in range(2):
            for k, one in enumerate(prompts):
                submit(served, f"{turn}/{k}", one, max_tokens=5)
                while not served.idle():
                    for o in served.step():
                        found.setdefault((host_memory, turn, k), []).extend(o.tokens)
        hits = served.stats().host_hit_tokens
        assert hits > 0 if host_memory else hits == 0
    for k in range(9):
        assert len({tuple(found[key]) for key in found if key[2] == k}) == 1
