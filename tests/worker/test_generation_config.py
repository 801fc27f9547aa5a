"""What a model advises for requests that leave it out: read, refused, turned off and overridden."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_gguf import add_model, finish, writer_for
from tiny_models import SIZES, random_model, tiny_checkpoint
from transformers import LlamaConfig

from quire import LLM, BadRequest, SamplingParams
from quire.worker.config import ModelOptions
from quire.worker.generation_config import HUGGING_FACE, read_defaults
from quire.worker.protocol import ModelInfo
from quire.worker.weights import open_checkpoint, sampling_defaults

ALL = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A model of one's own, whose generation_config.json may be written."""
    return shutil.copytree(saved, tmp_path / "model")


def advise(checkpoint: Path, **config: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(config))


def defaults(path: Path, **options: Any) -> dict[str, float]:
    told = ModelOptions(str(path), **options)
    opened = open_checkpoint(told)
    try:
        return dict(sampling_defaults(told, opened))
    finally:
        opened.close()


def test_a_directory_advises_what_its_generation_config_says(checkpoint: Path) -> None:
    advise(checkpoint, **ALL, do_sample=False, eos_token_id=2, num_beams=4)
    assert defaults(checkpoint) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_tokens": 9,
    }
    advise(checkpoint, temperature=None, top_k=0, do_sample=False)
    assert defaults(checkpoint) == {"top_k": 0}
    (checkpoint / "generation_config.json").unlink()
    assert defaults(checkpoint) == {}


def test_a_gguf_file_advises_what_its_metadata_say(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=True)
    writer = writer_for(tmp_path / "m.gguf", "llama", config)
    add_model(writer, random_model(config), "llama")
    writer.add_float32("general.sampling.temp", 0.6)
    writer.add_float32("general.sampling.top_p", 0.95)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_float32("general.sampling.penalty_repeat", 1.05)
    finish(writer)
    assert defaults(tmp_path / "m.gguf") == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    assert defaults(tmp_path / "m.gguf", generation_config="none") == {}


def test_the_operator_comes_before_the_model(checkpoint: Path) -> None:
    advise(checkpoint, temperature=0.6, top_p=0.9, top_k=20)
    override = '{"temperature": 1, "top_k": null, "max_new_tokens": 5}'
    assert defaults(checkpoint, override_generation_config=override) == {"temperature": 1, "top_p": 0.9, "max_tokens": 5}
    assert defaults(checkpoint, override_generation_config=override, generation_config="none") == {"temperature": 1, "max_tokens": 5}


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, r"must be a number in \[0, 100\], not -0\.1"),
        ("temperature", "0.6", r"must be a number in \[0, 100\], not '0\.6'"),
        ("temperature", float("nan"), r"must be a number in \[0, 100\], not nan"),
        ("top_p", 0, r"must be a number in \(0, 1\], not 0"),
        ("top_k", 20.5, r"must be an integer in \[-1, 2147483647\], not 20\.5"),
        ("top_k", True, r"must be an integer in \[-1, 2147483647\], not True"),
        ("min_p", 2, r"must be a number in \[0, 1\], not 2"),
        ("repetition_penalty", 0.0, r"must be a number in \(0, 100\], not 0\.0"),
        ("max_new_tokens", 0, r"must be an integer in \[1, 2147483647\], not 0"),
    ],
)
def test_bad_advice_names_file_field_and_limit(field: str, value: object, limit: str, checkpoint: Path) -> None:
    advise(checkpoint, **{field: value})
    with pytest.raises(ValueError, match=rf"^generation_config\.json: {field} {limit}"):
        LLM(str(checkpoint), progress=False, kv_pages=8)
    assert defaults(checkpoint, generation_config="none") == {}
    with pytest.raises(ValueError, match=rf"^override_generation_config: {field} {limit}"):
        defaults(checkpoint, generation_config="none", override_generation_config=json.dumps({field: value}))


@pytest.mark.parametrize("text", ["temperature=0.6", "[0.6]", "[" * 100_000])
def test_an_override_that_is_no_object_is_refused(text: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^override_generation_config: must be a JSON object such as"):
        defaults(checkpoint, override_generation_config=text)


def test_an_override_of_what_has_no_default_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^override_generation_config: max_tokens has no default; these have: .*, max_new_tokens$"):
        defaults(checkpoint, override_generation_config='{"max_tokens": 5}')


def test_each_default_is_one_of_a_request() -> None:
    assert SamplingParams(**read_defaults(ALL, HUGGING_FACE, "")) == SamplingParams(  # type: ignore[arg-type]
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.05, max_tokens=9
    )


def test_the_longest_answer_is_cut_to_the_room_there_is() -> None:
    info = ModelInfo("m", "", 64, 97, (), 0, pool_tokens=60, sampling=(("max_tokens", 40),))
    assert [info.default_params(tokens).max_tokens for tokens in (0, 20, 30, 60, 70)] == [40, 40, 30, 1, 1]
    assert info._replace(sampling=()).default_params(30) == SamplingParams()


def test_offline_calls_without_parameters_use_the_model_s(checkpoint: Path) -> None:
    advise(checkpoint, temperature=0.0, top_k=20, max_new_tokens=1000)
    prompt, options = [1, 2, 3], {"progress": False, "kv_pages": 16, "page_size": 4, "threads": 1}
    llm = LLM(str(checkpoint), **options)
    own = llm.default_params()
    assert own == SamplingParams(temperature=0.0, top_k=20, max_tokens=64)
    both = llm.generate([prompt, prompt + prompt])
    assert [len(output.outputs[0].token_ids) for output in both] == [61, 58]  # all that the 64 positions leave
    greedy = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=61))
    assert both[0].outputs[0].token_ids == greedy[0].outputs[0].token_ids
    assert llm.generate(prompt, SamplingParams(seed=1))[0].outputs[0].token_ids != greedy[0].outputs[0].token_ids
    with pytest.raises(BadRequest, match="max_tokens"):
        llm.generate(prompt, own)  # taken as it is
    assert LLM(str(checkpoint), generation_config="none", **options).default_params() == SamplingParams()
