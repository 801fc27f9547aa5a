"""What every route needs, in one object: `app.state.api`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from ...cluster.admin import Percentiles
from ...cluster.client import EngineClient
from ...worker.config import LimitOptions, ServerOptions
from ...worker.protocol import ModelInfo
from ...worker.tracing import Tracing
from ..metrics import Metrics
from .edge_text import EdgeText
from .errors import ApiError
from .lifecycle import Lifecycle
from .structured import EdgeGrammars
from .tool_calls import ToolCalls


@dataclass(frozen=True)
class Api:
    """The engine, the model's text side and the server's state."""

    client: EngineClient
    info: ModelInfo
    text: EdgeText
    grammars: EdgeGrammars
    tool_calls: ToolCalls
    options: ServerOptions
    limits: LimitOptions
    metrics: Metrics
    fingerprint: str  # `system_fingerprint`: changes when the model does
    tracing: Tracing | None = None
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    @property
    def context(self) -> int:
        """Tokens of prompt and output that one sequence can have: what the model takes, and the page pool holds."""
        return min(self.info.max_model_len, self.info.pool_tokens)

    def latencies(self) -> tuple[Percentiles | None, Percentiles | None]:
        """Of time to first token and per output token, lately."""
        return self.metrics.ttft.percentiles(), self.metrics.tpot.percentiles()

    def check_model(self, name: str | None) -> None:
        """Raises ApiError(404) unless `name` is the served model's; a request that names none means this one."""
        if name is not None and name != self.info.name:
            raise ApiError(
                404, f"the model {name[:200]!r} does not exist; this server has {self.info.name!r}", param="model", code="model_not_found"
            )

    @staticmethod
    def new_id(kind: str) -> str:
        """An id for a request: what the client sees, and what the engine calls it."""
        return f"{kind}-{secrets.token_hex(16)}"
