"""The hashes by which pages are found: chained, keyed and strong (BLAKE2b, 16 bytes). Pure.

    hash(page i) = H(key, hash(page i - 1) + token bytes of page i);  the chain starts from a hash of the tenant's salt

The page pool indexes by them, an ingress computes those of a prompt, and the controller knows which replica holds which. Nobody
else's hashes are ever taken: the key never leaves the cluster.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes, four for each, in the machine's order."""
    return array("I", tokens).tobytes()


def root_hash(key: bytes, salt: str) -> bytes:
    """Where the chain of a tenant starts."""
    return blake2b(salt.encode(), key=key, digest_size=HASH_BYTES, person=b"quire-tenant").digest()


def page_hash(key: bytes, parent: bytes, content: bytes) -> bytes:
    """The hash of a full page with the token bytes `content` that follows the page with hash `parent`."""
    return blake2b(parent + content, key=key, digest_size=HASH_BYTES).digest()


def prefix_hashes(key: bytes, salt: str, tokens: Sequence[int], page_size: int) -> tuple[bytes, ...]:
    """The hashes of the pages of `tokens` that a cache hit could supply: full ones, with at least one token left to compute."""
    parent, hashes = root_hash(key, salt), []
    for start in range(0, (len(tokens) - 1) // page_size * page_size, page_size):
        parent = page_hash(key, parent, token_bytes(tokens[start : start + page_size]))
        hashes.append(parent)
    return tuple(hashes)
