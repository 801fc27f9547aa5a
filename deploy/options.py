"""From a YAML file and flags to one `QuireOptions`. The only way in, and the flags, their help and docs/configuration.md
all come from the dataclasses in `worker.config`, so a new field there is a new flag, a new key and a new line in the docs.

`python -m quire.deploy.options > docs/configuration.md` writes the docs.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from ..worker.config import QuireOptions

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}

# What the types do not say: smallest and largest value that make sense.
_RANGES: dict[str, tuple[float, float]] = {
    "max_model_len": (1, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "threads": (1, 4096),
    "page_size": (1, 2**20),
    "kv_pages": (1, 2**31 - 1),
    "kv_memory": (1, 2**60),
    "max_batch_tokens": (1, 2**24),
    "max_running": (1, 2**20),
    "max_waiting": (0, 2**24),
    "max_prompts": (1, 2**20),
    "max_n": (1, 2**20),
    "max_choices": (1, 2**20),
    "max_logprobs": (0, 2**20),
    "max_stop": (0, 2**20),
    "max_stop_chars": (1, 2**20),
    "max_logit_bias": (0, 2**20),
    "port": (0, 65535),
    "max_body": (1024, 2**40),
    "grace_s": (0, 86400),
    "health_timeout_s": (0.1, 86400),
    "start_timeout_s": (1, 86400),
}


class OptionError(ValueError):
    """A value, a key or a file of the configuration is wrong; the message names it."""


@dataclass(frozen=True, slots=True)
class Option:
    """One leaf of `QuireOptions`: `path` are the fields that lead to it, `owner` is the dataclass that holds it."""

    path: tuple[str, ...]
    owner: type
    type: type  # bool, int, float or str
    optional: bool
    field: Field[Any]

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> str | None:
        """'bytes' for a size, 'list' for a repeatable flag, else None."""
        return self.field.metadata.get("kind")

    @property
    def choices(self) -> tuple[str, ...] | None:
        return self.field.metadata.get("choices")

    def help(self) -> str:
        """The field's text with its default."""
        text = str(self.field.metadata["help"])
        return text if self.field.default in (None, ()) else f"{text} (default: {self.default_text()})"

    def default_text(self) -> str:
        default: Any = self.field.default
        if self.type is bool:
            return "on" if default else "off"
        if self.type is float:
            return f"{default:g}"
        return format_bytes(default) if self.kind == "bytes" and default is not None else str(default)

    def parse(self, value: Any) -> Any:
        """The typed value of what a flag (text) or a YAML key (text, number, bool, list, null) holds.

        Raises:
            OptionError: it is not of the right type, out of range, or not one of the choices.
        """
        if value is None and self.optional:
            return None
        if self.kind == "list":
            items = value if isinstance(value, list | tuple) else [value]
            return tuple(self._text(item) for item in items)
        parsed = self._scalar(value)
        if self.choices and parsed not in self.choices:
            raise OptionError(f"must be one of {', '.join(self.choices)} (got {value!r})")
        low, high = _RANGES.get(self.name, (None, None))
        if low is not None and high is not None and not low <= parsed <= high:
            raise OptionError(f"must be {_span(low, high)} (got {value})")
        return parsed

    def _scalar(self, value: Any) -> Any:
        if self.kind == "bytes":
            return parse_bytes(value)
        if self.type is bool:
            if not isinstance(value, bool):
                raise OptionError(f"must be true or false (got {value!r})")
            return value
        if self.type is str:
            return self._text(value)
        try:
            if isinstance(value, bool) or (self.type is int and isinstance(value, float)):
                raise ValueError
            return self.type(value)
        except (TypeError, ValueError):
            noun = "a whole number" if self.type is int else "a number"
            raise OptionError(f"must be {noun} (got {value!r})") from None

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise OptionError(f"must be text; put it in quotes (got {value!r})")
        if not value.strip():
            raise OptionError("must not be empty")
        return value


def options() -> Iterator[Option]:
    """Every option, in the order of the dataclasses."""
    yield from _leaves(QuireOptions, ())


def parse_bytes(value: Any) -> int:
    """4096, "4096", "512MB", "1.5 GiB" or "4G" (binary) in bytes.

    Raises:
        OptionError: it is none of those.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip().upper()
    number = text.rstrip("BIKMGT ")
    unit = text[len(number) :].strip()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise OptionError(f"must be a size such as 512MB or 4GiB (got {value!r})") from None


def format_bytes(size: int) -> str:
    """The shortest exact text that `parse_bytes` reads back."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each option, grouped by owner, and `--config`. Flags that are not given leave no trace in the namespace."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags without the dashes in front; flags win")
    groups: dict[type, argparse._ArgumentGroup] = {}
    for option in options():
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
                raise OptionError(f"{config}: {key}: there is no such option{_suggest(str(key), by_name)}")
            if option.path in values:
                raise OptionError(f"{config}: {key}: is given twice")
            values[option.path] = _parse(option, value, f"{config}: {key}")
    for name, option in by_name.items():
        if name in flags:
            values[option.path] = _parse(option, flags[name], option.flag)
    return cast(QuireOptions, _assemble(QuireOptions(), values, ()))


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


def _leaves(owner: type, path: tuple[str, ...]) -> Iterator[Option]:
    hints = get_type_hints(owner)
    for field in fields(owner):
        hint, here = hints[field.name], (*path, field.name)
        if is_dataclass(hint):
            yield from _leaves(hint if isinstance(hint, type) else type(hint), here)
            continue
        kinds = [kind for kind in get_args(hint) or (hint,) if kind not in (type(None), Ellipsis)]
        yield Option(here, owner, kinds[0], type(None) in get_args(hint), field)


def _assemble(node: Any, values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """`node` (a frozen dataclass) with the values of the leaves below `path` put in."""
    changes: dict[str, Any] = {}
    for field in fields(node):
        here = (*path, field.name)
        if here in values:
            changes[field.name] = values[here]
        elif is_dataclass(field.default):
            changes[field.name] = _assemble(getattr(node, field.name), values, here)
    return replace(node, **changes)


def _parse(option: Option, value: Any, where: str) -> Any:
    try:
        return option.parse(value)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def _suggest(key: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    return f"; did you mean {close[0].replace('_', '-')}?" if close else ""


def _span(low: float, high: float) -> str:
    # Limits that only keep numbers sane are not worth naming.
    return f"at least {low}" if high >= 2**20 else f"from {low} to {high}"


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
