"""The processes below this one, from /proc: so that none is left when a command ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class Process(NamedTuple):
    """A pid, and its start time in clock ticks since boot: together they name one process for good."""

    pid: int
    start: int


def descendants(pid: int) -> list[Process]:
    """Children, their children, and so on, of a process on this machine."""
    parents: dict[Process, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _read(int(entry.name))) is not None:
            parents[found[0]] = found[1]
    below, found_now = {pid}, True
    while found_now:
        more = {process.pid for process, parent in parents.items() if parent in below} - below
        below |= more
        found_now = bool(more)
    return [process for process in parents if process.pid in below and process.pid != pid]


def end(processes: list[Process], grace_s: float) -> None:
    """Waits for processes to be gone, then kills those that are not."""
    deadline_s = time.monotonic() + grace_s
    while alive := [p for p in processes if is_alive(p)]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.02)
    for process in alive:
        log.debug("killing process %d, which did not end", process.pid)
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def is_alive(process: Process) -> bool:
    """Whether it runs. A zombie, or another process with the same pid, does not count."""
    found = _read(process.pid)
    return found is not None and found[0] == process


def _read(pid: int) -> tuple[Process, int] | None:
    """(process, parent's pid); None when there is none or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, *rest = text[text.rindex(")") + 2 :].split()
    return None if state in "ZX" else (Process(pid, int(rest[17])), int(parent))
