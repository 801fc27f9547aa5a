"""What the step scheduler tells the model runner, and what it hears back.

A plan is ordered and frozen. Sequences that the runner has not seen travel whole (`NewSequence`), known ones as a
difference (pages they gained). Token values sampled in a step stay with the runner, so a plan never waits for them.
"""

from __future__ import annotations

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


class StepPlan(NamedTuple):
    """One step for every rank. Order of work: forget, copies, new, pages, rows."""

    step: int
    rows: tuple[Row, ...]
    new: tuple[NewSequence, ...]
    pages: tuple[tuple[int, tuple[int, ...]], ...]  # (seq, page ids appended to its block table)
    copies: tuple[tuple[int, int], ...]  # (source page, destination page), before anything is written
    forget: tuple[int, ...]  # sequences that ended or were preempted since the last plan


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
