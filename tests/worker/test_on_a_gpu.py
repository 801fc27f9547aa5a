"""Whatever moves pages beside the steps of a GPU: the texts are those of a CPU where nothing moved.

A real GPU with `-m gpu`; here the pretended one, which also finds what went well by luck: streams that do not wait for one another, host
memory that is filled too early, memory that is freed too early.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import test_moved_tokens
import torch
from disturbing import swap_at_random
from gpu_device import Gpu
from interpreter import install
from pretend_gpu import pretended
from ranks import ranks, tiny_options
from test_engine import drain, engine, prompt, submit, tokens
from test_migration_links import Cluster
from tiny_models import SIZES, random_model
from transformers import LlamaConfig

from quire.worker.device_runner import DeviceRunner
from quire.worker.engine import Engine
from quire.worker.plan import MoveKind
from quire.worker.protocol import Outcome

SMALL = {"page_size": 16, "max_batch_tokens": 48, "max_running": 6, "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = SIZES | {"max_position_embeddings": 256, "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    random_model(LlamaConfig(**sizes)).save_pretrained(path)
    return path


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu | None]:
    """What keeps the book; None for a real one, which does not."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device")
        yield None
        return
    install()
    with pretended() as one:
        yield one


def serve(served: Engine, often: float = 0.0) -> dict[tuple[str, int], list[int]]:
    """The tokens of eight requests, greedy and sampled by turns, while sequences that run are put away at random."""
    draw, found = random.Random(1), {}
    for i in range(8):
        how = {"temperature": 1.0, "seed": i} if i % 2 else {}
        submit(served, f"r{i}", prompt(i % 5, 10 + 7 * i % 30), max_tokens=12 + i % 7, **how)
    while not served.idle():
        if served.scheduler._next is None:
            swap_at_random(served, draw, often)
        for o in served.step():
            found.setdefault((o.request_id, o.choice), []).append(o)
    served.scheduler.check()
    return {key: tokens(some) for key, some in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"cuda_graphs": False, "verify_moves": True}], ids=["graphs", "eager, verified"])
def test_sequences_are_swapped_out_and_suspended_at_random(gpu, model, how, tmp_path) -> None:
    places = {"host_memory": "32KiB", "disk_path": str(tmp_path), "disk_memory": "1MiB", "preemption": "swap"}
    served = engine(model, kv_pages=20, **SMALL, **places, **how)
    assert isinstance(served.runner, DeviceRunner)
    assert serve(served, 0.25) == serve(engine(model, kv_pages=100, device="cpu", **SMALL))
    stats = served.stats()
    assert all(stats.moved_bytes[kind] for kind in ("out", "in", "save", "load"))
    assert stats.pages_active == stats.host_pages_active == 0
    served.runner.close()


@pytest.mark.slow
def test_requests_go_from_replica_to_replica(gpu, model, monkeypatch) -> None:
    monkeypatch.setattr(test_moved_tokens, "OPEN", 5)
    with ExitStack() as stack:
        options = tiny_options(model, 1)
        cache = replace(options.cache, page_size=16, page_link="host")
        on_gpu = replace(options, model=replace(options.model, device="cuda", dtype="float32"), cache=cache)
        engines = {name: stack.enter_context(ranks(on_gpu)).engine for name in "AB"}
        cluster = Cluster(engines)
        stack.callback(cluster.stop)
        traffic = test_moved_tokens.Traffic(cluster, moving=True)
        found = traffic.run(6, lambda: len(traffic.ways) == 2)
        cluster.rest()
        alone = Cluster({"A": stack.enter_context(ranks(replace(options, cache=cache))).engine})
        stack.callback(alone.stop)
        assert found == test_moved_tokens.Traffic(alone, moving=False).run(traffic.sent)
        assert not traffic.outcomes[Outcome.LOST]
        for served in engines.values():
            served.scheduler.check()


@pytest.mark.slow
def test_a_prefix_comes_back_from_host_memory(gpu, model) -> None:
    served = engine(model, kv_pages=10, host_memory="16MiB", **SMALL)
    prompts = [prompt(k, 100) for k in range(3)]
    first, second = ([], [])
    for turn in (first, second):
        for k, one in enumerate(prompts):
            submit(served, f"{len(turn)}/{k}", one, max_tokens=5)
            turn.append([tokens(some) for some in drain(served).values()])
    assert first == second
    assert served.stats().host_hit_tokens > 0
    served.runner.close()


def test_steps_that_are_planned_ahead_wait_for_nothing_but_their_own_ends(gpu, model) -> None:
    """The host gives the device the next step before it waits for the present one, and then for its end and for its tokens alone."""
    if gpu is None:
        pytest.skip("a real GPU does not say what was waited for")
    served = engine(model, kv_pages=40, **SMALL)
    for i, how in enumerate([{}, {"repetition_penalty": 1.1, "logprobs": 2}, {"seed": 1, "temperature": 1.0, "logit_bias": {5: 1.0}}]):
        submit(served, f"r{i}", prompt(i, 20), max_tokens=20, **how)
    for _ in range(4):
        served.step()
    before = len(gpu.waits)
    for _ in range(5):
        served.step()
        assert served.runner._ahead is not None
    own = [what for thread, what in gpu.waits[before:] if thread == threading.current_thread().name]
    assert own == ["an event"] * 10
    drain(served)
    served.runner.close()


def test_a_page_whose_sequence_has_ended_is_filled_when_the_step_is_over_that_still_has_a_row_of_it(gpu, model) -> None:
    """It ended by a token, which nobody knew when that step was begun; meanwhile its pages are somebody else's, and a move writes them."""
    alone = engine(model, device="cpu", kv_pages=10, **SMALL)
    submit(alone, "r0", prompt(0, 20), max_tokens=20)
    stop = tokens(drain(alone)["r0", 0])[6]
    served = engine(model, kv_pages=10, host_memory="1MiB", prefix_cache=False, **SMALL)
    for i in range(2):
        submit(served, f"r{i}", prompt(i, 20), max_tokens=20, stop_token_ids=(stop,) if i == 0 else (), ignore_eos=True)
    while not any(o.request_id == "r0" and o.finish for o in served.step()):
        pass
    assert served.runner._ahead is not None
    assert len(served.runner._ahead.plan.rows) == 2
    scheduler, ended = served.scheduler, []
    pages = scheduler.pool.allocate(scheduler.pool.counts().free)
    scheduler.moves.start(MoveKind.IN, pages, ended.append, host_pages=range(len(pages)))
    while not ended:
        served.step()
    assert ended[0].error is None
    assert ended[0].pages == len(pages) > 7
    scheduler.pool.release(pages)
    drain(served)
    served.runner.close()
