"""The figures of a load test, with exact numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from quire.deploy.load.client import Outcome
from quire.deploy.load.plot import _level, write_png
from quire.deploy.load.report import Slo, percentile, summarize, table, tpot_s

# (start, TTFT, latency, tokens in, tokens out, cached)
FAST = Outcome(0.0, 0.25, 1.25, 100, 11, 32)  # TPOT 0.1 s
SLOW = Outcome(0.5, 0.75, 4.75, 50, 5, 0)  # TPOT 1 s
SINGLE = Outcome(1.0, 0.5, 0.5, 10, 1, 0)  # one token: no TPOT
FAILED = Outcome(1.0, None, 0.1, error="HTTP 429", message="the queue is full")
HALF = Outcome(1.0, 0.1, 0.2, error="stream cut")


@pytest.mark.parametrize(("outcome", "seconds"), [(FAST, 0.1), (SLOW, 1.0), (SINGLE, None), (FAILED, None)])
def test_tpot(outcome, seconds):
    assert tpot_s(outcome) == (None if seconds is None else pytest.approx(seconds))


def test_percentiles_interpolate_as_numpy_does():
    values = [5.0, 1.0, 9.0, 2.0, 4.0]
    for percent in (0, 1, 25, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([3.0], 99) == 3.0
    assert math.isnan(percentile([], 50))


def test_summary():
    got = summarize([FAST, SLOW, SINGLE, FAILED, HALF], 5.0, Slo())
    assert (got["requests"], got["succeeded"], got["errors"]) == (5, 3, {"HTTP 429": 1, "stream cut": 1})
    assert (got["input_tokens"], got["output_tokens"], got["cached_tokens"]) == (160, 17, 32)
    assert (got["requests_per_s"], got["input_tokens_per_s"], got["output_tokens_per_s"]) == (0.6, 32.0, 3.4)
    assert got["ttft_ms"] == pytest.approx({"mean": 500, "p50": 500, "p90": 700, "p99": 745})
    assert got["tpot_ms"] == pytest.approx({"mean": 550, "p50": 550, "p90": 910, "p99": 991})
    assert got["latency_ms"]["p50"] == pytest.approx(1250)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(), 3),  # no limit: every request that succeeded
        (Slo(ttft_ms=500), 2),
        (Slo(ttft_ms=499), 1),
        (Slo(tpot_ms=100.001), 2),  # the single token has no pace to miss
        (Slo(tpot_ms=99), 1),
        (Slo(ttft_ms=400, tpot_ms=50), 0),
    ],
)
def test_goodput(slo, met):
    got = summarize([FAST, SLOW, SINGLE, FAILED, HALF], 2.0, slo)
    assert got["goodput_requests_per_s"] == met / 2
    assert got["slo_attainment"] == met / 5


def test_a_run_in_which_all_fail_still_has_a_report():
    got = summarize([FAILED], 1.0, Slo(ttft_ms=1))
    assert got["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    json.dumps(got, allow_nan=False)
    assert "1 x HTTP 429" in table(got)


def test_the_table_says_it_all():
    text = table(summarize([FAST, SLOW, SINGLE, FAILED], 5.0, Slo(ttft_ms=500, tpot_ms=200)))
    for part in ("3 of 4 in 5.00 s", "17 tokens, 3.4 a second", "32 cached", "1 x HTTP 429", "TTFT <= 500 ms, TPOT <= 200 ms", "(50.0%)"):
        assert part in text, part
    row = next(line.split() for line in text.splitlines() if line.startswith("TTFT"))
    assert row == ["TTFT", "500.0", "500.0", "700.0", "745.0"]


def test_how_many_spans_are_open():
    assert _level([(1.0, 3.0), (2.0, 4.0)]) == ([0.0, 1.0, 2.0, 3.0, 4.0], [0, 1, 2, 1, 0])


@pytest.mark.parametrize("outcomes", [[FAST, SLOW, SINGLE, FAILED], [FAILED]])
def test_the_picture_is_a_png_of_some_size(tmp_path, outcomes):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    write_png(path, "a title", outcomes, summarize(outcomes, 5.0, Slo(ttft_ms=500)))
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") >= 1000  # width
