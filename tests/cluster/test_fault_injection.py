"""Everything goes wrong, seed by seed: the invariants hold. And when a check is switched off, they do not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from fault_simulation import Result, simulate
from simulated_network import Broken
from simulated_processes import Replica

from quire.cluster import journal, stream
from quire.cluster.journal import Journal
from quire.worker.protocol import unpack_frame

TENTH = 20  # seeds
CONTROL_SEEDS = 60


@cache
def run(seed: int) -> Result:
    """What a seed comes to."""
    return simulate(seed)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("tenth", [*range(5), *(pytest.param(tenth, marks=pytest.mark.slow) for tenth in range(5, 10))])
def test_the_invariants_hold(tenth: int) -> None:
    for seed in range(tenth * TENTH, (tenth + 1) * TENTH):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_the_faults_are_there() -> None:
    results = [run(seed) for seed in range(30)]
    outcomes: dict[str, int] = {}
    for result in results:
        for outcome, count in result.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    assert outcomes["done"] > 100
    assert outcomes["RequestFailed, poison"] > 0
    assert sum(result.deaths for result in results) > 30
    assert sum(result.resumed for result in results) > 30
    moved = sum((Counter(result.migrations) for result in results), Counter())
    assert moved["moved"] > 10
    assert moved.total() > moved["moved"]


def test_a_seed_is_the_same_run_each_time() -> None:
    assert [run(seed) for seed in range(5)] == [simulate(seed) for seed in range(5)]


def breaks(match: str, **world: Any) -> None:
    """Some of the seeds end in a violation that says `match`."""
    said = []
    for seed in range(CONTROL_SEEDS):
        try:
            simulate(seed, **world)
        except Broken as broken:
            if match in str(broken):
                return
            said.append(str(broken))
    raise AssertionError(f"nothing was broken so: {said}")


def test_without_the_check_for_repeats_tokens_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_after", lambda output, have: output)
    feed = stream.StreamTable.feed

    def any_frame(table: stream.StreamTable, connection: str, data: bytes, now_s: float) -> Any:
        known = table._connections.get(connection)
        if known is not None:
            known.next_frame = min(known.next_frame, unpack_frame(data).number)
        return feed(table, connection, data, now_s)

    monkeypatch.setattr(stream.StreamTable, "feed", any_frame)
    breaks("was due")


def test_without_the_journal_a_resumed_stream_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for_replica = Journal._for_replica

    def forgetful(self: Journal, left_ms: int | None) -> Any:
        kept = {choice: list(tokens) for choice, tokens in self._live.items()}
        for tokens in self._live.values():
            tokens.clear()
        try:
            return for_replica(self, left_ms)
        finally:
            if not any(kept.values()):
                self._live.update(kept)

    monkeypatch.setattr(Journal, "_for_replica", forgetful)
    breaks("token 0 came where")


def test_with_wrong_tokens_in_the_journal_the_text_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    for_replica = Journal._for_replica

    def wrong(self: Journal, left_ms: int | None) -> Any:
        request = for_replica(self, left_ms)
        if request.resume is not None:
            for choice, tokens in request.resume.items():
                request.resume[choice] = tuple(reversed(tokens))
        return request

    monkeypatch.setattr(Journal, "_for_replica", wrong)
    breaks("wanted")


def test_without_leases_a_dead_ingress_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replica, "_leave", lambda self, connection: None)
    breaks("keeps 3 ingresses")


def test_without_attempts_two_lives_of_a_request_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    again = Journal._again

    def same_attempt(self: Journal, now_s: float, delay_s: float) -> Any:
        self.attempt -= 1
        return again(self, now_s, delay_s)

    monkeypatch.setattr(Journal, "_again", same_attempt)
    breaks("has two owners")
