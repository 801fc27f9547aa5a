"""A stderr of JSON objects only, whatever is written into it."""

import io
import json
import sys

from quire.deploy.json_lines import JsonLines

OURS = '{"message": "served", "request_id": "cmpl-1"}'


def lines_of(*texts: str) -> list[dict[str, str]]:
    out = io.StringIO()
    stream = JsonLines(out)
    for text in texts:
        stream.write(text)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_of_another_process_loses_only_what_ray_puts_before_it() -> None:
    for prefix in ("", "(IngressActor pid=12) ", "\x1b[36m(ReplicaActor pid=7, ip=10.0.0.2)\x1b[0m "):
        assert lines_of(f"{prefix}{OURS}\n") == [json.loads(OURS)]


def test_what_is_no_json_becomes_a_message() -> None:
    (line,) = lines_of("(ReplicaActor pid=7) Fatal Python error: (really pid=8) x\n")
    assert line["message"] == "Fatal Python error: (really pid=8) x"
    assert line.keys() == {"time", "level", "logger", "message"}


def test_lines_may_come_in_pieces() -> None:
    assert lines_of(OURS[:10], OURS[10:], "\n\n", OURS) == [json.loads(OURS)]


def test_print_takes_it(monkeypatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", JsonLines(out))
    print("a", "b", file=sys.stderr)
    assert json.loads(out.getvalue())["message"] == "a b"
