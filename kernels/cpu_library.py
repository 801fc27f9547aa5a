"""The compiled C functions, ready to call: built on the first call in the process, then kept."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from .cpu_build import CannotBuild, library_path, load

log = logging.getLogger(__name__)

_P, _I, _F, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_building = threading.Lock()


class Library(NamedTuple):
    """The C functions; those that can take long let other Python threads run."""

    rms_norm: Callable[..., None]
    silu_mul: Callable[..., None]
    rope_and_write_kv: Callable[..., int]
    attention: Callable[..., int]
    linear: Callable[..., None]
    linear_int8: Callable[..., None]
    panel: int  # outputs that lie together in a packed weight


def library() -> Library | None:
    """The compiled functions, or None where they cannot be had; then the log says why, once."""
    with _building:
        return _library()


@functools.cache
def _library() -> Library | None:
    try:
        free, held = load(library_path())
    except (CannotBuild, OSError) as error:
        log.warning("the compiled CPU kernels are not available, torch takes their place: %s", error)
        return None
    return Library(
        rms_norm=_function(held.quire_rms_norm, None, [_P] * 5 + [_I, _I, _F, _T]),
        silu_mul=_function(held.quire_silu_mul, None, [_P, _P, _I, _I, _T]),
        rope_and_write_kv=_function(held.quire_rope_and_write_kv, _I, [_P] * 8 + [_I] * 10 + [_F, _T]),
        attention=_function(free.quire_attention, _T, [_P] * 6 + [_I] * 10 + [_F, _T]),
        linear=_function(free.quire_linear, None, [_P] * 4 + [_I] * 3 + [_T]),
        linear_int8=_function(free.quire_linear_int8, None, [_P] * 6 + [_I] * 3 + [_T]),
        panel=free.quire_panel(),
    )


def _function(function: Any, result: type | None, arguments: list[type]) -> Callable[..., Any]:
    function.restype, function.argtypes = result, arguments
    return function
