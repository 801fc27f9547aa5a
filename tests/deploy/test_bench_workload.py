"""What a load test sends and when."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from quire.deploy.load.traces import MOONCAKE_BLOCK_TOKENS, TraceOptions, WorkloadError
from quire.deploy.load.workload import LoadRequest, arrivals, fixed_lengths, prompts_file, trace_file

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,396,109\n"


def mooncake(*rows: tuple[int, int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as out:
            out.write(text)
        return path

    return write


def test_fixed_lengths_are_exact_and_repeatable():
    requests = fixed_lengths(3, 17, 5, TraceOptions(vocab_size=1000, seed=1))
    assert [len(r.prompt) for r in requests] == [17, 17, 17]
    assert all(r.exact and r.output_tokens == 5 for r in requests)
    assert all(256 <= token < 1000 for r in requests for token in r.prompt)
    assert len({r.prompt for r in requests}) == 3
    assert requests == fixed_lengths(3, 17, 5, TraceOptions(vocab_size=1000, seed=1))
    assert requests != fixed_lengths(3, 17, 5, TraceOptions(vocab_size=1000, seed=2))
    assert all(0 <= token < 20 for token in fixed_lengths(1, 50, 1, TraceOptions(vocab_size=20))[0].prompt)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl.gz"])
def test_prompts_of_every_form(file, name):
    text = 'plain words\n\n{"prompt": "p"}\n{"question": "q", "answer": "a"}\n{"turns": ["t1", "t2"]}\n'
    got = prompts_file(file(name, text), 6, 9)
    assert [r.prompt for r in got] == ["plain words", "p", "q", "t1", "plain words", "p"]
    assert all(r.output_tokens == 9 and not r.exact for r in got)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no prompt"), ('{"text": "x"}', "p.txt:1: has none of the keys"), ("ok\n{broken", "p.txt:2: is not JSON")],
)
def test_a_wrong_prompts_file_is_named(file, text, message):
    with pytest.raises(WorkloadError, match=message):
        prompts_file(file("p.txt", text), 1, 1)


def test_a_missing_file_and_a_false_gzip_are_named(file, tmp_path):
    with pytest.raises(WorkloadError, match=r"nothing\.txt cannot be read"):
        prompts_file(tmp_path / "nothing.txt", 1, 1)
    path = tmp_path / "x.gz"
    path.write_text("not gzip")
    with pytest.raises(WorkloadError, match=r"x\.gz cannot be read"):
        trace_file(path, 1, TraceOptions())


def test_azure(file):
    got = trace_file(file("azure.csv", AZURE), 10, TraceOptions())
    assert [(len(r.prompt), r.output_tokens, r.exact) for r in got] == [(374, 44, True), (396, 109, True)]
    assert [r.arrival_s for r in got] == pytest.approx([0.0, 4.25])


def test_scaled_lengths_are_rounded_up_and_never_zero(file):
    got = trace_file(file("azure.csv", AZURE), 10, TraceOptions(scale=100))
    assert [(len(r.prompt), r.output_tokens) for r in got] == [(4, 1), (4, 2)]


def test_what_the_model_cannot_hold_is_left_out(file):
    got = trace_file(file("azure.csv", AZURE), 10, TraceOptions(max_tokens=418))
    assert [len(r.prompt) for r in got] == [374]  # 374 + 44 just fits
    with pytest.raises(WorkloadError, match="no request of at most 417 tokens"):
        trace_file(file("azure.csv", AZURE), 10, TraceOptions(max_tokens=417))


def test_mooncake_shares_prefixes_as_recorded(file):
    path = file("m.jsonl.gz", mooncake((3000, 1030, 20, [0, 7, 8]), (6000, 1500, 40, [0, 7, 9]), (9000, 10, 1, [5])))
    one, two, three = trace_file(path, 10, TraceOptions())
    assert (len(one.prompt), len(two.prompt), len(three.prompt)) == (1030, 1500, 10)
    assert one.prompt[:1024] == two.prompt[:1024]
    assert one.prompt[1024:] != two.prompt[1024:1030]
    assert [r.arrival_s for r in (one, two, three)] == [0.0, 3.0, 6.0]


def test_mooncake_scaled_by_16_maps_a_block_to_32_tokens(file):
    one, two = trace_file(file("m.jsonl", mooncake((0, 1024, 16, [0, 7]), (0, 1024, 16, [0, 8]))), 10, TraceOptions(scale=16))
    assert (len(one.prompt), one.output_tokens) == (64, 1)
    assert one.prompt[:32] == two.prompt[:32]
    assert one.prompt[32:] != two.prompt[32:]


def test_a_sample_of_a_mooncake_trace_keeps_sessions_whole(file):
    rows = [(turn * 1000, 1000 + 100 * turn, 16, [0, session, *range(turn)]) for turn in range(3) for session in range(100, 500)]
    got = trace_file(file("m.jsonl", mooncake(*rows)), 10_000, TraceOptions(one_session_in=10))
    turns = Counter(request.prompt[512:1000] for request in got)
    assert set(turns.values()) == {3}
    assert 20 <= len(turns) <= 60  # of 400
    assert got[0].arrival_s == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is neither an Azure trace"),
        ("a,b\n1,2\n", "is neither an Azure trace"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", r"t:2: .*yesterday"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46.68,1\n", "t:2: KeyError"),
        (mooncake((0, 1, 1, [0])) + '{"timestamp": 0}\n', "t:2: KeyError"),
    ],
)
def test_a_wrong_trace_is_named(file, text, message):
    with pytest.raises(WorkloadError, match=message):
        trace_file(file("t", text), 10, TraceOptions())


def test_arrivals():
    requests = [LoadRequest("x", 1, False, at_s) for at_s in (0.0, 4.0, 10.0)]
    assert arrivals(requests, None, None, 0) is None
    assert arrivals(requests, None, 2.0, 0) == [0.0, 2.0, 5.0]
    many = [requests[0]] * 4001
    times = arrivals(many, 10.0, None, 3)
    assert times == arrivals(many, 10.0, None, 3) != arrivals(many, 10.0, None, 4)
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400, rel=0.1)  # 4000 gaps of 0.1 s on average


@pytest.mark.parametrize(
    ("name", "first_lengths"),
    [
        ("traces/AzureLLMInferenceTrace_conv.csv.gz", [(374, 44), (396, 109), (879, 55)]),
        ("traces/mooncake_conversation_trace.jsonl.gz", [(6758, 500), (7322, 490)]),
    ],
)
def test_the_real_traces(data_file, name, first_lengths):
    got = trace_file(data_file(name), 300, TraceOptions())
    assert [(len(r.prompt), r.output_tokens) for r in got[: len(first_lengths)]] == first_lengths
    assert len(got) == 300
    assert [r.arrival_s for r in got] == sorted(r.arrival_s for r in got)


@pytest.mark.parametrize(
    ("name", "start"), [("mt_bench_question", "Compose an engaging travel"), ("gsm8k_test", "Janet’s ducks lay 16 eggs")]
)
def test_the_real_prompts(data_file, name, start):
    assert prompts_file(data_file(f"prompts/{name}.jsonl.gz"), 80, 1)[0].prompt.startswith(start)


def test_block_size_is_the_published_one():
    assert MOONCAKE_BLOCK_TOKENS == 512
