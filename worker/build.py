"""Builds what computes: finds and loads the model, or this rank's shard of it, and makes a page pool beside it."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from .backend import device_of, kernels_of, kv_dtype_of, linears_of, ops_of
from .config import EngineOptions
from .constraint import Constraints
from .cuda_graphs import CudaCapture
from .device_layers import Decoding
from .device_runner import DeviceFollower, DeviceRunner
from .host_memory import free_bytes
from .kv_store import KVStore, PageShape
from .model import DecoderModel, Progress
from .model_config import ModelConfig
from .packing import packb, unpackb
from .page_link import Listener
from .page_mover import PageMover, Place
from .parallel import LEADER, RankGroup
from .protocol import ModelInfo
from .rendezvous import listen
from .runner import FollowerRunner, LeaderRunner, ModelRunner
from .sampler import Sampler
from .shard import Shard
from .suspend_files import SuspendDirectory
from .text.tokenizer import load_tokenizer
from .weights import open_checkpoint, sampling_defaults

log = logging.getLogger(__name__)

CPU_POOL_SHARE, CPU_POOL_BYTES = 0.25, 8 * 2**30  # default pool of a replica on a CPU: a share of what is free, at most so much
GPU_POOL_SHARE = 0.85  # default pool on a GPU: a share of what the weights left; the rest is for activations
HOST_SHARE = 0.25  # default host pool beside a GPU: as large as the pool, at most this share of the host memory that is free


class Sizes(NamedTuple):
    """What the deciding half must know of the computing half."""

    info: ModelInfo
    pages: int
    host_pages: int
    page_bytes: int  # on all ranks together
    kv_format: str  # what pages hold: only between replicas that say the same can they move
    startup_s: dict[str, float]  # what the start took beside loading, by phase


class _Rank(NamedTuple):
    """What this rank computes with."""

    config: ModelConfig
    path: Path
    model: DecoderModel
    kernels: str  # their name
    page: PageShape
    pages: int  # that fit here
    host_pages: int  # that fit into the host memory beside it
    sampling: tuple[tuple[str, float], ...]  # `ModelInfo.sampling`


def build_runner(
    options: EngineOptions,
    progress: Progress | None = None,
    group: RankGroup | None = None,
    host: str | None = None,
    warming: Progress | None = None,
) -> tuple[ModelRunner | LeaderRunner, Sizes]:
    """Load the model that `options` names and make a page pool for it.

    Args:
        options: of the whole engine.
        progress: called with (bytes done, bytes in all) while weights load.
        group: the ranks that share the model, of which this is the leader; None for `tp=1`.
        host: this process's address, at which other replicas may reach it to send pages; None: they may not. A group knows its own.
        warming: called with (steps done, steps in all) while a GPU's runner warms up.

    Raises:
        ValueError: the model or an option is not supported, on any rank, or the pool would hold no page; names it.
        GroupBroken: a rank is gone.
    """
    rank = _load(options, progress, group)
    config = rank.config
    info = ModelInfo(
        config.name,
        str(rank.path),
        config.max_model_len,
        config.vocab_size,
        config.eos_token_ids,
        int(time.time()),
        sampling=rank.sampling,
    )
    if rank.sampling:
        log.info("generation_config: requests that leave them out get %s", ", ".join(f"{name} {value}" for name, value in info.sampling))
    kv = _pool(rank, options)
    runner = _runner(rank, options, group, kv, _mover(rank, kv, options, group, host))
    startup_s = {}
    if isinstance(runner, DeviceRunner):
        started_s = time.monotonic()
        runner.warm_up(options.scheduler.max_batch_tokens, warming)
        startup_s["warm up"] = time.monotonic() - started_s
    kv_format = f"{config.num_layers} layers, {config.num_kv_heads} heads of {config.head_dim}, {rank.page.dtype}"
    sizes = Sizes(info, rank.pages, rank.host_pages, rank.page.page_bytes * options.parallel.tp, kv_format, startup_s)
    return (runner if group is None else LeaderRunner(runner, group)), sizes


def _runner(
    rank: _Rank, options: EngineOptions, group: RankGroup | None, kv: KVStore, moving: tuple[PageMover, tuple[str, ...]]
) -> ModelRunner:
    """The runner for the device. On a GPU with Triton it works ahead, from graphs unless those are switched off."""
    config = rank.config
    constraints = Constraints(partial(load_tokenizer, rank.path), config.eos_token_ids, config.vocab_size)
    rest = (constraints, _max_running(options), config.max_model_len, *moving)
    if not _works_ahead(rank, kv.pool.device):
        return ModelRunner(rank.model, kv, Sampler(config.eos_token_ids, config.vocab_size), *rest)
    from .device_sampler import DeviceSampler  # Triton is not installed everywhere

    sampler = DeviceSampler(config.eos_token_ids, config.vocab_size, _max_running(options), kv.pool.device)
    return DeviceRunner(rank.model, kv, sampler, *rest, how=_decoding(rank, options), group=group)


def _decoding(rank: _Rank, options: EngineOptions) -> Decoding:
    """The same on every rank. Fixed tiles and windows have no use for a prefix that is read apart."""
    capture = CudaCapture() if options.model.cuda_graphs else None
    return Decoding(capture, share_prefixes=not options.model.deterministic and None in rank.config.sliding_windows)


def _works_ahead(rank: _Rank, device: torch.device) -> bool:
    return device.type == "cuda" and rank.kernels == "triton"


def build_follower(options: EngineOptions, group: RankGroup, progress: Progress | None = None) -> FollowerRunner:
    """`build_runner` for a rank that follows."""
    rank = _load(options, progress, group)
    kv = _pool(rank, options)
    mover, _ = _mover(rank, kv, options, group, None)
    most, longest = _max_running(options), rank.config.max_model_len
    if not _works_ahead(rank, kv.pool.device):
        return FollowerRunner(rank.model, kv, most, longest, mover)
    runner = DeviceFollower(rank.model, kv, group, most, longest, mover, how=_decoding(rank, options))
    runner.warm_up(options.scheduler.max_batch_tokens)
    return runner


def _load(options: EngineOptions, progress: Progress | None, group: RankGroup | None) -> _Rank:
    ranks = group.size if group else 1
    if options.parallel.tp != ranks:
        raise ValueError(f"tp: {options.parallel.tp} ranks are asked for, and there are {ranks}; several run under `quire serve` only")
    try:
        rank = _load_own(options, progress, group)
    except Exception as error:
        if group is not None:
            group.exchange(packb(((), str(error) or repr(error))))  # the other ranks wait to hear from this one
        raise
    return rank if group is None else _agreed(rank, group)


def _agreed(mine: _Rank, group: RankGroup) -> _Rank:
    """Pages of every rank's pools: an id means the same page on all of them, so the rank that can hold least says how many. And one kind
    of kernels, since with some a rank works ahead of its host."""
    said = [unpackb(answer) for answer in group.exchange(packb(((mine.pages, mine.host_pages, mine.kernels), "")))]
    for rank, (_, error) in enumerate(said):
        if error:
            raise ValueError(f"rank {rank}: {error}")
    pages, host_pages, kernels = zip(*(answer for answer, _ in said), strict=True)
    for rank, name in enumerate(kernels):
        if name != kernels[LEADER]:
            raise ValueError(f"rank {rank}: has {name} kernels, and the leader {kernels[LEADER]}; --attention says which all take")
    return mine._replace(pages=min(map(int, pages)), host_pages=min(map(int, host_pages)))


def _load_own(options: EngineOptions, progress: Progress | None, group: RankGroup | None) -> _Rank:
    model_options = options.model
    device = device_of(model_options)
    torch.set_num_threads(model_options.threads or max(len(os.sched_getaffinity(0)) // options.parallel.tp, 1))
    checkpoint = open_checkpoint(model_options)
    config, sampling = checkpoint.config, sampling_defaults(model_options, checkpoint)
    shard = Shard(config, group.rank, group.size) if group else Shard(config)
    dtype = getattr(torch, ("float32" if device.type == "cpu" else config.dtype) if model_options.dtype == "auto" else model_options.dtype)
    kernels = kernels_of(model_options, device, dtype)
    if model_options.deterministic and device.type == "cuda" and group is not None:
        raise ValueError("deterministic: NCCL's sums depend on the batch, so it needs tp = 1 on a GPU")
    make_linear, ops = linears_of(model_options, kernels, device, dtype), ops_of(model_options, kernels)
    log.info("%s kernels on %s in %s%s", kernels, device, dtype, ", deterministic" if model_options.deterministic else "")
    kept = kv_dtype_of(options.cache, kernels, dtype)
    page = PageShape(shard.num_kv_heads, config.num_layers, options.cache.page_size, config.head_dim, kept)
    model = DecoderModel(config, checkpoint, device, dtype, make_linear, ops, progress, group)
    checkpoint.close()
    most = _max_running(options) * -(-config.max_model_len // page.page_size)
    pages = _num_pages(options, page.page_bytes, device, most)
    host_pages = _num_host_pages(options, pages, page.page_bytes, device)
    return _Rank(config, checkpoint.path, model, kernels, page, pages, host_pages, sampling)


def _pool(rank: _Rank, options: EngineOptions) -> KVStore:
    device = device_of(options.model)
    gib = rank.pages * rank.page.page_bytes / 2**30
    log.info(
        "%s: %d pages of %d tokens, %.2f GiB, on %s in %s", rank.config.name, rank.pages, rank.page.page_size, gib, device, rank.page.dtype
    )
    return KVStore(rank.page, rank.pages, device, rank.host_pages)


def _mover(
    rank: _Rank, kv: KVStore, options: EngineOptions, group: RankGroup | None, host: str | None
) -> tuple[PageMover, tuple[str, ...]]:
    """What moves this rank's pages, and the addresses of all ranks."""
    cache, kv_heads = options.cache, rank.config.num_kv_heads
    disk = SuspendDirectory(Path(cache.disk_path)) if cache.disk_path else None
    if group is not None:
        place = Place(group.rank, group.size, kv_heads, group.reports(), cache.page_link, cache.verify_moves, disk)
        host = group.host
    else:
        place = Place(kv_heads=kv_heads, link_kind=cache.page_link, verify=cache.verify_moves, disk=disk)
    if host is None:
        return PageMover(kv, place), ()
    listener = Listener(listen(host), kv.pool.device)
    told = [listener.address.encode()] if group is None else group.exchange(listener.address.encode())
    return PageMover(kv, place, listener), tuple(address.decode() for address in told)


def _max_running(options: EngineOptions) -> int:
    return min(options.scheduler.max_running, options.scheduler.max_batch_tokens)


def _num_pages(options: EngineOptions, page_bytes: int, device: torch.device, most: int) -> int:
    """Pages that fit on this rank: as told, else its share of the bytes told, else of what is free now; at most what can be used."""
    cache, ranks = options.cache, options.parallel.tp
    if cache.kv_pages is not None:
        return cache.kv_pages
    if cache.kv_memory is not None:
        pool_bytes = cache.kv_memory // ranks
    elif device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took, or an engine that is gone, is free too
        pool_bytes = int(torch.cuda.mem_get_info(device)[0] * GPU_POOL_SHARE)
    else:
        pool_bytes = min(int(free_bytes() * CPU_POOL_SHARE), CPU_POOL_BYTES) // ranks
    if pool_bytes < page_bytes:
        raise ValueError(f"kv_memory: {pool_bytes} bytes hold no page; one page of {cache.page_size} tokens takes {page_bytes} bytes")
    return min(pool_bytes // page_bytes, most)


def _num_host_pages(options: EngineOptions, pages: int, page_bytes: int, device: torch.device) -> int:
    """Pages of this rank's host pool: its share of the bytes told, else on a GPU as many as the pool has, if that much is free."""
    told, ranks = options.cache.host_memory, options.parallel.tp
    if told is not None:
        if 0 < told < page_bytes * ranks:
            raise ValueError(f"host_memory: {told} bytes hold no page; one page takes {page_bytes * ranks} bytes; 0 means none")
        return told // ranks // page_bytes
    return min(pages, int(free_bytes() * HOST_SHARE) // ranks // page_bytes) if device.type == "cuda" else 0
