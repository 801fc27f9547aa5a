"""msgpack, in the one form in which everything here is written and read.

The library is imported when something first crosses a wire: `quire.LLM` sends nothing and works without it. Pure.
"""

from __future__ import annotations

from typing import Any


def packb(value: Any) -> bytes:
    """Plain values as msgpack; tuples become arrays."""
    import msgpack

    return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]


def unpackb(data: bytes) -> Any:
    """The inverse of `packb`; arrays become tuples.

    Raises:
        ValueError: the bytes are not msgpack.
    """
    import msgpack

    try:
        return msgpack.unpackb(data, strict_map_key=False, use_list=False)
    except msgpack.UnpackException as error:
        raise ValueError(str(error) or repr(error)) from None
