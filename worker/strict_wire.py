"""msgpack arrays for plain records (named tuples and dataclasses), read back strictly: exactly the types that the fields declare.

Fields travel in their order, without names. Known types are bool, int, float, str, bytes, `X | None`, `tuple[X, ...]`, `dict[X, Y]`,
enums of strings, and records of them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .packing import packb, unpackb

T = TypeVar("T")
Read = Callable[[Any], Any]
_known_fields: dict[type, tuple[str, ...]] = {}
_known_readers: dict[Any, Read] = {}


class BadMessage(ValueError):
    """The bytes are not what they should be."""


def pack(record: Any) -> bytes:
    """A record as msgpack."""
    return packb(_plain(record))


def unpack(kind: type[T], data: bytes) -> T:
    """The inverse of `pack`.

    Raises:
        BadMessage: the bytes are not a record of that kind.
    """
    try:
        raw = unpackb(data)
    except ValueError as error:
        raise BadMessage(f"{kind.__name__}: not msgpack: {error}") from None
    return reader(kind)(raw)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    fields = _fields(type(value))
    if fields:
        return [_plain(getattr(value, name)) for name in fields]
    return [_plain(v) for v in value] if type(value) is tuple and value and _fields(type(value[0])) else value


def _fields(kind: type) -> tuple[str, ...]:
    """The names of a record's fields; none for any other type."""
    if kind not in _known_fields:
        is_record = hasattr(kind, "_fields") or hasattr(kind, "__dataclass_fields__")
        _known_fields[kind] = tuple(get_type_hints(kind)) if is_record else ()
    return _known_fields[kind]


def reader(kind: Any) -> Read:
    """What turns the msgpack form of a `kind` into one, or raises BadMessage."""
    if kind not in _known_readers:
        _known_readers[kind] = _make_reader(kind)
    return _known_readers[kind]


def _make_reader(kind: Any) -> Read:
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType and len(args) == 2 and args[1] is NoneType:
        inner = reader(args[0])
        return lambda raw: None if raw is None else inner(raw)
    if origin is tuple and args[1:] == (Ellipsis,):
        return _tuple_reader(args[0])
    if origin is dict:
        return _dict_reader(reader(args[0]), reader(args[1]))
    if kind is float:
        return _of(float, int)
    if kind in (bool, int, str, bytes):
        return _of(kind)
    if issubclass(kind, StrEnum):
        return _enum_reader(kind)
    return _record_reader(kind)


def _of(*types: type) -> Read:
    def read(raw: Any) -> Any:
        if type(raw) not in types:
            raise BadMessage(f"{raw!r:.40} is not of type {types[0].__name__}")
        return raw

    return read


def _tuple_reader(item: Any) -> Read:
    read_item = reader(item)

    def read(raw: Any) -> Any:
        if type(raw) is not tuple:
            raise BadMessage(f"{raw!r:.40} is not an array")
        if item in (int, str, bytes):  # long ones: checked without a call for each
            if not set(map(type, raw)) <= {item}:
                raise BadMessage(f"an array holds something else than {item.__name__}")
            return raw
        return tuple(map(read_item, raw))

    return read


def _dict_reader(read_key: Read, read_value: Read) -> Read:
    def read(raw: Any) -> Any:
        if type(raw) is not dict:
            raise BadMessage(f"{raw!r:.40} is not a map")
        return {read_key(key): read_value(value) for key, value in raw.items()}

    return read


def _enum_reader(kind: type[StrEnum]) -> Read:
    def read(raw: Any) -> Any:
        if type(raw) is not str or raw not in set(kind):
            raise BadMessage(f"{raw!r:.40} is no {kind.__name__}")
        return kind(raw)

    return read


def _record_reader(kind: type) -> Read:
    readers = {name: reader(hint) for name, hint in get_type_hints(kind).items()}

    def read(raw: Any) -> Any:
        if type(raw) is not tuple or len(raw) != len(readers):
            raise BadMessage(f"{kind.__name__}: not an array of {len(readers)}")
        values = []
        for (name, read_value), value in zip(readers.items(), raw, strict=True):
            try:
                values.append(read_value(value))
            except BadMessage as error:
                raise BadMessage(f"{kind.__name__}.{name}: {error}") from None
        return kind(*values)

    return read
