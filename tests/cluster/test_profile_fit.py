"""The fit finds the cost that steps were made from, and says how far it is off when there is none."""

from __future__ import annotations

import random

import pytest

from quire.cluster.simulator.fit import Step, fit
from quire.cluster.simulator.speed_profile import StepCost


def steps(cost: StepCost, noise: float = 0.0) -> list[Step]:
    draw, found = random.Random(1), []
    for _ in range(60):
        prompt, decodes = draw.choice((0, 0, 5, 30, 200, 512)), draw.choice((0, 1, 4, 16, 64))
        if not prompt + decodes:
            continue
        start, context = draw.randrange(3000), decodes * draw.randrange(1, 3000)
        pairs = prompt * start + prompt * (prompt + 1) / 2
        rows = decodes + (prompt > 0)
        seconds = cost.step_s(prompt, pairs, decodes, context, rows) * (1 + noise * draw.uniform(-1, 1))
        found.append(Step(prompt, pairs, decodes, context, rows, seconds))
    return found


@pytest.mark.parametrize(
    "cost",
    [
        StepCost(0.004, 2e-5, 128.0, 1e-5, 3e-8, 1e-9),
        StepCost(0.002, 1e-3, 0.0, 5e-4, 2e-6, 1e-6),
        StepCost(0.0, 1e-3),
    ],
)
def test_it_finds_what_the_steps_were_made_from(cost: StepCost) -> None:
    found = fit(steps(cost))
    assert found.worst_error < 1e-3
    assert found.cost.token_s == pytest.approx(cost.token_s, rel=1e-2)
    assert found.cost.knee_tokens == cost.knee_tokens


def test_noise_is_told_and_does_not_make_anything_negative() -> None:
    found = fit(steps(StepCost(0.004, 1e-3, 0.0, 1e-5), noise=0.2))
    assert 0.02 < found.median_error < 0.2
    assert min(found.cost.base_s, found.cost.sequence_s, found.cost.context_token_s, found.cost.pair_s) >= 0


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 6 steps"):
        fit(steps(StepCost(0.0, 1.0))[:5])
