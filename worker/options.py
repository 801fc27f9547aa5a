"""Option values by their flat names, checked and put into the nested dataclasses of `config`."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from .config import EngineOptions


def engine_options(**values: Any) -> EngineOptions:
    """`EngineOptions` with the given leaves changed, by name (`page_size=16`).

    Raises:
        ValueError: there is no such option.
    """
    options = EngineOptions()
    left = dict(values)
    for group in fields(options):
        owner = getattr(options, group.name)
        mine = {f.name: left.pop(f.name) for f in fields(owner) if f.name in left and not is_dataclass(f.default)}
        options = replace(options, **{group.name: replace(owner, **mine)})
    if left:
        raise ValueError(f"{next(iter(left))}: there is no such option")
    return options
