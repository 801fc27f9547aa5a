"""`quire chat`: talk to a running server in the terminal."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from .arguments import CommandError, add_server_arguments, nonnegative_float, positive_float, positive_int, server_of

if TYPE_CHECKING:
    from ..load.http import Server

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def add_parser(commands: Any, api_key: str | None) -> None:
    """`api_key` is the default of --api-key."""
    parser = commands.add_parser("chat", help="talk to a running server", description=f"Talks to a running server. {_HELP}")
    add_server_arguments(parser, api_key)
    group = parser.add_argument_group("answers")
    group.add_argument("--system", metavar="TEXT", help="system message at the head of the conversation")
    group.add_argument("--max-tokens", type=positive_int, metavar="N", help="longest answer (default: as long as the model can)")
    group.add_argument("--temperature", type=nonnegative_float, metavar="X", help="0 is greedy (default: the server's)")
    group.add_argument("--top-p", type=positive_float, metavar="X", help="nucleus mass in (0, 1]")
    group.add_argument("--top-k", type=positive_int, metavar="N", help="draw from so many most likely tokens")
    group.add_argument("--min-p", type=nonnegative_float, metavar="X", help="drop tokens below this share of the most likely one")
    group.add_argument("--repetition-penalty", type=positive_float, metavar="X", help="above 1: against repetition")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads lines until the end of the input or /exit. Without a terminal, an error in an answer ends it with status 1."""
    import asyncio

    from ..load.http import HttpError

    server = server_of(args)
    interactive = sys.stdin.isatty()
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    sampling = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    with asyncio.Runner() as runner:
        try:
            model = args.model or next(iter(runner.run(server.models())))
        except HttpError as error:
            hint = "; start one with `quire serve`, or name it with --url" if error.kind == "connect" else ""
            raise CommandError(f"{error}{hint}") from None
        if interactive:
            print(f"{model} at {args.url}. {_HELP}")
        start = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(start)
        for line in _lines(interactive):
            if line == "/exit":
                break
            if line == "/reset":
                messages = list(start)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer: list[str] = []
            try:
                runner.run(_answer(server, {"model": model, "messages": messages, **sampling}, answer))
            except KeyboardInterrupt:
                print(" [stopped]", end="", flush=True)
            except HttpError as error:
                print(f"{error}", file=sys.stderr)
                if not interactive:
                    return 1
                if not answer:
                    messages.pop()  # so that the question can be put again
                    continue
            print()
            messages.append({"role": "assistant", "content": "".join(answer)})
    return 0


async def _answer(server: Server, body: dict[str, Any], pieces: list[str]) -> None:
    """Prints the answer as it comes and leaves what has come in `pieces`, also when it is interrupted."""
    from ..load.http import HttpError, error_message

    async with aclosing(server.events("/v1/chat/completions", {**body, "stream": True})) as events:
        async for event in events:
            data = json.loads(event.data)
            if "error" in data:
                raise HttpError("error event", error_message(data))
            for choice in data.get("choices", ()):
                if text := choice["delta"].get("content"):
                    pieces.append(text)
                    print(text, end="", flush=True)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or what stdin holds, without blanks around it."""
    if not interactive:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a file in another encoding is no reason to end
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  history and editing for input()

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves")
