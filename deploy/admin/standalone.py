"""`quire admin`: the admin API of a cluster that something else runs, for as long as it has a controller.

Where Ray Serve holds the HTTP servers there is no `quire serve` process to serve it; the Helm chart runs this beside Ray's head.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time

from ...cluster.ray_gateway import AdminPort, join
from ...worker.config import QuireOptions
from ...worker.logs import LogSetup, start_logging
from ...worker.protocol import ReplicaLost
from ..serving import Signals
from .guard import check_admin
from .server import start_admin

log = logging.getLogger(__name__)

POLL_S = 2.0
ABSENT_S = 60.0  # Ray restarts a dead controller in a second or two


def serve_admin_alone(options: QuireOptions) -> int:
    """Serves until a signal: 0. While there is no controller it listens nowhere, and waits for one. 1 when Ray cannot be joined."""
    start_logging(LogSetup(options.server.log_level, options.server.log_format))
    signals = Signals()
    try:
        check_admin(options.admin)
        join(options)
        signals.install()
        while (port := _controller(options.cluster.namespace, signals)) is not None:
            admin = start_admin(port, options.admin)
            _watch(port, signals)
            admin.stop()
    except (OSError, ValueError, TimeoutError) as error:  # Ray's ConnectionError is an OSError
        sys.stderr.write(f"quire: error: {error}\n")
        return 1
    return 0


def _controller(namespace: str, signals: Signals) -> AdminPort | None:
    """The controller, as soon as there is one; None after a signal."""
    said = False
    while not signals.count:
        try:
            return AdminPort(namespace)
        except ValueError:
            if not said:
                log.info("waiting for a controller in namespace %r", namespace)
            said = True
            time.sleep(POLL_S)
    return None


def _watch(port: AdminPort, signals: Signals) -> None:
    """Returns after a signal, or when the controller has not answered for `ABSENT_S`: another one has another handle."""
    answered_s = time.monotonic()
    while not signals.count:
        try:
            asyncio.run(port.status())
            answered_s = time.monotonic()
        except ReplicaLost as error:
            log.warning("%s", error)
            if time.monotonic() - answered_s > ABSENT_S:
                return
        time.sleep(POLL_S)
