"""One model's cluster as whoever serves or asks it sees it: registered with its controller, with a tokenizer and an engine client."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from ..cluster.admin import Percentiles
from ..cluster.ray_gateway import Registration, connect
from ..worker.config import QuireOptions
from ..worker.protocol import ReplicaLost
from ..worker.text.source import resolve_model
from ..worker.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

AFTER_START_S = 60.0  # from a replica's readiness to its first frame here
REGISTER_S = 2.0


class Edge:
    """Use it as a context, on one event loop; `opened` before anything else.

    Args:
        ingress_id: who it is, also after a restart.
        options: of the model's cluster.

    Raises:
        ValueError: there is no controller in the options' namespace.
    """

    def __init__(self, ingress_id: str, options: QuireOptions) -> None:
        self._options = options
        self._registration = Registration(options.cluster.namespace, ingress_id, os.getpid())
        self._registering: asyncio.Task[None] | None = None
        self.client = connect(options, ingress_id)
        self._tokenizer: Tokenizer | None = None
        self.latencies: Callable[[], tuple[Percentiles | None, Percentiles | None]] = lambda: (None, None)  # see `Registration.renew`

    async def __aenter__(self) -> Self:
        self._registering = asyncio.create_task(self._register())
        self.client.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._registering is not None:
            self._registering.cancel()
        await self.client.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's.

        Raises:
            RuntimeError: not opened yet.
        """
        if self._tokenizer is None:
            raise RuntimeError("the edge is not open")
        return self._tokenizer

    async def opened(self) -> dict[str, float]:
        """Loads the tokenizer and waits for a replica. Phase -> seconds.

        Raises:
            OSError, ValueError: no tokenizer.
            TimeoutError: no replica became ready in time.
        """
        begun_s = time.monotonic()
        self._tokenizer = await asyncio.to_thread(lambda: load_tokenizer(Path(resolve_model(self._options.engine.model.model))))
        took_s = time.monotonic() - begun_s
        await self.client.ready(self._options.cluster.start_timeout_s + AFTER_START_S)
        return {"tokenizer": took_s}

    async def _register(self) -> None:
        while True:
            try:
                logging.getLogger().setLevel((await self._registration.renew(*self.latencies())).upper())
            except ReplicaLost as error:  # a controller that comes back hears of us then
                log.debug("could not register: %s", error)
            await asyncio.sleep(REGISTER_S)
