"""What an option is, derived from the dataclasses in `config`: its name, type, range and help, and how its value is read.

`deploy.options` makes flags, YAML keys and docs of it; `LLM` takes the engine's options by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast, get_args, get_type_hints

from .config import EngineOptions

Root = TypeVar("Root")

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
    "host_memory": (0, 2**60),
    "disk_memory": (1, 2**60),
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
    "max_grammar": (0, 2**24),
    "port": (0, 65535),
    "max_body": (1024, 2**40),
    "grace_s": (0, 86400),
    "health_timeout_s": (0.1, 86400),
    "start_timeout_s": (1, 86400),
    "tp": (1, 1024),
    "step_timeout_s": (1, 86400),
    "migration_bandwidth": (1, 2**60),
    "max_migrations": (1, 256),
    "ingresses": (1, 256),
    "admin_port": (0, 65535),
    "replicas": (1, 4096),
    "prefill_replicas": (0, 4095),
    "max_queue_requests": (1, 2**24),
    "max_queue_tokens": (1, 2**40),
    "max_queue_wait_s": (0.01, 86400),
    "min_replicas": (0, 4096),
    "max_replicas": (1, 4096),
    "gpu_budget": (1, 2**20),
    "target_ttft_ms": (1, 10**8),
    "target_tpot_ms": (0.1, 10**8),
    "target_wait_s": (0.01, 86400),
    "target_ongoing": (0.01, 10**6),
    "scale_up_cooldown_s": (0, 86400),
    "scale_down_cooldown_s": (0, 86400),
    "scale_to_zero_s": (0, 10**7),
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

    def read(self, value: Any, where: str) -> Any:
        """`parse`, with `where` (a flag, a file and key, a name) in front of what is wrong."""
        try:
            return self.parse(value)
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from None

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


def leaves(root: type) -> Iterator[Option]:
    """Every option below the dataclass `root`, in the order of the fields."""
    return _leaves(root, ())


def assemble(root: Root, values: Mapping[tuple[str, ...], Any]) -> Root:
    """`root` (a frozen dataclass) with the leaves at the given paths changed."""
    return cast(Root, _assemble(root, values, ()))


def engine_options(**values: Any) -> EngineOptions:
    """`EngineOptions` with the given leaves changed, by name (`page_size=16`, `kv_memory="2GiB"`).

    Raises:
        OptionError: there is no such option, or its value is wrong; names it.
    """
    by_name = {option.name: option for option in leaves(EngineOptions)}
    changes = {}
    for name, value in values.items():
        if name not in by_name:
            raise OptionError(f"{name}: there is no such option{suggest(name, by_name)}")
        changes[by_name[name].path] = by_name[name].read(value, name)
    return assemble(EngineOptions(), changes)


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


def suggest(key: str, names: Mapping[str, Any]) -> str:
    """`; did you mean ...?`, when a name is near; else nothing."""
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    return f"; did you mean {close[0].replace('_', '-')}?" if close else ""


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


def _span(low: float, high: float) -> str:
    # Limits that only keep numbers sane are not worth naming.
    return f"at least {low}" if high >= 2**20 else f"from {low} to {high}"
