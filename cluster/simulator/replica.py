"""A replica on the simulation's clock: what `planner` plans takes the time that a speed profile says.

Steps that only decode are not played one by one: from one decision to the next they are one `Stretch`, cut short when something comes in.
The replica reports as the real one does, by event frames from the same event log, with speeds smoothed by the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ...worker.events import Changes, Speeds
from ...worker.protocol import EventFrame, LiveRequest, ModelInfo, ReplicaLoad
from ..messages import Route
from .loop import EventLoop
from .planner import Berth, Planner
from .sequence import Sequence
from .speed_profile import SpeedProfile
from .stretch import Stretch

ALIKE_STEPS = 64  # of a stretch, that the measured speed hears of: what earlier ones said has faded


class Replica:
    """One life of a replica.

    Args:
        route: its name and epoch.
        profile: its speed and size.
        loop: the clock.
        ended: called with each sequence that has its last token.
        news: called between two steps when there is something that no frame has told.
    """

    def __init__(
        self, route: Route, profile: SpeedProfile, loop: EventLoop, ended: Callable[[Sequence], None], news: Callable[[], None]
    ) -> None:
        self.route = route
        self.profile = profile
        self.info = info_of(profile)
        self.planner = Planner(profile.replica)
        self._loop = loop
        self._ended = ended
        self._news = news
        self._speeds = Speeds()
        self._sequences: dict[str, Sequence] = {}
        self._stretch: Stretch | None = None
        self._version = 0  # of the stretch's end
        self._boundary: list[Callable[[], None]] = []  # to be done between two steps
        self._arrivals = self._steps = 0
        self._live_tokens: Counter[str] = Counter()  # output of live requests that was generated here, by tenant
        self._told: int | None = None  # of the log's events

    # --- what comes in ---

    def submit(self, s: Sequence) -> None:
        """A request comes, or one that another replica has begun comes without its pages."""
        self._enlist(s)
        self.planner.queue(s)
        self._disturb()

    def reserve(self, s: Sequence) -> Berth | None:
        """As `Planner.reserve`; so below."""
        self.settle()
        berth = self.planner.reserve(s)
        self._disturb()
        return berth

    def widen(self, berth: Berth, pages: int) -> Berth | None:
        self.settle()
        wider = self.planner.widen(berth, pages)
        self._disturb()
        return wider

    def cancel(self, berth: Berth) -> None:
        self.settle()
        self.planner.cancel(berth)
        self._disturb()

    def arrive(self, s: Sequence, berth: Berth, computed: int) -> None:
        """A request goes on here with its pages."""

        def settle_in() -> None:
            self._enlist(s)
            self.planner.settle_in(s, berth, computed)

        self.between_steps(settle_in)

    def between_steps(self, do: Callable[[], None]) -> None:
        """`do` is called when the step under way has ended, or now."""
        self._boundary.append(do)
        self._disturb()

    def leave(self, s: Sequence) -> None:
        """It goes on elsewhere. Only between two steps."""
        self.planner.take_out(s)
        self._depart(s, moved=True)

    # --- what there is ---

    def idle(self) -> bool:
        """Nothing runs, waits, or is on its way here."""
        return not self._sequences and not self.planner.awaited

    def boundary_s(self) -> float:
        """When the step under way will have ended; now, when there is none."""
        self.settle()
        return self._loop.now_s if self._stretch is None else self._stretch.end_s(1)

    def sequence(self, request_id: str) -> Sequence | None:
        """A request that it has, up to date."""
        s = self._sequences.get(request_id)
        if s is not None and s in self.planner.batch:
            self.settle()
            self.planner.batch.sync(s)
        return s

    def decodes(self, s: Sequence) -> bool:
        """Whether it runs, and has all but its last token computed."""
        return s in self.planner.batch

    def requests(self) -> list[LiveRequest]:
        """What it holds, in the order of arrival."""
        self.settle()
        return [self._row(s) for s in self._sequences.values()]

    def served_tokens(self, tenant: str) -> int:
        """Output of a tenant's live requests that was generated here."""
        self.settle()
        return self._live_tokens[tenant]

    def has_news(self) -> bool:
        """Whether there are events that no frame has told."""
        return self._told != self.planner.log.next

    def frame(self) -> EventFrame:
        """What has changed since the last one; the first is a dump."""
        self.settle()
        log = self.planner.log
        after, self._told = self._told, log.next
        changes = log.since(after)
        served = log.served(None if changes is None else after, self._live_tokens)
        if changes is None:
            changes = Changes(self.planner.pages.findable(), (), tuple(self._sequences), ())
        return EventFrame(
            *self.route,
            after or 0,
            self._told,
            after is None,
            changes.stored,
            changes.removed,
            tuple(self._row(self._sequences[request_id]) for request_id in changes.started),
            changes.ended,
            served,
            self.load(),
            changes.moved,
        )

    def load(self) -> ReplicaLoad:
        """What routing goes by."""
        planner, pages = self.planner, self.planner.pages
        priorities = [*planner.batch.priorities, *(s.priority for s in planner.prefilling)]
        return ReplicaLoad(
            running=len(planner.batch) + len(planner.prefilling),
            waiting=len(planner.waiting),
            pages_total=pages.total,
            pages_free=pages.available - pages.cached,
            pages_cached=pages.cached,
            pages_active=pages.active,
            pages_reserved=0,
            pages_host=0,
            pending_tokens=planner.pending_tokens(),
            lowest_priority=max(priorities, default=-(2**31)),
            prefill_tokens_per_s=self._speeds.prefill_tokens_per_s,
            decode_step_s=self._speeds.decode_step_s,
            steps=self._steps,
        )

    def _row(self, s: Sequence) -> LiveRequest:
        if s in self.planner.batch:
            self.planner.batch.sync(s)
        return LiveRequest(
            s.request_id, s.tenant, s.priority, "running" if s.pages else "waiting", 1, s.prompt_tokens, s.generated, s.pages
        )

    # --- coming and going ---

    def _enlist(self, s: Sequence) -> None:
        s.arrival, s.came_with = self._arrivals, s.generated
        self._arrivals += 1
        self._sequences[s.request_id] = s
        self.planner.log.started(s.request_id, s.tenant)

    def _depart(self, s: Sequence, moved: bool = False) -> None:
        del self._sequences[s.request_id]
        here = s.generated - s.came_with
        self._live_tokens[s.tenant] -= here
        self.planner.log.ended(s.request_id, s.tenant, s.generated, here, moved)

    # --- time ---

    def settle(self) -> None:
        """Counts the steps that have ended by now."""
        stretch = self._stretch
        if stretch is not None and (done := stretch.done(self._loop.now_s)):
            self._decoded(done)
            stretch.drop(done)

    def _decoded(self, steps: int) -> None:
        """So many steps have ended and others follow, whose first one's pages are held now, as those of these were."""
        planner = self.planner
        planner.pages.take(planner.batch.pages_needed(steps, skip=1))
        self._count(steps)

    def _count(self, steps: int) -> None:
        self.planner.batch.advance(steps)
        self._steps += steps
        for tenant, count in self.planner.batch.tenants.items():
            self._live_tokens[tenant] += steps * count

    def _disturb(self) -> None:
        """Something has come in: it is looked at when the step under way has ended, or now."""
        self.settle()
        if self._stretch is None:
            self._begin()
        elif self._stretch.steps > 1:
            self._stretch.steps = 1
            self._await_end(self._stretch)

    def _await_end(self, stretch: Stretch) -> None:
        self._version += 1
        version = self._version

        def end() -> None:
            if version == self._version:
                self._end(stretch)

        self._loop.at(stretch.end_s(), end)

    def _begin(self) -> None:
        """Plans the next steps, if there is anything to compute."""
        while self._boundary:
            self._boundary.pop(0)()
        planner = self.planner
        planner.plan()
        batch, planned = planner.batch, planner.planned
        if batch or planned:
            cost, prompts = self.profile.step, sum(planned.values())
            pairs = sum(n * s.computed + n * (n + 1) / 2 for s, n in planned.items())
            step_s = cost.step_s(prompts, pairs, len(batch), batch.context + len(batch), len(batch) + len(planned))
            steps = 1 if planned else max(batch.steps_with(planner.pages.available, batch.steps_left()), 1)
            planner.pages.take(batch.pages_needed(1))
            self._stretch = Stretch(self._loop.now_s, steps, step_s, cost.context_token_s * len(batch))
            self._await_end(self._stretch)
        elif self.has_news():
            self._news()

    def _end(self, stretch: Stretch) -> None:
        """The stretch is over."""
        last_s = stretch.first_s + (stretch.steps - 1) * stretch.growth_s
        prompts = sum(n for n in self.planner.planned.values() if n > 1)
        for _ in range(min(stretch.steps, ALIKE_STEPS)):
            self._speeds.count(prompts, last_s)
        if stretch.steps > 1:
            self._decoded(stretch.steps - 1)
        self._count(1)
        self._stretch = None
        self._apply()
        if prompts or self.has_news():  # the real one would have filled pages, also where a trace does not say of what
            self._news()
        self._begin()

    def _apply(self) -> None:
        """What the last step of the stretch has come to."""
        planner, now_s = self.planner, self._loop.now_s
        planned, planner.planned = planner.planned, {}
        for s in planner.batch.ended():
            self._finish(s)
        for s, count in planned.items():
            s.computed += count
            planner.index(s)
            if s.computed == s.known:
                planner.prefilling.remove(s)
                s.known += 1
                self._live_tokens[s.tenant] += 1
                s.first_s = now_s if s.first_s is None else s.first_s
                if s.generated >= s.output_tokens:
                    self._finish(s)
                else:
                    planner.batch.add(s)

    def _finish(self, s: Sequence) -> None:
        s.last_s = self._loop.now_s
        self.planner.let_go(s)
        self._depart(s)
        self._ended(s)


def info_of(profile: SpeedProfile) -> ModelInfo:
    """What the cluster is told of such a replica."""
    shape = profile.replica
    tokens, most = shape.pages * shape.page_size, shape.max_running + 1024
    return ModelInfo(profile.name, "", shape.max_model_len, 2**17, (), 0, shape.page_size, tokens, most, shape.max_running, tp=shape.gpus)
