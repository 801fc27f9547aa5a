"""The coefficients of a step's cost (`speed_profile`) from steps that were measured.

For a given knee the formula is linear in the others, which least squares of the relative errors finds; none may be negative. Five unknowns
have 31 sets of which the others may be 0: all are tried, for each knee of a few, and the smallest error wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from .speed_profile import StepCost

KNEES = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0)
RIDGE = 1e-9  # keeps what cannot be told apart from being divided by nothing


class Step(NamedTuple):
    """A step that was measured: what the arguments of `StepCost.step_s` were, and its seconds."""

    prompt_tokens: float
    pairs: float
    decodes: float
    context: float
    rows: float
    seconds: float


class Fit(NamedTuple):
    """What was found. Errors are shares of what was measured."""

    cost: StepCost
    median_error: float
    p90_error: float
    worst_error: float
    steps: int


def fit(steps: Iterable[Step]) -> Fit:
    """The cost that comes closest.

    Raises:
        ValueError: fewer steps than unknowns, or one that took no time.
    """
    known = list(steps)
    if len(known) < 6 or any(step.seconds <= 0 for step in known):
        raise ValueError(f"a fit needs at least 6 steps that took time, not {len(known)}")
    best = min((_linear(known, knee) for knee in KNEES), key=lambda found: found[0])[1]
    errors = sorted(abs(_predicted(best, step) / step.seconds - 1) for step in known)
    median, p90 = (errors[min(int(share * len(errors)), len(errors) - 1)] for share in (0.5, 0.9))
    return Fit(best, median, p90, errors[-1], len(known))


def _predicted(cost: StepCost, step: Step) -> float:
    return cost.step_s(step.prompt_tokens, step.pairs, step.decodes, step.context, step.rows)


def _linear(steps: Sequence[Step], knee: float) -> tuple[float, StepCost]:
    """(sum of squared relative errors, cost) for one knee."""
    columns = [(1.0, max(s.prompt_tokens + s.decodes, knee), s.rows, s.context, s.pairs) for s in steps]
    rows = [[value / s.seconds for value in column] for column, s in zip(columns, steps, strict=True)]
    best: tuple[float, list[float]] | None = None
    for size in range(1, 6):
        for chosen in combinations(range(5), size):
            found = _least_squares([[row[i] for i in chosen] for row in rows])
            if found is None or min(found) < 0:
                continue
            whole = [0.0] * 5
            for i, value in zip(chosen, found, strict=True):
                whole[i] = value
            error = sum((sum(a * b for a, b in zip(row, whole, strict=True)) - 1.0) ** 2 for row in rows)
            if best is None or error < best[0]:
                best = error, whole
    if best is None:
        raise ValueError("no cost fits these steps")
    base_s, token_s, sequence_s, context_token_s, pair_s = best[1]
    return best[0], StepCost(base_s, token_s, knee if token_s else 0.0, sequence_s, context_token_s, pair_s)


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """x that makes every row times x closest to 1, by the normal equations; None when there is none."""
    size = len(rows[0])
    scale = [max(max(abs(row[i]) for row in rows), 1e-300) for i in range(size)]
    scaled = [[row[i] / scale[i] for i in range(size)] for row in rows]
    matrix = [[sum(row[i] * row[j] for row in scaled) + RIDGE * (i == j) for j in range(size)] for i in range(size)]
    vector = [sum(row[i] for row in scaled) for i in range(size)]
    for i in range(size):  # Gauss; the matrix is positive definite
        if matrix[i][i] <= 0:
            return None
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, size):
                matrix[k][j] -= factor * matrix[i][j]
            vector[k] -= factor * vector[i]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (vector[i] - sum(matrix[i][j] * found[j] for j in range(i + 1, size))) / matrix[i][i]
    return [value / of for value, of in zip(found, scale, strict=True)]
