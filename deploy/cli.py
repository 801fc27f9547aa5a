"""The `quire` command. Environment variables are read here and nowhere else; what is slow to import waits for its command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from .commands import admin, admin_server, bench, chat, env, profile, serve, simulate, top
from .commands.arguments import CommandError


def parser(api_key: str | None = None, admin_token: str | None = None) -> argparse.ArgumentParser:
    """The whole command line; `api_key` is the clients' default key, `admin_token` the operators'."""
    whole = argparse.ArgumentParser(prog="quire", description="Serves large language models from a paged KV pool.")
    whole.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = whole.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    serve.add_parser(commands)
    chat.add_parser(commands, api_key)
    bench.add_parser(commands, api_key)
    admin.add_parsers(commands, admin_token)
    admin_server.add_parser(commands, admin_token)
    top.add_parser(commands, admin_token)
    profile.add_parser(commands)
    simulate.add_parser(commands)
    env.add_parser(commands)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for a wrong flag, configuration or server, 130 after Ctrl-C."""
    # Ray reads these when it is imported. By default it leaves out lines that look alike on several processes: ours differ by their
    # request's id, and each counts.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    args = parser(os.environ.get("QUIRE_API_KEY"), os.environ.get("QUIRE_ADMIN_TOKEN")).parse_args(argv)
    try:
        status: int = args.run(args)
    except CommandError as error:
        sys.stderr.write(f"quire {args.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output left. Keep the interpreter from failing over the same pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(main())
