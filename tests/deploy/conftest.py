"""Servers for the API's tests: one whose model follows a script, for exact texts, and one with a real model."""

from __future__ import annotations

import functools
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import ScriptRunner, ServerThread, script_engine

from quire.worker.config import CacheOptions, EngineOptions, LimitOptions, ModelOptions, SchedulerOptions, ServerOptions
from quire.worker.text.source import resolve_model
from quire.worker.text.tokenizer import Tokenizer, load_tokenizer

# httpx reads all the world's certificates for every client that it makes: longer than a request takes. Nothing here speaks TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model("smollm2"))


@pytest.fixture(scope="session")
def _script_server(tokenizer: Tokenizer) -> Iterator[tuple[ServerThread, ScriptRunner]]:
    runner = ScriptRunner()
    engine = script_engine(runner, tokenizer.vocab_size, tokenizer.eos_token_id)
    with ServerThread(engine, tokenizer, ServerOptions(port=0, max_body=2**20, log_level="warning"), LimitOptions()) as server:
        yield server, runner


@pytest.fixture
def script(_script_server: tuple[ServerThread, ScriptRunner]) -> ScriptRunner:
    """What the script server's model says; reset for every test."""
    runner = _script_server[1]
    runner.script = (1000,)
    runner.hold()
    runner.free()
    return runner


@pytest.fixture
def scripted(_script_server: tuple[ServerThread, ScriptRunner], script: ScriptRunner) -> ServerThread:
    """A server whose model says `script.script`."""
    server = _script_server[0]
    server.client.submitted.restart()
    server.client.aborted.restart()
    server.client.refuse_with = None
    return server


@pytest.fixture(scope="session")
def real(tokenizer: Tokenizer) -> Iterator[ServerThread]:
    """A server with the small real model."""
    from quire.worker.engine import build_engine

    options = EngineOptions(
        model=ModelOptions(threads=2, max_model_len=2048),
        cache=CacheOptions(kv_pages=256),
        scheduler=SchedulerOptions(max_batch_tokens=256, max_running=32, max_waiting=64),
    )
    with ServerThread(build_engine(options, b"key"), tokenizer, ServerOptions(port=0, log_level="warning"), options.limits) as server:
        yield server
