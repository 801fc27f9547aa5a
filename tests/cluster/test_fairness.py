"""Virtual token counters: prices, weights, lifts, and how few of them are kept."""

from __future__ import annotations

from quire.cluster.fairness import KEPT_COUNTERS, VirtualTokenCounters


def counters(**weights: float) -> VirtualTokenCounters:
    return VirtualTokenCounters(lambda tenant: weights.get(tenant, 1.0))


def test_input_costs_one_and_output_two_over_the_weight() -> None:
    vtc = counters(b=2.0)
    for tenant in "ab":
        vtc.charge_input(tenant, 100)
        vtc.charge_output(tenant, 10)
    assert vtc.served("a") == 120.0
    assert vtc.served("b") == 60.0
    assert vtc.served("c") == 0.0


def test_who_comes_back_is_lifted_to_the_least_of_those_that_wait() -> None:
    vtc = counters()
    for tenant, tokens in (("a", 500), ("b", 300), ("idle", 10), ("ahead", 900)):
        vtc.charge_input(tenant, tokens)
    vtc.join("a")
    vtc.join("b")
    assert [vtc.served(t) for t in "ab"] == [500.0, 500.0], "b comes second, and starts where a is"
    vtc.charge_input("a", 100)
    vtc.join("idle")
    vtc.join("ahead")
    assert vtc.served("idle") == 500.0, "no credit for having been away"
    assert vtc.served("ahead") == 900.0, "and no pardon"
    vtc.charge_input("idle", 40)
    vtc.join("idle")
    assert vtc.served("idle") == 540.0, "who has not left is not lifted"
    assert list(vtc.active()) == ["a", "b", "idle", "ahead"]
    assert vtc.active_weight() == 4.0


def test_when_nobody_waits_the_last_that_left_is_the_measure() -> None:
    vtc = counters()
    vtc.join("a")
    vtc.join("b")
    vtc.charge_input("a", 70)
    vtc.charge_input("b", 30)
    vtc.leave("a")
    vtc.leave("b")
    vtc.charge_output("b", 10)  # what it runs goes on
    vtc.join("c")
    assert vtc.served("c") == 50.0
    vtc.leave("c")
    vtc.leave("a")  # has left long ago
    vtc.join("d")
    assert vtc.served("d") == 50.0


def test_counters_of_passers_by_are_forgotten_without_changing_anybodys_turn() -> None:
    vtc = counters()
    vtc.join("stays")
    for i in range(3 * KEPT_COUNTERS):
        vtc.join(f"t{i}")
        vtc.charge_input(f"t{i}", 1)
        vtc.leave(f"t{i}")
        vtc.charge_input("stays", 2)
    assert len(vtc._served) <= KEPT_COUNTERS + 3
    assert vtc.served("stays") == 6.0 * KEPT_COUNTERS
    vtc.join("t0")  # forgotten, or lifted: the same
    assert vtc.served("t0") == vtc.served("stays")


def test_even_counters_ahead_of_everybody_are_bounded() -> None:
    vtc = counters()
    vtc.join("stays")
    for i in range(3 * KEPT_COUNTERS):
        vtc.charge_input(f"t{i}", 1000 + i)
        vtc.join(f"t{i}")
        vtc.leave(f"t{i}")
    assert len(vtc._served) <= KEPT_COUNTERS + 3
    assert vtc.served(f"t{3 * KEPT_COUNTERS - 1}") == 1000.0 + 3 * KEPT_COUNTERS - 1, "those furthest ahead are kept"
