"""Checkpoints in Hugging Face form: one file or shards, refused before a weight is read when they are not what they say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, Pages, load, random_model
from transformers import LlamaConfig, PreTrainedModel

from quire.worker.config import ModelOptions
from quire.worker.model_config import UnsupportedModel
from quire.worker.weights import open_checkpoint

TOKENS = [5, 3, 90, 11, 42]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model(LlamaConfig(**SIZES))


@pytest.fixture
def directory(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_shards_are_read_as_one(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(Pages(load(tmp_path)).run(TOKENS, [5]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_come_in_the_type_asked_for_and_outlive_the_file(stored: torch.dtype, directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = {name: weight.to(stored) for name, weight in load_file(file).items()}
    save_file(weights, file)
    checkpoint = open_checkpoint(ModelOptions(str(directory)))
    name = "model.layers.1.mlp.down_proj.weight"
    same, wide = checkpoint.tensor(name, stored), checkpoint.tensor(name, torch.float32)
    checkpoint.close()
    assert torch.equal(same, weights[name])
    assert torch.equal(wide, weights[name].float())


def test_the_head_is_tied_when_the_checkpoint_has_none(directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old checkpoints have it
    save_file(weights, file)
    untied, tied = json.loads((directory / "config.json").read_text())["tie_word_embeddings"], load(directory)
    assert untied is False
    assert tied.config.tie_embeddings
    hidden = torch.eye(32)[:3] * 0.5
    final_norm = weights["model.norm.weight"]
    expected = (hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * final_norm) @ weights["model.embed_tokens.weight"].T
    torch.testing.assert_close(tied.logits(hidden), expected, atol=1e-4, rtol=0)


def test_name_and_length_are_the_users_or_the_checkpoints(directory: Path) -> None:
    def config(**options: object) -> tuple[str, int]:
        found = open_checkpoint(ModelOptions(str(directory), **options)).config  # type: ignore[arg-type]
        return found.name, found.max_model_len

    assert config() == ("tiny", 64)
    assert config(served_model_name="mine", max_model_len=20) == ("mine", 20)
    with pytest.raises(UnsupportedModel, match="max_model_len 65 is more than the 64 positions"):
        config(max_model_len=65)
    with pytest.raises(UnsupportedModel, match="max_model_len is 0"):
        config(max_model_len=0)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.2.mlp.up_proj.weight", None, r"no tensor model\.layers\.2\.mlp\.up_proj\.weight"),
        ("model.norm.weight", torch.zeros(31), r"model\.norm\.weight has shape \[31\], the configuration says \[32\]"),
        ("model.layers.0.self_attn.q_norm.weight", torch.zeros(8), r"self_attn\.q_norm\.weight has no place in LlamaForCausalLM"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int8), r"model\.norm\.weight is of type I8"),
        ("model.norm.weight", torch.zeros(32).to(torch.float8_e4m3fn), r"model\.norm\.weight is of type F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, tensor: torch.Tensor | None, message: str, directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    save_file({key: value for key, value in (weights | {name: tensor}).items() if value is not None}, file)
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(ModelOptions(str(directory)))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "../tiny/model.safetensors"}}, r"'\.\./tiny/model\.safetensors', which is not a safetensors"),
        ({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}, r"'pytorch_model\.bin', which is not a safetensors"),
        ({"weight_map": {"model.norm.weight": "model-2.safetensors"}}, r"model-2\.safetensors, which is not there"),
        ({"weight_map": ["model.safetensors"]}, "no weight_map"),
        ([], "not a JSON object"),
    ],
)
def test_an_index_names_only_files_beside_it(index: object, message: str, directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModel, match=message):
        open_checkpoint(ModelOptions(str(directory)))


def test_pickled_weights_are_never_read(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="pickled weights are never read"):
        open_checkpoint(ModelOptions(str(directory)))


def test_a_damaged_file_is_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UnsupportedModel, match="damaged"):
        open_checkpoint(ModelOptions(str(directory)))
