"""`quire bench` and `quire chat` against Quire's own API with the real model."""

from __future__ import annotations

import io
import json

import pytest

from quire.deploy import cli

pytestmark = pytest.mark.usefixtures("clean_environment")


def bench(url: str, report, *argv: str) -> dict:
    assert cli.main(["bench", "--url", url, "--json", str(report), *argv]) == 0
    return json.loads(report.read_text())["summary"]


def test_fixed_lengths_are_what_the_server_counts(real, tmp_path):
    summary = bench(real.url, tmp_path / "out.json", *"--num-requests 4 --concurrency 2 --input-tokens 40 --output-tokens 6".split())
    assert (summary["succeeded"], summary["input_tokens"], summary["output_tokens"]) == (4, 160, 24)
    assert 0 < summary["ttft_ms"]["p50"] < summary["latency_ms"]["p50"]
    assert summary["tpot_ms"]["p50"] > 0


def test_a_mooncake_trace_finds_its_shared_prefixes_in_the_cache(real, tmp_path):
    trace = tmp_path / "trace.jsonl"
    # Scaled by 16, a block is one page of 32 tokens: the second request finds the first one's two shared pages.
    rows = [{"timestamp": at, "input_length": 1536, "output_length": 32, "hash_ids": [0, 1, last]} for at, last in ((0, 2), (1000, 3))]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = bench(real.url, tmp_path / "out.json", "--trace", str(trace), "--scale", "16", "--concurrency", "1", "--seed", "17")
    assert (summary["input_tokens"], summary["output_tokens"], summary["cached_tokens"]) == (192, 4, 64)


def test_questions_are_answered(real, tmp_path, data_file):
    prompts = data_file("prompts/mt_bench_question.jsonl.gz")
    argv = ["--prompts", str(prompts), "--num-requests", "3", "--output-tokens", "5", "--rate", "50", "--temperature", "1"]
    summary = bench(real.url, tmp_path / "out.json", *argv)
    assert summary["succeeded"] == 3
    assert 3 <= summary["output_tokens"] <= 15


def test_chat(real, monkeypatch, capsys):
    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert cli.main(["chat", "--url", real.url, "--temperature", "0", "--max-tokens", "8"]) == 0
        return capsys.readouterr().out.splitlines()

    one, two = talk("What is 2+2?", "And what is the capital of France?")
    assert one
    assert two
    assert talk("What is 2+2?", "/reset", "What is 2+2?") == [one, one]
