"""What `quire serve` does: starts the cluster and the ingress, says when they serve, watches them, and takes them down.

probe the port -> Ray -> controller -> replica (torch, weights)   } at the same time
                                    -> ingress (port, tokenizer)  }  -> HTTP server -> ready line
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ..cluster.controller import ReplicaState
from ..cluster.ray_gateway import Cluster, ReplicaStatus
from ..worker.config import QuireOptions
from ..worker.protocol import ReplicaLost
from ..worker.text.source import resolve_model
from .process_tree import descendants, end
from .serve_app import Ingress, IngressDied, listen

log = logging.getLogger(__name__)

TICK_S = 0.2  # how late a signal or a death may be noticed
POLL_S = 0.5
CONTROLLER_ABSENT_S = 30.0  # Ray restarts a dead controller in a second or two
LEFTOVER_S = 3.0


class Failed(Exception):
    """Why there is nothing to serve any more."""


def serve(options: QuireOptions) -> int:
    """Serves until a signal or a death; the process's exit code.

    SIGTERM and SIGINT: new requests get 503, running ones `grace_s`; then exit 0. A second one cuts them off.
    """
    logging.basicConfig(level=options.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    signals = Signals()
    try:
        listen(options.server).close()  # what cannot work is said before anything is started
        options = _located(options)
        signals.install()
        stdout = sys.stdout
        with redirect_stdout(sys.stderr), _cluster(options) as (cluster, phases):  # where Ray puts what its processes print
            signals.install()  # Ray has put its own handlers there
            return _serve_on(cluster, options, signals, phases, stdout)
    except (Failed, IngressDied, ReplicaLost, OSError, ValueError) as error:
        sys.stderr.write(f"quire: error: {error}\n")
        return 1


def _located(options: QuireOptions) -> QuireOptions:
    """The options with a model that is found from any working directory.

    Raises:
        ValueError: a local Ray is to be started, and there is no such model.
    """
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
    cluster = Cluster(options)
    try:
        yield cluster, {"Ray": time.monotonic() - begun_s}
    finally:
        children = descendants(os.getpid())  # of a local Ray: none may outlive this command
        cluster.close()
        end(children, LEFTOVER_S)


def _serve_on(cluster: Cluster, options: QuireOptions, signals: Signals, phases: dict[str, float], stdout: TextIO) -> int:
    begun_s = time.monotonic()
    ingress = Ingress(options)
    cluster.check()
    watch = _Watch(cluster)
    with _LoadingBar() as bar:
        while (started := ingress.started(TICK_S)) is None:
            bar.show(watch.replicas())
            if signals.count:
                return 0
    for replica in cluster.status():
        phases |= replica.phases
    phases |= started["phases"]
    took_s = phases["Ray"] + time.monotonic() - begun_s
    host = f"[{options.server.host}]" if ":" in options.server.host else options.server.host
    stdout.write(f"Quire is ready on http://{host}:{started['port']}\n")
    stdout.flush()
    log.info("ready after %.1f s (%s)", took_s, ", ".join(f"{name} {s:.1f}" for name, s in phases.items()))
    while not signals.count:
        ingress.check(TICK_S)
        watch.replicas()
    _drain(ingress, watch, options.server.grace_s, signals)
    return 0


def _drain(ingress: Ingress, watch: _Watch, grace_s: float, signals: Signals) -> None:
    running = ingress.running()
    if running:
        log.info("stopping: %d running requests have %g s to finish; a second signal cuts them off", running, grace_s)
    token, cut = ingress.drain(grace_s), False
    while ingress.drained(token, TICK_S) is None:
        watch.replicas()
        if signals.count > 1 and not cut:
            cut = True
            ingress.drain(0.0)
    ingress.stop()


class _Watch:
    """Looks at the replicas, twice a second at most."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._latest: list[ReplicaStatus] = []
        self._asked_s = float("-inf")
        self._answered_s = time.monotonic()

    def replicas(self) -> list[ReplicaStatus]:
        """The replicas.

        Raises:
            Failed: one has died, or nobody knows, for the controller is gone.
        """
        now_s = time.monotonic()
        if now_s - self._asked_s < POLL_S:
            return self._latest
        self._asked_s = now_s
        try:
            self._latest = self._cluster.status()
            self._answered_s = now_s
        except ReplicaLost as error:
            if now_s - self._answered_s > CONTROLLER_ABSENT_S:
                raise Failed(str(error)) from error
            log.warning("%s", error)
        for replica in self._latest:
            if replica.state is ReplicaState.DEAD:
                raise Failed(f"{replica.replica_id}: {replica.reason}")
        return self._latest


class _LoadingBar:
    """Weights loaded, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = ""

    def __enter__(self) -> _LoadingBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, replicas: list[ReplicaStatus]) -> None:
        """Draws what the replicas have loaded so far, and says what they wait for."""
        waits_for = next((r.reason for r in replicas if r.reason), "")
        if waits_for != self._said:
            self._said = waits_for
            log.info("%s", waits_for)
        done, total = sum(r.loaded for r in replicas), sum(r.to_load for r in replicas)
        if not total:
            return
        if self._bar is None:
            self._bar = tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, file=sys.stderr, leave=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
