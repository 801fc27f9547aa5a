"""Opens a checkpoint: what the model is, and its tensors one by one under Hugging Face's names.

Only safetensors and GGUF are read. Names and shapes are held against the configuration before a weight is touched.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import ModelOptions
from .generation_config import Defaults, read_override
from .gguf_weights import GgufCheckpoint
from .hf_config import read_config, read_generation_defaults, read_json
from .model_config import ModelConfig, UnsupportedModel
from .shard import Part
from .text.source import resolve_model

_FLOATS = {"F32", "F16", "BF16", "F64"}


class Checkpoint(Protocol):
    """An open checkpoint.

    Attributes:
        config: of the model in it.
        path: the directory or file.
        kind: "safetensors" or "gguf".
    """

    config: ModelConfig
    path: Path
    kind: str

    def tensor(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """The tensor that Hugging Face calls `name`, or a part of it, on the CPU, as `dtype`.

        Only what is asked for is read. May share the file's memory: do not write to it.
        """
        ...

    def sampling_defaults(self) -> Defaults:
        """What the model's makers advise. Raises: ValueError."""
        ...

    def close(self) -> None:
        """Let go of the files. Tensors that were given out stay valid."""
        ...


def open_checkpoint(options: ModelOptions) -> Checkpoint:
    """Find and open the model that `options` names; its config carries the served name and length.

    Raises:
        ModelNotFound: there is no such model.
        UnsupportedModel: it needs something that is not implemented, named in the message.
    """
    path = resolve_model(options.model)
    checkpoint: Checkpoint = GgufCheckpoint(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path)
    as_typed = options.model if not Path(options.model).expanduser().exists() else None  # an alias or a hub id names the model well
    checkpoint.config = checkpoint.config.serving(options.max_model_len, options.served_model_name or as_typed)
    return checkpoint


def sampling_defaults(options: ModelOptions, checkpoint: Checkpoint) -> tuple[tuple[str, float], ...]:
    """`ModelInfo.sampling`, as `options` and the model have it.

    Raises:
        ValueError: a default is none that a request could have given; names the file, or the option, and the field.
    """
    advised = checkpoint.sampling_defaults() if options.generation_config == "auto" else {}
    return tuple((name, value) for name, value in (advised | read_override(options)).items() if value is not None)


class SafetensorsCheckpoint:
    """A directory with config.json and one or many .safetensors files; memory-mapped, read tensor by tensor."""

    kind = "safetensors"

    def __init__(self, directory: Path) -> None:
        """Raises: UnsupportedModel."""
        self.path = directory
        config = read_config(directory)
        self._where: dict[str, Any] = {}
        with ExitStack() as files:
            try:
                shapes = self._open(directory, files)
            except SafetensorError as error:
                raise UnsupportedModel(f"{directory}: a safetensors file is damaged: {error}") from None
            self.config = config.matching(shapes)
            self._files = files.pop_all()

    def _open(self, directory: Path, files: ExitStack) -> dict[str, tuple[int, ...]]:
        """Map every file and note where each tensor is; the safetensors library checks offsets and sizes as it opens one."""
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _safetensors_files(directory):
            opened = files.enter_context(safe_open(file, framework="pt"))
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                view = opened.get_slice(name)
                if view.get_dtype() not in _FLOATS:
                    raise UnsupportedModel(f"tensor {name} is of type {view.get_dtype()}; supported are {', '.join(sorted(_FLOATS))}")
                shapes[name] = tuple(view.get_shape())
                self._where[name] = opened
        return shapes

    def tensor(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """See `Checkpoint.tensor`."""
        tensor: Tensor
        if part is None:
            tensor = self._where[name].get_tensor(name)
        else:
            tensor = self._where[name].get_slice(name)[(slice(None),) * part.dim + (slice(part.start, part.stop),)]
        return tensor.to(dtype)

    def sampling_defaults(self) -> Defaults:
        """See `Checkpoint.sampling_defaults`."""
        return read_generation_defaults(self.path)

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._where.clear()
        self._files.close()


def _safetensors_files(directory: Path) -> list[Path]:
    """The files that the index names, or the single file."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise UnsupportedModel(f"{directory} has no model.safetensors; pickled weights are never read")
        return [directory / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UnsupportedModel(f"{index.name} has no weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsupportedModel(f"{index.name} names {name!r}, which is not a safetensors file beside it")
        if not (directory / name).is_file():
            raise UnsupportedModel(f"{index.name} names {name}, which is not there")
    return [directory / name for name in names]
