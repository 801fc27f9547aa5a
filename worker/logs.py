"""Logging of every process of Quire: one line a record on stderr, for people or for machines.

Whatever a line is about is said by fields, never only in its words: `extra={"request_id": ...}` where the line is written,
`about(...)` for all lines of a task, and what is true of a whole process (replica, epoch, ingress) once, in `start_logging`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

FIELDS = ("request_id", "tenant", "replica", "epoch", "ingress", "rank")  # in this order in a line of text
EXTRAS = ("status", "prompt_tokens", "output_tokens", "ttft_ms", "duration_ms", "finish")  # of the line that ends a request
LEVELS = ("debug", "info", "warning", "error")

_task: ContextVar[dict[str, Any]] = ContextVar("quire_log_fields", default={})  # noqa: B039  never changed in place


class LogSetup(NamedTuple):
    """What travels to a process that is to log; both as in `ServerOptions`."""

    level: str = "info"
    format: str = "text"


def start_logging(setup: LogSetup, **process: Any) -> None:
    """Logs of this process go to stderr from now on. `process` are fields (of FIELDS) that are true of all its lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if setup.format == "json" else TextFormatter(process))
    logging.basicConfig(level=setup.level.upper(), handlers=[handler], force=True)


def set_level(level: str) -> None:
    """Changes how much this process logs.

    Raises:
        ValueError: it is none of LEVELS.
    """
    if level not in LEVELS:
        raise ValueError(f"must be one of {', '.join(LEVELS)}")
    logging.getLogger().setLevel(level.upper())


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Every line of this task, or thread, concerns `fields` (of FIELDS) until the block ends."""
    token = _task.set({**_task.get(), **fields})
    try:
        yield
    finally:
        _task.reset(token)


def fields_of(record: logging.LogRecord, process: dict[str, Any]) -> dict[str, Any]:
    """What the line is about: its own fields, then the task's, then the process's; empty ones left out."""
    found = {**process, **_task.get(), **{name: getattr(record, name) for name in (*FIELDS, *EXTRAS) if hasattr(record, name)}}
    return {name: found[name] for name in (*FIELDS, *EXTRAS) if found.get(name) not in (None, "")}


class TextFormatter(logging.Formatter):
    """`2025-01-31 12:00:00,123 INFO quire.x: words [request_id=... replica=...]`."""

    def __init__(self, process: dict[str, Any] | None = None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._process = process or {}

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        fields = fields_of(record, self._process)
        line = super().formatMessage(record)
        return f"{line} [{' '.join(f'{name}={value}' for name, value in fields.items())}]" if fields else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields, and the trace of an exception."""

    def __init__(self, process: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._process = process or {}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record, self._process),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def start_actor_logging(level: str, format: str = "text", **process: Any) -> None:
    """Logs of this process to stderr (`start_logging`); stray prints too, because stdout belongs to the ready line."""
    sys.stdout = sys.stderr
    start_logging(LogSetup(level, format), **process)
