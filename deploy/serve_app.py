"""Quire as an application on Ray Serve: `serve run`, `serve deploy` and KubeRay's serveConfigV2 name `quire.deploy.serve_app:build`.

Serve places, scales and watches the ingresses; controllers and replicas are Quire's own, start with the first ingress and end with the
last one.
"""

from __future__ import annotations

import asyncio
import logging
from itertools import count
from typing import TYPE_CHECKING, Any

from ray import serve

from .application import Arguments, models_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..worker.config import QuireOptions
    from .model_service import ModelService

log = logging.getLogger(__name__)

MAX_ONGOING = 1_000_000  # admission is the controller's
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
RETIRED_S = 3600.0  # that streams of a former configuration may go on
MARGIN_S = 15.0  # above the grace time, to release replicas


class ServeIngress:
    """The OpenAI API of all models, in a replica of the deployment `Ingress`."""

    def __init__(self) -> None:
        from .api.by_model import ByModel  # here and below: whoever only builds the application needs no HTTP stack

        self._id = f"serve-{serve.get_replica_context().replica_id.unique_id}"
        self._services: dict[str, ModelService] = {}
        self._apps: dict[str, FastAPI] = {}
        self._whole = ByModel(self._apps, 0, self._close)
        self._numbers = count()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> Any:
        return self._whole

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Serves what `config`, the arguments of `build`, says.

        The first time it is waited for. A later change goes on behind this call, because Serve sends no requests during it. Where the
        controller can take it over (`cluster.upgrading`), replicas are replaced and running streams move to the new ones. Else what is
        new comes up beside what runs and then gets the requests, while running streams end where they are.

        Raises:
            ValueError: `config` is wrong; says what.
        """
        wanted = models_of(Arguments.model_validate(config))
        if self._services:
            self._spawn(self._become(wanted))
        else:
            await self._become(wanted)

    def check_health(self) -> None:
        """Serve asks now and then.

        Raises:
            RuntimeError: a model cannot be served.
        """
        if not self._services:
            raise RuntimeError("no models: give them as args of the application, or as user_config of the deployment Ingress")
        for name, service in self._services.items():
            if service.hopeless:
                raise RuntimeError(f"{name}: {service.hopeless}")

    async def _become(self, wanted: dict[str, QuireOptions]) -> None:
        from .model_service import ModelService

        async with self._turn:
            self._whole.max_body = max(options.server.max_body for options in wanted.values())
            for name, options in wanted.items():
                there = self._services.get(name)
                if there is not None and there.asked == options:
                    continue
                service = ModelService(options, f"{self._id}.{next(self._numbers)}")  # the one before may serve yet
                await service.opened()
                self._services[name], self._apps[name] = service, service.app
                log.info("%s is served", name)
                if there is not None:
                    self._spawn(there.close(RETIRED_S))
            for name in self._services.keys() - wanted.keys():
                del self._apps[name]
                self._spawn(self._services.pop(name).close(RETIRED_S))

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a change of the configuration has failed; what was served before still is: %s", task.exception())

    async def _close(self) -> None:
        """Serve has let the running requests end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(service.close(0.0) for service in self._services.values()), return_exceptions=True)


def build(args: dict[str, Any]) -> Any:
    """The application; `args` are those of `application.Arguments`. Starts nothing.

    With other `args` Serve replaces the ingresses one after the other. In a configuration file they may instead stand as `user_config` of
    the deployment `Ingress` (and `args` be left out): then a change is made in place (`ServeIngress.reconfigure`).

    Raises:
        ValueError: something in `args` is wrong; says what.
    """
    models = models_of(Arguments.model_validate(args)) if args else {}
    grace_s = max((options.server.grace_s for options in models.values()), default=RETIRED_S)
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=grace_s + MARGIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        user_config=args or None,
        ray_actor_options={"num_cpus": 0},  # CPUs are counted for the ranks of replicas
    )
    return ingress(serve.ingress()(ServeIngress)).bind()
