"""Streams that go on for as long as a test has to do with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

WAIT_S = 120.0


@contextmanager
def stream(url: str, prompt: str, key: str = "", **fields: Any) -> Iterator[None]:
    """One completion, from its first output to the end of the context."""
    body = {"prompt": prompt, "max_tokens": 7500, "ignore_eos": True, "stream": True, **fields}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    begun, leave = threading.Event(), threading.Event()

    def read() -> None:
        with httpx.stream("POST", url + "/v1/completions", json=body, headers=headers, timeout=WAIT_S) as answer:
            for _ in answer.iter_lines():
                begun.set()
                if leave.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert begun.wait(WAIT_S)
        yield
    finally:
        leave.set()
        thread.join(WAIT_S)
