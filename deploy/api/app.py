"""The FastAPI application: routes, errors, and the middleware around them. No Ray here; whoever has an engine client can serve."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from ...cluster.client import EngineClient
from ...worker.config import LimitOptions, ServerOptions
from ...worker.protocol import ModelInfo
from ...worker.text.tokenizer import Tokenizer
from ...worker.tracing import Tracing
from ..metrics import Metrics
from ..tenants_file import load_tenants
from . import chat, completions, cross_origin, errors, info_routes, openapi, text_routes
from .auth import RequireKey
from .context import Api
from .edge_text import EdgeText
from .middleware import BodyLimit, CountRequests, StrictRequest
from .structured import EdgeGrammars
from .tool_calls import ToolCalls


def create_app(
    client: EngineClient, tokenizer: Tokenizer, info: ModelInfo, options: ServerOptions, limits: LimitOptions, ingress_id: str
) -> FastAPI:
    """The OpenAI API over `client`. `ingress_id` tells its metrics from those of other ingresses.

    `app.state.api` is the `Api`; `app.state.lifecycle` drains it. There are no pages of documentation: they would need
    scripts from elsewhere, and a key.

    Raises:
        ValueError, OSError: the API keys, the collector of traces, the format of calls or the allowed origins cannot be used.
    """
    keys, _ = load_tenants(options)
    tracing = Tracing(options.otlp_endpoint, {"service.instance.id": f"ingress-{os.getpid()}"}) if options.otlp_endpoint else None
    api = Api(
        client=client,
        info=info,
        text=EdgeText(tokenizer, info.max_model_len),
        grammars=EdgeGrammars(tokenizer, info.eos_token_ids, limits.max_grammar),
        tool_calls=ToolCalls.of(tokenizer, options.tool_call_format),
        options=options,
        limits=limits,
        metrics=Metrics(client.stats, client.recovery, ingress_id),
        fingerprint="fp_" + hashlib.sha256(repr(info).encode()).hexdigest()[:12],
        tracing=tracing,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.text.close()
        api.grammars.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(title="Quire", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.state.api = api
    app.state.lifecycle = api.lifecycle
    for module in (chat, completions, text_routes, info_routes, openapi):
        app.include_router(module.router)
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=options.max_body)  # the last one added stands outermost
    app.add_middleware(RequireKey, keys=keys)
    app.add_middleware(StrictRequest)
    app.add_middleware(CountRequests, metrics=api.metrics)
    cross_origin.allow(app, options.allowed_origin)
    return app
