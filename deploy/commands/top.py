"""`quire top`: pages, requests and throughput of a running server, live in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import select
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from .admin import add_admin_arguments, ask
from .arguments import CommandError, positive_float

_DESCRIPTION = "Shows pages, requests and throughput of a running server, live. q or Ctrl-C leaves."
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # another screen without a cursor, and back
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_PIPE_WIDTH = 100


def add_parser(commands: Any, token: str | None) -> None:
    """`token` is the default of --admin-token."""
    parser = commands.add_parser("top", help="watch pages, requests and throughput of a running server", description=_DESCRIPTION)
    add_admin_arguments(parser, token)
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument("--interval-s", type=positive_float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draws until q, Ctrl-C or the end of the output; without a terminal one frame after another."""
    top, at_s = ask(args, "/admin/top"), time.monotonic()
    live = sys.stdout.isatty() and not args.once
    rates: dict[str, tuple[float, float]] | None = None
    failure = ""
    with _screen() if live else contextlib.nullcontext(), contextlib.suppress(KeyboardInterrupt):
        while True:
            _draw(top, rates, failure, live)
            if args.once or _left(args.interval_s, live):
                break
            try:
                then, before = time.monotonic(), top
                top, failure = ask(args, "/admin/top"), ""
                rates = rates_between(before, top, then - at_s)
                at_s = then
            except CommandError as error:
                if not live:
                    raise
                failure = str(error)
    return 0


def rates_between(before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, tuple[float, float]]:
    """Replica -> prompt and output tokens a second between two answers; 0 for a replica that began anew."""
    rates = {}
    for replica, now in after["tokens"].items():
        then = before["tokens"].get(replica)
        same = then is not None and then["epoch"] == now["epoch"]
        rates[replica] = ((now["prompt"] - then["prompt"]) / seconds, (now["output"] - then["output"]) / seconds) if same else (0.0, 0.0)
    return rates


def _draw(top: dict[str, Any], rates: dict[str, tuple[float, float]] | None, failure: str, live: bool) -> None:
    from ..screen import glyphs_for, top_lines

    size = tuple(shutil.get_terminal_size()) if live else (_PIPE_WIDTH, 0)
    lines = top_lines(top, rates, (size[0], size[1]), glyphs_for(sys.stdout.encoding))
    if failure:
        lines[:1] = [failure[: size[0]]]
    text = _HOME + "".join(f"{line}{_REST_OF_LINE}\r\n" for line in lines[:-1]) + lines[-1] + _REST_OF_LINE + _REST_OF_SCREEN
    sys.stdout.write(text if live else "\n".join(lines) + "\n\n")
    sys.stdout.flush()


def _left(wait_s: float, live: bool) -> bool:
    """Waits; True when q was pressed."""
    if not (live and sys.stdin.isatty()):
        time.sleep(wait_s)
        return False
    ready, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "")


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Another screen, and keys without Enter; both are put back."""
    import termios
    import tty

    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys is not None else None
    try:
        if keys is not None:
            tty.setcbreak(keys)
        sys.stdout.write(_ENTER)
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        if keys is not None and before is not None:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
