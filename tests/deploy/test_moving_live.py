"""Real processes: streams that are moved by hand and by a drain give the text of an undisturbed run, and no error."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_server import Serve, save_tiny_model, until

from quire.deploy import cli

WAIT_S = 120.0
STREAMS = 6
ENDLESS = 7500  # tokens: a stream that lasts for as long as a test has to do with it
ON = 300  # characters that it goes on for after that


class Reader:
    """A stream that a thread reads to its end, or until it is told to leave."""

    def __init__(self, url: str, number: int, tokens: int) -> None:
        sampled = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0.0}
        length = {"max_tokens": tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        self.body = {"prompt": f"stream {number}: " + "abc " * 60, **sampled, **length}
        self.text, self.tokens, self.request_id, self.error = "", 0, "", ""
        self.begun = threading.Event()
        self._leave = threading.Event()
        self._url = url
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url + "/v1/completions", json=self.body, timeout=WAIT_S) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(json.loads(line[6:]))
                    if self._leave.is_set():
                        return
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            self.error = repr(error)
        self.begun.set()

    def _take(self, event: dict[str, Any]) -> None:
        self.error = self.error or str(event.get("error", ""))
        self.request_id = event.get("id", self.request_id)
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.begun.set()

    def end(self) -> tuple[str, int, str]:
        """(text, output tokens, error) of the whole stream."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.text, self.tokens, self.error

    def leave(self, length: int) -> str:
        """The text, once it has so many characters."""
        deadline_s = time.monotonic() + WAIT_S
        while len(self.text) < length:
            assert self.thread.is_alive(), self.error or "the stream ended"
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        self._leave.set()
        self.end()
        assert self.error == ""
        return self.text


def start(url: str) -> list[Reader]:
    readers = [Reader(url, number, ENDLESS) for number in range(STREAMS)]
    for reader in readers:
        assert reader.begun.wait(WAIT_S)
    return readers


@pytest.mark.ray
@pytest.mark.slow
def test_streams_that_move_notice_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--kv-pages", "1024", "--replicas", "3", "--no-rebalance"]
    with Serve(tmp_path / "log", *flags) as server:
        server.wait_ready()
        admin = server.admin

        def quire(*words: str) -> tuple[int, dict[str, Any]]:
            status = cli.main([words[0], "--admin-url", admin, *words[1:], "--json"])
            return status, json.loads(capsys.readouterr().out)

        def place(reader: Reader) -> str | None:
            return next((row["replica"] for row in server.status()["requests"] if row["id"] == reader.request_id), None)

        readers = start(server.url)
        source = place(readers[0])
        to = "replica-1" if source == "replica-0" else "replica-0"
        status, moved = quire("migrate", readers[0].request_id, "--to", to)
        assert (status, moved["outcome"], moved["source"], moved["destination"]) == (0, "moved", source, to), moved
        assert moved["pages"] > 0
        assert moved["bytes"] > 0
        assert moved["downtime_ms"] > 0
        places = {row["id"]: row["replica"] for row in server.status()["requests"]}
        here = [reader for reader in readers if places.get(reader.request_id) == to]
        status, drained = quire("drain", to)
        assert (status, drained["state"], drained["requests"]) == (0, "drained", 0)
        assert 0 < drained["moved"] <= len(here)
        assert {row["id"]: row["state"] for row in server.status()["replicas"]}[to] == "drained"
        late = Reader(server.url, 1, ENDLESS)  # nothing new goes there
        assert late.begun.wait(WAIT_S)
        assert place(late) != to
        texts = [reader.leave(len(reader.text) + ON) for reader in (*readers, late)]
        assert quire("drain", to, "--undo")[1]["state"] == "ready"
        until("nothing is left", lambda: not any(row["pages"]["active"] for row in server.status()["replicas"]), server.stderr, WAIT_S)

        calm = [Reader(server.url, number, ENDLESS) for number in (*range(STREAMS), 1)]  # nothing moves now
        assert [reader.leave(len(text))[: len(text)] for reader, text in zip(calm, texts, strict=True)] == texts
        assert 'quire_migrations_total{outcome="moved",reason="operator"} 1.0' in httpx.get(admin + "/metrics").text
