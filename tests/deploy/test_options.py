"""One path from a YAML file and flags to the frozen configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from quire.deploy import options
from quire.deploy.options import build
from quire.worker.config import QuireOptions
from quire.worker.options import _RANGES, OptionError, format_bytes, parse_bytes


def parse(*argv: str) -> QuireOptions:
    parser = argparse.ArgumentParser(prog="quire serve")
    options.add_flags(parser)
    return build(vars(parser.parse_args(list(argv))))


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "quire.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_without_flags_it_is_the_defaults():
    assert parse() == QuireOptions()


def test_every_option_has_a_flag_a_help_and_a_unique_name():
    names = [option.name for option in options.options()]
    assert len(names) == len(set(names)) > 30
    for option in options.options():
        assert option.field.metadata["help"]
        assert option.parse(option.field.default) == option.field.default, option.name
    # Numbers without bounds would let nonsense through to the engine.
    assert {o.name for o in options.options() if o.type in (int, float)} == set(_RANGES)


def test_flags_reach_the_leaf_that_owns_them():
    got = parse(*"--model /m --page-size 16 --no-prefix-cache --max-running 4 --max-n 2 --port 0 --ray-address auto".split())
    assert (got.engine.model.model, got.engine.cache.page_size, got.engine.cache.prefix_cache) == ("/m", 16, False)
    assert (got.engine.scheduler.max_running, got.engine.limits.max_n) == (4, 2)
    assert (got.server.port, got.cluster.ray_address) == (0, "auto")
    assert got.engine.cache.kv_memory is None  # the rest is untouched
    assert got.server.host == "127.0.0.1"


def test_the_file_takes_both_spellings_and_flags_win(config):
    path = config("page-size: 16\nmax_running: 8\nkv-memory: 512MiB\nprefix-cache: false\napi-key: [one, two]\nquantize: null\n")
    got = parse("--config", path, "--max-running", "9")
    assert got.engine.cache.page_size == 16
    assert got.engine.scheduler.max_running == 9
    assert got.engine.cache.kv_memory == 512 * 2**20
    assert got.engine.cache.prefix_cache is False
    assert got.server.api_key == ("one", "two")
    assert parse("--config", path, "--api-key", "three").server.api_key == ("three",)
    assert parse("--config", config("")) == QuireOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page-sise: 16", "page-sise: there is no such option; did you mean page-size?"),
        ("page-size: 16\npage_size: 32", "page_size: is given twice"),
        ("page-size: many", "page-size: must be a whole number (got 'many')"),
        ("page-size: 16.5", "page-size: must be a whole number (got 16.5)"),
        ("page-size: true", "page-size: must be a whole number (got True)"),
        ("page-size: null", "page-size: must be a whole number (got None)"),
        ("page-size: 0", "page-size: must be at least 1 (got 0)"),
        ("port: 70000", "port: must be from 0 to 65535 (got 70000)"),
        ("prefix-cache: maybe", "prefix-cache: must be true or false (got 'maybe')"),
        ("dtype: float64", "dtype: must be one of auto, float32, bfloat16, float16 (got 'float64')"),
        ("grace-s: .nan", "grace-s: must be from 0 to 86400 (got nan)"),
        ("kv-memory: 4 stone", "kv-memory: must be a size such as 512MB or 4GiB (got '4 stone')"),
        ("api-key: [12345]", "api-key: must be text; put it in quotes (got 12345)"),
        ("host: ''", "host: must not be empty"),
        ("- 1", "must hold `option: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(config, text, message):
    path = config(text)
    with pytest.raises(OptionError) as caught:
        parse("--config", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"nothing\.yaml: cannot be read"):
        parse("--config", str(tmp_path / "nothing.yaml"))


def test_a_yaml_file_cannot_make_objects(config):
    with pytest.raises(OptionError, match="is not YAML"):
        parse("--config", config("model: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--page-size", "-1"), "--page-size: must be at least 1"),
        (("--max-running", "x"), "--max-running: must be a whole number"),
        (("--api-key", ""), "--api-key: must not be empty"),
        (("--health-timeout-s", "inf"), "--health-timeout-s: must be from 0.1 to 86400"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(argv, message):
    with pytest.raises(OptionError) as caught:
        parse(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1KB", 1000), ("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("512 mb", 512_000_000), ("4G", 4 * 2**30), ("10B", 10), (7, 7)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4XB", "1e999", True, None, "4 4"])
def test_what_is_no_size(text):
    with pytest.raises(OptionError):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 3 * 2**20, 2**40, 2**30 + 1])
def test_sizes_are_written_so_that_they_read_back(size):
    assert parse_bytes(format_bytes(size)) == size


def test_the_documentation_is_up_to_date(root):
    written = (root / "docs" / "configuration.md").read_text()
    assert written == options.markdown(), "run: python -m quire.deploy.options > docs/configuration.md"
