"""What a controller must find again after its death: kept by Ray itself, in the store of its head (GCS), for as long as the cluster is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any, NamedTuple

import msgpack
from ray.experimental import internal_kv

from ...worker.config import QuireOptions
from ...worker.options import assemble, leaves
from ..tenants import TenantLimits

kv: Any = internal_kv
SPACE = b"quire"


class Remembered(NamedTuple):
    """How many replicas there are to be, those that are or come, those that leave, whether an operator has said how many, ModelInfo's
    fields, and the versions of the replicas, (id, version) each."""

    target: int
    staying: tuple[str, ...]
    leaving: tuple[str, ...]
    by_hand: bool
    model: tuple[Any, ...] | None = None
    versions: tuple[tuple[str, str], ...] = ()


class Memory:
    """Of one controller: a new cluster in the same namespace has another `identity`, so it finds nothing. Calls block."""

    def __init__(self, namespace: str, identity: bytes) -> None:
        self._key = f"{namespace}/{identity.hex()[:16]}/replicas".encode()
        self._options_key = f"{namespace}/{identity.hex()[:16]}/options".encode()
        self._saved: Remembered | None = None

    def load(self) -> Remembered | None:
        """What the controller before this one has saved; None when there was none.

        Raises:
            ValueError: it is not what was saved.
        """
        raw = kv._internal_kv_get(self._key, namespace=SPACE)
        if raw is None:
            return None
        target, staying, leaving, by_hand, model, versions = msgpack.unpackb(raw, use_list=False)
        names = (*staying, *leaving, *(word for row in versions for word in row))
        if (
            not all(isinstance(name, str) for name in names)
            or not isinstance(target, int)
            or not isinstance(by_hand, bool)
            or not isinstance(model, tuple | None)
        ):
            raise ValueError("the saved table of replicas is damaged")
        self._saved = Remembered(target, staying, leaving, by_hand, model, versions)
        return self._saved

    def save(self, what: Remembered) -> None:
        """Keeps it, if it is new."""
        if what != self._saved:
            kv._internal_kv_put(self._key, msgpack.packb(what), overwrite=True, namespace=SPACE)
            self._saved = what

    def become(self, options: QuireOptions, tenants: tuple[TenantLimits, ...]) -> None:
        """The next controller goes by these, whatever the first one was started with."""
        record = msgpack.packb((packed(options), [astuple(limits) for limits in tenants]))
        kv._internal_kv_put(self._options_key, record, overwrite=True, namespace=SPACE)

    def options(self) -> tuple[QuireOptions, tuple[TenantLimits, ...]] | None:
        """What `become` was told last; None: nothing.

        Raises:
            ValueError: it is not what was saved.
        """
        raw = kv._internal_kv_get(self._options_key, namespace=SPACE)
        if raw is None:
            return None
        options, tenants = msgpack.unpackb(raw, use_list=False)
        return unpacked(options), tuple(TenantLimits(*row) for row in tenants)

    def forget(self) -> None:
        """There is nothing to be found again."""
        for key in (self._key, self._options_key):
            kv._internal_kv_del(key, namespace=SPACE)


def packed(options: QuireOptions) -> dict[str, Any]:
    """Options as primitives, by name."""
    values = {}
    for option in leaves(QuireOptions):
        owner: Any = options
        for name in option.path:
            owner = getattr(owner, name)
        values[option.name] = owner
    return values


def unpacked(values: Mapping[str, Any]) -> QuireOptions:
    """The inverse of `packed`.

    Raises:
        ValueError: an option is missing, or its value is wrong; names it.
    """
    known = {option.name: option for option in leaves(QuireOptions)}
    if values.keys() != known.keys():
        raise ValueError(f"saved options: {', '.join(sorted(values.keys() ^ known.keys()))}: missing or unknown")
    return assemble(QuireOptions(), {option.path: option.read(values[name], name) for name, option in known.items()})
