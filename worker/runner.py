"""The model runner: turns a step plan into tensors, runs the model and the sampler, and answers with the tokens.

It keeps what it was told of each sequence in a slot of three arrays on the host (tokens, block table, length), so that the
inputs of a step are gathered with a few NumPy operations whatever the batch, and a plan carries differences only. Sampled
tokens are appended here; the scheduler hears of them, but need not send them back.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from ..kernels import cpu, reference
from ..kernels.layout import AttentionBatch
from .config import EngineOptions, ModelOptions
from .host_memory import free_bytes
from .kv_store import KVStore, PageShape
from .linear import linear_factory
from .model import DecoderModel, Ops, Progress
from .plan import NewSequence, Row, Sampled, StepPlan, StepResult
from .protocol import ModelInfo, SamplingParams, TokenLogprob
from .sampler import Sampler, SamplingRow, prompt_logprobs
from .weights import open_checkpoint

log = logging.getLogger(__name__)

SCORED_ROWS = 64  # prompt positions whose logits are held at once: 64 x vocabulary floats
CPU_POOL_SHARE, CPU_POOL_BYTES = 0.25, 8 * 2**30  # default pool on a CPU: a share of what is free, at most so much
GPU_POOL_SHARE = 0.85  # default pool on a GPU: a share of what the weights left; the rest is for activations

IntArray = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Slot:
    """One known sequence: its place in the arrays, and what the sampler needs."""

    index: int
    params: SamplingParams
    seed: int
    prompt_len: int
    num_tokens: int
    num_pages: int


class _Inputs(NamedTuple):
    """One step's inputs, on the model's device, and the rows in the order in which they are computed."""

    rows: list[Row]
    tokens: torch.Tensor
    positions: torch.Tensor
    batch: AttentionBatch


class ModelRunner:
    """Computes plans for one model on one device.

    Args:
        model, kv, sampler: what computes.
        max_running: sequences known at once.
        max_len: tokens of one sequence at most.
    """

    def __init__(self, model: DecoderModel, kv: KVStore, sampler: Sampler, max_running: int, max_len: int) -> None:
        self._model = model
        self._kv = kv
        self._sampler = sampler
        self._device = kv.pool.device
        self._tokens = np.zeros((max_running, max_len + 1), np.int32)
        self._tables = np.zeros((max_running, -(-max_len // kv.page_size)), np.int32)
        self._free = list(range(max_running - 1, -1, -1))
        self._slots: dict[int, _Slot] = {}
        self._scores: dict[int, list[TokenLogprob]] = {}  # prompt logprobs of prompts that are still being computed

    def reset(self) -> None:
        """Forget every sequence, whatever a `run` that raised has left half done."""
        self._slots.clear()
        self._scores.clear()
        self._free = list(range(len(self._tokens) - 1, -1, -1))

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        for seq in plan.forget:
            self._free.append(self._slots.pop(seq).index)
            self._scores.pop(seq, None)
        self._kv.copy_pages(plan.copies)
        for new in plan.new:
            self._learn(new)
        for seq, pages in plan.pages:
            slot = self._slots[seq]
            self._tables[slot.index, slot.num_pages : slot.num_pages + len(pages)] = pages
            slot.num_pages += len(pages)
        inputs = self._gather(plan.rows)
        hidden = self._model.forward(inputs.tokens, inputs.positions, inputs.batch, self._kv)
        ends = np.cumsum(inputs.batch.row_lens)
        scores = tuple(self._score_prompts(inputs.rows, hidden, ends))
        sampled = self._sample(inputs.rows, hidden, ends)
        return StepResult(plan.step, tuple(sampled[row.seq] for row in plan.rows if row.samples), scores)

    def _learn(self, new: NewSequence) -> None:
        index = self._free.pop()
        self._tokens[index, : len(new.tokens)] = new.tokens
        self._tables[index, : len(new.pages)] = new.pages
        self._slots[new.seq] = _Slot(index, new.params, new.seed, new.prompt_len, len(new.tokens), len(new.pages))

    def _gather(self, planned: tuple[Row, ...]) -> _Inputs:
        rows = sorted(planned, key=lambda row: row.num_tokens > 1)  # stable: rows of one token first
        size = self._kv.page_size
        slots = np.fromiter((self._slots[row.seq].index for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        num_decode = int((counts == 1).sum())
        row_starts = np.concatenate(([0], np.cumsum(counts)))
        if num_decode == len(rows):
            owners, positions = slots, starts
        else:
            owners = np.repeat(slots, counts)
            positions = np.arange(row_starts[-1]) - np.repeat(row_starts[:-1] - starts, counts)
        kv_lens = starts + counts
        width = -(-int(kv_lens.max()) // size)
        kv_slots = self._tables[owners, positions // size].astype(np.int64) * size + positions % size
        batch = AttentionBatch(
            row_starts=self._to_device(row_starts.astype(np.int32)),
            kv_lens=self._to_device(kv_lens.astype(np.int32)),
            block_tables=self._to_device(self._tables[slots, :width]),
            slots=self._to_device(kv_slots),
            num_decode=num_decode,
            row_lens=tuple(counts.tolist()),
            kv_lens_list=tuple(kv_lens.tolist()),
        )
        tokens = self._to_device(self._tokens[owners, positions].astype(np.int64))
        return _Inputs(rows, tokens, self._to_device(positions), batch)

    def _to_device(self, array: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _sample(self, rows: list[Row], hidden: torch.Tensor, ends: npt.NDArray[np.int64]) -> dict[int, Sampled]:
        at = [i for i, row in enumerate(rows) if row.samples]
        if not at:
            return {}
        last = hidden if len(at) == len(hidden) else hidden[torch.from_numpy(ends[at] - 1).to(self._device)]
        slots = [self._slots[rows[i].seq] for i in at]
        wanted = [
            SamplingRow(slot.params, slot.seed, slot.num_tokens, slot.prompt_len, self._tokens[slot.index, : slot.num_tokens])
            for slot in slots
        ]
        results: dict[int, Sampled] = {}
        for i, slot, drawn in zip(at, slots, self._sampler.sample(self._model.logits(last), wanted), strict=True):
            self._tokens[slot.index, slot.num_tokens] = drawn.token
            slot.num_tokens += 1
            results[rows[i].seq] = Sampled(rows[i].seq, drawn.token, drawn.logprob, drawn.error)
        return results

    def _score_prompts(
        self, rows: list[Row], hidden: torch.Tensor, ends: npt.NDArray[np.int64]
    ) -> list[tuple[int, tuple[TokenLogprob, ...]]]:
        """Log-probabilities of the prompt tokens after each computed position, for rows that ask; whole prompts are handed over."""
        done: list[tuple[int, tuple[TokenLogprob, ...]]] = []
        for row, end in zip(rows, ends.tolist(), strict=True):
            slot = self._slots[row.seq]
            if slot.params.prompt_logprobs is None or slot.num_tokens > slot.prompt_len:
                continue
            scores = self._scores.setdefault(row.seq, [])
            first = end - row.num_tokens
            count = min(row.num_tokens, slot.prompt_len - 1 - row.start)
            for chunk in range(0, count, SCORED_ROWS):
                n = min(SCORED_ROWS, count - chunk)
                position = row.start + chunk + 1
                targets = self._tokens[slot.index, position : position + n].tolist()
                logits = self._model.logits(hidden[first + chunk : first + chunk + n])
                scores.extend(prompt_logprobs(logits, targets, slot.params.prompt_logprobs))
            if row.samples:
                whole = tuple(self._scores.pop(row.seq))
                if len(whole) == slot.prompt_len - 1:  # a sequence that starts from its leader's pages has scored nothing
                    done.append((row.seq, whole))
        return done


class Sizes(NamedTuple):
    """What the deciding half must know of the computing half."""

    info: ModelInfo
    pages: int


def build_runner(options: EngineOptions, progress: Progress | None = None) -> tuple[ModelRunner, Sizes]:
    """Load the model that `options` names and make a page pool for it.

    Args:
        options: of the whole engine.
        progress: called with (bytes done, bytes in all) while weights load.

    Raises:
        ValueError: the model or an option is not supported, or the pool would hold no page; names it.
    """
    model_options, cache = options.model, options.cache
    torch.set_num_threads(model_options.threads or len(os.sched_getaffinity(0)))
    checkpoint = open_checkpoint(model_options)
    config = checkpoint.config
    device = _device(model_options)
    dtype = getattr(torch, ("float32" if device.type == "cpu" else config.dtype) if model_options.dtype == "auto" else model_options.dtype)
    shape = PageShape(config.num_kv_heads, config.num_layers, cache.page_size, config.head_dim, dtype)
    make_linear = linear_factory(device, dtype, model_options.quantize)
    model = DecoderModel(config, checkpoint, device, dtype, make_linear, _ops(device, dtype), progress)
    max_running = min(options.scheduler.max_running, options.scheduler.max_batch_tokens)
    most = max_running * -(-config.max_model_len // cache.page_size)
    pages = _num_pages(options, shape.page_bytes, device, most)
    checkpoint.close()
    info = ModelInfo(config.name, str(checkpoint.path), config.max_model_len, config.vocab_size, config.eos_token_ids, int(time.time()))
    runner = ModelRunner(
        model,
        KVStore(shape, pages, device),
        Sampler(config.eos_token_ids, config.vocab_size),
        max_running,
        config.max_model_len,
    )
    pool_gib = pages * shape.page_bytes / 2**30
    log.info("%s: %d pages of %d tokens, %.2f GiB, on %s in %s", info.name, pages, cache.page_size, pool_gib, device, dtype)
    return runner, Sizes(info, pages)


def _device(options: ModelOptions) -> torch.device:
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch finds no CUDA device")
    if options.quantize is not None and name != "cpu":
        raise ValueError(f"quantize: {options.quantize} runs on a CPU, not on {name}")
    return torch.device(name)


def _ops(device: torch.device, dtype: torch.dtype) -> Ops:
    fast = device.type == "cpu" and dtype == torch.float32 and cpu.available()
    module: ModuleType = cpu if fast else reference
    return cast(Ops, module)


def _num_pages(options: EngineOptions, page_bytes: int, device: torch.device, most: int) -> int:
    """Pages of the pool: as told, else a share of the memory that is free now, and never more than could be used."""
    cache = options.cache
    if cache.kv_pages is not None:
        return cache.kv_pages
    if cache.kv_memory is not None:
        pool_bytes = cache.kv_memory
    elif device.type == "cuda":
        pool_bytes = int(torch.cuda.mem_get_info(device)[0] * GPU_POOL_SHARE)
    else:
        pool_bytes = min(int(free_bytes() * CPU_POOL_SHARE), CPU_POOL_BYTES)
    if pool_bytes < page_bytes:
        raise ValueError(f"kv_memory: {pool_bytes} bytes hold no page; one page of {cache.page_size} tokens takes {page_bytes} bytes")
    return min(pool_bytes // page_bytes, most)
