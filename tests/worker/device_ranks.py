"""What lets the runners of GPUs work on a CPU, for tests of several ranks: something in place of graphs, kernels that can be called from
there, and a sampler that answers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ranks import KEY, follower_process, generate, tokens
from torch import Tensor

from quire.kernels import reference
from quire.kernels.layout import AttentionBatch
from quire.worker import build, device_sampler
from quire.worker.backend import device_of
from quire.worker.config import EngineOptions
from quire.worker.device_runner import DeviceFollower, DeviceRunner
from quire.worker.engine import Runner, build_engine
from quire.worker.parallel import lead
from quire.worker.plan import StepPlan, StepResult
from quire.worker.protocol import SamplingParams
from quire.worker.rendezvous import LOOPBACK, address_of, listen
from quire.worker.sampler import Held, Sampler, SamplingRow
from quire.worker.sequence_table import PENDING

Patch = Callable[[Any, str, Any], None]


class Again:
    """Instead of a graph. Notes what was captured and replayed, by its number of rows."""

    def __init__(self) -> None:
        self.done: list[tuple[str, int]] = []

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = compute().clone()
        self.done.append(("capture", len(result)))

        def replay() -> None:
            self.done.append(("replay", len(result)))
            result.copy_(compute())

        return replay, result


class RecordableOps:
    """The reference kernels as `Again` needs them: lengths are read where its inputs lie, and rows that a step lacks write nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def rope_and_write_kv(self, qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Tensor, slots: Tensor, *rest: Any) -> Tensor:
        real = slots >= 0
        if real.any():
            reference.rope_and_write_kv(qkv[real], positions[real], cos_sin, pages, slots[real], *rest)
        return reference.rope_and_write_kv(qkv, positions, cos_sin, torch.empty_like(pages[:1]), torch.zeros_like(slots), *rest)

    def paged_attention(self, q: Tensor, pages: Tensor, batch: AttentionBatch, *rest: Any) -> Tensor:
        lens = tuple(max(n, 1) for n in batch.kv_lens.tolist())
        return reference.paged_attention(q, pages, replace(batch, kv_lens_list=lens), *rest)


class HostSampler(Sampler):
    """`DeviceSampler` without Triton."""

    def __init__(self, eos_token_ids: Sequence[int], vocab_size: int, places: int, device: torch.device) -> None:
        super().__init__(eos_token_ids, vocab_size)

    def learn(self, sequences: Sequence[Held]) -> None:
        """It counts anew for each draw."""

    def begin(self, logits: Tensor, rows: Sequence[SamplingRow], places: Sequence[int], latest: Tensor) -> Any:
        known = [np.where(row.tokens == PENDING, int(latest[place]), row.tokens) for row, place in zip(rows, places, strict=True)]
        drawn = self.sample(logits, [row._replace(tokens=tokens) for row, tokens in zip(rows, known, strict=True)])
        return SimpleNamespace(tokens=torch.tensor([d.token for d in drawn]), result=lambda: drawn)


class Watched:
    """The runners that have been built, of all ranks, and what stands for their graphs."""

    def __init__(self) -> None:
        self.runners: list[DeviceRunner | DeviceFollower] = []
        self.captures: list[Again] = []

    def install(self, patch: Patch) -> None:
        """From now on every rank that is built on this process's CPU works as on a GPU."""

        def capture() -> Again:
            self.captures.append(Again())
            return self.captures[-1]

        def warmed(kind: type[DeviceRunner] | type[DeviceFollower]) -> Callable[..., None]:
            warm_up = kind.warm_up

            def noted(runner: Any, *args: Any) -> None:
                self.runners.append(runner)
                warm_up(runner, *args)
                runner._table._tokens[:] = 0  # what it leaves there is nobody's

            return noted

        patch(build, "_works_ahead", lambda rank, device: True)
        patch(build, "CudaCapture", capture)
        for kind in (DeviceRunner, DeviceFollower):
            patch(kind, "warm_up", warmed(kind))

    def install_without_triton(self, patch: Patch) -> None:
        """`install`, with kernels and a sampler that take milliseconds."""
        self.install(patch)
        patch(build, "ops_of", lambda options, kernels: RecordableOps())
        patch(device_sampler, "DeviceSampler", HostSampler)


def one_launch_at_a_time(patch: Patch) -> None:
    """Triton's interpreter keeps the running program in a global, and ranks that are threads share it."""
    from triton.runtime.interpreter import GridExecutor

    launch, lock = GridExecutor.__call__, threading.Lock()

    def alone(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return launch(*args, **kwargs)

    patch(GridExecutor, "__call__", alone)


def count_ahead(runner: Runner) -> list[StepPlan]:
    """The plans that `runner` is given ahead, from now on."""
    run_ahead, ahead = runner.run_ahead, []

    def counted(plan: StepPlan, following: Callable[[], StepPlan | None]) -> StepResult:
        def noted() -> StepPlan | None:
            if (after := following()) is not None:
                ahead.append(after)
            return after

        return run_ahead(plan, noted)

    runner.run_ahead = counted  # type: ignore[method-assign]
    return ahead


# --- processes of their own, on the device that `options` name ---


def device_follower_process(rank: int, size: int, address: str, options: EngineOptions) -> None:
    """`ranks.follower_process`, working as on a GPU."""
    _work_as_on_a_gpu(options)
    follower_process(rank, size, address, options)


def device_leader_process(options: EngineOptions, prompts: list[list[int]], params: list[SamplingParams], said: Any) -> None:
    """Says its address; the tokens of `prompts` with each of `params`; how many steps were begun ahead. Or what went wrong."""
    _work_as_on_a_gpu(options)
    try:
        listener = listen(LOOPBACK)
        said.put(address_of(listener))
        group = lead(listener, options.parallel.tp, options.parallel.step_timeout_s, said.put, device_of(options.model))
        engine = build_engine(options, KEY, group=group)
        ahead = count_ahead(engine.runner)
        for some in params:
            said.put(tokens(generate(engine, prompts, some)))
        said.put(len(ahead))
        engine.runner.close()
    except Exception as error:
        said.put(repr(error))
        raise
    threading.Event().wait(600)


def _work_as_on_a_gpu(options: EngineOptions) -> None:
    if options.model.device == "cpu":
        Watched().install_without_triton(setattr)
