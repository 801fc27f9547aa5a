"""The sampling kernels against a sort in float64, and against the sampler of the CPU path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quire.kernels import reference
from quire.kernels.sampling import MOST_COUNTED, SampleLaunch, SampleRows, sample
from quire.worker.counter_rng import gumbel, stream_keys
from quire.worker.protocol import SamplingParams
from quire.worker.sampler import Sampler, SamplingRow

SMALL = SampleLaunch(elements=256, num_warps=4)  # several stretches and blocks a row
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows_of(
    params: list[SamplingParams],
    keys: np.ndarray,
    device: str,
    cells: dict[int, dict[int, float]],
    held: torch.Tensor | None = None,
    latest: tuple[int, ...] = (),
) -> SampleRows:
    """cells: row -> token -> bias; held: of each row; latest: uncounted tokens of each row."""
    starts, tokens, values = [0], [], []
    for row in range(len(params)):
        tokens += list(cells.get(row, {}))
        values += list(cells.get(row, {}).values())
        starts.append(len(tokens))

    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    count = len(params)
    return SampleRows(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k for p in params], torch.int32),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([math.log(p.min_p) if p.min_p else -math.inf for p in params], torch.float32),
        keys=torch.from_numpy(keys.view(np.int32)).to(device),
        cell_starts=column(starts, torch.int32),
        cell_tokens=column(tokens or [0], torch.int32),
        cell_bias=column(values or [0.0], torch.float32),
        penalties=column([(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params], torch.float32),
        owners=column(list(reversed(range(count))), torch.int64),
        uncounted=column([bool(latest)] * count, torch.int32),
        held=(torch.full((1, 1), -1, dtype=torch.int16) if held is None else held.flip(0)).to(device),
        latest=column(list(reversed(latest)) or [0] * count, torch.int64),
    )


def keys_for(count: int) -> np.ndarray:
    return stream_keys([7 * i + 1 for i in range(count)], [100 + i for i in range(count)])


def drawn(logits: torch.Tensor, params: list[SamplingParams], device: str, launch: SampleLaunch = SMALL) -> list[int]:
    tokens, finite = sample(logits.clone().to(device), rows_of(params, keys_for(len(params)), device, {}), launch)
    assert finite.all()
    return tokens.tolist()


def on_the_cpu_path(logits: torch.Tensor, params: list[SamplingParams]) -> list[int]:
    rows = [SamplingRow(p, 7 * i + 1, 100 + i, 1, np.zeros(1, np.int32)) for i, p in enumerate(params)]
    return [d.token for d in Sampler((), logits.shape[1]).sample(logits.clone(), rows)]


def test_the_noise_is_that_of_the_cpu_path():
    keys = keys_for(4)
    ours = reference.gumbel(torch.from_numpy(keys.view(np.int32)), 5000)
    np.testing.assert_allclose(ours.numpy(), gumbel(keys, np.arange(5000)), atol=2e-6)


@pytest.mark.parametrize("vocab", [1, 97, 256, 1000])
def test_greedy_takes_the_lowest_of_the_highest(device, vocab):
    logits = torch.randn(3, vocab)
    logits[0] = 1.0  # all equal
    logits[1, [vocab // 3, vocab - 1]] = 9.0
    assert drawn(logits, [GREEDY] * 3, device) == [0, vocab // 3, int(logits[2].argmax())]


def test_a_draw_is_the_argmax_of_score_and_noise(device):
    logits = torch.randn(6, 700) * 3
    params = [SamplingParams(temperature=t) for t in (0.01, 0.5, 1.0, 1.0, 2.0, 100.0)]
    noise = reference.gumbel(torch.from_numpy(keys_for(6).view(np.int32)), 700)
    temperature = torch.tensor([[p.temperature] for p in params], dtype=torch.float64)
    assert drawn(logits, params, device) == (logits.double() / temperature + noise).argmax(1).tolist()


FILTERED = [
    SamplingParams(top_k=1),
    SamplingParams(top_k=40, temperature=0.7),
    SamplingParams(top_k=5000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.999, temperature=3.0),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0, temperature=1.5),
    SamplingParams(min_p=0.01, top_k=20, top_p=0.8, temperature=2.0),
]


def test_filters_leave_what_a_sort_leaves(device):
    logits = torch.randn(len(FILTERED), 600) * 2
    logits[1, :50] = logits[1].max() + 1  # a tie across the k-th place stays whole
    noise = reference.gumbel(torch.from_numpy(keys_for(len(FILTERED)).view(np.int32)), 600)
    expected = []
    for row, p, loud in zip(logits, FILTERED, noise, strict=True):
        scores = (row - row.max()) / p.temperature
        kept = reference.kept_tokens(scores, p.top_k, p.top_p, p.min_p)
        expected.append(int(torch.where(kept, scores.double() + loud, -math.inf).argmax()))
    assert drawn(logits, FILTERED, device) == expected


def test_tokens_are_those_of_the_cpu_path(device):
    params = [*FILTERED, GREEDY, SamplingParams(), SamplingParams(temperature=0.3)] * 2
    logits = torch.randn(len(params), 500) * 4
    assert drawn(logits, params, device) == on_the_cpu_path(logits, params)


def test_a_row_does_not_see_its_neighbours(device):
    logits = torch.randn(len(FILTERED), 300)
    together = drawn(logits, FILTERED, device)
    keys = keys_for(len(FILTERED))
    for i, p in enumerate(FILTERED):
        alone, _ = sample(logits[i : i + 1].clone().to(device), rows_of([p], keys[i : i + 1], device, {}), SMALL)
        assert alone.tolist() == [together[i]]


def test_biases_and_bans_come_before_the_draw(device):
    logits = torch.zeros(3, 700)
    logits[:, 10], logits[:, 600], logits[:, 3] = 5.0, 4.0, -1.0
    given = logits.clone().to(device)
    cells = {0: {10: -math.inf}, 1: {10: -1.5, 3: 7.0}}
    tokens, finite = sample(given, rows_of([GREEDY] * 3, keys_for(3), device, cells), SMALL)
    assert tokens.tolist() == [600, 3, 10]
    assert finite.all()
    logits[0, 10], logits[1, 10], logits[1, 3] = -math.inf, 3.5, 6.0
    assert torch.equal(given.cpu(), logits)


def test_penalties_of_what_is_held(device):
    """Tokens 10 and 3 are in the prompt, 600 twice in the output, 3 once; 650 and 600 have been drawn and are counted now."""
    logits = torch.zeros(5, 700)
    logits[:, 10], logits[:, 600], logits[:, 3], logits[:, 650] = 5.0, 4.0, -1.0, 2.0
    held = torch.zeros(5, 700, dtype=torch.int16)
    held[:, 10], held[:, 600], held[:, 3] = 1, 4, 3
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=2.0),
        SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(temperature=0.0, repetition_penalty=2.0, frequency_penalty=-1.0),
        GREEDY,
        SamplingParams(temperature=0.0, frequency_penalty=0.1),
    ]
    rows = rows_of(params, keys_for(5), device, {2: {10: 1.0}}, held, latest=(650, 600, 650, 600, 3))
    given, counts = logits.clone().to(device), rows.held.clone().cpu()
    tokens, finite = sample(given, rows, SMALL)
    assert finite.all()
    of = given.cpu()
    assert [of[0, t].item() for t in (10, 600, 3, 650, 0)] == [2.5, 2.0, -2.0, 1.0, 0.0]
    assert [of[1, t].item() for t in (10, 600, 3, 650)] == [5.0, 4.0 - 0.5 - 3 * 0.25, -1.0 - 0.5 - 0.25, 2.0]
    assert [of[2, t].item() for t in (10, 600, 3, 650)] == [3.0, 2.0 + 2.0, -2.0 + 1.0, 1.0 + 1.0]
    assert torch.equal(of[3], logits[3])
    assert of[4, 3] == np.float32(-1.0) - np.float32(2 * float(np.float32(0.1)))
    assert tokens.tolist() == [10, 10, 600, 10, 10]
    for row, newest in ((0, 650), (1, 600), (2, 650), (4, 3)):
        counts[4 - row, newest] += 2
    assert torch.equal(rows.held.cpu(), counts), "each is counted once, and who has no penalties is not"
    again, _ = sample(logits.clone().to(device), replace(rows, uncounted=torch.zeros_like(rows.uncounted)), SMALL)
    assert again.tolist() == tokens.tolist()
    assert torch.equal(rows.held.cpu(), counts)


def test_counts_do_not_overflow(device):
    held = torch.full((1, 300), 2 * MOST_COUNTED.value + 1, dtype=torch.int16)
    rows = rows_of([SamplingParams(temperature=0.0, frequency_penalty=1.0)], keys_for(1), device, {}, held, latest=(7,))
    logits = torch.zeros(1, 300, device=device)
    sample(logits, rows, SMALL)
    assert set(logits.flatten().tolist()) == {-float(MOST_COUNTED.value)}
    assert torch.equal(rows.held.cpu(), held)


def test_more_edits_than_a_program_takes_at_once(device):
    logits = torch.randn(1, 600)
    cells = {0: {token: -math.inf for token in range(600) if token != 431}}
    tokens, _ = sample(logits.to(device), rows_of([SamplingParams()], keys_for(1), device, cells), SMALL)
    assert tokens.tolist() == [431]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_said_so_alone(device, bad):
    logits = torch.randn(3, 300)
    logits[1, :] = bad if bad == -math.inf else logits[1]
    logits[1, 299] = bad
    params = [SamplingParams(), SamplingParams(top_p=0.5), GREEDY]
    tokens, finite = sample(logits.clone().to(device), rows_of(params, keys_for(3), device, {}), SMALL)
    assert finite.tolist() == [True, False, True]
    assert tokens[2] == int(logits[2].argmax())


def test_refuses_other_logits(device):
    rows = rows_of([GREEDY], keys_for(1), device, {})
    zeros = torch.zeros(2, 16, device=device)
    for logits in (zeros, zeros[:1].half(), zeros[:1, ::2]):
        with pytest.raises(ValueError, match="float32"):
            sample(logits, rows)
