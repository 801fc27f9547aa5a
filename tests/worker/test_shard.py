"""Which part of which tensor a rank has: together they are the whole, each once; and only the part is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, random_model
from transformers import LlamaConfig, Qwen3Config

from quire.worker.config import ModelOptions
from quire.worker.shard import Part, Shard
from quire.worker.weights import open_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "tiny"
    random_model(Qwen3Config(**SIZES, head_dim=16, attention_bias=True)).save_pretrained(path)
    return path


def test_one_rank_has_all(directory: Path) -> None:
    config = open_checkpoint(ModelOptions(str(directory))).config
    shard = Shard(config)
    assert shard.shapes() == config.shapes()
    assert {shard.part(name) for name in config.shapes()} == {None}
    assert (shard.num_heads, shard.num_kv_heads, shard.vocab_rows, shard.vocab_start) == (4, 2, 97, 0)


def test_the_parts_of_four_ranks(directory: Path) -> None:
    config = open_checkpoint(ModelOptions(str(directory))).config
    layer = "model.layers.1."
    parts = {
        f"{layer}self_attn.q_proj.weight": [(0, 0, 16), (0, 16, 32), (0, 32, 48), (0, 48, 64)],
        f"{layer}self_attn.q_proj.bias": [(0, 0, 16), (0, 16, 32), (0, 32, 48), (0, 48, 64)],
        f"{layer}self_attn.k_proj.weight": [(0, 0, 16), (0, 0, 16), (0, 16, 32), (0, 16, 32)],  # two KV heads, each twice
        f"{layer}self_attn.v_proj.bias": [(0, 0, 16), (0, 0, 16), (0, 16, 32), (0, 16, 32)],
        f"{layer}self_attn.o_proj.weight": [(1, 0, 16), (1, 16, 32), (1, 32, 48), (1, 48, 64)],
        f"{layer}self_attn.o_proj.bias": [None] * 4,
        f"{layer}self_attn.q_norm.weight": [None] * 4,
        f"{layer}mlp.gate_proj.weight": [(0, 0, 12), (0, 12, 24), (0, 24, 36), (0, 36, 48)],
        f"{layer}mlp.down_proj.weight": [(1, 0, 12), (1, 12, 24), (1, 24, 36), (1, 36, 48)],
        "model.embed_tokens.weight": [(0, 0, 25), (0, 25, 50), (0, 50, 75), (0, 75, 97)],
        "lm_head.weight": [(0, 0, 25), (0, 25, 50), (0, 50, 75), (0, 75, 97)],
        "model.norm.weight": [None] * 4,
    }
    for name, expected in parts.items():
        found = [Shard(config, rank, 4).part(name) for rank in range(4)]
        assert [None if part is None else tuple(part) for part in found] == expected, name
    # The sum over the ranks has this bias once.
    assert [f"{layer}self_attn.o_proj.bias" in Shard(config, rank, 4).shapes() for rank in range(4)] == [True, False, False, False]


@pytest.mark.parametrize("size", [2, 4])
def test_a_part_is_read_as_the_shapes_say(size: int, directory: Path) -> None:
    checkpoint = open_checkpoint(ModelOptions(str(directory)))
    for rank in range(size):
        shard = Shard(checkpoint.config, rank, size)
        for name, shape in shard.shapes().items():
            whole, part = checkpoint.tensor(name, torch.float32), shard.part(name)
            got = checkpoint.tensor(name, torch.float32, part)
            assert got.shape == shape
            assert torch.equal(got, whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start))


def test_only_the_part_is_taken_out_of_the_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(ModelOptions(str(directory)))
    opened = next(iter(checkpoint._where.values()))
    asked: list[object] = []

    class Slices:
        def get_slice(self, name: str) -> object:
            class View:
                def __getitem__(self, index: object) -> torch.Tensor:
                    asked.append(index)
                    return opened.get_slice(name)[index]

            return View()

    monkeypatch.setattr(checkpoint, "_where", dict.fromkeys(checkpoint._where, Slices()))  # it cannot give a whole tensor
    checkpoint.tensor("model.layers.0.mlp.down_proj.weight", torch.float32, Part(1, 12, 24))
    checkpoint.tensor("model.layers.0.mlp.up_proj.weight", torch.float32, Part(0, 12, 24))
    assert asked == [(slice(None), slice(12, 24)), (slice(12, 24),)]


def test_a_large_vocabulary_is_shared_out_evenly(tmp_path: Path) -> None:
    random_model(LlamaConfig(**SIZES | {"vocab_size": 96})).save_pretrained(tmp_path)
    config = open_checkpoint(ModelOptions(str(tmp_path))).config
    assert [Shard(config, rank, 4).vocab_start for rank in range(4)] == [0, 24, 48, 72]
