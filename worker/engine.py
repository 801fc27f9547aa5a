"""One engine: requests in, outputs out, one step at a time. Knows neither threads nor Ray.

plan = scheduler.plan();  result = runner.run(plan);  outputs = scheduler.apply(result)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .config import EngineOptions
from .door import Door
from .events import Changes
from .migration_wire import Format, Offer
from .page_pool import PagePool
from .plan import MemoryBytes, Moved, MoveKind, StepPlan, StepResult
from .protocol import (
    BadRequest,
    EngineStats,
    EventFrame,
    GenerateRequest,
    LiveRequest,
    ModelInfo,
    Overloaded,
    ReplicaLoad,
    SequenceOutput,
)
from .scheduler import Scheduler
from .sequence import Request, Sequence, sequence_seed
from .snapshot import SequenceSnapshot
from .station import Placed

if TYPE_CHECKING:
    from .parallel import RankGroup
    from .tracing import SequenceSpans

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class Runner(Protocol):
    """Whatever computes a plan: the model runner, or in tests something quicker. One that inherits from this moves no pages."""

    def run(self, plan: StepPlan) -> StepResult: ...

    def run_ahead(self, plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        """`run`. Where the device works beside the host, `following` is asked for the next plan meanwhile, and that one is begun too."""
        return self.run(plan)

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that sequences to come will have. It may take long, and is called from any thread.

        Raises:
            BadRequest: it cannot be compiled.
        """
        return

    def reset(self) -> None:
        """Forget every sequence after a `run` that raised. Raises when there is no way back."""

    def memory_bytes(self) -> MemoryBytes: ...

    def poll(self) -> tuple[Moved, ...]:
        """The moves that have ended on every rank since it was asked last. Never waits."""
        return ()

    def watch(self, wake: Callable[[], None]) -> None:
        """Call `wake`, from any thread, whenever `poll` may have something to tell."""
        return

    def addresses(self) -> tuple[str, ...]:
        """The "host:port" of each rank, in their order, at which other replicas reach it to send pages."""
        return ()


@dataclass(slots=True)
class _Rate:
    """Requests that ended per second, smoothed: what Retry-After is computed from."""

    per_s: float = 0.0
    since_s: float = 0.0
    ended: int = 0

    def count(self, ended: int, now_s: float) -> None:
        self.ended += ended
        if now_s - self.since_s >= 1.0:
            latest = self.ended / (now_s - self.since_s)
            self.per_s = latest if self.per_s == 0.0 else 0.7 * self.per_s + 0.3 * latest
            self.since_s, self.ended = now_s, 0


class Engine:
    """One replica's engine. Not thread-safe: `EngineLoop` owns the thread that calls it.

    Args:
        scheduler, runner: the deciding and the computing half.
        door: checks every request.
        info: what front ends are told of the model.
        max_waiting: sequences that may wait.
        seed: where the seeds of requests without one come from.
        page_bytes: of one page, all ranks together.
        kv_format: what pages hold; only between engines that say the same can they move.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        door: Door,
        info: ModelInfo,
        max_waiting: int,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        page_bytes: int = 1,
        kv_format: str = "",
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.door = door
        self.info = info
        self.page_bytes = page_bytes
        self.page_format = Format(info.name, info.page_size, kv_format)
        self._max_waiting = max_waiting
        self._seed = seed
        self._arrivals = 0
        self._sequences = 0
        self._step_s = 0.0
        self._clock = clock
        self._rate = _Rate(since_s=clock())
        self.spans: SequenceSpans | None = None  # set where traces are kept
        self.startup_s: dict[str, float] = {}  # what its start took beside loading, by phase
        self.resting = False  # the latest step found nothing to do: until something comes in, or a move ends, nor will the next

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Check a request; in canonical form. It is the part of `submit` that may take long, once, and may be done before on any thread.

        Raises:
            BadRequest: it is malformed or too large, or its grammar cannot be compiled.
        """
        request = self.door.check(request)
        if request.params.grammar:
            self.runner.prepare(request.params.grammar)
        return request

    def submit(self, request: GenerateRequest) -> GenerateRequest:
        """Check a request and queue all its sequences; the request in canonical form.

        A sequence that is resumed arrives like one that comes back from a preemption: with output tokens of its own, whose keys and
        values, as far as no page is found that holds them, are computed again. They count as recomputed, not as prompt or output.

        Raises:
            BadRequest: it is malformed, too large, its id is in use, or a sequence that it resumes has ended.
            Overloaded: the queue is full.
        """
        request = self.prepare(request)
        if self.scheduler.has_request(request.request_id):
            raise BadRequest("request_id", f"{request.request_id!r} is in use")
        if len(request.choices) > self.room():
            waiting = self.scheduler.num_waiting
            raise Overloaded(f"the queue is full: {waiting} sequences wait, at most {self._max_waiting} may", self._retry_after_s())
        self._arrivals += 1
        sequences = {s.choice: s for s in self._sequences_of(request)}
        for s in sequences.values():
            if s.resumed and self.scheduler.finish_of(s, s.tokens[-1], s.num_output)[0] is not None:
                raise BadRequest("resume", f"the output of choice {s.choice} has ended already")
        self.scheduler.add(
            Request(
                request.request_id,
                request.tenant,
                request.priority,
                sum(map(len, request.prompts)),
                sequences,
                self._deadline_s(request),
                resumed_tokens=sum(s.resumed for s in sequences.values()),
                trace=request.trace,
            )
        )
        if self.spans is not None:
            self.spans.submitted(request, {s.seq: s.choice for s in sequences.values()})
        return request

    def room(self) -> int:
        """Sequences that may be submitted now: free places in the queue and among those that run."""
        return self._max_waiting - self.scheduler.num_waiting + self.scheduler.free_places()

    def snapshot(self, s: Sequence, attempt: int) -> SequenceSnapshot:
        """A sequence as it stands."""
        return SequenceSnapshot.of(s, attempt, s.num_computed if s.pages else 0)

    def arrive(self, offer: Offer, sequences: tuple[SequenceSnapshot, ...], ended_tokens: int, placed: dict[int, Placed]) -> None:
        """Go on with a request that another replica has begun, from where its sequences stand now; those in `placed` run at once."""
        first = sequences[0]
        self._arrivals += 1
        leaders: dict[int, Sequence] = {}  # by prompt: who computes it for those that have no token yet
        arrived: dict[int, Sequence] = {}
        for snapshot in sequences:
            s = self._revived(snapshot, self.scheduler.pool.root(offer.tenant))
            if s.choice not in placed and not s.num_output:
                s.leader = leaders.get(s.choice // s.params.n)
                leaders.setdefault(s.choice // s.params.n, s)
            arrived[s.choice] = s
        deadline_s = None if offer.deadline_ms is None or placed else self._clock() + offer.deadline_ms / 1000
        came_tokens = ended_tokens + sum(s.num_output for s in arrived.values())
        request = Request(
            first.request_id,
            offer.tenant,
            first.priority,
            offer.prompt_tokens,
            arrived,
            deadline_s,
            ended_tokens,
            came_tokens,
            offer.trace,
        )
        self.scheduler.arrive(request, placed)
        if self.spans is not None:
            self.spans.submitted(_as_submitted(offer, arrived), {s.seq: s.choice for s in arrived.values()})

    def _revived(self, snapshot: SequenceSnapshot, root: bytes) -> Sequence:
        self._sequences += 1
        return Sequence(
            self._sequences - 1,
            snapshot.request_id,
            snapshot.choice,
            list(snapshot.tokens),
            snapshot.prompt_len,
            snapshot.params,
            snapshot.max_tokens,
            snapshot.seed,
            root,
            (snapshot.priority, self._arrivals, snapshot.choice),
            resumed=len(snapshot.tokens) - snapshot.prompt_len,
            cached_tokens=snapshot.cached_tokens,
        )

    def abort(self, request_id: str, choice: int | None = None) -> list[SequenceOutput]:
        """End a request, or one of its sequences, at once; the terminal outputs (none if it is not alive)."""
        return self.traced(self.scheduler.abort(request_id, choice))

    def step(self) -> list[SequenceOutput]:
        """Compute one step; what each sequence gained. Nothing to do gives an empty list.

        A runner that raises does not end the engine: its sequences are computed one at a time until the one to blame is found, which
        ends alone with `FinishReason.ERROR` (`Isolation`).

        Raises:
            Exception: the runner's own, once it is clear that no sequence is to blame, or when the runner cannot start over.
        """
        started_s = self._clock()
        self.scheduler.moves.ended(self.runner.poll())
        outputs = self.scheduler.expire(started_s)
        plan = self.scheduler.plan()
        self.resting = plan is None
        if plan is None:
            return self.traced(outputs)
        try:
            result = self.runner.run_ahead(plan, self.scheduler.plan_ahead)
        except Exception as error:  # noqa: BLE001  whatever a sequence may provoke; the engine's own fault is raised again
            return self.traced(outputs + self._contain(error))
        outputs += self.scheduler.apply(result)
        now_s = self._clock()
        self._step_s += now_s - started_s
        if plan.rows:
            self.scheduler.speeds.count(sum(row.num_tokens for row in plan.rows if row.num_tokens > 1), now_s - started_s)
        self.scheduler.took(plan, now_s - started_s)
        self._rate.count(sum(o.finish is not None for o in outputs), now_s)
        return self.traced(outputs, plan, now_s - started_s)

    def traced(self, outputs: list[SequenceOutput], plan: StepPlan | None = None, took_s: float = 0.0) -> list[SequenceOutput]:
        """`outputs`, noted where traces are kept."""
        if self.spans is not None:
            self.spans.stepped([new.seq for new in plan.new] if plan is not None else (), outputs, took_s)
        return outputs

    def _contain(self, error: Exception) -> list[SequenceOutput]:
        log.warning("a step raised; looking for the request that makes it", exc_info=error)
        self.runner.reset()
        outputs = self.scheduler.fail(f"the model could not compute it: {error!r}")
        if self.scheduler.isolation.hopeless:
            raise error
        for output in outputs:
            who = {"request_id": output.request_id}
            log.error("choice %d makes a step raise and was ended: %r", output.choice, error, extra=who)
        return outputs

    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.scheduler.idle()

    def stats(self) -> EngineStats:
        """Counters and gauges as they stand."""
        c, pages, host = self.scheduler.counters, self.scheduler.pool.counts(), self.scheduler.host.pages.counts()
        decisions = self.scheduler.decisions
        return EngineStats(
            steps=c.steps,
            running=len(self.scheduler.running) + len(self.scheduler.arriving),
            waiting=self.scheduler.num_waiting,
            pages_total=pages.total,
            pages_free=pages.free,
            pages_cached=pages.cached,
            pages_active=pages.active,
            pages_reserved=pages.reserved,
            prompt_tokens=c.prompt_tokens,
            output_tokens=c.output_tokens,
            prefix_query_tokens=c.prefix_query_tokens,
            prefix_hit_tokens=c.prefix_hit_tokens,
            recomputed_tokens=c.recomputed_tokens,
            preemptions=dict(decisions.counts),
            step_seconds=self._step_s,
            host_pages_free=host.free,
            host_pages_cached=host.cached,
            host_pages_active=host.active,
            host_hit_tokens=c.host_hit_tokens,
            moved_bytes={
                kind.value: n * self.page_bytes for kind, n in self.scheduler.moves.moved_pages.items() if kind is not MoveKind.ERASE
            },
            stall_seconds=c.stall_s,
            predicted_seconds=dict(decisions.predicted_s),
            actual_seconds=dict(decisions.actual_s),
            disk_pages=self.scheduler.disk.used,
        )

    def load(self) -> ReplicaLoad:
        """What routing goes by."""
        scheduler, pages, host = self.scheduler, self.scheduler.pool.counts(), self.scheduler.host.pages.counts()
        return ReplicaLoad(
            running=len(scheduler.running) + len(scheduler.arriving),
            waiting=scheduler.num_waiting,
            pages_total=pages.total,
            pages_free=pages.free,
            pages_cached=pages.cached,
            pages_active=pages.active,
            pages_reserved=pages.reserved,
            pages_host=host.active + host.cached,
            pending_tokens=scheduler.pending_tokens(),
            lowest_priority=scheduler.running[-1].priority if scheduler.running else -(2**31),
            prefill_tokens_per_s=scheduler.speeds.prefill_tokens_per_s,
            decode_step_s=scheduler.speeds.decode_step_s,
            steps=scheduler.counters.steps,
        )

    def requests(self) -> list[LiveRequest]:
        """The requests that live, in the order of arrival."""
        return self.scheduler.live()

    def has_news(self, after: int | None) -> bool:
        """Whether `events(..., after)` would tell more than the load."""
        return after != self.scheduler.pool.events.next

    def events(self, replica_id: str, epoch: int, after: int | None) -> EventFrame:
        """What has changed since the event numbered `after`, or a dump of all there is when that cannot be told."""
        pool = self.scheduler.pool
        changes, live = pool.events.since(after), self.scheduler.live()
        served = pool.events.served(None if changes is None else after, self.scheduler.served_tokens())
        dump = changes is None
        if changes is None:
            changes = Changes(pool.findable(), (), tuple(r.request_id for r in live), ())
        started = set(changes.started)
        return EventFrame(
            replica_id,
            epoch,
            after or 0,
            pool.events.next,
            dump,
            changes.stored,
            changes.removed,
            tuple(r for r in live if r.request_id in started),
            changes.ended,
            served,
            self.load(),
            changes.moved,
        )

    def _retry_after_s(self) -> float:
        """How long the sequences that wait will take to get a place, at the measured rate; between 1 and 60 seconds."""
        return min(max(self.scheduler.num_waiting / self._rate.per_s, 1.0), 60.0) if self._rate.per_s else 1.0

    def _deadline_s(self, request: GenerateRequest) -> float | None:
        if request.deadline_ms is None:
            return None
        resume = request.resume or {}
        if any(resume.values()) or (resume and len(resume) < len(request.prompts) * request.params.n):
            return None  # it has had its turn, elsewhere
        return self._clock() + request.deadline_ms / 1000

    def _sequences_of(self, request: GenerateRequest) -> list[Sequence]:
        params, sequences = request.params, []
        root = self.scheduler.pool.root(request.tenant)
        source = sequence_seed(self._seed, self._arrivals) if request.seed is None else request.seed
        leaders: dict[int, Sequence] = {}  # by prompt
        for choice in request.choices:
            i, k = divmod(choice, params.n)
            prompt = request.prompts[i]
            output = request.resume[choice] if request.resume is not None else ()
            s = Sequence(
                seq=self._sequences,
                request_id=request.request_id,
                choice=choice,
                tokens=[*prompt, *output],
                prompt_len=len(prompt),
                params=params,
                max_tokens=self.door.longest(len(prompt)) if params.max_tokens is None else params.max_tokens,
                seed=sequence_seed(sequence_seed(source, i + 1) if params.seed is None else params.seed, k),
                root=root,
                order=(request.priority, self._arrivals, choice),
                resumed=len(output),
                leader=leaders.get(i),
            )
            leaders.setdefault(i, s)
            self._sequences += 1
            sequences.append(s)
        return sequences


def _as_submitted(offer: Offer, sequences: dict[int, Sequence]) -> GenerateRequest:
    """The request of sequences that have arrived. Prompts all of whose choices have ended are empty."""
    first = offer.sequences[0]
    prompts = {choice // first.params.n: tuple(s.tokens[: s.prompt_len]) for choice, s in sequences.items()}
    in_order = tuple(prompts.get(i, ()) for i in range(max(prompts) + 1))
    return GenerateRequest(
        first.request_id, in_order, first.params, first.priority, offer.tenant, offer.deadline_ms, trace=offer.trace, attempt=first.attempt
    )


def build_engine(
    options: EngineOptions,
    hash_key: bytes,
    progress: Progress | None = None,
    group: RankGroup | None = None,
    host: str | None = None,
    warming: Progress | None = None,
) -> Engine:
    """Load the model and make an engine around it.

    Args:
        options: what to serve, and with how much.
        hash_key: secret of the page hashes, at most 64 bytes; the same in the whole cluster.
        progress: called with (done, total) while weights load.
        group: the ranks that share the model, of which this is the leader; None for `tp=1`.
        host: this process's address, at which other replicas may reach it; None: they may not.
        warming: called with (done, total) while a GPU warms up.

    Raises:
        ValueError: an option or the model is not supported; names it.
    """
    from .build import build_runner  # here, so that the deciding half can be used and tested without torch

    runner, sizes = build_runner(options, progress, group, host, warming)
    scheduler_options = options.scheduler
    page_size = options.cache.page_size
    pool = PagePool(sizes.pages, page_size, hash_key, options.cache.prefix_cache)
    max_running = min(scheduler_options.max_running, scheduler_options.max_batch_tokens)
    info = sizes.info._replace(
        page_size=page_size,
        pool_tokens=sizes.pages * page_size,
        max_sequences=max_running + scheduler_options.max_waiting,
        max_running=max_running,
        tp=options.parallel.tp,
    )
    engine = Engine(
        Scheduler(
            pool,
            scheduler_options.max_batch_tokens,
            max_running,
            info.eos_token_ids,
            sizes.host_pages,
            options.cache.preemption,
            options.cache.disk_memory // sizes.page_bytes if options.cache.disk_path else 0,
        ),
        runner,
        Door.of(info, options.limits),
        info,
        scheduler_options.max_waiting,
        options.model.seed,
        page_bytes=sizes.page_bytes,
        kv_format=sizes.kv_format,
    )
    engine.startup_s = sizes.startup_s
    return engine
