"""The sampler against naive per-row references, and what it promises of batches, errors and log-probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.worker.constraint import Allowed
from quire.worker.nucleus import floors, floors_on_device, leaders
from quire.worker.protocol import SamplingParams
from quire.worker.sampler import LEAST_LOGPROB, Drawn, Sampler, SamplingRow, prompt_logprobs

VOCAB = 40
EOS = (2, 5)


def row(params: SamplingParams, seed: int = 0, tokens: tuple[int, ...] = (1, 3), prompt_len: int = 1) -> SamplingRow:
    return SamplingRow(params, seed, len(tokens), prompt_len, np.array(tokens, dtype=np.int32))


def sample(logits: np.ndarray, rows: list[SamplingRow]) -> list[Drawn]:
    return Sampler(EOS, logits.shape[1]).sample(torch.tensor(logits, dtype=torch.float32), rows)


def random_logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 2


def edited_by_hand(logits: np.ndarray, r: SamplingRow) -> np.ndarray:
    """logit_bias, min_tokens and penalties, one token at a time."""
    p, out, history = r.params, logits.astype(np.float64), r.tokens.tolist()
    output = history[r.prompt_len :]
    for token, bias in p.logit_bias.items():
        out[token] += bias
    if len(output) < p.min_tokens:
        for token in (*EOS, *p.stop_token_ids):
            out[token] = -math.inf
    for token in set(history):
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    for token in set(output):
        out[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return out


def kept_by_hand(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k and top_p: sort, cut, renormalise."""
    scaled = (logits.astype(np.float64) - logits.max()) / p.temperature
    probabilities = np.exp(scaled)
    probabilities[scaled < (math.log(p.min_p) if p.min_p else -math.inf)] = 0
    if p.top_k > 0:
        probabilities[probabilities < np.sort(probabilities)[::-1][min(p.top_k, len(logits)) - 1]] = 0
    probabilities /= probabilities.sum()
    if p.top_p < 1:
        order = np.sort(probabilities)[::-1]
        last = min(int(np.searchsorted(order.cumsum(), p.top_p)), len(order) - 1)
        probabilities[probabilities < order[last]] = 0
    return probabilities / probabilities.sum()


params_of_edits = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    min_tokens=st.sampled_from([0, 2, 50]),
    presence_penalty=st.sampled_from([0.0, -1.5, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)


histories = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


@given(st.lists(st.tuples(params_of_edits, histories), min_size=1, max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_bias_bans_and_penalties_are_the_naive_ones(cases: list[tuple[SamplingParams, list[int]]], data: st.DataObject) -> None:
    rows = [row(p, tokens=tuple(tokens), prompt_len=data.draw(st.integers(1, len(tokens)))) for p, tokens in cases]
    logits = random_logits(data.draw(st.integers(0, 2**32)), len(rows))
    edited = torch.from_numpy(logits.copy())
    drawn = Sampler(EOS, VOCAB).sample(edited, rows)  # greedy leaves the edited logits in place
    for i, r in enumerate(rows):
        expected = edited_by_hand(logits[i], r)
        np.testing.assert_allclose(edited[i].numpy(), expected, rtol=1e-5, atol=1e-5)
        assert drawn[i].token == int(edited[i].numpy().argmax())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02),
        SamplingParams(frequency_penalty=1.0, repetition_penalty=1.2, logit_bias={7: 1.5}),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all filters", "penalties"],
)
def test_draws_have_the_right_distribution(params: SamplingParams) -> None:
    n = 8_000
    logits = random_logits(4)[0]
    rows = [SamplingRow(params, 11, position, 1, np.array([1, 3, 3], dtype=np.int32)) for position in range(3, 3 + n)]
    tokens = [d.token for d in sample(np.broadcast_to(logits, (n, VOCAB)), rows)]
    counts = np.bincount(tokens, minlength=VOCAB)
    expected = kept_by_hand(edited_by_hand(logits, rows[0]), params)
    assert counts[expected == 0].sum() == 0
    mean = n * expected[expected > 0]
    sigmas = (((counts[expected > 0] - mean) ** 2 / mean).sum() - len(mean) + 1) / math.sqrt(2 * (len(mean) - 1))
    assert sigmas < 4


params_of_filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, -1, 1, 3, 50, 2000, 10**6]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 1.0]),
)


@given(st.lists(params_of_filters, min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([3, 40, 3000]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_filters_keep_the_naive_set(params: list[SamplingParams], seed: int, vocab: int, ties: bool) -> None:
    logits = random_logits(seed, len(params), vocab)
    if ties:
        logits = np.round(logits)
    scores = torch.from_numpy(np.stack([(x - x.max()) / np.float32(p.temperature) for x, p in zip(logits, params, strict=True)]))
    on_device = floors_on_device(scores, params)
    for i, floor in enumerate(floors(scores, params)):
        expected = kept_by_hand(logits[i], params[i]) > 0
        for found in (floor, on_device[i]):
            kept = (scores[i] >= found).numpy()
            assert kept[scores[i].argmax()]
            # The nucleus may end one token sooner or later where its mass is top_p to within rounding.
            border = params[i].top_p < 1 and np.unique(scores[i][kept != expected].numpy()).size <= 1
            assert (kept == expected).all() or border


def test_top_p_is_a_share_of_what_min_p_leaves() -> None:
    scores = torch.from_numpy(np.log(np.array([1.0] + [0.006] * 100 + [0.0004] * 2000, dtype=np.float32)))[None]
    params = [SamplingParams(min_p=0.0005, top_p=0.55)]  # min_p leaves 1.6 of 2.4, and 1 is enough of that
    assert floors(scores, params).tolist() == [0.0]
    assert floors_on_device(scores, params).tolist() == [0.0]


def test_the_likeliest_come_in_order_and_ties_by_id() -> None:
    scores = np.array([-9.5, 0.0, -3.0, 0.0, -20.0, -3.0], dtype=np.float32)
    assert leaders(scores, 4).tolist() == [1, 3, 2, 5]
    assert leaders(scores, 99).tolist() == [1, 3, 2, 5, 0, 4]
    assert leaders(np.tile(np.float32([-1.0, 0.0]), 500), 520).tolist() == [*range(1, 1000, 2), *range(0, 40, 2)]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.zeros((2, VOCAB), dtype=np.float32)
    logits[1, [9, 30]] = 1.0
    assert [d.token for d in sample(logits, [row(SamplingParams(temperature=0.0))] * 2)] == [0, 9]


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 3e-5])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = random_logits(3) * np.float32(1e36)
    drawn = sample(logits, [row(SamplingParams(temperature=temperature))])[0]
    assert drawn == Drawn(int(logits.argmax()))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    variants = [
        SamplingParams(temperature=0.0),
        SamplingParams(logprobs=3),
        SamplingParams(top_p=0.9, temperature=0.7),
        SamplingParams(top_k=7, logprobs=0),
        SamplingParams(min_p=0.1, repetition_penalty=1.4),
        SamplingParams(presence_penalty=1.0, logit_bias={3: 4.0}),
    ]
    logits = random_logits(8, 48, 1201)
    rows = [row(variants[i % 6], seed=i * 977, tokens=tuple(range(1, 3 + i % 9))) for i in range(48)]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(48)]
    assert together[::-1] == sample(logits[::-1].copy(), rows[::-1])


def test_seed_and_position_decide() -> None:
    logits = np.zeros((200, 1000), dtype=np.float32)
    fixed = [row(SamplingParams(), seed=2**64 - 1)] * 200
    assert len({d.token for d in sample(logits, fixed)}) == 1
    assert len({d.token for d in sample(logits, [r._replace(position=i) for i, r in enumerate(fixed)])}) > 150
    assert len({d.token for d in sample(logits, [r._replace(seed=i) for i, r in enumerate(fixed)])}) > 150


def test_min_tokens_keeps_every_end_out_until_then() -> None:
    logits = np.full((1, VOCAB), -20.0, dtype=np.float32)
    logits[0, [2, 5, 9, 17]] = [9.0, 8.0, 7.0, 1.0]
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(9,))
    assert sample(logits, [row(params, tokens=(1, 3))])[0].token == 17
    assert sample(logits, [row(params, tokens=(1, 3, 4))])[0].token == 2


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(6, 3, 500)
    params = SamplingParams(temperature=0.2, top_k=2, logit_bias={123: 100.0}, presence_penalty=2.0)
    rows = [row(replace(params, logprobs=n)) for n in (0, 5, 20)]
    reference = torch.log_softmax(torch.from_numpy(logits).double(), dim=1)
    for i, drawn in enumerate(sample(logits, rows)):
        assert drawn.token == 123
        assert drawn.logprob is not None
        assert drawn.logprob.logprob == pytest.approx(float(reference[i, 123]), abs=1e-4)
        values, ids = reference[i].topk((0, 5, 20)[i])
        assert [token for token, _ in drawn.logprob.top] == ids.tolist()
        assert [value for _, value in drawn.logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_prompt_logprobs_score_each_target() -> None:
    logits = random_logits(7, 4)
    scored = prompt_logprobs(torch.from_numpy(logits.copy()), [0, 1, 2, 39], 2)
    reference = torch.log_softmax(torch.from_numpy(logits), dim=1)
    assert [s.token for s in scored] == [0, 1, 2, 39]
    assert [s.logprob for s in scored] == pytest.approx([float(reference[i, t]) for i, t in enumerate([0, 1, 2, 39])], abs=1e-5)
    assert [[t for t, _ in s.top] for s in scored] == reference.topk(2).indices.tolist()


def test_impossible_tokens_report_a_number() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    logits[0, 4] = -math.inf
    assert prompt_logprobs(torch.from_numpy(logits), [4], 0)[0].logprob == LEAST_LOGPROB


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.5, logprobs=2)], ids=["greedy", "random"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_their_row_alone(bad: float, params: SamplingParams) -> None:
    logits = random_logits(9, 3)
    good = sample(logits, [row(params)] * 3)
    broken = logits.copy()
    broken[1] = bad if bad == -math.inf else broken[1]
    broken[1, 7] = bad
    got = sample(broken, [row(params)] * 3)
    assert got[1].error
    assert got[1].logprob is None
    assert [got[0], got[2]] == [good[0], good[2]]


def test_a_ban_on_every_token_is_an_error_of_the_row() -> None:
    params = SamplingParams(min_tokens=5, stop_token_ids=tuple(range(VOCAB)))
    assert sample(random_logits(1), [row(params)])[0].error


def test_no_rows_no_tokens() -> None:
    assert sample(np.zeros((0, VOCAB), dtype=np.float32), []) == []


masks = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8, unique=True)


@given(params_of_edits, histories, masks, st.floats(0.0, 1.5), st.integers(0, 50), st.sampled_from([1.0, 0.5, 0.01]), st.data())
@settings(max_examples=150, deadline=None)
def test_only_what_the_grammar_allows_is_drawn_whatever_else_is_asked(params, history, tokens, temperature, top_k, top_p, data):
    """Also where min_tokens would ban all of it, and where the filters would keep more than there is."""
    params = replace(params, temperature=temperature, top_k=top_k, top_p=top_p, min_p=data.draw(st.sampled_from([0.0, 0.3])))
    logits = random_logits(data.draw(st.integers(0, 99)), rows=2)
    given = row(params, tokens=tuple(history))
    free, bound = sample(logits, [given, given._replace(allowed=allowed(tokens))])
    assert bound.error is None
    assert bound.token in tokens
    assert sample(logits[:1], [given])[0].token == free.token


def test_under_a_grammar_the_best_of_what_is_allowed_wins():
    logits = random_logits(3)
    tokens = [1, 7, 31, 32, 39]
    expected = max(tokens, key=lambda token: logits[0, token])
    assert sample(logits, [row(SamplingParams(temperature=0.0))._replace(allowed=allowed(tokens))])[0].token == expected
    biased = SamplingParams(temperature=0.0, logit_bias={7: 100.0, 8: 100.0})
    assert sample(logits, [row(biased)._replace(allowed=allowed(tokens))])[0].token == 7


def allowed(tokens: list[int]) -> Allowed:
    bits = np.zeros(64, np.uint8)
    bits[tokens] = 1
    return Allowed(np.packbits(bits, bitorder="little").view(np.uint32))
