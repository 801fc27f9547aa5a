"""What the step scheduler tells the model runner, and what it hears back.

A plan is ordered and frozen. Sequences that the runner has not seen travel whole (`NewSequence`), known ones as a
difference (pages they gained). Token values sampled in a step stay with the runner, so a plan never waits for them.

Pages also travel: to host memory and back, to another replica and from one, into files and out of them. Such a move is started by one plan,
goes on beside the steps that follow, and has ended on every rank before a plan uses what it has brought, or reuses what it has left.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from .protocol import SamplingParams, TokenLogprob


class NewSequence(NamedTuple):
    """A sequence that the runner has to learn (admitted, forked, or back after a preemption)."""

    seq: int  # unique for the life of the replica
    tokens: tuple[int, ...]  # prompt and output known so far
    prompt_len: int
    pages: tuple[int, ...]  # block table so far
    params: SamplingParams
    seed: int  # of this sequence, in [0, 2**64); never None here


class Row(NamedTuple):
    """Compute `num_tokens` tokens of a sequence from position `start` on; sample when its last known token is among them."""

    seq: int
    start: int
    num_tokens: int
    samples: bool


class MoveKind(StrEnum):
    """Where pages go: from the device to host memory, back, to another replica over a link, from one, into a file, out of it, or nowhere:
    the file is erased."""

    OUT = "out"
    IN = "in"
    SEND = "send"
    RECEIVE = "receive"
    SAVE = "save"
    LOAD = "load"
    ERASE = "erase"


class Move(NamedTuple):
    """Pages that travel, in this order, beside the steps that follow. Nobody writes into what is read; nobody touches what is written.

    A link is read as it was written: the n-th RECEIVE of a link takes the pages of the n-th SEND at its other end, in their order. It may
    have room for more pages than come.
    """

    move: int  # number, unique for the life of the replica
    kind: MoveKind
    pages: tuple[int, ...]  # of the device pool
    host_pages: tuple[int, ...] = ()  # of the host pool, for OUT and IN: as many; for LOAD, their ordinals in the file
    link: str = ""  # for SEND and RECEIVE
    file: str = ""  # for SAVE, LOAD and ERASE: its name
    snapshot: bytes = b""  # for SAVE: `SequenceSnapshot.to_bytes` of the sequence whose pages they are


class LinkEnd(NamedTuple):
    """One end of a link, which is to be opened by every rank. The end that sends connects; the other listens (`Runner.addresses`)."""

    link: str
    peer_tp: int  # ranks at the other end
    addresses: tuple[str, ...]  # of those ranks, "host:port" in their order, at the end that sends; empty at the end that receives


class Moved(NamedTuple):
    """A move that has ended on every rank: whole, or not, and then nothing that it wrote may be believed."""

    move: int
    pages: int = 0  # that have travelled
    seconds: float = 0.0  # from its start, or from the end of what stood before it in its queue, if that was later
    error: str | None = None


class StepPlan(NamedTuple):
    """One step for every rank. Order of work: fenced, forget, copies, links, moves, closed, new, pages, rows.

    There may be no rows: then it only moves pages.
    """

    step: int
    rows: tuple[Row, ...]
    new: tuple[NewSequence, ...]
    pages: tuple[tuple[int, tuple[int, ...]], ...]  # (seq, page ids appended to its block table)
    copies: tuple[tuple[int, int], ...]  # (source page, destination page), before anything is written
    forget: tuple[int, ...]  # sequences that ended or were preempted since the last plan
    moves: tuple[Move, ...] = ()  # that start, after everything that earlier steps have written
    fenced: tuple[int, ...] = ()  # moves that failed: from this step on their pages are used, so a rank that is late with one ends it first
    links: tuple[LinkEnd, ...] = ()  # to open
    closed: tuple[str, ...] = ()  # links to close, after what has been started on them


class Sampled(NamedTuple):
    """The token that a sampling row produced."""

    seq: int
    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None  # this sequence's logits were not finite: it fails, alone


class StepResult(NamedTuple):
    """What a step produced, in the order of the plan's sampling rows."""

    step: int
    sampled: tuple[Sampled, ...]
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprob, ...]], ...] = ()  # (seq, for the prompt tokens this step scored)


class MemoryBytes(NamedTuple):
    """What the weights and the page pool take on one rank."""

    weights: int
    pool: int
