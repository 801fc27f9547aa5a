"""Speed profiles from data sheets: what a step takes at least, given peak rates and the share of them that kernels reach.

With `tp` ranks that share everything evenly, F = flops reached by all of them together, B = bytes/s of their memories together, in bf16:

    token_s          2 * linear parameters / F  +  bytes of the all-reduces for one token / link bytes/s
    knee_tokens      (bytes of all linears / B) / token_s                                     below it a step waits for the weights
    sequence_s       2 * vocabulary * hidden / F                                              logits of a row that samples
    context_token_s  2 * layers * kv_heads * head_dim * 2 bytes / B                           keys and values of one token
    pair_s           4 * layers * heads * head_dim / F                                        scores and weighted values of one pair
    base_s           launches  +  2 * layers * latency of an all-reduce, if tp > 1
    startup_s        processes, imports and graphs  +  bytes of all weights / bytes/s at which they are loaded

An all-reduce of n bytes over tp ranks sends 2 * n * (tp - 1) / tp bytes from each; there are two in a layer, of hidden * 2 bytes a token.
The pool gets the share of what the weights leave that Quire takes on a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .speed_profile import ReplicaShape, SpeedProfile, StepCost

BYTES = 2  # of a number in bf16
POOL_SHARE = 0.85  # `worker.build.GPU_POOL_SHARE`
PAGE_SIZE = 32
BEGIN_S = 15.0  # until `quire serve` is ready with a model whose weights take no time to load: most of it processes and imports
LOAD_BYTES_PER_S = 7e9  # a 70B model in 8 bits in 10 s (github.com/vllm-project/vllm/issues/19824)


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU. Rates are the data sheet's; `reached` are the shares of them that are assumed of good kernels."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float  # bf16, dense
    link_bytes_per_s: float  # to its peers, in one direction
    reached_flops: float = 0.6
    reached_bytes: float = 0.8
    launch_s: float = 0.0005  # of a step from a graph, and what the host does between two
    reduce_s: float = 10e-6  # latency of an all-reduce


@dataclass(frozen=True, slots=True)
class Decoder:
    """The shape of a Llama."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def linear_parameters(self) -> int:
        """Of all layers, without embedding and head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_parameters(self) -> int:
        """Of the head, and as many of the embedding."""
        return self.vocab * self.hidden


H200 = Device("H200 SXM", 141e9, 4.8e12, 989e12, 450e9)
LLAMA_8B = Decoder("Llama 3.1 8B", 32, 4096, 14_336, 32, 8, 128, 128_256)
LLAMA_70B = Decoder("Llama 3.1 70B", 80, 8192, 28_672, 64, 8, 128, 128_256)


def derive(name: str, device: Device, model: Decoder, tp: int) -> SpeedProfile:
    """By the formulas above."""
    flops, bandwidth = tp * device.flops_per_s * device.reached_flops, tp * device.bytes_per_s * device.reached_bytes
    reduced_bytes = 2 * model.layers * model.hidden * BYTES * 2 * (tp - 1) / tp
    token_s = 2 * model.linear_parameters / flops + reduced_bytes / device.link_bytes_per_s
    weight_bytes = (model.linear_parameters + model.head_parameters) * BYTES
    kv_bytes = 2 * model.layers * model.kv_heads * model.head_dim * BYTES
    all_bytes = weight_bytes + model.head_parameters * BYTES
    left_bytes = tp * device.memory_bytes - all_bytes
    startup_s = round(BEGIN_S + all_bytes / LOAD_BYTES_PER_S, 1)
    step = StepCost(
        base_s=device.launch_s + (2 * model.layers * device.reduce_s if tp > 1 else 0.0),
        token_s=token_s,
        knee_tokens=weight_bytes / bandwidth / token_s,
        sequence_s=2 * model.head_parameters / flops,
        context_token_s=kv_bytes / bandwidth,
        pair_s=4 * model.layers * model.heads * model.head_dim / flops,
    )
    page_bytes = kv_bytes * PAGE_SIZE
    shape = ReplicaShape(int(left_bytes * POOL_SHARE / page_bytes), PAGE_SIZE, page_bytes=page_bytes, gpus=tp, startup_s=startup_s)
    origin = {"device": asdict(device), "model": asdict(model), "tp": tp, "formula": "cluster/simulator/roofline.py"}
    return SpeedProfile(name, True, step, shape, origin)


def shipped() -> list[SpeedProfile]:
    """The profiles in `profiles/`."""
    return [
        derive("h200-llama-8b", H200, LLAMA_8B, 1),
        derive("h200-llama-70b-tp4", H200, LLAMA_70B, 4),
        derive("h200-llama-70b-tp8", H200, LLAMA_70B, 8),
    ]
