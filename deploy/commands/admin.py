"""`quire status`, `restart`, `migrate`, `drain`, `rebalance`, `scale` and `log-level`: what operators ask of the admin API."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...worker.logs import LEVELS
from .arguments import CommandError, positive_float

if TYPE_CHECKING:
    from ..load.http import Server

DEFAULT_URL = "http://127.0.0.1:8001"
_TIMEOUT_S = 90.0
_WAIT_S = 5.0  # for a drain to end, in one question


def add_parsers(commands: Any, token: str | None) -> None:
    """`token` is the default of --admin-token."""
    status = _parser(commands, "status", "show controller, replicas, pages and requests of a running server", token, run_status)
    status.add_argument("--json", action="store_true", help="as JSON")
    restart = _parser(commands, "restart", "give a replica a new life; its streams go on elsewhere", token, run_restart)
    restart.add_argument("replica", metavar="REPLICA", help="its id, as `quire status` shows it")
    migrate = _parser(commands, "migrate", "move a running request to another replica, pages and all", token, run_migrate)
    migrate.add_argument("request", metavar="REQUEST", help="its id, as `quire status` shows it")
    migrate.add_argument("--to", required=True, metavar="REPLICA", help="where it goes on")
    drain = _parser(commands, "drain", "empty a replica: it takes nothing new, and its streams go on elsewhere", token, run_drain)
    which = drain.add_mutually_exclusive_group(required=True)
    which.add_argument("replica", metavar="REPLICA", nargs="?", help="its id, as `quire status` shows it")
    which.add_argument("--node", metavar="NAME", help="every replica that has a rank on this machine, as `quire status` shows it")
    drain.add_argument("--undo", action="store_true", help="let it take requests again")
    drain.add_argument("--no-wait", action="store_true", help="do not wait until it is empty")
    drain.add_argument("--wait-s", type=positive_float, default=math.inf, metavar="SECONDS", help="wait no longer than this")
    rebalance = _parser(commands, "rebalance", "move running requests to where there is room, once, now", token, run_rebalance)
    scale = _parser(commands, "scale", "change the number of replicas of a running server", token, run_scale)
    scale.add_argument("replicas", metavar="N|auto", help="so many from now on, whatever the autoscaler says; auto: as it says again")
    for command in (migrate, drain, rebalance, scale):
        command.add_argument("--json", action="store_true", help="as JSON")
    level = _parser(commands, "log-level", "change how much a running server logs", token, run_log_level)
    level.add_argument("level", choices=LEVELS)


def add_admin_arguments(parser: argparse.ArgumentParser, token: str | None) -> None:
    """--admin-url, --admin-token (default `token`)."""
    group = parser.add_argument_group("server")
    group.add_argument("--admin-url", default=DEFAULT_URL, metavar="URL", help=f"where the admin API is (default: {DEFAULT_URL})")
    group.add_argument("--admin-token", default=token, metavar="TOKEN", help="sent as a bearer token (default: $QUIRE_ADMIN_TOKEN)")


def run_status(args: argparse.Namespace) -> int:
    """Prints the status once."""
    status = ask(args, "/admin/status")
    if args.json:
        print(json.dumps(status, indent=2))
        return 0
    from ..screen import glyphs_for, status_lines

    print("\n".join(status_lines(status, glyphs_for(sys.stdout.encoding))))
    return 0


def run_restart(args: argparse.Namespace) -> int:
    """0 when the new life has begun."""
    from urllib.parse import quote

    answer = ask(args, f"/admin/replicas/{quote(args.replica, safe='')}/restart", {})
    print(f"{answer['replica']} is restarting")
    return 0


def run_migrate(args: argparse.Namespace) -> int:
    """0 when it goes on there, 1 when it stays where it is."""
    from urllib.parse import quote

    moved = ask(args, f"/admin/requests/{quote(args.request, safe='')}/migrate", {"to": args.to})
    print(json.dumps(moved, indent=2) if args.json else _moved_line(moved))
    return 0 if moved["outcome"] == "moved" else 1


def run_drain(args: argparse.Namespace) -> int:
    """0 when it is empty, or need not be waited for; with --node, when all there are."""
    deadline_s = time.monotonic() + args.wait_s
    replicas = [args.replica] if args.node is None else _ready_on(args)
    waits = not (args.no_wait or args.undo)
    if len(replicas) > 1 and waits:  # none of them may take what another sheds
        for replica in replicas:
            _drain(args, replica, 0.0)
    drains = []
    for replica in replicas:
        drain = _drain(args, replica, min(_WAIT_S, args.wait_s) if waits else 0.0)
        while waits and drain["state"] == "draining" and (left_s := deadline_s - time.monotonic()) > 0:
            drain = _drain(args, replica, min(_WAIT_S, left_s))
        drains.append({"outcome": drain["state"], **drain})
    if args.json:
        print(json.dumps(drains[0] if args.node is None else drains, indent=2))
    else:
        print("\n".join(map(_drain_line, drains)) or f"no replica to drain on {args.node}")
    wanted = {"drained"} | ({"ready"} if args.undo else set()) | ({"draining"} if args.no_wait else set())
    return 0 if all(drain["state"] in wanted for drain in drains) else 1


def _ready_on(args: argparse.Namespace) -> list[str]:
    """Those that have a rank on the machine and can be drained: one that starts, or has died, holds nothing."""
    replicas = ask(args, "/admin/status")["replicas"]
    drainable = ("ready", "draining", "drained")
    return [r["id"] for r in replicas if r["state"] in drainable and any(rank["node"] == args.node for rank in r["ranks"])]


def _drain(args: argparse.Namespace, replica: str, wait_s: float) -> dict[str, Any]:
    from urllib.parse import quote

    return ask(args, f"/admin/replicas/{quote(replica, safe='')}/drain", {"undo": args.undo, "wait_s": wait_s})


def _drain_line(drain: dict[str, Any]) -> str:
    cost = f"{drain['moved']} requests moved ({drain['pages']} pages, {drain['bytes']} bytes), {drain['requests']} left"
    return f"{drain['replica']} is {drain['state']}: {cost}; the longest pause was {drain['downtime_ms']:.1f} ms"


def run_rebalance(args: argparse.Namespace) -> int:
    """0 when every move that was begun has been made."""
    moves = ask(args, "/admin/rebalance", {})["moves"]
    if args.json:
        sums = {name: sum(move[name] for move in moves) for name in ("pages", "bytes")}
        moved = sum(move["outcome"] == "moved" for move in moves)
        longest_ms = max((move["downtime_ms"] for move in moves), default=0.0)
        print(json.dumps({"outcome": f"{moved} of {len(moves)} moved", **sums, "downtime_ms": longest_ms, "moves": moves}, indent=2))
    else:
        print("\n".join(map(_moved_line, moves)) or "nothing to move")
    return 0 if all(move["outcome"] == "moved" for move in moves) else 1


def _moved_line(move: dict[str, Any]) -> str:
    cost = f"{move['pages']} pages, {move['bytes']} bytes, {move['downtime_ms']:.1f} ms" if move["outcome"] == "moved" else move["reason"]
    return f"{move['request']}  {move['source']} -> {move['destination']}  {move['cause']}: {move['outcome']} ({cost})"


def run_scale(args: argparse.Namespace) -> int:
    """0 when it is decided: replicas come and go after that."""
    if args.replicas != "auto" and not args.replicas.isdigit():
        raise CommandError(f"replicas: must be a number or auto (got {args.replicas!r})")
    view = ask(args, "/admin/scale", {"auto": True} if args.replicas == "auto" else {"replicas": int(args.replicas)})
    if args.json:
        print(json.dumps(view, indent=2))
    else:
        by = "by hand" if view["by_hand"] else f"by the autoscaler ({view['autoscaler']})"
        print(f"{view['target']} replicas are to be, {by}; {view['ready']} are ready")
    return 0


def run_log_level(args: argparse.Namespace) -> int:
    """0 when every process has been told."""
    answer = ask(args, "/admin/log-level", {"level": args.level})
    print(f"log level is {answer['level']}")
    return 0


def ask(args: argparse.Namespace, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON that the admin API answers; a POST when there is a `body`.

    Raises:
        CommandError: there is none, or it refuses.
    """
    import asyncio

    from ..load.http import HttpError, Server

    try:
        server = Server(args.admin_url, args.admin_token or None, _TIMEOUT_S)
        answer = asyncio.run(_answer(server, path, body))
    except ValueError as error:
        raise CommandError(str(error)) from None
    except HttpError as error:
        hint = {
            "connect": " (is `quire serve` running? --admin-url says where its admin API is)",
            "HTTP 401": " (--admin-token or $QUIRE_ADMIN_TOKEN)",
        }
        raise CommandError(f"{error}{hint.get(error.kind, '')}") from None
    if not isinstance(answer, dict):
        raise CommandError(f"{args.admin_url} is no admin API of Quire")
    return answer


async def _answer(server: Server, path: str, body: dict[str, Any] | None) -> Any:
    return await (server.get(path) if body is None else server.post(path, body))


def _parser(commands: Any, name: str, what: str, token: str | None, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    add_admin_arguments(parser, token)
    parser.set_defaults(run=run)
    return parser
