"""The automaton of stop strings against a search of the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.worker.text.stops import StopStrings

letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=5)


@given(stop_lists, letters)
@settings(max_examples=500, deadline=None)
def test_every_node_knows_what_ends_and_what_may_begin(stops: list[str], text: str) -> None:
    automaton = StopStrings(stops)
    node = 0
    for end in range(1, len(text) + 1):
        node = automaton.step(node, text[end - 1])
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        assert automaton.found[node] == max(ended, key=len, default=None)
        beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
        assert automaton.held[node] == max((len(b) for b in beginnings if text[:end].endswith(b)), default=0)


def test_the_characters_that_begin_a_stop_string() -> None:
    assert StopStrings(["ab", "b", "xyz"]).starts == {"a", "b", "x"}
