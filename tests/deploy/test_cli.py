"""The command line as a user sees it: a process of its own, or main() where a process adds nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from sse_peer import running_peer

from quire.deploy import cli

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def peer():
    with running_peer() as running:
        yield running


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["bench"], ["env"], ["status"], ["top"], ["restart"], ["log-level"]])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys\nfrom quire.deploy import cli\n"
        f"try:\n    cli.main({[*command, '--help']!r})\nexcept SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'fastapi', 'asyncio', 'yaml', 'matplotlib', 'tqdm'} & set(sys.modules)\n"
        "print('STATUS', status, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.stdout.rstrip().endswith("STATUS 0 []"), done.stdout[-500:] + done.stderr
    assert done.stdout.startswith("usage: quire")


def test_no_command_and_an_unknown_one_are_usage_errors():
    for argv in ([], ["sevre"]):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "quire 0.1.0\n"


@pytest.mark.parametrize("argv", [["serve", "--page-size", "0"], ["serve", "--config", "/nothing.yaml"]])
def test_serve_refuses_a_wrong_configuration_before_anything_starts(argv, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("quire serve: ")
    assert "Traceback" not in error


def test_serve_hands_the_built_options_to_the_server(monkeypatch, tmp_path):
    serving = pytest.importorskip("quire.deploy.serving")
    config = tmp_path / "quire.yaml"
    config.write_text("port: 9001\npage-size: 64\n")
    seen = []
    monkeypatch.setattr(serving, "serve", lambda options: seen.append(options) or 7)
    assert cli.main(["serve", "--config", str(config), "--port", "9002"]) == 7
    assert (seen[0].server.port, seen[0].engine.cache.page_size) == (9002, 64)


def test_env_as_text_and_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["quire"] == "0.1.0"
    assert facts["system"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(facts) == {"system", "packages", "cpu", "devices"}
    assert cli.main(["env"]) == 0
    assert f"  python         {facts['system']['python']}\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["bench", "chat"])
def test_no_server_is_said_plainly(command, capsys):
    assert cli.main([command, "--url", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:1" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--concurrency", "0"], "must be a whole number of at least 1 (got '0')"),
        (["bench", "--rate", "nan"], "must be a number above 0"),
        (["bench", "--rate", "1", "--speedup", "1"], "not allowed with argument"),
        (["bench", "--prompts", "a", "--trace", "b"], "not allowed with argument"),
        (["chat", "--temperature", "-1"], "must be a number of at least 0"),
    ],
)
def test_wrong_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--speedup", "2"], ["--url", "nonsense"]])
def test_bench_refuses_what_makes_no_sense(argv, capsys):
    assert cli.main(["bench", *argv]) == 2
    assert "quire bench: " in capsys.readouterr().err


def test_bench_measures_a_server_and_writes_json_and_png(peer, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    argv = "--num-requests 6 --input-tokens 5 --output-tokens 4 --concurrency 2 --slo-ttft-ms 60000".split()
    assert cli.main(["bench", "--url", peer.url, "--json", str(report), "--png", str(picture), *argv]) == 0
    out, progress = capsys.readouterr()
    assert "6 of 6" in out
    assert "5 tokens in, 4 out, 2 at a time" in out
    assert "6/6" in progress
    figures = json.loads(report.read_text())
    assert figures["summary"]["output_tokens"] == 24
    assert figures["summary"]["slo_attainment"] == 1.0
    assert len(figures["requests"]) == 6
    assert figures["model"] == "tiny"
    assert picture.stat().st_size > 10_000
    assert all(len(body["prompt"]) == 5 and body["model"] == "tiny" and body["temperature"] == 0 for body in peer.bodies)
    assert not any("priority" in body or "deadline_ms" in body for body in peer.bodies)  # other servers do not know them


def test_bench_can_say_how_urgent_its_requests_are(peer, capsys):
    argv = "--num-requests 2 --output-tokens 2 --priority low --deadline-ms 500".split()
    assert cli.main(["bench", "--url", peer.url, *argv]) == 0
    assert [(body["priority"], body["deadline_ms"]) for body in peer.bodies] == [("low", 500)] * 2


def test_bench_with_a_trace_leaves_out_what_the_served_model_cannot_hold(peer, tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:4{second}.0000000,{length},4" for second, length in enumerate((30, 61, 60))]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    assert cli.main(["bench", "--url", peer.url, "--trace", str(trace), "--speedup", "1000"]) == 0
    assert [len(body["prompt"]) for body in peer.bodies] == [30, 60]  # the peer says max_model_len 64
    assert "2 of 2" in capsys.readouterr().out


def test_bench_fails_when_a_request_fails_and_says_why(peer, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fine\n429\n")
    assert cli.main(["bench", "--url", peer.url, "--prompts", str(prompts), "--num-requests", "4"]) == 1
    out, error = capsys.readouterr()
    assert "2 x HTTP 429" in out
    assert "the queue is full" in error


def test_chat_keeps_the_conversation(peer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n/reset\nnew\n/exit\nnever\n"))
    monkeypatch.setenv("QUIRE_API_KEY", "from-env")
    assert cli.main(["chat", "--url", peer.url, "--system", "be brief", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "you said hello\nyou said again\nyou said new\n"
    contents = [[message["content"] for message in body["messages"]] for body in peer.bodies]
    assert contents == [["be brief", "hello"], ["be brief", "hello", "you said hello", "again"], ["be brief", "new"]]
    assert peer.bodies[0]["temperature"] == 0
    assert "top_p" not in peer.bodies[0]  # what is not given is left to the server
    assert peer.headers[-1]["authorization"] == "Bearer from-env"


def test_chat_takes_what_is_not_utf_8(peer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(["chat", "--url", peer.url]) == 0
    assert capsys.readouterr().out == "you said caf\N{REPLACEMENT CHARACTER}\n"


def test_chat_without_a_terminal_fails_when_an_answer_fails(peer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("429\nhello\n"))
    assert cli.main(["chat", "--url", peer.url]) == 1
    assert "the queue is full" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_chat(peer):
    command = [sys.executable, "-m", "quire.deploy.cli", "chat", "--url", peer.url]
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        chat.stdin.write("hold\n")
        chat.stdin.flush()
        assert peer.holding.wait(60)
        assert chat.stdout.read(len("you said hold")) == "you said hold"
        chat.send_signal(signal.SIGINT)
        assert peer.closed_early.wait(60)  # the server hears of it
        out, error = chat.communicate("hello\n", timeout=60)
    finally:
        chat.kill()
        chat.wait()
    assert (out, error, chat.returncode) == (" [stopped]\nyou said hello\n", "", 0)
    assert [m["content"] for m in peer.bodies[-1]["messages"]] == ["hold", "you said hold", "hello"]


def test_a_reader_that_leaves_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "quire.deploy.cli", "env"]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141
