"""The sampler of a GPU against that of a CPU: the kernel in the interpreter, or compiled with -m gpu."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quire.worker.constraint import Allowed
from quire.worker.device_sampler import DeviceSampler, sample_rows
from quire.worker.protocol import SamplingParams
from quire.worker.sampler import Held, Sampler, SamplingRow
from quire.worker.sequence_table import PENDING
from quire.worker.staging import ALIGNMENT, Staging, size_of

VOCAB, EOS = 300, (2, 7)
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=0.0, logit_bias={5: 3.0, 250: -2.5}, repetition_penalty=1.2),
    SamplingParams(min_tokens=9, stop_token_ids=(11, 12), logit_bias={11: 50.0}),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.3, top_k=12, min_p=0.02, frequency_penalty=1.0),
    SamplingParams(top_k=-1, logprobs=3),
    SamplingParams(temperature=0.0, logprobs=0, presence_penalty=1.0),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device(request.param)


def rows() -> list[SamplingRow]:
    numbers = np.random.default_rng(0)
    return [SamplingRow(p, 11 * i + 1, 20 + i, 12, numbers.integers(0, VOCAB, 20).astype(np.int32)) for i, p in enumerate(PARAMS)]


def bound(row: SamplingRow, tokens: list[int], error: str | None = None) -> SamplingRow:
    """The row under a grammar that allows only `tokens`."""
    bits = np.zeros(32 * -(-VOCAB // 32), np.uint8)
    bits[tokens] = 1
    return row._replace(allowed=Allowed(np.packbits(bits, bitorder="little").view(np.uint32), error))


def mixed() -> list[SamplingRow]:
    """Every other row under a grammar; one that allows only what min_tokens would ban, one that has come to an error."""
    allowed = {0: [5, 31, 32, 299], 2: [250, 5, 9], 3: [EOS[1]], 5: list(range(64, 96)), 6: [17]}
    made = [bound(row, allowed[i]) if i in allowed else row for i, row in enumerate(rows())]
    return [*made[:7], bound(made[7], [], "it does not go on")]


def scores() -> torch.Tensor:
    torch.manual_seed(0)
    logits = torch.randn(len(PARAMS), VOCAB) * 3
    for row, wanted in zip(logits, rows(), strict=True):
        row[torch.from_numpy(wanted.tokens[12:]).long()] += 6.0  # what has been said is likely, so that penalties count
    logits[3, list(EOS)] += 20.0  # banned, and would be drawn
    return logits


def test_the_same_tokens_and_log_probabilities(device):
    expected = Sampler(EOS, VOCAB).sample(scores(), rows())
    got = DeviceSampler(EOS, VOCAB, len(PARAMS), device).sample(scores().to(device), rows())
    assert [d.token for d in got] == [d.token for d in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None and theirs.logprob is not None:
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)
            assert [t for t, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]
    plain = Sampler(EOS, VOCAB).sample(scores(), [r._replace(params=SamplingParams(temperature=0.0)) for r in rows()])
    assert [d.token for d in plain[1:4]] != [d.token for d in expected[1:4]], "the edits decide, or the test shows nothing"


def test_grammars_in_a_mixed_batch(device):
    free = Sampler(EOS, VOCAB).sample(scores(), rows())
    expected = Sampler(EOS, VOCAB).sample(scores(), mixed())
    got = DeviceSampler(EOS, VOCAB, len(PARAMS), device).sample(scores().to(device), mixed())
    assert [(d.token, d.error) for d in got] == [(d.token, d.error) for d in expected]
    assert got[7] == (0, None, "it does not go on")
    assert [got[i].token for i in (1, 4)] == [free[i].token for i in (1, 4)], "who has no grammar does not notice"
    assert got[0].token in (5, 31, 32, 299)
    assert (got[3].token, got[6].token) == (EOS[1], 17)
    assert got[5].token in range(64, 96)
    raw = torch.log_softmax(scores()[6], dim=0)
    for drawn in (got[6], expected[6]):
        assert drawn.logprob is not None
        assert drawn.logprob.logprob == pytest.approx(raw[17].item(), abs=1e-4), "of the distribution before the grammar"
        assert [t for t, _ in drawn.logprob.top] == raw.topk(3).indices.tolist()


def test_a_row_that_is_not_finite_fails_alone(device):
    logits = scores()
    logits[6, 3] = math.nan
    got = DeviceSampler(EOS, VOCAB, len(PARAMS), device).sample(logits.to(device), rows())
    assert [d.error is None for d in got] == [True] * 6 + [False, True]
    assert got[6].logprob is None
    assert got[7].logprob is not None


def test_each_token_is_biased_once():
    both = SamplingParams(logit_bias={4: 1.0, 9: -1.0}, stop_token_ids=(9,), min_tokens=5)
    *_, starts, ids, bias, penalties = sample_rows([SamplingRow(both, 1, 4, 1, np.array([9, 4, 4, 6], np.int32))], (2,))
    assert starts.tolist() == [0, 3]
    assert dict(zip(ids.tolist(), bias.tolist(), strict=True)) == {4: 1.0, 9: -math.inf, 2: -math.inf}
    assert penalties.tolist() == [[1.0, 0.0, 0.0]]


def test_what_is_drawn_counts_though_the_host_has_not_heard_of_it(device):
    """Eight steps, in all of which the host's last token is wrong; some are drawn twice, as after a row that was dropped."""
    draws, expected = [], []
    params = [
        SamplingParams(temperature=0.0, frequency_penalty=0.7),
        SamplingParams(temperature=0.0, presence_penalty=0.9, repetition_penalty=1.3),
        SamplingParams(seed=1, repetition_penalty=1.5, frequency_penalty=0.1),
        SamplingParams(temperature=0.0),
    ]
    torch.manual_seed(0)
    logits = torch.randn(len(params), VOCAB)
    logits[:, :6] += 4.0  # a few tokens that come again and again
    texts = [[5, 17, 17, *([3] if i == 1 else [])] for i in range(len(params))]  # one comes with output, as after a preemption
    places = [2, 0, 3, 1]
    sampler = DeviceSampler(EOS, VOCAB, len(params), device)
    sampler.learn([Held(place, np.arange(40, dtype=np.int32), 0) for place in places])  # who had these places before
    latest = torch.zeros(len(params), dtype=torch.int64, device=device)
    sampler.learn([Held(places[i], np.array(texts[i], np.int32), 3) for i in range(3)])
    for step in range(8):
        row = [SamplingRow(p, 9, len(text), 3, np.array(text, np.int32)) for p, text in zip(params, texts, strict=True)]
        unheard = [r._replace(tokens=np.array([*r.tokens[:-1], PENDING], np.int32)) if step else r for r in row]
        for _ in range(1 + (step in (0, 4, 7))):
            drawing = sampler.begin(logits.clone().to(device), unheard, places, latest)
            draws.append([d.token for d in drawing.result()])
            expected.append([d.token for d in Sampler(EOS, VOCAB).sample(logits.clone(), row)])
        latest[torch.tensor(places, device=device)] = drawing.tokens
        for text, token in zip(texts, draws[-1], strict=True):
            text.append(token)
    assert draws == expected
    for text, place in zip(texts[:3], places, strict=False):
        *before, _ = text  # what was drawn last is counted by the next draw
        said = np.bincount(before[3:], minlength=VOCAB)
        assert sampler._held[place].tolist() == (2 * said + np.isin(np.arange(VOCAB), text[:3])).tolist()
    assert all(len(set(text[3:])) > 2 for text in texts[:3])
    assert len(set(texts[3][3:])) == 1


def test_staging_keeps_places_and_alignment(device):
    staging = Staging(device)
    arrays = [np.arange(3, dtype=np.int64), np.zeros(0, np.int32), np.array([[1, 2], [3, 4]], np.int32), np.array([0.5], np.float32)]
    memory = torch.empty(size_of(arrays), dtype=torch.uint8, device=device)
    first = staging.upload(arrays, memory)
    assert [t.tolist() for t in first] == [[0, 1, 2], [], [[1, 2], [3, 4]], [0.5]]
    assert all((t.data_ptr() - memory.data_ptr()) % ALIGNMENT == 0 for t in first)
    second = staging.upload([arrays[0] + 5, *arrays[1:]], memory)
    assert second[0].data_ptr() == first[0].data_ptr()
    assert first[0].tolist() == [5, 6, 7]
    large = staging.upload([np.arange(50_000, dtype=np.int64)])[0]
    assert large[-1] == 49_999
