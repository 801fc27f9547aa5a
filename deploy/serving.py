"""What `quire serve` does: starts the cluster and the ingresses, says when they serve, watches them, and takes them down.

probe the ports -> Ray -> controller -> replicas (torch, weights)    } at the same time
                                     -> ingresses (port, tokenizer)  }  -> HTTP servers -> ready line

Whatever dies is started again: replicas by the controller, the controller by Ray, ingresses here. The command ends by itself only
when no replica can be started, or nobody knows any more.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ..cluster.controller import ReplicaState
from ..cluster.ray_gateway import AdminPort, Cluster, ReplicaView
from ..worker.config import QuireOptions
from ..worker.logs import LogSetup, start_logging
from ..worker.protocol import ReplicaLost
from ..worker.text.source import resolve_model
from .admin.guard import check_admin
from .admin.server import bind, start_admin
from .ingress_actor import IngressDied, probe, reserve
from .ingresses import Ingresses
from .json_lines import JsonLines
from .process_tree import descendants, end
from .tenants_file import load_tenants

log = logging.getLogger(__name__)

TICK_S = 0.2  # how late a signal or a death may be noticed
POLL_S = 0.5
CONTROLLER_ABSENT_S = 60.0  # Ray restarts a dead controller in a second or two
LEFTOVER_S = 3.0


class Failed(Exception):
    """Why there is nothing to serve any more."""


def serve(options: QuireOptions) -> int:
    """Serves until a signal, or until there is nothing left to serve with; the process's exit code.

    SIGTERM and SIGINT: new requests get 503, running ones `grace_s`; then exit 0. A second one cuts them off.
    """
    start_logging(LogSetup(options.server.log_level, options.server.log_format))
    signals = Signals()
    try:
        options = _checked(options)  # what cannot work is said before anything is started
        signals.install()
        stdout = sys.stdout
        rest = JsonLines(sys.stderr) if options.server.log_format == "json" else sys.stderr  # for what Ray's processes print
        with redirect_stdout(rest), redirect_stderr(rest), closing(reserve(options.server)) as held:
            options = replace(options, server=replace(options.server, port=held.getsockname()[1]))
            with _cluster(options) as (cluster, phases):
                signals.install()  # Ray has put its own handlers there
                return _serve_on(cluster, options, signals, phases, stdout)
    except (Failed, IngressDied, ReplicaLost, TimeoutError, OSError, ValueError) as error:
        sys.stderr.write(f"quire: error: {error}\n")
        return 1


def _checked(options: QuireOptions) -> QuireOptions:
    """The options with a model that is found from any working directory.

    Raises:
        ValueError: something in them cannot work: no such model (where a local Ray is to be started), an admin API without a token.
        OSError: an address cannot be used, or a file not be read.
    """
    probe(options.server)
    check_admin(options.admin)
    bind(options.admin).close()
    for label in options.cluster.node_label:
        if "=" not in label:
            raise ValueError(f"--node-label must be key=value, not {label!r}")
    model = options.engine.model
    if options.cluster.ray_address is None:
        resolve_model(model.model)
    path = Path(model.model).expanduser()
    if not path.exists():
        return options
    return replace(options, engine=replace(options.engine, model=replace(model, model=str(path.absolute()))))


class Signals:
    """Counts SIGTERM and SIGINT."""

    def __init__(self) -> None:
        self.count = 0

    def install(self) -> None:
        """Takes both over from whoever had them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def _cluster(options: QuireOptions) -> Iterator[tuple[Cluster, dict[str, float]]]:
    begun_s = time.monotonic()
    _, tenants = load_tenants(options.server)
    cluster = Cluster(options, tenants)
    try:
        yield cluster, {"Ray": time.monotonic() - begun_s}
    finally:
        children = descendants(os.getpid())  # of a local Ray: none may outlive this command
        cluster.close()
        end(children, LEFTOVER_S)


def _serve_on(cluster: Cluster, options: QuireOptions, signals: Signals, phases: dict[str, float], stdout: TextIO) -> int:
    begun_s = time.monotonic()
    ingresses = Ingresses(options)
    cluster.lease.check()
    admin = start_admin(AdminPort(options.cluster.namespace), options.admin)
    watch = _Watch(cluster)
    with _LoadingBar(shown=options.server.log_format == "text") as bar:
        while (started := ingresses.start(TICK_S)) is None or not watch.settled:
            bar.show(watch.replicas())
            if signals.count:
                return 0
    for replica in watch.replicas():
        phases |= replica.phases
    phases |= started
    took_s = phases["Ray"] + time.monotonic() - begun_s
    host = f"[{options.server.host}]" if ":" in options.server.host else options.server.host
    stdout.write(f"Quire is ready on http://{host}:{options.server.port}\n")
    stdout.flush()
    log.info("ready after %.1f s (%s)", took_s, ", ".join(f"{name} {s:.1f}" for name, s in phases.items()))
    while not signals.count:
        ingresses.watch(TICK_S)
        watch.replicas()
    _drain(ingresses, watch, options.server.grace_s, signals)
    admin.stop()
    return 0


def _drain(ingresses: Ingresses, watch: _Watch, grace_s: float, signals: Signals) -> None:
    running = ingresses.running()
    if running:
        log.info("stopping: %d running requests have %g s to finish; a second signal cuts them off", running, grace_s)
    drain, cut = ingresses.drain(grace_s), False
    while not drain.over(TICK_S):
        watch.replicas()
        if signals.count > 1 and not cut:
            cut = True
            ingresses.cut_off()
    ingresses.stop()


class _Watch:
    """Looks at the replicas, twice a second at most, and says what becomes of them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._latest: tuple[ReplicaView, ...] = ()
        self._asked_s = float("-inf")
        self._answered_s = time.monotonic()
        self.settled = False

    def replicas(self) -> tuple[ReplicaView, ...]:
        """The replicas.

        Raises:
            Failed: none of them can be started, or nobody knows, for the controller is gone.
        """
        now_s = time.monotonic()
        if now_s - self._asked_s < POLL_S:
            return self._latest
        self._asked_s = now_s
        try:
            view = self._cluster.lease.view()
        except ReplicaLost as error:
            if now_s - self._answered_s > CONTROLLER_ABSENT_S:
                raise Failed(str(error)) from error
            log.warning("%s", error)
            return self._latest
        if view.hopeless:
            raise Failed(view.hopeless)
        self._say(view.replicas)
        self._answered_s, self._latest, self.settled = now_s, view.replicas, view.settled
        return self._latest

    def _say(self, replicas: tuple[ReplicaView, ...]) -> None:
        before = {replica.replica_id: replica for replica in self._latest}
        for replica in replicas:
            was = before.get(replica.replica_id)
            if was is not None and (was.epoch, was.state) != (replica.epoch, replica.state):
                level = logging.WARNING if replica.state in (ReplicaState.DEAD, ReplicaState.SUSPECT) else logging.INFO
                log.log(level, "%s is %s%s", replica.replica_id, replica.state, f": {replica.reason}" if replica.reason else "")


class _LoadingBar:
    """Weights loaded, on stderr, where people read it."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._said = ""

    def __enter__(self) -> _LoadingBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, replicas: tuple[ReplicaView, ...]) -> None:
        """Draws what the replicas have loaded so far, and says what they wait for."""
        waits_for = next((r.reason for r in replicas if r.reason), "")
        if waits_for != self._said:
            self._said = waits_for
            log.info("%s", waits_for)
        done, total = sum(r.loaded for r in replicas), sum(r.to_load for r in replicas)
        if not total or not self._shown:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, file=sys.stderr, leave=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
