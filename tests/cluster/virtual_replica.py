"""Replicas on a virtual clock: the real engine and router, with a runner that takes time instead of computing.

An hour of traffic passes in seconds, and the same requests always give the same figures. Requests wait first come, first served
in front of the router; what travels takes `DELAY_S`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quire.cluster.messages import AdmitRequest
from quire.cluster.routing import Router
from quire.worker.config import LimitOptions
from quire.worker.door import Door
from quire.worker.engine import Engine, Runner
from quire.worker.page_hash import prefix_hashes
from quire.worker.page_pool import PagePool
from quire.worker.plan import Sampled, StepPlan, StepResult
from quire.worker.protocol import GenerateRequest, ModelInfo, SamplingParams
from quire.worker.scheduler import Scheduler

KEY = b"a key for tests"
DELAY_S = 0.003  # from one process to another
VOCAB = 10_000


class VirtualClock:
    """Seconds that pass only when somebody moves them on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@dataclass(frozen=True)
class Speed:
    """What a step takes: a constant, and so much for each prefilled token and each decoded one."""

    step_s: float = 0.004
    prefill_token_s: float = 0.0005
    decode_token_s: float = 0.001


@dataclass(frozen=True)
class Shape:
    """The size of a replica."""

    pages: int = 512
    page_size: int = 32
    max_batch_tokens: int = 512
    max_running: int = 32
    max_model_len: int = 16_384


class _TimedRunner(Runner):
    def __init__(self, clock: VirtualClock, speed: Speed) -> None:
        self._clock, self._speed = clock, speed

    def run(self, plan: StepPlan) -> StepResult:
        prefill = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        decode = sum(row.num_tokens == 1 for row in plan.rows)
        self._clock.now_s += self._speed.step_s + prefill * self._speed.prefill_token_s + decode * self._speed.decode_token_s
        return StepResult(plan.step, tuple(Sampled(row.seq, row.seq % VOCAB) for row in plan.rows if row.samples))


class VirtualReplica:
    """One replica: `inbox` holds what arrived during a step, `free_s` says when the step is over."""

    def __init__(self, replica_id: str, clock: VirtualClock, speed: Speed, shape: Shape) -> None:
        scheduler = Scheduler(PagePool(shape.pages, shape.page_size, KEY), shape.max_batch_tokens, shape.max_running)
        self.info = ModelInfo(
            "virtual",
            "",
            shape.max_model_len,
            VOCAB,
            (),
            0,
            shape.page_size,
            shape.pages * shape.page_size,
            shape.max_running + 1024,
            shape.max_running,
        )
        self.replica_id = replica_id
        self.engine = Engine(
            scheduler, _TimedRunner(clock, speed), Door.of(self.info, LimitOptions()), self.info, 1024, clock=clock.monotonic
        )
        self.inbox: deque[GenerateRequest] = deque()
        self.free_s: float | None = None  # None: idle


class Job(NamedTuple):
    """One request of the traffic."""

    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass
class Figures:
    """What became of the traffic; `ttft_s` in the order of the jobs."""

    ttft_s: list[float]
    cached_tokens: int = 0
    prompt_tokens: int = 0
    end_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class VirtualCluster:
    """Replicas behind one router."""

    def __init__(self, router: Router, speeds: Sequence[Speed], shape: Shape) -> None:
        clock = self._clock = VirtualClock()
        self._router = router
        self._replicas = {f"r{i}": VirtualReplica(f"r{i}", clock, speed, shape) for i, speed in enumerate(speeds)}
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._line: deque[tuple[AdmitRequest, GenerateRequest]] = deque()
        for name, replica in self._replicas.items():
            router.add(name, 1, replica.info)
            self._report(replica)

    def run(self, jobs: Sequence[Job]) -> Figures:
        """Serve all of `jobs`."""
        self._jobs = jobs
        self._figures = Figures([-1.0] * len(jobs))
        for i, job in enumerate(jobs):
            self._at(job.arrival_s, lambda i=i: self._arrive(i))
        while self._happenings:
            self._clock.now_s, _, happen = heapq.heappop(self._happenings)
            happen()
        return self._figures

    def _at(self, when_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._happenings, (when_s, next(self._order), happen))

    def _arrive(self, i: int) -> None:
        job = self._jobs[i]
        size = next(iter(self._replicas.values())).info.page_size
        length = len(job.prompt)
        hashes = prefix_hashes(KEY, "", job.prompt, size)
        params = SamplingParams(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True)
        admit = AdmitRequest(str(i), 0, "", 0, 0.0, None, 1, length, job.output_tokens, length + job.output_tokens, hashes)
        self._line.append((admit, GenerateRequest(str(i), (job.prompt,), params)))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._line:
            admit, request = self._line[0]
            choice = self._router.choose(admit, self._clock.now_s)
            if choice is None:
                return
            self._line.popleft()
            replica = self._replicas[choice.replica_id]
            self._at(self._clock.now_s + DELAY_S, lambda replica=replica, request=request: self._submit(replica, request))

    def _submit(self, replica: VirtualReplica, request: GenerateRequest) -> None:
        replica.inbox.append(request)
        if replica.free_s is None:
            self._step(replica)

    def _step(self, replica: VirtualReplica) -> None:
        while replica.inbox:
            replica.engine.submit(replica.inbox.popleft())
        outputs = replica.engine.step()
        replica.free_s = None
        if outputs or not replica.engine.idle():
            replica.free_s = self._clock.now_s  # the runner has moved it on
            for output in outputs:
                if output.index == 0 and output.tokens:
                    i = int(output.request_id)
                    self._figures.ttft_s[i] = replica.free_s - self._jobs[i].arrival_s
                    self._figures.cached_tokens += output.cached_tokens or 0
                    self._figures.prompt_tokens += len(self._jobs[i].prompt)
            self._figures.end_s = max(self._figures.end_s, replica.free_s)
            self._at(replica.free_s, lambda: self._after(replica))

    def _after(self, replica: VirtualReplica) -> None:
        self._at(self._clock.now_s + DELAY_S, lambda: self._news(replica))
        self._step(replica)

    def _news(self, replica: VirtualReplica) -> None:
        self._report(replica)
        self._dispatch()

    def _report(self, replica: VirtualReplica) -> None:
        frame = replica.engine.events(replica.replica_id, 1, self._router.resync_point(replica.replica_id, 1))
        self._router.events(frame, self._clock.now_s)
