"""Reads what stands before the weights in a GGUF file: the metadata, and where each tensor is. Imports nothing heavy.

The `gguf` package's reader builds numpy views for every token of the vocabulary (2.3 s for 49,000 tokens); this takes
hundredths of that, for the model and the tokenizer alike. Every length is checked against the file before it is believed.
Layout: magic, version, tensor count, metadata count, (key, type, value)*, (name, dims, type, offset)*, padding, data.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_KEY_BYTES = 2**16


class GgufError(ValueError):
    """The file is not a GGUF file, or its header does not add up."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` is row-major (the file's order reversed), `type_id` GGML's number, `offset` bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata (numbers, strings, bools and lists of them) by key, tensors by name, and the file's size."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: int


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`.

    Raises:
        GgufError: not GGUF, an unknown version, or lengths and offsets that do not fit the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise GgufError(f"{path.name}: too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data).header()
            except (GgufError, struct.error, UnicodeDecodeError) as error:
                raise GgufError(f"{path.name}: {error}") from None


class _Cursor:
    """Walks the header once, from front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0

    def header(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise GgufError("not a GGUF file (its magic is missing)")
        self.at = 4
        version = self.scalar("<I")
        if version not in _VERSIONS:
            raise GgufError(f"GGUF version {version} is not supported (versions {_VERSIONS} are)")
        tensor_count, metadata_count = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.fits(metadata_count, 13)):
            key = self.string(_MAX_KEY_BYTES)
            if key in metadata:
                raise GgufError(f"metadata key {key} stands twice")
            metadata[key] = self.value(self.scalar("<I"))
        found = [self.tensor() for _ in range(self.fits(tensor_count, 32))]
        return GgufHeader(metadata, self.placed(found, metadata.get("general.alignment", 32)), self.size)

    def tensor(self) -> TensorInfo:
        name = self.string(_MAX_KEY_BYTES)
        dims = self.scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise GgufError(f"tensor {name} has {dims} dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(dims))[::-1]
        if 0 in shape:
            raise GgufError(f"tensor {name} is empty")
        return TensorInfo(name, shape, self.scalar("<I"), self.scalar("<Q"))

    def placed(self, found: list[TensorInfo], alignment: Any) -> dict[str, TensorInfo]:
        """The tensors by name, with offsets from the start of the file."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise GgufError(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for info in found:
            if info.name in tensors:
                raise GgufError(f"tensor {info.name} stands twice")
            if info.offset % alignment or start + info.offset >= self.size:
                raise GgufError(f"tensor {info.name} starts at {info.offset}, unaligned or past the end of the file")
            tensors[info.name] = TensorInfo(info.name, info.shape, info.type_id, start + info.offset)
        return tensors

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string(self.size)
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        return self.scalar(self.format(kind))

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self.strings(self.fits(count, 8))
        code = self.format(kind)
        end = self.at + self.fits(count, struct.calcsize(code)) * struct.calcsize(code)
        values = struct.unpack_from(f"<{count}{code[1]}", self.data, self.at)
        self.at = end
        return list(values)

    def strings(self, count: int) -> list[str]:
        """A long array of strings (the vocabulary), in one tight loop."""
        data, size, at = self.data, self.size, self.at
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (length,) = unpack(data, at)
            end = at + 8 + length
            if end > size:
                raise GgufError("a string runs past the end of the file")
            found.append(data[at + 8 : end].decode())
            at = end
        self.at = at
        return found

    def string(self, longest: int) -> str:
        length = self.scalar("<Q")
        if length > longest or self.at + length > self.size:
            raise GgufError("a string runs past the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise GgufError(f"metadata of type {kind} is not supported")
        return _SCALARS[kind]

    def fits(self, count: int, least_bytes: int) -> int:
        """`count`, unless so many items cannot be in what is left of the file."""
        if count * least_bytes > self.size - self.at:
            raise GgufError(f"{count} items are announced, more than the file can hold")
        return count
