"""The table of launch parameters, and what stands for a missing entry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quire.kernels import launch
from quire.kernels.launch import Chip, Shape, bucket_of, described, dtype_name, itemsize, read_table
from quire.kernels.paged_decode import DecodeLaunch, decode_rule, prefix_rule
from quire.kernels.paged_prefill import prefill_rule

ENTRY = {
    "kernel": "paged_decode", "arch": 90, "dtype": "bfloat16", "head_dim": 128, "group": 4, "page_size": 32, "bucket": 64,
    "params": {"block_n": 32, "num_warps": 2, "num_stages": 7, "min_split_keys": 512, "max_splits": 8},
}  # fmt: skip
SHAPE = Shape("paged_decode", "bfloat16", 128, 4, 32, 64)


def written(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_table_that_is_shipped_can_be_read() -> None:
    assert isinstance(read_table(), dict)


def test_an_entry_is_found_by_its_shape_and_chip_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = read_table(written(tmp_path / "tuned.json", {"format": 1, "entries": [ENTRY]}))
    monkeypatch.setattr(launch, "_table", lambda: table)
    launch.launch_of.cache_clear()
    try:
        assert launch.launch_of(DecodeLaunch, decode_rule, SHAPE, described(90)) == DecodeLaunch(32, 2, 7, 512, 8)
        assert launch.launch_of(DecodeLaunch, decode_rule, SHAPE, described(80)) == decode_rule(SHAPE, described(80))
        other = Shape("paged_decode", "bfloat16", 128, 4, 32, 32)
        assert launch.launch_of(DecodeLaunch, decode_rule, other, described(90)) == decode_rule(other, described(90))
    finally:
        launch.launch_of.cache_clear()


def test_a_table_of_another_format_or_with_two_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format"):
        read_table(written(tmp_path / "new.json", {"format": 2, "entries": []}))
    with pytest.raises(ValueError, match="two entries"):
        read_table(written(tmp_path / "twice.json", {"format": 1, "entries": [ENTRY, ENTRY]}))


def test_names_and_buckets() -> None:
    assert dtype_name(torch.bfloat16) == dtype_name(torch.bfloat16, torch.bfloat16) == "bfloat16"
    assert dtype_name(torch.bfloat16, torch.float8_e4m3fn) == "bfloat16+float8_e4m3fn"
    assert [itemsize(name) for name in ("float32", "bfloat16", "bfloat16+float8_e4m3fn")] == [4, 2, 1]
    assert [bucket_of(n) for n in (0, 1, 3, 64, 65, 100_000)] == [1, 1, 4, 64, 128, 1024]


@pytest.mark.parametrize("on", [described(80), described(89), described(90), described(100), described(75), Chip(0, 99 * 1024, 64)])
def test_rules_have_an_answer_for_every_shape(on: Chip) -> None:
    for dtype in ("float32", "float16", "bfloat16", "bfloat16+float8_e4m3fn"):
        for dim in (64, 80, 96, 128, 256):
            for group in (1, 3, 17):
                shape = Shape("paged_decode", dtype, dim, group, 32, 16)
                assert prefill_rule(shape, on).block_m >= group
                assert decode_rule(shape, on).block_n in (16, 32, 64, 128)
                assert prefix_rule(shape, on).block_n in (16, 32, 64, 128)
