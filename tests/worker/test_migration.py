"""A request moves while it runs: nothing of its text changes, and nothing is left behind, whatever goes wrong on the way."""

from __future__ import annotations

import pytest
from migration_world import PAGE, Trouble, World, assert_idle

from quire.worker.config import MigrationOptions
from quire.worker.migration import LEASE_S, Source
from quire.worker.migration_destination import Destination
from quire.worker.migration_wire import Accept, Commit, Committed, Offer, Pages, Ready
from quire.worker.protocol import Outcome

PROMPT = list(range(1, 11))


def said(world: World) -> list[str]:
    return [f"{e.sender.replica_id} {type(e.message).__name__}" for e in world.said]


def test_a_running_request_moves_with_its_pages():
    world = World()
    stream = world.submit("A", "r", PROMPT)
    for _ in range(5):
        world.turn()
    had = len(stream.have(0))
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    assert said(world) == ["A Offer", "B Accept", "A Pages", "B Ready", "A Pages", "B Ready", "A Commit", "B Committed"]
    ((_, result),) = world.results
    assert result.outcome is Outcome.MOVED
    assert result.pages == -(-(len(PROMPT) + had + 2) // PAGE)
    assert 0 < result.downtime_ms < 60
    assert stream.owner == "B"
    assert_idle(world["A"])
    world.settle()
    computed = [world[name].engine.runner.computed_tokens for name in "AB"]
    assert sum(computed) == len(PROMPT) + 24 - 1  # nothing was computed twice
    assert stream.resumed == 0


def test_the_exact_pages_travel_and_come_back():
    world = World(prefix_cache=False)
    world.submit("A", "r", PROMPT)
    world.until(lambda: len(world.streams["r"].have(0)) == 3)
    (a,) = world["A"].engine.scheduler.running
    assert a.pages == [0, 1, 2]
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    (b,) = world["B"].engine.scheduler.running
    assert b.pages[:4] == [0, 1, 2, 3]
    assert world["A"].engine.scheduler.pool.counts().free == 64
    assert world["B"].engine.scheduler.pool.counts().reserved == 0
    world.settle()


def test_what_the_destination_has_is_not_sent():
    world = World()
    world.submit("B", "other", PROMPT, max_tokens=2)
    world.until(lambda: world.streams["other"].over)
    stream = world.submit("A", "r", PROMPT)
    world.until(lambda: len(stream.have(0)) == 1)
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    (accept,) = [e.message for e in world.said if isinstance(e.message, Accept)]
    assert accept.found == (2,)
    assert world.results[0][1].pages < -(-len(PROMPT) // PAGE) + 1
    world.settle()


def test_when_everything_is_there_no_page_travels():
    world = World()
    for name in "AB":
        world.submit(name, f"before {name}", list(range(8)), max_tokens=1)
    world.until(lambda: all(s.over for s in world.streams.values()))
    world.submit("A", "r", list(range(8)), max_tokens=30)
    world.turn("A")
    (s,) = world["A"].engine.scheduler.running
    world.migrate("r", "A", "B")
    while s.num_computed % PAGE:
        world.turn("A")
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.MOVED
    world.settle()


def test_a_request_moves_back_and_forth_every_few_tokens():
    world = World()
    stream = world.submit("A", "r", PROMPT, max_tokens=200)
    for hop in range(12):
        source, to = "AB" if hop % 2 == 0 else "BA"
        have = len(stream.have(0))
        world.until(lambda have=have: len(stream.have(0)) > have)
        world.migrate("r", source, to)
        world.until(lambda hop=hop: len(world.results) == hop + 1)
    assert [r.outcome for _, r in world.results] == [Outcome.MOVED] * 12
    assert stream.resumed == 0
    world.settle()


def test_all_choices_move_and_shared_pages_travel_once():
    world = World()
    stream = world.submit("A", "r", [PROMPT, [20, 21]], n=3)
    world.until(lambda: all(len(stream.have(c)) > 2 for c in range(6)))
    shared = world["A"].engine.scheduler.running[0].pages[0]
    assert world["A"].engine.scheduler.pool.references[shared] == 3
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.MOVED
    first = world["B"].engine.scheduler.running[0]
    assert world["B"].engine.scheduler.pool.references[first.pages[0]] == 3
    assert stream.resumed == 0
    world.settle()


def test_a_choice_that_ends_on_the_way_is_left_out():
    world = World(trouble=Trouble(longest_s=0.03))
    stream = world.submit("A", "r", PROMPT, n=3, max_tokens=60)
    world.until(lambda: len(stream.have(0)) > 1)
    world.migrate("r", "A", "B")
    world.turn()
    world["A"].loop.abort("r", 1)
    stream.ended[1] = "given up"
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.MOVED
    assert set(world["B"].engine.scheduler.request("r").sequences) == {0, 2}
    world.until(lambda: stream.over)
    world.streams.clear()
    world.settle()


def test_a_prefill_moves_while_it_runs():
    world = World(max_batch_tokens=4, pages=64)
    long = [i % 40 for i in range(80)]
    stream = world.submit("A", "r", long)
    world.turn("A")
    world.migrate("r", "A", "B")
    world.until(lambda: bool(stream.have(0)) or bool(world.results))
    sent = world["A"].engine.scheduler.moves.moved_pages
    assert not world.results
    assert sum(sent.values()) > 10  # most of it was there before the first token
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.MOVED
    assert world["B"].engine.runner.computed_tokens == 0 or len(stream.have(0)) > 0
    world.settle()
    assert world["B"].engine.runner.computed_tokens < 30


def test_a_waiting_request_moves_without_pages():
    world = World(max_running=1)
    world.submit("A", "first", PROMPT, max_tokens=40)
    world.turn()
    waiting = world.submit("A", "r", [7, 8, 9], n=2, max_tokens=5)
    world.turn("A")
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    assert said(world) == ["A Offer", "B Accept", "A Commit", "B Committed"]
    assert world.results[0][1][:2] == (Outcome.MOVED, 0)
    assert waiting.owner == "B"
    world.settle()


def test_a_waiting_request_that_starts_on_the_way_moves_with_its_pages():
    world = World(max_running=1)
    world.submit("A", "first", PROMPT, max_tokens=4)
    world.turn("A")
    stream = world.submit("A", "r", [7, 8, 9, 7, 8], max_tokens=60)
    world.turn("A")
    world.migrate("r", "A", "B")
    for _ in range(10):  # B has not looked at the offer yet
        world.turn("A")
    assert len(stream.have(0)) > 3
    world.until(lambda: bool(world.results))
    outcome, pages = world.results[0][1][:2]
    assert outcome is Outcome.MOVED
    assert pages >= 2
    assert world["B"].engine.scheduler.running[0].request_id == "r"
    world.settle()


@pytest.mark.parametrize("full", [False, True])
def test_a_victim_of_a_lack_of_pages_moves_to_where_there_is_room_or_gives_way_here(full):
    world = World(pages=12, max_batch_tokens=40, preemption="migrate")
    if full:
        world.submit("B", "other", [1] * 20, max_tokens=28)
        world.turn("B")
    world["A"].loop.relief(world["B"].peer, 10)
    for i in range(2):
        world.submit("A", f"r{i}", PROMPT, seed=i, max_tokens=24)
    counts = world["A"].engine.scheduler.decisions.counts
    world.settle()
    assert counts["migrate"] > 0
    assert (counts["recompute"] > 0) is full
    assert (world["B"].engine.scheduler.moves.moved_pages["receive"] > 0) is not full
    assert (world["A"].engine.scheduler.costs().handshake_s > 0) is not full
    assert all(s.resumed == 0 for s in world.streams.values())


def test_what_was_preempted_moves_without_pages_and_keeps_its_tokens():
    world = World(pages=12, max_batch_tokens=40)
    for i in range(3):
        world.submit("A", f"r{i}", PROMPT, seed=i, max_tokens=24)
    preempted = world["A"].engine.scheduler.decisions.counts
    world.until(lambda: preempted["recompute"] > 0)
    (name,) = {s.request_id for s in world["A"].engine.scheduler.waiting}
    world.migrate(name, "A", "B")
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.MOVED
    world.settle()


def test_a_prefix_is_copied_and_found_there():
    world = World()
    stream = world.submit("A", "r", PROMPT + PROMPT, max_tokens=40)
    world.until(lambda: len(stream.have(0)) > 2)
    world.migrate("r", "A", "B", fill=True)
    world.until(lambda: bool(world.results))
    outcome, pages = world.results[0][1][:2]
    assert (outcome, stream.owner) == (Outcome.FILLED, "A")
    assert world["B"].engine.scheduler.pool.counts().cached == pages >= 5
    again = world.submit("B", "again", PROMPT + PROMPT, max_tokens=4)
    world.until(lambda: again.over)
    assert world["B"].engine.stats().prefix_hit_tokens == 16
    world.settle()


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"max_running": 1}, "it needs 2 places, and 1 are free"),
        ({"pages": 3}, "exceed the KV pool"),
        ({"pages": 12}, "pages, and"),
        ({"page_size": 2}, "its pages are"),
    ],
)
def test_the_destination_refuses_and_says_why(engine, reason):
    world = World()
    world.replicas["B"] = type(world["A"])(world, "B", **({"pages": 64, "page_size": PAGE} | engine))
    stream = world.submit("A", "r", PROMPT, n=2, max_tokens=30)
    if engine == {"pages": 12}:
        world.submit("B", "other", [5] * 30, max_tokens=10)
    world.until(lambda: len(stream.have(0)) > 2)
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    result = world.results[0][1]
    assert result.outcome is Outcome.REFUSED
    assert reason in result.reason
    world.settle()


def test_other_refusals():
    world = World("AB")
    world.migrate("nobody", "A", "B")
    world.migrate("nobody", "A", "A")
    world.turn()
    assert [r.reason for _, r in world.results] == ["no request 'nobody' is alive here", "it is there already"]
    stream = world.submit("A", "r", PROMPT)
    world.turn()
    world["B"].loop.unsubscribe("ingress/1")
    world.migrate("r", "A", "B")
    world.until(lambda: len(world.results) == 3)
    assert "no stream to its ingress" in world.results[2][1].reason
    world.until(lambda: stream.over)


def test_who_is_to_be_empty_takes_nothing_until_that_is_over():
    world = World()
    stream = world.submit("A", "r", PROMPT, max_tokens=60)
    world.until(lambda: len(stream.have(0)) > 2)
    world["B"].loop.drain(True)
    world.migrate("r", "A", "B")
    world.until(lambda: len(world.results) == 1)
    assert world.results[0][1].outcome is Outcome.REFUSED
    assert "it is to be empty" in world.results[0][1].reason
    world["B"].loop.drain(False)
    world.migrate("r", "A", "B")
    world.until(lambda: len(world.results) == 2)
    assert world.results[1][1].outcome is Outcome.MOVED
    world.settle()


def test_pages_are_offered_in_vain_where_nobody_listens_and_what_waits_moves_all_the_same():
    world = World(max_running=1)
    stream = world.submit("A", "r", PROMPT, max_tokens=60)
    world.submit("A", "waits", PROMPT, seed=1, max_tokens=4)
    world.until(lambda: len(stream.have(0)) > 2)
    world["B"].engine.runner.addresses = tuple
    asked_s = world.now_s
    for name in ("r", "waits"):
        world.migrate(name, "A", "B")
    world.until(lambda: len(world.results) == 2)
    assert world.now_s - asked_s < 1.0
    results = dict(world.results)
    assert results["r"].outcome is Outcome.REFUSED
    assert "takes no pages" in results["r"].reason
    assert results["waits"].outcome is Outcome.MOVED
    world.settle()


def test_no_more_than_so_many_at_once_and_the_others_wait():
    world = World(options=MigrationOptions(migration_bandwidth=10**9, max_migrations=2), max_running=16, max_batch_tokens=32)
    for i in range(6):
        world.submit("A", f"r{i}", [i, *PROMPT], seed=i, max_tokens=60)
    world.turn()
    for i in range(6):
        world.migrate(f"r{i}", "A", "B")
    most = 0

    def count() -> None:
        nonlocal most
        most = max(most, len(world["A"].leaving()), len(world["B"].arriving()))

    world.on_turn = count
    world.until(lambda: len(world.results) == 6)
    assert {r.outcome for _, r in world.results} == {Outcome.MOVED}
    assert most == 2
    world.settle()


def test_bytes_are_sent_no_faster_than_the_budget_allows():
    world = World(options=MigrationOptions(migration_bandwidth=100), pages=128)  # a page is one byte here
    stream = world.submit("A", "r", [i % 40 for i in range(150)], max_tokens=300)
    world.until(lambda: len(stream.have(0)) > 1)
    began_s = world.now_s
    world.migrate("r", "A", "B")
    sent: list[tuple[float, int]] = []
    moves = world["A"].engine.scheduler.moves
    world.on_turn = lambda: sent.append((world.now_s - began_s, sum(moves.moved_pages.values())))
    world.until(lambda: bool(world.results))
    assert world.results[0][1].pages > 37
    assert all(pages <= 5 + 5 + 100 * seconds for seconds, pages in sent)  # a round lasts 0.05 s
    assert world.now_s - began_s > 0.3
    world.settle()


# --- things go wrong ---

SOURCE = [Source.OFFERED, Source.COPYING, Source.FROZEN]
DESTINATION = [Destination.OPEN, Destination.CLOSING, Destination.HERE]


def reach(world: World, state, delay: int = 3) -> bool:
    """Go on until a half of the one migration is in that state; False when it is never seen there."""
    stream = world.submit("A", "r", PROMPT, n=2, max_tokens=40)
    neighbour = world.submit("B", "neighbour", [30, 31, 32], max_tokens=40, seed=2)
    world.until(lambda: len(stream.have(0)) > 1 and len(neighbour.have(0)) > 1)
    for name in "AB":
        world[name].engine.runner.delay = delay
    world.migrate("r", "A", "B")
    seen = set()
    for _ in range(200):
        migrations = world["A"].leaving() + world["B"].arriving() + [m for m, _ in world["B"].migrator._over.values()]
        if any(m.state is state for m in migrations):
            return True
        seen |= {m.state for m in migrations}
        world.turn()
    raise AssertionError(f"never in {state}, only in {seen}")


@pytest.mark.parametrize("state", SOURCE)
def test_the_source_aborts(state):
    world = World()
    reach(world, state)
    world["A"].leaving()[0].abort("told to")
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is (Outcome.LOST if state is Source.FROZEN else Outcome.ABORTED)
    assert world.streams["r"].resumed == 0 or state is Source.FROZEN
    world.settle()


@pytest.mark.parametrize("state", DESTINATION[:2])
def test_the_destination_aborts(state):
    world = World()
    reach(world, state)
    world["B"].arriving()[0].abort("told to")
    world.until(lambda: bool(world.results))
    assert world.results[0][1][0] is Outcome.ABORTED
    assert world.results[0][1].reason == "told to"
    assert world.streams["r"].owner == "A"
    world.settle()
    assert world.streams["r"].resumed == 0


@pytest.mark.parametrize("state", SOURCE + DESTINATION)
@pytest.mark.parametrize("choice", [None, 1])
def test_the_client_gives_up(state, choice):
    world = World()
    reach(world, state)
    stream = world.streams["r"]
    owner = stream.owner
    for c in stream.request.choices if choice is None else [choice]:
        stream.ended[c] = "given up"
    world[owner].loop.abort("r", choice)
    world.until(lambda: all(s.over for s in world.streams.values()))
    if choice is None:
        del world.streams["r"]
        world.expect(world.streams["neighbour"])
    for _ in range(100):
        world.turn(seconds=1.0)
    assert_idle(world["A"])
    assert_idle(world["B"])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("state", SOURCE + DESTINATION)
@pytest.mark.parametrize("who", ["A", "B"])
def test_either_side_dies(state, who, told):
    world = World(names="ABC")
    reach(world, state)
    world.kill(who, told)
    world.settle()
    stream, neighbour = world.streams["r"], world.streams["neighbour"]
    assert neighbour.resumed == (who == "B")
    if who == "B" and stream.owner == "A" and told:
        assert stream.resumed == 0


@pytest.mark.parametrize("kind", [Offer, Accept, Pages, Ready, Commit, Committed])
@pytest.mark.parametrize("copies", [0, 2])
def test_a_message_is_lost_or_comes_twice_for_ever(kind, copies):
    world = World()
    post = world.post

    def tampered(sender, actor, data):
        before = len(world.posted)
        post(sender, actor, data)
        if isinstance(world.said[-1].message, kind):
            world.posted[before:] = world.posted[before:] * copies

    world.post = tampered
    stream = world.submit("A", "r", PROMPT, max_tokens=24)
    world.until(lambda: len(stream.have(0)) > 1)
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    outcome = world.results[0][1].outcome
    if copies == 2:
        assert outcome is Outcome.MOVED
    else:
        assert outcome is {Commit: Outcome.ABORTED, Committed: Outcome.LOST}.get(kind, Outcome.ABORTED), outcome
    world.settle()
    assert stream.resumed == 0 or kind is Committed


@pytest.mark.parametrize("kind", [Offer, Accept, Pages, Ready, Commit, Committed])
def test_a_message_that_is_lost_once_is_asked_for_again(kind):
    world = World()
    post, lost = world.post, []

    def once(sender, actor, data):
        before = len(world.posted)
        post(sender, actor, data)
        if isinstance(world.said[-1].message, kind) and not lost:
            lost.append(world.posted.pop(before))

    world.post = once
    stream = world.submit("A", "r", PROMPT, max_tokens=200)
    world.until(lambda: len(stream.have(0)) > 1)
    world.migrate("r", "A", "B")
    world.until(lambda: bool(world.results))
    assert lost
    assert world.results[0][1].outcome is Outcome.MOVED
    world.settle()
    assert stream.resumed == 0


def test_a_link_that_breaks_leaves_it_where_it_is():
    world = World()
    reach(world, Source.COPYING)
    world.until(lambda: bool(world["A"].engine.scheduler.moves.under_way()))
    world["A"].engine.runner.open_links.clear()
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.ABORTED
    assert "pages could not be sent" in world.results[0][1].reason
    world.settle()
    assert world.streams["r"].resumed == 0


def test_last_pages_that_never_come_leave_it_where_it_is():
    world = World()
    reach(world, Source.FROZEN)
    world["A"].engine.runner.open_links.clear()  # what was sent last does not arrive
    began_s = world.now_s
    world.until(lambda: bool(world.results))
    assert world.results[0][1].outcome is Outcome.ABORTED
    assert world.now_s - began_s < LEASE_S
    world.settle()
    assert world.streams["r"].resumed == 0


def test_a_later_attempt_may_follow_at_once_where_an_earlier_one_was_given_up():
    world = World()
    reach(world, Source.FROZEN)
    stream, migration = world.streams["r"], world["A"].leaving()[0]
    world["A"].loop._post(lambda: migration.abort("told to"))
    world.random.choice = lambda names: "A"  # both before the next step
    world["A"].loop._post(lambda: stream.attempt or world.resume(stream))
    world.settle()


def test_a_step_that_raises_in_the_meantime_hurts_nobody():
    world = World()
    reach(world, Source.FROZEN)
    for i in range(2):  # a step of one sequence would be its own fault
        world.submit("A", f"late {i}", [9, 9], seed=i, max_tokens=10)
    run, failed = world["A"].engine.runner.run, []

    def once(plan):
        if not failed and plan.rows:
            failed.append(1)
            raise MemoryError("once")
        return run(plan)

    world["A"].engine.runner.run = once
    world.until(lambda: bool(failed))
    world.settle()


@pytest.mark.parametrize("seed", range(24))
def test_random_interleavings(seed):
    """Many requests among three replicas, migrated at random, over a bad network, with aborts and deaths."""
    bad = Trouble(lost=seed % 4 * 0.05, doubled=seed % 3 * 0.1, longest_s=(seed % 5) * 0.03)
    host = {"host_pages": 20, "preemption": "swap"} if seed % 2 else {}
    small = {"pages": 50} if seed % 3 == 0 else {"pages": 160}
    options = MigrationOptions(migration_bandwidth=10**9 if seed % 4 else 400, max_migrations=1 + seed % 3)
    world = World(seed, "ABC", bad, options, max_running=8, **host, **small)
    chance = world.random
    for replica in world.replicas.values():
        replica.engine.runner.delay = 1 + seed % 4
    prompts = [[chance.randrange(40) for _ in range(chance.randrange(1, 30))] for _ in range(4)]
    asked, deaths = 0, 0
    for turn in range(400):
        if asked < 12 and chance.random() < 0.1:
            prompt = prompts[chance.randrange(4)]
            to = chance.choice([n for n, r in world.replicas.items() if r.alive])
            world.submit(to, f"r{asked}", prompt, n=chance.choice([1, 1, 2]), seed=asked, max_tokens=chance.randrange(1, 160))
            asked += 1
        live = [s for s in world.streams.values() if not s.over]
        if live and chance.random() < 0.3:
            stream = chance.choice(live)
            to = chance.choice([n for n in "ABC" if n != stream.owner])
            if world[stream.owner].alive:
                world.migrate(stream.request.request_id, stream.owner, to, fill=chance.random() < 0.1)
        if chance.random() < 0.01:
            halves = [m for r in world.replicas.values() if r.alive for m in [*r.leaving(), *r.arriving()]]
            if halves:
                chance.choice(halves).abort("at random")
        if seed % 5 == 0 and turn > 100 and deaths < 2 and chance.random() < 0.01:
            deaths += 1
            world.kill(chance.choice([n for n, r in world.replicas.items() if r.alive]), told=chance.random() < 0.5)
        world.turn("".join(n for n in "ABC" if chance.random() < 0.8))
    world.settle()
