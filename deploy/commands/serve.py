"""`quire serve`: serve a model over HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from ...worker.config import AutoscalingOptions, QuireOptions
from .. import options
from .arguments import CommandError

_DESCRIPTION = """\
Serves a model behind OpenAI's API. Every flag may also stand in the YAML file that --config names, under the same name.
Once it serves, the line `Quire is ready on http://...` appears on stdout. Ctrl-C or SIGTERM ends it.

  quire serve
  quire serve --model ./Qwen3-0.6B --port 9000 --kv-memory 4GiB
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="quire serve [--config FILE] [--model MODEL] [--host HOST] [--port N] [option ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status of the server."""
    try:
        chosen = options.build(vars(args))
        _check(chosen)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    from ..serving import serve

    return serve(chosen)


def _check(chosen: QuireOptions) -> None:
    """Says what cannot work before anything is started.

    Raises:
        ValueError, OSError: naming the flag or the file at fault.
    """
    if chosen.admin.admin_token is not None or chosen.admin.admin_host != "127.0.0.1":
        from ..admin.guard import check_admin

        check_admin(chosen.admin)
    cluster = chosen.cluster
    if cluster.prefill_replicas >= cluster.replicas and cluster.prefill_replicas:
        raise ValueError(f"--prefill-replicas {cluster.prefill_replicas}: there must be more --replicas (now {cluster.replicas})")
    if chosen.autoscaling != AutoscalingOptions():
        from ...cluster.autoscaling_setup import autoscaler_of

        autoscaler_of(chosen)
    if chosen.server.api_key_file is not None:
        from ..tenants_file import load_tenants

        load_tenants(chosen.server)
    if chosen.server.otlp_endpoint is not None:
        from ...worker.tracing import check_tracing

        check_tracing(chosen.server.otlp_endpoint)
