"""Streams that threads read, while a test does something to the cluster that they come from."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

WAIT_S = 120.0
ENDLESS = 7500  # tokens: a stream that lasts for as long as a test has to do with it


class Reader:
    """A completion that a thread reads to its end, or until it is told to leave."""

    def __init__(self, url: str, body: dict[str, Any], key: str = "") -> None:
        self.text, self.tokens, self.request_id, self.error = "", 0, "", ""
        self.begun = threading.Event()
        self._leave = threading.Event()
        self._url = url
        self._body = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, **body}
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url + "/v1/completions", json=self._body, headers=self._headers, timeout=WAIT_S) as answer:
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

    def leave(self, length: int = 0) -> str:
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


def numbered(url: str, number: int, tokens: int) -> Reader:
    """One of many; equal numbers have equal texts. Odd ones are sampled with a seed."""
    sampled = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0.0}
    return Reader(url, {"prompt": f"stream {number}: " + "abc " * 60, "max_tokens": tokens, **sampled})


@contextmanager
def stream(url: str, prompt: str, key: str = "", **fields: Any) -> Iterator[None]:
    """One completion, from its first output on."""
    reader = Reader(url, {"prompt": prompt, "max_tokens": ENDLESS, **fields}, key)
    assert reader.begun.wait(WAIT_S)
    try:
        yield
    finally:
        reader.leave()
