"""A whole decode step on a GPU, from plan to tokens, beside the time that reading weights and keys must take, and beside transformers.

    python benchmarks/decode_step.py [--model 1b,8b] [--batch 1,8,64,256] [--context 512,2048,8192] [--no-peer] [--json FILE]

Random weights in the shapes of Llama-3.1-8B and Llama-3.2-1B, bfloat16, greedy. The roofline is the bytes that every step must read (all
weights but the embedding, and the keys and values of every row) over the bandwidth of a device copy measured in the same run. Steps run as
in service: planned and issued one ahead, from CUDA graphs, pages of 32 tokens in random order. What does not fit into memory is left out.
transformers' continuous batching generates for the same number of prompts of the same length; its step is the difference between two
lengths of output, so that its prefill does not count. An hour for everything; `--model 1b --batch 1,64 --context 512` takes five minutes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from torch import Tensor
from tqdm import tqdm

from quire.kernels.triton_ops import TritonOps
from quire.worker.constraint import Constraints
from quire.worker.cuda_graphs import Capture, CudaCapture
from quire.worker.device_layers import Decoding
from quire.worker.device_runner import DeviceRunner
from quire.worker.device_sampler import DeviceSampler
from quire.worker.kv_store import KVStore, PageShape
from quire.worker.linear import PlainLinear
from quire.worker.model import DecoderModel
from quire.worker.model_config import ModelConfig
from quire.worker.plan import NewSequence, Row, StepPlan
from quire.worker.protocol import SamplingParams
from quire.worker.rope import RopeConfig
from quire.worker.text.tokenizer import load_tokenizer

PAGE, WARM_STEPS, STEPS = 32, 8, 64
ROOM = 0.9  # of the memory that is free: what is left is for activations, graphs and logits
PEER_TOKENS = 8, 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=2**20, ignore_eos=True)


def shape(hidden: int, layers: int, heads: int, head_dim: int, inner: int, tied: bool) -> ModelConfig:
    """A model of the Llama 3 family with 8 KV heads."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        intermediate_size=inner,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        tie_embeddings=tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(None,) * layers,
        max_model_len=16384,
        eos_token_ids=(),
        bos_token_id=None,
        dtype="bfloat16",
        name="random",
    )


MODELS = {"1b": shape(2048, 16, 32, 64, 8192, True), "8b": shape(4096, 32, 32, 128, 14336, False)}


class RandomWeights:
    """A `Checkpoint` of numbers that nobody trained, made on the device."""

    path, kind = Path(), "safetensors"

    def __init__(self, config: ModelConfig, device: str) -> None:
        self.config = config
        self._shapes = config.shapes()
        self._device = device

    def tensor(self, name: str, dtype: torch.dtype, part: Any = None) -> Tensor:
        """Small enough that activations stay finite through all layers."""
        return torch.randn(self._shapes[name], device=self._device, dtype=dtype) * 0.02

    def close(self) -> None:
        """There is nothing to let go of."""


def model_of(config: ModelConfig, device: str, dtype: torch.dtype) -> DecoderModel:
    return DecoderModel(config, RandomWeights(config, device), device, dtype, PlainLinear, TritonOps())


def runner_of(model: DecoderModel, rows: int, context: int, device: str, dtype: torch.dtype, capture: Capture | None) -> DeviceRunner:
    """A runner whose pool holds just these rows, for all the steps to come."""
    config = model.config
    page = PageShape(config.num_kv_heads, config.num_layers, PAGE, config.head_dim, dtype)
    kv = KVStore(page, rows * pages_of(context), device)
    sampler = DeviceSampler((), config.vocab_size, rows, torch.device(device))
    constraints = Constraints(partial(load_tokenizer, Path()), (), config.vocab_size)  # nobody brings a grammar
    return DeviceRunner(model, kv, sampler, constraints, rows, context + WARM_STEPS + STEPS + 2, how=Decoding(capture))


def pages_of(context: int) -> int:
    return -(-(context + WARM_STEPS + STEPS + 2) // PAGE)


def plans(rows: int, context: int) -> Iterator[StepPlan]:
    """Decode steps of `rows` sequences, the first with `context` keys each."""
    order = torch.randperm(rows * pages_of(context)).view(rows, -1).tolist()
    new = tuple(NewSequence(s, (7,) * context, context, tuple(order[s]), GREEDY, s) for s in range(rows))
    for step in range(WARM_STEPS + STEPS):
        at = tuple(Row(s, context - 1 + step, 1, True) for s in range(rows))
        yield StepPlan(step, at, () if step else new, (), (), ())


def step_s(runner: DeviceRunner, rows: int, context: int) -> float:
    """Seconds of a step, over STEPS of them, each issued while the one before it is computed."""
    coming = plans(rows, context)
    plan = next(coming)
    began_s = 0.0
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            began_s = time.perf_counter()
        following = next(coming, None)
        runner.run_ahead(plan, lambda following=following: following)
        if following is not None:
            plan = following
    return (time.perf_counter() - began_s) / STEPS


def bytes_of(model: DecoderModel, rows: int, context: int) -> tuple[int, int]:
    """What a step must read: (weights, keys and values)."""
    config = model.config
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * 2
    token = config.num_layers * config.num_kv_heads * config.head_dim * 2 * 2
    return model.weight_bytes() - embedding, rows * (context + WARM_STEPS + STEPS // 2) * token


def measured(model: DecoderModel, rows: int, context: int, bandwidth: float) -> dict[str, Any] | None:
    """One line of the table; None where the pages do not fit."""
    weights, keys = bytes_of(model, rows, context)
    if rows * pages_of(context) * PAGE * keys // (rows * context) > torch.cuda.mem_get_info()[0] * ROOM:
        return None
    runner = runner_of(model, rows, context, "cuda", torch.bfloat16, CudaCapture())
    runner._kv.pool.normal_(std=0.1)
    seconds = step_s(runner, rows, context)
    limit = (weights + keys) / bandwidth
    return {
        "batch": rows,
        "context": context,
        "step_ms": seconds * 1e3,
        "tokens_per_s": rows / seconds,
        "roofline_ms": limit * 1e3,
        "of_roofline": limit / seconds,
    }


def peer_step_s(model: Any, rows: int, context: int) -> float | None:
    """Seconds of a step of transformers' continuous batching; None where it cannot do it."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    prompts = [[(13 * s + 7 * i) % 100_000 for i in range(context)] for s in range(rows)]
    took = []
    for tokens in (PEER_TOKENS[0], *PEER_TOKENS):  # the first time everything takes longer
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        try:
            answers = model.generate_batch(
                inputs=prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(), progress_bar=False
            )
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # a peer that cannot do a shape is no reason to stop
            tqdm.write(f"transformers cannot do {rows} x {context}: {str(error).splitlines()[0]}")
            return None
        took.append(time.perf_counter() - began_s)
        if [len(answer.generated_tokens) for answer in answers.values()] != [tokens] * rows:  # it logs why, and goes on
            tqdm.write(f"transformers has not generated all tokens of {rows} x {context}")
            return None
    return (took[2] - took[1]) / (PEER_TOKENS[1] - PEER_TOKENS[0])


def peer_of(config: ModelConfig) -> Any:
    """The same shape in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_model_len,
        tie_word_embeddings=config.tie_embeddings,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(sizes).to(torch.bfloat16).eval()


def main() -> None:
    parser = gpu.arguments(__doc__)
    parser.add_argument("--model", default="1b,8b")
    parser.add_argument("--batch", default="1,8,64,256")
    parser.add_argument("--context", default="512,2048,8192")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    args = parser.parse_args()
    gpu.require_cuda()
    shapes = [(rows, context) for rows in map(int, args.batch.split(",")) for context in map(int, args.context.split(","))]
    bandwidth = gpu.copy_bandwidth()
    result: dict[str, Any] = {"machine": gpu.machine(), "copy_gb_s": bandwidth / 1e9, "steps": []}
    print(f"{result['machine']}\ncopy {bandwidth / 1e9:.0f} GB/s")
    print(f"{'model':6}{'batch':>6}{'context':>9}{'step ms':>10}{'roofline':>10}{'of it':>8}{'transformers ms':>18}")
    for name in args.model.split(","):
        result["steps"] += lines_of(name, shapes, bandwidth, not args.no_peer)
    gpu.save(args.json, result)


def lines_of(name: str, shapes: list[tuple[int, int]], bandwidth: float, peer: bool) -> list[dict[str, Any]]:
    """The lines of one model: Quire's first, since both do not fit beside each other."""
    lines: list[dict[str, Any]] = []
    model: Any = model_of(MODELS[name], "cuda", torch.bfloat16)
    for rows, context in tqdm(shapes, leave=False, unit="shape", desc=f"{name}, quire"):
        line = measured(model, rows, context, bandwidth)
        if line is None:
            tqdm.write(f"{name:6}{rows:6}{context:9}   does not fit into memory")
        else:
            lines.append({"model": name, **line, "transformers_ms": None})
        _freed()
    del model
    _freed()
    model = peer_of(MODELS[name]) if peer else None
    for line in tqdm(lines, leave=False, unit="shape", desc=f"{name}, transformers", disable=not peer):
        seconds = peer_step_s(model, line["batch"], line["context"]) if peer else None
        line["transformers_ms"] = None if seconds is None else seconds * 1e3
        beside = "-" if seconds is None else f"{seconds * 1e3:.2f}"
        numbers = f"{line['step_ms']:10.2f}{line['roofline_ms']:10.2f}{line['of_roofline']:8.1%}{beside:>18}"
        tqdm.write(f"{name:6}{line['batch']:6}{line['context']:9}{numbers}")
        _freed()
    return lines


def _freed() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
