"""How Triton kernels are launched: what is known of the chip, the table of measured parameters, and what stands for a missing entry.

The table is `tuned.json` beside this file. It is written by a benchmark on a GPU and checked in; nothing here measures, so a
launch costs a dictionary lookup and the first request is as fast as the last. A shape that the table does not have gets its
kernel's rule, which is a plain function of the shape and the chip.

    {"format": 1, "entries": [
      {"kernel": "paged_decode", "arch": 90, "dtype": "bfloat16", "head_dim": 128, "group": 4, "page_size": 32, "bucket": 64,
       "params": {"block_n": 64, "num_warps": 4, "num_stages": 3, "min_split_keys": 256, "max_splits": 32}}]}

`params` are the fields of the kernel's own launch class. What does not matter to a kernel is 0: a norm has no page size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton import knobs

TABLE = Path(__file__).with_name("tuned.json")
FORMAT = 1
INTERPRETED = bool(knobs.runtime.interpret)  # kernels that are defined now run on CPU tensors, without a compiler
LARGEST_BUCKET = 1024

# Per capability: shared memory that one program may have, and multiprocessors of the largest chip of its kind.
_CHIPS = {80: (163 * 1024, 108), 86: (99 * 1024, 84), 89: (99 * 1024, 142), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}
_OTHER = (99 * 1024, 64)

Params = TypeVar("Params")


@dataclass(frozen=True, slots=True)
class Chip:
    """What rules ask of a device. `arch` is the compute capability times ten, 0 in the interpreter."""

    arch: int
    shared_bytes: int
    multiprocessors: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch depends on, and the key of the table (together with the architecture).

    Attributes:
        kernel: file name without .py.
        dtype: torch's name of the inputs' type; "bfloat16+float8_e4m3fn" where pages are stored in another one.
        head_dim, group, page_size: 0 where the kernel does not know them. group: query heads on one KV head.
        bucket: rows or tokens, as `bucket_of` gives them.
    """

    kernel: str
    dtype: str
    head_dim: int = 0
    group: int = 0
    page_size: int = 0
    bucket: int = 0


def bucket_of(count: int) -> int:
    """The power of two at or above `count`, at most LARGEST_BUCKET: launches are measured for these alone."""
    return min(triton.next_power_of_2(max(count, 1)), LARGEST_BUCKET)


def dtype_name(inputs: torch.dtype, pages: torch.dtype | None = None) -> str:
    """Shape.dtype of kernels that read `inputs`, and pages of type `pages`."""
    name = str(inputs).removeprefix("torch.")
    return name if pages in (None, inputs) else f"{name}+{str(pages).removeprefix('torch.')}"


def chip(device: torch.device) -> Chip:
    """The chip under `device`; in a cross-compile it is the one that the active driver pretends to be."""
    if INTERPRETED:
        return Chip(0, *_OTHER)
    if device.type == "cuda":
        return _cuda_chip(device)
    return described(triton.runtime.driver.active.get_current_target().arch)


@cache
def _cuda_chip(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    known = described(properties.major * 10 + properties.minor)
    return Chip(known.arch, known.shared_bytes, properties.multi_processor_count)


def described(arch: int) -> Chip:
    """The largest chip of capability `arch`."""
    shared_bytes, multiprocessors = _CHIPS.get(arch, _OTHER)
    return Chip(arch, shared_bytes, multiprocessors)


def itemsize(dtype: str) -> int:
    """Bytes of an element of the pages that `Shape.dtype` names."""
    wide: torch.dtype = getattr(torch, dtype.rpartition("+")[2])
    return wide.itemsize


def read_table(path: Path = TABLE) -> dict[tuple[int, Shape], dict[str, int]]:
    """The entries of a table by (arch, shape).

    Raises:
        ValueError: the file is of another format, or has two entries for one shape.
    """
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')}, this is {FORMAT}")
    table: dict[tuple[int, Shape], dict[str, int]] = {}
    for entry in content["entries"]:
        key = {name: value for name, value in entry.items() if name not in ("arch", "params")}
        at = (entry["arch"], Shape(**key))
        if at in table:
            raise ValueError(f"{path} has two entries for {at}")
        table[at] = entry["params"]
    return table


@cache
def _table() -> Mapping[tuple[int, Shape], dict[str, int]]:
    return read_table()


@cache
def launch_of(make: Callable[..., Params], rule: Callable[[Shape, Chip], Params], shape: Shape, on: Chip) -> Params:
    """The table's parameters for `shape`, or the rule's. `make` is the kernel's launch class."""
    found = _table().get((on.arch, shape))
    return rule(shape, on) if found is None else make(**found)
