"""What the leader tells the other ranks, as msgpack arrays: a step to compute, or that it is over.

A step carries the plan and the tokens that earlier steps sampled, as far as the leader has come to know them since its last message.
Only the leader samples, so all ranks go on from the same tokens whatever their hardware rounds, and the tokens cost no message of
their own. Whoever reads gets exactly the types of `plan`, or `BadMessage`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from .packing import packb, unpackb
from .plan import LinkEnd, Move, MoveKind, NewSequence, Row, StepPlan
from .protocol import SamplingParams


class BadMessage(ValueError):
    """The bytes are not a message of the leader's."""


class Step(NamedTuple):
    """Compute `plan`; `sampled` are the tokens of the sampling rows, in their order, of the steps that have ended since the step before was
    sent. Those of that step itself are not among them when `plan` was made ahead."""

    plan: StepPlan
    sampled: tuple[int, ...]


def pack_step(plan: StepPlan, sampled: tuple[int, ...]) -> bytes:
    """A step to compute."""
    new = [(*n[:4], [getattr(n.params, name) for name in _PARAMS], n.seed) for n in plan.new]
    moves = [plan.moves, plan.fenced, plan.links, plan.closed]
    message = [plan.step, plan.rows, new, plan.pages, plan.copies, plan.forget, moves, sampled]
    return packb(message)


def pack_end() -> bytes:
    """There will be no further step."""
    return packb([])


def unpack(data: bytes) -> Step | None:
    """The inverse of `pack_step`, or None for `pack_end`.

    Raises:
        BadMessage: it is neither.
    """
    try:
        raw = unpackb(data)
    except ValueError as error:
        raise BadMessage(f"not msgpack: {error}") from None
    if raw == ():
        return None
    step, rows, new, pages, copies, forget, moving, sampled = _array("message", raw, 8)
    moves, fenced, links, closed = _array("moving", moving, 4)
    plan = StepPlan(
        _integer("step", step),
        tuple(map(_row, _array("rows", rows))),
        tuple(map(_new, _array("new", new))),
        tuple((_integer("pages", seq), _integers("pages", ids)) for seq, ids in (_array("pages", p, 2) for p in _array("pages", pages))),
        tuple((source, target) for source, target in (_integers("copies", c, 2) for c in _array("copies", copies))),
        _integers("forget", forget),
        tuple(map(_move, _array("moves", moves))),
        _integers("fenced", fenced),
        tuple(map(_link, _array("links", links))),
        _strings("closed", closed),
    )
    return Step(plan, _integers("sampled", sampled))


def _row(raw: Any) -> Row:
    seq, start, num_tokens, samples = _array("row", raw, 4)
    _integers("row", (seq, start, num_tokens))
    if type(samples) is not bool:
        raise BadMessage(f"row: {samples!r} is not a bool")
    return Row(seq, start, num_tokens, samples)


def _new(raw: Any) -> NewSequence:
    seq, tokens, prompt_len, pages, params, seed = _array("new", raw, 6)
    _integers("new", (seq, prompt_len, seed))
    return NewSequence(seq, _integers("tokens", tokens), prompt_len, _integers("pages", pages), _params(params), seed)


def _move(raw: Any) -> Move:
    move, kind, pages, host_pages, link, file, snapshot = _array("move", raw, 7)
    if kind not in set(MoveKind):
        raise BadMessage(f"move: {kind!r} is no kind of move")
    _integers("move", (move,))
    _strings("move", (link, file))
    if type(snapshot) is not bytes:
        raise BadMessage("move: its snapshot is not bytes")
    return Move(move, MoveKind(kind), _integers("move", pages), _integers("move", host_pages), link, file, snapshot)


def _link(raw: Any) -> LinkEnd:
    link, peer_tp, addresses = _array("link", raw, 3)
    _strings("link", (link,))
    return LinkEnd(link, _integer("link", peer_tp), _strings("link", addresses))


def _params(raw: Any) -> SamplingParams:
    values = dict(zip(_PARAMS, _array("params", raw, len(_PARAMS)), strict=True))
    for name, value in values.items():
        if not _PARAMS[name](value):
            raise BadMessage(f"params.{name}: {value!r} is of the wrong type")
    return SamplingParams(**values)


def _array(name: str, raw: Any, length: int | None = None) -> tuple[Any, ...]:
    if type(raw) is not tuple or length not in (None, len(raw)):
        raise BadMessage(f"{name}: not an array of {'any length' if length is None else length}")
    return raw


def _integers(name: str, raw: Any, length: int | None = None) -> tuple[int, ...]:
    if not set(map(type, _array(name, raw, length))) <= {int}:
        raise BadMessage(f"{name}: not integers")
    return raw  # type: ignore[no-any-return]


def _strings(name: str, raw: Any) -> tuple[str, ...]:
    if not set(map(type, _array(name, raw))) <= {str}:
        raise BadMessage(f"{name}: not strings")
    return raw  # type: ignore[no-any-return]


def _integer(name: str, raw: Any) -> int:
    return _integers(name, (raw,))[0]


def _of(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _tuple_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is tuple and set(map(type, value)) <= {kind}


def _is_bias(value: Any) -> bool:
    return type(value) is dict and set(map(type, value)) <= {int} and set(map(type, value.values())) <= {int, float}


_BY_ANNOTATION: dict[str, Callable[[Any], bool]] = {
    "int": _of(int),
    "int | None": _of(int, type(None)),
    "float": _of(int, float),
    "bool": _of(bool),
    "str": _of(str),
    "dict[int, float]": _is_bias,
    "tuple[str, ...]": _tuple_of(str),
    "tuple[int, ...]": _tuple_of(int),
}
_PARAMS = {field.name: _BY_ANNOTATION[str(field.type)] for field in fields(SamplingParams)}  # in the order in which they travel
