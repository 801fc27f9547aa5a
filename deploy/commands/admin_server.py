"""`quire admin`: serve the admin API of a cluster that something else runs."""

from __future__ import annotations

import argparse
from typing import Any

from .. import options
from .arguments import CommandError

_OPTIONS = frozenset("ray_address namespace admin_host admin_port admin_token log_level log_format".split())
_DESCRIPTION = """\
Joins a Ray cluster and serves the admin API of the controller in a namespace: the one that an application on Ray Serve has started.
`quire serve` has an admin API of its own.

  RAY_AUTH_MODE=token quire admin --ray-address ray-head:6379 --namespace quire
"""


def add_parser(commands: Any, token: str | None) -> None:
    """`token` is the default of --admin-token."""
    parser = commands.add_parser(
        "admin",
        help="serve the admin API of a cluster that Ray Serve runs",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_flags(parser, _OPTIONS)
    parser.set_defaults(run=run, **({} if token is None else {"admin_token": token}))


def run(args: argparse.Namespace) -> int:
    """The exit status of the server."""
    try:
        chosen = options.build(vars(args))
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    if chosen.cluster.ray_address is None:
        raise CommandError("--ray-address must name a Ray cluster")
    from ..admin.standalone import serve_admin_alone

    return serve_admin_alone(chosen)
