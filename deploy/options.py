"""From a YAML file and flags to one `QuireOptions`. The only way in, and the flags, their help and docs/configuration.md
all come from the dataclasses in `worker.config`, so a new field there is a new flag, a new key and a new line in the docs.

`python -m quire.deploy.options > docs/configuration.md` writes the docs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..worker.config import QuireOptions
from ..worker.options import Option, OptionError, assemble, leaves, suggest


def options() -> Iterator[Option]:
    """Every option, in the order of the dataclasses."""
    return leaves(QuireOptions)


def add_flags(parser: argparse.ArgumentParser, only: frozenset[str] | None = None) -> None:
    """One flag for each option, or for those in `only`, grouped by owner, and `--config`.

    Flags that are not given leave no trace in the namespace.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags without the dashes in front; flags win")
    groups: dict[type, argparse._ArgumentGroup] = {}
    for option in options():
        if only is not None and option.name not in only:
            continue
        if option.owner not in groups:
            groups[option.owner] = parser.add_argument_group(f"{_title(option.owner)} options", _summary(option.owner))
        how: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": option.help().replace("%", "%%")}
        if option.type is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            how["choices"] = option.choices
        else:
            how["metavar"] = _metavar(option)
        if option.kind == "list":
            how["action"] = "append"
        groups[option.owner].add_argument(option.flag, **how)


def build(flags: Mapping[str, Any]) -> QuireOptions:
    """The configuration: defaults, then the file that `flags["config"]` names, then the flags that were given.

    Raises:
        OptionError: naming the file and key, or the flag, at fault.
    """
    by_name = {option.name: option for option in options()}
    values: dict[tuple[str, ...], Any] = {}
    config = flags.get("config")
    if config is not None:
        for key, value in read_yaml(Path(config)).items():
            option = by_name.get(str(key).replace("-", "_"))
            if option is None:
                raise OptionError(f"{config}: {key}: there is no such option{suggest(str(key), by_name)}")
            if option.path in values:
                raise OptionError(f"{config}: {key}: is given twice")
            values[option.path] = option.read(value, f"{config}: {key}")
    for name, option in by_name.items():
        if name in flags:
            values[option.path] = option.read(flags[name], option.flag)
    return assemble(QuireOptions(), values)


def read_yaml(path: Path) -> dict[Any, Any]:
    """The map in a YAML file; an empty file is an empty map.

    Raises:
        OptionError: it cannot be read, is not YAML, or is not one flat map.
    """
    import yaml  # 15 ms that `quire --help` need not pay

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise OptionError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise OptionError(f"{path}: must hold `option: value` lines")
    return raw


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every option is a flag of `quire serve` and a key of the YAML file that `--config FILE` names",
        "(`page-size: 32` or `page_size: 32`).",
        "Flags win over the file. Sizes take `512MB`, `4GiB` or bytes; on/off options are `--prefix-cache` and `--no-prefix-cache`",
        "as flags, `true` and `false` in the file; a repeatable option is a list in the file.",
        "",
        "This page is written by `python -m quire.deploy.options`.",
    ]
    owner = None
    for option in options():
        if option.owner is not owner:
            owner = option.owner
            lines += ["", f"## {_title(owner).capitalize()}", "", _summary(owner), ""]
            lines += ["| flag | default | what it does |", "|---|---|---|"]
        default = "" if option.field.default in (None, ()) else f"`{option.default_text()}`"
        text = str(option.field.metadata["help"]).replace("|", "\\|")
        if option.choices:
            text += f"; one of {', '.join(f'`{choice}`' for choice in option.choices)}"
        lines.append(f"| `{option.flag}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _title(owner: type) -> str:
    return owner.__name__.removesuffix("Options").lower()


def _summary(owner: type) -> str:
    return (owner.__doc__ or "").splitlines()[0]


def _metavar(option: Option) -> str:
    if option.kind == "bytes":
        return "SIZE"
    if option.name.endswith("_s"):
        return "SECONDS"
    if option.name.endswith("_file"):
        return "FILE"
    return {int: "N", float: "X"}.get(option.type, "TEXT")


if __name__ == "__main__":
    sys.stdout.write(markdown())
