"""A stderr that is JSON to the last line: what Ray prints for its processes, and whatever else is written, one object a line."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from typing import TextIO

# Ray puts the actor's class and process before each line that it forwards; both stand in the line already.
_PREFIX = re.compile(r"^(?:\x1b\[\d+m)?\([^()]*pid=[^()]*\)(?:\x1b\[\d+m)? ")


class JsonLines(io.TextIOBase):
    """Writes to `stream`. Lines that are JSON objects pass; others become the message of one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._begun = ""

    def write(self, text: str) -> int:
        """Takes text; what has no end of line yet waits for it."""
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                plain = _PREFIX.sub("", line).rstrip("\r")
                if plain:
                    self._stream.write((plain if plain.startswith("{") else _as_json(plain)) + "\n")
            self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        """The stream's."""
        return self._stream.fileno()


def _as_json(line: str) -> str:
    now_s = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_s))
    stamp = f"{stamp}.{int(now_s * 1000) % 1000:03d}Z"
    return json.dumps({"time": stamp, "level": "info", "logger": "stderr", "message": line}, ensure_ascii=False)
