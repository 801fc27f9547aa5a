"""What a simulated replica is: how long its steps take, and how much it holds. JSON in and out.

One step computes P prompt tokens and D decodes, T = P + D tokens of R = sequences in all. Its kernels run one after the other, and
the linear layers are bound by whichever is slower, computing or reading the weights:

    step_s = base_s                                   launches, scheduling, what the host does
           + token_s * max(T, knee_tokens)            linear layers: below the knee they wait for the weights
           + sequence_s * R                           sampling, and what a row of the batch costs
           + context_token_s * C                      attention of decodes: keys and values that they read, C = sum of their contexts
           + pair_s * A                               attention of prompts: A = sum over prompt tokens of what each of them attends to
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("profiles")


class ProfileError(ValueError):
    """The file is no speed profile; the message names it and the field."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of the formula above, in seconds (`knee_tokens`: tokens)."""

    base_s: float
    token_s: float
    knee_tokens: float = 0.0
    sequence_s: float = 0.0
    context_token_s: float = 0.0
    pair_s: float = 0.0

    def step_s(self, prompt_tokens: float, pairs: float, decodes: float, context: float, rows: float) -> float:
        """One step: `prompt_tokens` that attend to `pairs`, `decodes` that read `context` tokens together, in `rows` sequences."""
        linear_s = self.token_s * max(prompt_tokens + decodes, self.knee_tokens)
        return self.base_s + linear_s + self.sequence_s * rows + self.context_token_s * context + self.pair_s * pairs


@dataclass(frozen=True, slots=True)
class ReplicaShape:
    """The size of one replica.

    Attributes:
        pages, page_size: of its pool, in pages and tokens.
        page_bytes: of one page, on all ranks together.
        gpus: that it takes.
        link_bytes_per_s: at which it sends pages to others.
        startup_s: from the decision to start it until it serves.
    """

    pages: int
    page_size: int = 32
    max_batch_tokens: int = 512
    max_running: int = 256
    max_model_len: int = 131_072
    page_bytes: int = 1
    gpus: int = 1
    link_bytes_per_s: float = 2.0**30
    startup_s: float = 60.0


@dataclass(frozen=True, slots=True)
class SpeedProfile:
    """A replica on some machine.

    Attributes:
        derived: computed from a data sheet, not measured.
        origin: machine and versions of a measurement, or the data sheet and the assumptions of a derivation.
        error: of the fit against what was measured (`fit.Fit`); empty when derived.
    """

    name: str
    derived: bool
    step: StepCost
    replica: ReplicaShape
    origin: dict[str, Any] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """The inverse of `parse`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load(name: str) -> SpeedProfile:
    """A shipped profile by its name, or a file.

    Raises:
        ProfileError: there is no such file, or it is not a profile.
    """
    shipped = SHIPPED / f"{name}.json"
    path = shipped if shipped.is_file() else Path(name)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{name} cannot be read: {error}; shipped profiles: {', '.join(shipped_names())}") from None
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def shipped_names() -> list[str]:
    """The profiles that come with Quire."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def parse(text: str) -> SpeedProfile:
    """Raises:
    ProfileError: not JSON, a field is unknown or missing, or a value is of the wrong kind or out of range.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"not JSON: {error}") from None
    top = _fields("profile", raw, SpeedProfile)
    for name, kind in (("name", str), ("derived", bool), ("origin", dict), ("error", dict)):
        if name in top and not isinstance(top[name], kind):
            raise ProfileError(f"{name} must be a {kind.__name__}")
    step, replica = _fields("step", top.get("step"), StepCost), _fields("replica", top.get("replica"), ReplicaShape)
    for name, value in step.items():
        _check(f"step.{name}", value, 0.0)
    for f in fields(ReplicaShape):
        if f.name in replica:
            whole = f.type == "int"
            _check(f"replica.{f.name}", replica[f.name], 1.0 if whole else 0.0, whole)
    try:
        top["step"], top["replica"] = StepCost(**step), ReplicaShape(**replica)
        profile = SpeedProfile(**top)
    except TypeError as error:
        raise ProfileError(str(error).replace("__init__() ", "")) from None
    if profile.step.base_s + profile.step.token_s <= 0:
        raise ProfileError("step.token_s: a step must take time")
    if profile.replica.max_running > profile.replica.max_batch_tokens:
        raise ProfileError("replica.max_running must be at most max_batch_tokens")
    return profile


def _fields(name: str, raw: Any, of: type) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ProfileError(f"{name} must be an object")
    known = {f.name for f in fields(of)}
    for key in raw:
        if key not in known:
            raise ProfileError(f"{name}.{key} is unknown")
    return dict(raw)


def _check(name: str, value: Any, least: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not least <= value < math.inf:
        raise ProfileError(f"{name} must be a {'whole ' if whole else ''}number of at least {least:g}, not {value!r}")
