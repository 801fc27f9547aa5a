"""Several ranks that work as on GPUs: from graphs, and a step ahead. The tokens are those of the ranks of a CPU, and of one rank.

On a CPU the followers are threads, and what stands in place of a graph notes what it does; `-m gpu` runs two GPUs with real graphs.
"""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from device_ranks import Watched, count_ahead, device_follower_process, device_leader_process, one_launch_at_a_time
from ranks import KEY, WAIT_S, generate, ranks, spawn, tiny_options, tokens
from tiny_models import SIZES, random_model, tiny_checkpoint
from transformers import LlamaConfig

from quire.worker.config import EngineOptions
from quire.worker.device_runner import DeviceFollower, DeviceRunner
from quire.worker.engine import Engine, Runner, build_engine
from quire.worker.parallel import GroupBroken, lead
from quire.worker.plan import MemoryBytes, Sampled, StepPlan, StepResult
from quire.worker.plan_wire import unpack
from quire.worker.protocol import GenerateRequest, SamplingParams, SequenceOutput
from quire.worker.rendezvous import LOOPBACK, address_of, listen
from quire.worker.runner import LeaderRunner
from quire.worker.sequence_table import PENDING

GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(1, 97, (n,), generator=GENERATOR).tolist() for n in (1, 9, 33)]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=8, temperature=1.0, ignore_eos=True, logprobs=2)
SCORED = replace(DRAWN, max_tokens=4, prompt_logprobs=1)  # its steps are not planned ahead


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LlamaConfig(**SIZES)).save_pretrained(path)
    return path


@contextmanager
def as_on_gpus() -> Iterator[Watched]:
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        watched.install_without_triton(patch.setattr)
        yield watched


def options_of(path: Path, tp: int, step_timeout_s: float = 60.0) -> EngineOptions:
    return tiny_options(path, tp, step_timeout_s, attention="torch")


def plain(path: Path, tp: int, *params: SamplingParams) -> list[list[list[int]]]:
    with ranks(options_of(path, tp)) as several:
        return [tokens(generate(several.engine, PROMPTS, p)) for p in params]


def check_alike(watched: Watched, tp: int) -> None:
    """All ranks have captured and replayed the same, in the same order, and know the same tokens but for those of the last two steps."""
    leader, *followers = sorted(watched.runners, key=lambda runner: isinstance(runner, DeviceFollower))
    assert isinstance(leader, DeviceRunner)
    assert len(watched.captures) == 1 + len(followers) == tp
    for follower in followers:
        other = follower._table._tokens != leader._table._tokens
        assert (follower._table._tokens[other] == PENDING).all()
        assert other.sum(axis=1).max() <= 2
    first, *others = (capture.done for capture in watched.captures)
    assert len(set(first)) > 4
    assert all(done == first for done in others)


def until_idle(engine: Engine) -> list[SequenceOutput]:
    outputs = []
    while not engine.idle():
        outputs += engine.step()
        engine.scheduler.check()
    return outputs


def by_choice(outputs: list[SequenceOutput]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for o in outputs:
        found.setdefault((o.request_id, o.choice), []).extend(o.tokens)
    return found


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_tokens_are_those_of_the_plain_path(tp: int, checkpoint: Path) -> None:
    with as_on_gpus() as watched, ranks(options_of(checkpoint, tp)) as several:
        assert [what for what, _ in watched.captures[0].done].count("capture") == 4, "all buckets are captured before the first request"
        ahead = count_ahead(several.engine.runner)
        found, counts = [], []
        for params in (GREEDY, DRAWN, SCORED):
            found.append(tokens(generate(several.engine, PROMPTS, params)))
            counts.append(len(ahead))
    check_alike(watched, tp)
    assert [what for what, _ in watched.captures[0].done].count("capture") == 4
    for ranks_of_a_cpu in {1, tp}:
        assert found == plain(checkpoint, ranks_of_a_cpu, GREEDY, DRAWN, SCORED)
    assert counts[0] >= 9, "every step is planned ahead but the first"
    assert counts[1] >= counts[0] + 7
    assert counts[2] == counts[1], "who asks for scores of the prompt is waited for"


@pytest.mark.parametrize("preemption", ["recompute", pytest.param("swap", marks=pytest.mark.slow)])
def test_ranks_follow_through_preemption_and_shared_pages(preemption: str, checkpoint: Path) -> None:
    def outputs(tp: int) -> dict[tuple[str, int], list[int]]:
        options = options_of(checkpoint, tp)
        cache = replace(options.cache, kv_pages=15, host_memory=2**20 * (preemption == "swap"), preemption=preemption)
        with ranks(replace(options, cache=cache)) as several:  # one prompt and its output take 11
            for i, prompt in enumerate(PROMPTS):
                params = SamplingParams(n=2, max_tokens=10, temperature=1.0, seed=i, ignore_eos=True)
                several.engine.submit(GenerateRequest(str(i), (tuple(prompt),), params))
            found = by_choice(until_idle(several.engine))
            assert several.engine.stats().preemptions[preemption] > 0
        return found

    with as_on_gpus() as watched:
        found = outputs(2)
    check_alike(watched, 2)
    assert found == outputs(1)
    assert {len(t) for t in found.values()} == {10}


def test_rows_that_are_dropped_while_the_next_step_is_under_way(checkpoint: Path) -> None:
    """A sequence that is frozen meanwhile, and goes on later, computes again from a token that every rank knows by then; what was drawn for
    its dropped row is nobody's. An aborted one leaves."""
    params = replace(DRAWN, max_tokens=24)
    want = plain(checkpoint, 1, params)[0]
    with as_on_gpus() as watched, ranks(options_of(checkpoint, 2)) as several:
        engine, outputs, dropped = several.engine, [], 0
        for i, prompt in enumerate(PROMPTS):
            engine.submit(GenerateRequest(str(i), (tuple(prompt),), replace(params, seed=i)))
        while not any(o.request_id == "2" for o in outputs):
            outputs += engine.step()
        engine.abort("0")
        leader = next(runner for runner in watched.runners if isinstance(runner, DeviceRunner))
        while (held := engine.scheduler.request("1")) is not None:
            dropped += leader._ahead is not None and any(row.seq == 1 for row in leader._ahead.plan.rows)
            engine.scheduler.freeze(held)
            for _ in range(2):
                outputs += engine.step()
            engine.scheduler.thaw(held)
            for _ in range(3):
                outputs += engine.step()
        outputs += until_idle(engine)
    assert dropped >= 5
    check_alike(watched, 2)
    found = by_choice(outputs)
    assert [found["1", 0], found["2", 0]] == want[1:]
    assert found["0", 0] == want[0][: len(found["0", 0])]


def test_a_follower_that_is_told_too_much(checkpoint: Path) -> None:
    with as_on_gpus() as watched:
        with ranks(options_of(checkpoint, 2)) as several:
            generate(several.engine, PROMPTS[:1], GREEDY)
        # Its thread has ended, and with it the last step, whose token the leader has before the follower notes that it was drawn.
        follower = next(runner for runner in watched.runners if isinstance(runner, DeviceFollower))
        with pytest.raises(ValueError, match="the leader tells of 3 tokens, and 2 have been drawn"):  # of the last two steps
            follower.run(empty(0), (1, 2, 3))


def test_ranks_with_other_kernels_are_refused_by_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter(("torch", "compiled"))
    monkeypatch.setattr("quire.worker.build.kernels_of", lambda *args: next(kinds))
    with pytest.raises(ValueError, match=r"rank 1: has \w+ kernels, and the leader \w+"), ranks(tiny_options(checkpoint, 2)):
        pass


# --- what the leader says ---


class Told:
    """In place of the group: what the other ranks would hear."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, tuple[int, ...]]] = []  # (step, tokens)

    def send(self, message: bytes) -> None:
        step = unpack(message)
        assert step is not None
        self.steps.append((step.plan.step, step.sampled))


class OneAhead(Runner):
    """Answers a step with its number, after the next one has been begun."""

    broken = False

    def run(self, plan: StepPlan) -> StepResult:
        return self.run_ahead(plan, lambda: None)

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        following()
        if self.broken:
            raise MemoryError("no memory")
        return StepResult(plan.step, (Sampled(0, plan.step),))

    def memory_bytes(self) -> MemoryBytes:
        return MemoryBytes(0, 0)


def empty(step: int) -> StepPlan:
    return StepPlan(step, (), (), (), (), ())


def test_a_plan_that_was_made_ahead_does_not_wait_for_the_tokens_of_the_step_before() -> None:
    told: Any = Told()
    runner: Any = OneAhead()
    leader = LeaderRunner(runner, told)
    leader.run_ahead(empty(0), lambda: empty(1))
    assert told.steps == [(0, ()), (1, ())]
    leader.run_ahead(empty(1), lambda: empty(2))
    assert told.steps[2:] == [(2, (0,))]
    leader.run_ahead(empty(2), lambda: None)
    assert told.steps[3:] == []
    leader.run(empty(3))
    assert told.steps[3:] == [(3, (1, 2))]
    leader.run(empty(4))
    assert told.steps[4:] == [(4, (3,))]


def test_a_step_that_raises_with_another_one_begun_is_the_last() -> None:
    told: Any = Told()
    runner: Any = OneAhead()
    leader = LeaderRunner(runner, told)
    runner.broken = True
    with pytest.raises(MemoryError):
        leader.run_ahead(empty(0), lambda: empty(1))
    with pytest.raises(GroupBroken, match="an earlier step failed: no memory"):
        leader.run_ahead(empty(1), lambda: empty(2))
    with pytest.raises(GroupBroken, match="cannot forget a step that failed: no memory"):
        leader.reset()
    assert [step for step, _ in told.steps] == [0, 1]


# --- with all the parts, and in processes ---


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_with_the_kernels_of_a_gpu(tp: int, tmp_path: Path) -> None:
    """Triton's, in the interpreter."""
    path = tiny_checkpoint(tmp_path)
    options = options_of(path, tp, 600.0)  # a step takes seconds
    want = [o[:6] for o in plain(path, 1, GREEDY)[0]], [o[:6] for o in plain(path, 1, DRAWN)[0]]
    of_a_gpu = replace(options, model=replace(options.model, attention="triton"), cache=replace(options.cache, page_size=16, kv_pages=20))
    watched = Watched()
    with pytest.MonkeyPatch.context() as patch:
        one_launch_at_a_time(patch.setattr)
        watched.install(patch.setattr)
        with ranks(replace(of_a_gpu, scheduler=replace(options.scheduler, max_running=4))) as several:
            ahead = count_ahead(several.engine.runner)
            found = tuple(tokens(generate(several.engine, PROMPTS, replace(p, max_tokens=6))) for p in (GREEDY, DRAWN))
    assert found == want
    assert len(ahead) >= 10
    check_alike(watched, tp)


@pytest.mark.slow
def test_a_killed_follower_breaks_the_step_that_was_begun_ahead(checkpoint: Path) -> None:
    options = options_of(checkpoint, 2, 600.0)
    broken: queue.Queue[str] = queue.Queue()
    listener = listen(LOOPBACK)
    process = spawn(device_follower_process, 1, 2, address_of(listener), options)
    with as_on_gpus():
        engine = build_engine(options, KEY, group=lead(listener, 2, 600.0, broken.put, torch.device("cpu")))
    ahead = count_ahead(engine.runner)
    generate(engine, PROMPTS, GREEDY)
    engine.submit(GenerateRequest("late", ((1, 2, 3),), SamplingParams(max_tokens=40, ignore_eos=True)))
    begun = len(ahead)
    engine.step()
    assert len(ahead) == begun + 1
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(GroupBroken):
        until_idle(engine)
    assert "a rank is gone" in broken.get(timeout=WAIT_S)
    process.join(WAIT_S)


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices")
    ]),
])  # fmt: skip
def test_two_processes_with_a_device_each(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs with graphs that hold NCCL's sums."""
    path = tiny_checkpoint(tmp_path)
    want = plain(path, 1, GREEDY, DRAWN)
    options = options_of(path, 2)
    if device == "cuda":
        model = replace(options.model, device=device, dtype="float32", attention="triton")
        options = replace(options, model=model, cache=replace(options.cache, page_size=16, kv_pages=20))
    said = get_context("spawn").Queue()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # each rank sees one device, as Ray would have it
    processes = [spawn(device_leader_process, options, PROMPTS, [GREEDY, DRAWN], said)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    try:
        processes.append(spawn(device_follower_process, 1, 2, said.get(timeout=WAIT_S), options))
        assert [said.get(timeout=4 * WAIT_S) for _ in want] == want  # a GPU's kernels are compiled first
        assert said.get(timeout=WAIT_S) >= 14, "every step is planned ahead but the first of each"
        processes[1].join(WAIT_S)
        assert processes[1].exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join(WAIT_S)
