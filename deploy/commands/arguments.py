"""What the commands share: flags of a client, number types with clear errors, and the error that ends a command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..load.http import Server


class CommandError(Exception):
    """Ends the command with its message on stderr and exit status 2."""


def add_server_arguments(parser: argparse.ArgumentParser, api_key: str | None) -> None:
    """--url, --api-key (default `api_key`), --model, --timeout-s."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: http://127.0.0.1:8000)")
    group.add_argument("--api-key", default=api_key, metavar="KEY", help="sent as a bearer token (default: $QUIRE_API_KEY)")
    group.add_argument("--model", metavar="NAME", help="name of the model (default: the first that the server names)")
    group.add_argument("--timeout-s", type=positive_float, default=600.0, metavar="SECONDS", help="longest silence allowed (default: 600)")


def server_of(args: argparse.Namespace) -> Server:
    """The server that the flags name.

    Raises:
        CommandError: the URL or the key cannot be used.
    """
    from ..load.http import Server

    try:
        return Server(args.url, args.api_key or None, args.timeout_s)
    except ValueError as error:
        raise CommandError(str(error)) from None


def _number(convert: Callable[[str], float], allowed: Callable[[float], bool], noun: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {noun} (got {text!r})")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
nonnegative_float = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
