"""API keys and the tenants that they belong to: from `--api-key`, and from the file that `--api-key-file` names.

The file has a key on each line, and then every key is a tenant of its own; or it is YAML:

    tenants:
      - name: search
        keys: ["sk-first", "sk-second"]
        weight: 2
        requests_per_s: 10
        tokens_per_min: 100000
        max_concurrent: 32
        max_pages: 4096

Errors name file, tenant and field, and never a key. Keys stay here and in the ingress; everybody else hears names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cluster.tenants import TenantLimits
from ..worker.config import ServerOptions
from ..worker.options import OptionError, suggest
from .api.auth import ApiKeys

_NUMBERS: dict[str, type] = {"weight": float, "requests_per_s": float, "tokens_per_min": float, "max_concurrent": int, "max_pages": int}
_FIELDS = {"name", "keys", *_NUMBERS}
_LARGEST = 1e12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_YAML = re.compile(r"""^\s*["']?tenants["']?\s*:""", re.MULTILINE)


def load_tenants(options: ServerOptions) -> tuple[ApiKeys, tuple[TenantLimits, ...]]:
    """The accepted keys, and the limits of the tenants that have a name.

    Raises:
        ValueError: a key is empty, or something in the file is wrong, or it names no key: a server that was meant to be closed
            must not open.
        OSError: the file cannot be read.
    """
    if options.api_key_file is None:
        return ApiKeys(options.api_key), ()
    path = Path(options.api_key_file)
    text = path.read_text(encoding="utf-8")
    if path.suffix not in (".yaml", ".yml") and not _YAML.search(text):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} holds no API key")
        return ApiKeys((*options.api_key, *lines)), ()
    tenants, limits = _read_tenants(path, text)
    if any(key in tenants for key in options.api_key):
        raise OptionError(f"{path}: a key of a tenant is also given by --api-key")
    return ApiKeys(options.api_key, tenants), limits


def _read_tenants(path: Path, text: str) -> tuple[dict[str, str], tuple[TenantLimits, ...]]:
    """Key -> name, and the limits."""
    raw = _read_yaml(path, text)
    for key in raw:
        if key != "tenants":
            raise OptionError(f"{path}: {key}: there is no such field; there is only tenants")
    entries = raw.get("tenants")
    if not isinstance(entries, list) or not entries:
        raise OptionError(f"{path}: tenants: must be a list of tenants, and not empty")
    names: dict[str, str] = {}
    limits: dict[str, TenantLimits] = {}
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise OptionError(f"{path}: tenant {number}: must be fields with values")
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError(f"{path}: tenant {number}: name: must be up to 64 letters, digits, dots, dashes and underscores")
        where = f"{path}: tenant {name}"
        if name in limits:
            raise OptionError(f"{where}: name: is given twice")
        limits[name] = _limits(name, entry, where)
        for key in _keys(entry.get("keys"), where):
            if key in names:
                raise OptionError(f"{where}: keys: one of them is given twice, or belongs to {names[key]} too")
            names[key] = name
    return names, tuple(limits.values())


def _read_yaml(path: Path, text: str) -> dict[Any, Any]:
    import yaml  # 15 ms that a server without such a file need not pay

    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:  # its words quote the file, and so the keys
        mark = getattr(error, "problem_mark", None)
        raise OptionError(f"{path}: is not YAML" + (f" (line {mark.line + 1})" if mark else "")) from None
    if not isinstance(raw, dict):
        raise OptionError(f"{path}: must hold a list of tenants")
    return raw


def _limits(name: str, entry: Mapping[Any, Any], where: str) -> TenantLimits:
    values: dict[str, Any] = {}
    for field, value in entry.items():
        if field not in _FIELDS:
            raise OptionError(f"{where}: {field}: there is no such field{suggest(str(field), dict.fromkeys(_FIELDS))}")
        if field not in _NUMBERS or value is None:
            continue
        kind = _NUMBERS[field]
        right_type = isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or isinstance(value, int))
        if not right_type or not 0 < value <= _LARGEST:
            noun = "a whole number of at least 1" if kind is int else "a number above 0"
            raise OptionError(f"{where}: {field}: must be {noun} (got {value!r})")
        values[field] = kind(value)
    return TenantLimits(name, **values)


def _keys(keys: Any, where: str) -> list[str]:
    if not isinstance(keys, list) or not keys:
        raise OptionError(f"{where}: keys: must be a list of API keys, and not empty")
    if not all(isinstance(key, str) and key.strip() == key and key for key in keys):
        raise OptionError(f"{where}: keys: each must be text without blanks around it; put it in quotes")
    return keys
