"""Web pages of other origins that may call the API from a browser (CORS). None may unless an operator names them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

ANY = "*"
REMEMBERED_S = 600  # what a browser was told it need not ask again for
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


def allow(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets the pages of these origins call `app`. Call it last: it stands before the keys, since a browser asks for permission without one.

    Cookies are no part of it, as there are none: a page needs a key like anybody else.

    Raises:
        ValueError: one is no origin as browsers write them.
    """
    for origin in origins:
        if origin != ANY and not _ORIGIN.fullmatch(origin):
            raise ValueError(f"--allowed-origin: {origin!r} is not an origin such as https://app.example.com, nor {ANY}")
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
            max_age=REMEMBERED_S,
        )
