"""The deterministic mode: a token's logits are the same bits alone, among strangers, in chunks, and computed again after a preemption."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from interpreter import install
from tiny_models import SIZES, Pages, random_model
from transformers import LlamaConfig

from quire.worker.backend import kernels_of, linears_of, ops_of
from quire.worker.config import ModelOptions
from quire.worker.model import DecoderModel
from quire.worker.weights import open_checkpoint

STRANGERS = 32
PROMPT = [random.Random(1).randrange(97) for _ in range(35)]
SHAPE = {**SIZES, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 16 dimensions


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products by two threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _mended_interpreter():
    install()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model(LlamaConfig(**{**SHAPE, "head_dim": 16})).save_pretrained(path)
    return path


def model_of(path: Path, attention: str, deterministic: bool) -> DecoderModel:
    options = ModelOptions(str(path), attention=attention, deterministic=deterministic)
    checkpoint, device = open_checkpoint(options), torch.device("cpu")
    kernels = kernels_of(options, device, torch.float32)
    linears = linears_of(options, kernels, device, torch.float32)
    return DecoderModel(checkpoint.config, checkpoint, device, torch.float32, linears, ops_of(options, kernels))


def last_logits(model: DecoderModel, strangers: int) -> dict[str, torch.Tensor]:
    """The logits after PROMPT, one way and another."""
    page = 16
    found = {"alone": Pages(model, 8, page).run(PROMPT, [len(PROMPT)])[-1]}
    numbers = random.Random(2)
    crowd = {f"s{i}": [numbers.randrange(97) for _ in range(numbers.choice((1, 1, 3, 9)))] for i in range(strangers)}
    among = Pages(model, 8 + 2 * strangers, page)
    among.step(a=PROMPT[:-1])
    found[f"one token among {strangers} strangers"] = among.step(a=PROMPT[-1:], **crowd)["a"][-1]
    crowded = Pages(model, 8 + 2 * strangers, page).step(a=PROMPT, **crowd)
    found[f"whole among {strangers} strangers"] = crowded["a"][-1]
    found["in chunks"] = Pages(model, 8, page).run(PROMPT, [7, 1, 16])[-1]
    found["token by token"] = Pages(model, 8, page).run(PROMPT, [len(PROMPT) - 3, 1])[-1]
    # As a preemption leaves it: the pages are gone, and what was decoded token by token is computed again as a prompt.
    again = Pages(model, 8, page)
    again.step(a=PROMPT[:-1])
    found["computed again"] = again.step(a=PROMPT[-1:])["a"][-1]
    return found


@pytest.mark.parametrize(("attention", "strangers"), [("compiled", STRANGERS), pytest.param("triton", 2, marks=pytest.mark.slow)])
def test_the_same_bits_every_way(checkpoint, attention, strangers):
    found = last_logits(model_of(checkpoint, attention, True), strangers)
    for way, logits in found.items():
        assert torch.equal(logits, found["alone"]), way


def test_without_it_the_ways_differ(checkpoint, capsys):
    found = last_logits(model_of(checkpoint, "torch", False), STRANGERS)
    largest = {way: float((logits - found["alone"]).abs().max()) for way, logits in found.items()}
    with capsys.disabled():
        print("\nlargest difference of a logit from the request alone, torch kernels, deterministic mode off:", largest)
    assert max(largest.values()) > 0  # if this ever fails the mode is not needed, or the test does not see


def test_what_is_not_deterministic_is_refused(checkpoint):
    with pytest.raises(ValueError, match="deterministic: torch"):
        model_of(checkpoint, "torch", True)
    options = ModelOptions(str(checkpoint), attention="triton", deterministic=True, quantize="int8")
    with pytest.raises(ValueError, match="deterministic: quantized"):
        linears_of(options, "triton", torch.device("cpu"), torch.float32)
