"""The admin API's HTTP server: a thread of the `quire serve` process."""

from __future__ import annotations

import logging
import socket
import threading
import time

import uvicorn

from ...cluster.admin import AdminPort
from ...worker.config import AdminOptions, ServerOptions
from ..api.http_server import server_config
from .app import create_admin_app
from .guard import check_admin

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


def bind(options: AdminOptions) -> socket.socket:
    """A bound socket for the admin API. Not yet listening: who connects now is refused.

    Raises:
        OSError: the address cannot be used; says which, why, and which flag changes it.
    """
    where = f"cannot listen on {options.admin_host}:{options.admin_port} for the admin API"
    try:
        family, _, _, _, address = socket.getaddrinfo(
            options.admin_host, options.admin_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{where}: {error.strerror} (--admin-host)") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"{where}: {error.strerror}; choose another port with --admin-port") from None
    return bound


class RunningAdmin:
    """The admin API while it serves."""

    def __init__(self, url: str, server: uvicorn.Server, thread: threading.Thread) -> None:
        self.url = url
        self._server = server
        self._thread = thread

    def stop(self) -> None:
        """Closes it and every connection; what does not close in time dies with the process."""
        self._server.should_exit = True
        self._thread.join(2 * STOP_TIMEOUT_S)


def start_admin(port: AdminPort, options: AdminOptions) -> RunningAdmin:
    """Serves the admin API until `stop`.

    Raises:
        ValueError: an address that others can reach, and no token.
        OSError: the address cannot be used.
        TimeoutError: the server did not start in time.
    """
    check_admin(options)
    bound = bind(options)
    config = server_config(
        create_admin_app(port, options.admin_token), ServerOptions(host=options.admin_host, port=options.admin_port, log_level="warning")
    )
    config.timeout_graceful_shutdown = int(STOP_TIMEOUT_S)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="admin", daemon=True)
    thread.start()
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not server.started:  # uvicorn has no event for it
        if not thread.is_alive() or time.monotonic() > deadline_s:
            server.should_exit = True
            bound.close()
            raise TimeoutError("the admin API did not start")
        time.sleep(0.01)
    host = f"[{options.admin_host}]" if ":" in options.admin_host else options.admin_host
    url = f"http://{host}:{bound.getsockname()[1]}"
    log.info("admin API on %s", url)
    return RunningAdmin(url, server, thread)
