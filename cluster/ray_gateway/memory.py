"""What a controller must find again after its death: kept by Ray itself, in the store of its head (GCS), for as long as the cluster is."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
from ray.experimental import internal_kv

kv: Any = internal_kv
SPACE = b"quire"


class Remembered(NamedTuple):
    """How many replicas there are to be, those that are or come, those that leave, whether an operator has said how many, and
    ModelInfo's fields."""

    target: int
    staying: tuple[str, ...]
    leaving: tuple[str, ...]
    by_hand: bool
    model: tuple[Any, ...] | None = None


class Memory:
    """One record for each controller: a new cluster in the same namespace has another `identity`, so it finds nothing. Calls block."""

    def __init__(self, namespace: str, identity: bytes) -> None:
        self._key = f"{namespace}/{identity.hex()[:16]}/replicas".encode()
        self._saved: Remembered | None = None

    def load(self) -> Remembered | None:
        """What the controller before this one has saved; None when there was none.

        Raises:
            ValueError: it is not what was saved.
        """
        raw = kv._internal_kv_get(self._key, namespace=SPACE)
        if raw is None:
            return None
        target, staying, leaving, by_hand, model = msgpack.unpackb(raw, use_list=False)
        names = (*staying, *leaving)
        if (
            not all(isinstance(name, str) for name in names)
            or not isinstance(target, int)
            or not isinstance(by_hand, bool)
            or not isinstance(model, tuple | None)
        ):
            raise ValueError("the saved table of replicas is damaged")
        self._saved = Remembered(target, staying, leaving, by_hand, model)
        return self._saved

    def save(self, what: Remembered) -> None:
        """Keeps it, if it is new."""
        if what != self._saved:
            kv._internal_kv_put(self._key, msgpack.packb(what), overwrite=True, namespace=SPACE)
            self._saved = what

    def forget(self) -> None:
        """There is nothing to be found again."""
        kv._internal_kv_del(self._key, namespace=SPACE)
