"""What the leader tells the other ranks: every field comes back, and nothing else is taken."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest

from quire.worker.plan import LinkEnd, Move, MoveKind, NewSequence, Row, StepPlan
from quire.worker.plan_wire import BadMessage, Step, pack_end, pack_step, unpack
from quire.worker.protocol import SamplingParams

PARAMS = SamplingParams(
    n=2, max_tokens=5, temperature=0.5, logit_bias={3: -1.5, 7: 2}, seed=2**63, stop=("a", "b"), stop_token_ids=(1, 2), ignore_eos=True
)
PLAN = StepPlan(
    step=7,
    rows=(Row(1, 0, 1, True), Row(2, 4, 9, False)),
    new=(NewSequence(2, (5, 6, 7), 2, (8, 9), PARAMS, 2**64 - 1), NewSequence(3, (), 0, (), SamplingParams(), 0)),
    pages=((1, (4, 5)), (3, ())),
    copies=((1, 2),),
    forget=(9, 8),
    moves=(
        Move(4, MoveKind.OUT, (1, 2), (3, 4)),
        Move(5, MoveKind.RECEIVE, (6,), (), "a-b"),
        Move(6, MoveKind.SAVE, (7,), (), "", "0", b"s"),
    ),
    fenced=(2, 3),
    links=(LinkEnd("a-b", 2, ()), LinkEnd("b-a", 1, ("10.0.0.1:5",))),
    closed=("c",),
)


def test_a_step_and_the_end_come_back_as_they_were() -> None:
    step = unpack(pack_step(PLAN, (3, 4)))
    assert step == Step(PLAN, (3, 4))
    assert type(step.plan.rows[0]) is Row
    assert type(step.plan.new[0]) is NewSequence
    assert type(step.plan.moves[0]) is Move
    assert type(step.plan.links[0]) is LinkEnd
    assert unpack(pack_step(StepPlan(0, (), (), (), (), ()), ())) == Step(StepPlan(0, (), (), (), (), ()), ())
    assert unpack(pack_end()) is None


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_parameter_travels_and_none_of_another_type(name: str) -> None:
    of: Any = {int: 3, str: "x", float: 0.25, bool: True, dict: {1: 2.0}, tuple: ("x",) if name == "stop" else (4,), type(None): 5}
    changed = replace(SamplingParams(), **{name: of[type(getattr(SamplingParams(), name))]})
    plan = PLAN._replace(new=(NewSequence(1, (1,), 1, (0,), changed, 0),))
    step = unpack(pack_step(plan, ()))
    assert step is not None
    assert step.plan.new[0].params == changed
    wrong = replace(SamplingParams(), **{name: [b"x"]})
    with pytest.raises(BadMessage, match=name):
        unpack(pack_step(plan._replace(new=(plan.new[0]._replace(params=wrong),)), ()))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[:-1],
        lambda m: [*m, 1],
        lambda m: {"step": 1},
        lambda m: 5,
        lambda m: [str(m[0]), *m[1:]],
        lambda m: [m[0], [[1, 0, 1, 1]], *m[2:]],
        lambda m: [m[0], [[1, 0, True, True]], *m[2:]],
        lambda m: [m[0], [[1, 0, 1]], *m[2:]],
        lambda m: [*m[:2], [[1, [2], 1, [3], [], 0]], *m[3:]],
        lambda m: [*m[:2], [[1, ["2"], 1, [3], *m[2][0][4:]]], *m[3:]],
        lambda m: [*m[:3], [[1]], *m[4:]],
        lambda m: [*m[:3], [[1, 2]], *m[4:]],
        lambda m: [*m[:4], [[1, 2, 3]], *m[5:]],
        lambda m: [*m[:5], [1.0], *m[6:]],
        lambda m: [*m[:7], [None]],
        lambda m: [*m[:6], [[], [], []], m[7]],
        lambda m: [*m[:6], [[[1, "away", [], [], ""]], [], [], []], m[7]],
        lambda m: [*m[:6], [[[1, "out", ["1"], [2], ""]], [], [], []], m[7]],
        lambda m: [*m[:6], [[], [None], [], []], m[7]],
        lambda m: [*m[:6], [[], [], [["a", 1, [2]]], []], m[7]],
        lambda m: [*m[:6], [[], [], [], [1]], m[7]],
    ],
)
def test_what_is_no_message_is_refused(change: Any) -> None:
    message = msgpack.unpackb(pack_step(PLAN, (3, 4)), strict_map_key=False)
    with pytest.raises(BadMessage):
        unpack(msgpack.packb(change(message)))


@pytest.mark.parametrize("data", [b"", b"\xc1", pack_step(PLAN, ())[:-1], pack_end() + b"\x00"])
def test_bytes_that_are_not_msgpack_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage, match="msgpack"):
        unpack(data)
