"""The bytes that each token stands for: a text is the concatenation of its tokens' bytes, read as UTF-8.

Holds for the two families of vocabularies that Quire serves: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM), where each
character of a token spells one byte, and SentencePiece BPE (Llama 2, Mistral), where U+2581 is a space, `<0x0A>` is a
byte, and a text drops its first space.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCEPIECE_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class UnsupportedTokenizer(ValueError):
    """The model's tokenizer is of a kind that Quire does not know; the message names it."""


class Pieces(NamedTuple):
    """`of[id]` is the token's bytes (empty for ids that no token has); `drops_first_space` as SentencePiece texts do."""

    of: list[bytes]
    drops_first_space: bool


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def pieces_of(backend: Backend) -> Pieces:
    """The bytes of every token of `backend`.

    Raises:
        UnsupportedTokenizer: its decoder is neither byte-level nor SentencePiece's.
    """
    steps = _decoder_steps(backend)
    names = {step["type"] for step in steps}
    vocab = backend.get_vocab(with_added_tokens=True)
    of = [b""] * (max(vocab.values(), default=-1) + 1)
    if "ByteLevel" in names:
        # As the decoder has it: a token with a character outside the alphabet (an added one) stands for itself.
        table = {ord(char): byte for char, byte in byte_alphabet().items()}
        for token, index in vocab.items():
            spelled = token.translate(table)
            of[index] = spelled.encode("latin-1") if all(ord(char) in table for char in token) else token.encode()
        return Pieces(of, False)
    if not names or names - _SENTENCEPIECE_STEPS or not _spaces_are_spelled(steps):
        kind = ", ".join(sorted(names)) or "none"
        raise UnsupportedTokenizer(f"a tokenizer with decoder {kind} is not supported (byte-level and SentencePiece BPE are)")
    fallback = "ByteFallback" in names
    for token, index in vocab.items():
        byte = _BYTE_TOKEN.fullmatch(token) if fallback else None
        of[index] = bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
    return Pieces(of, any(_drops_first_space(step) for step in steps))


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _spaces_are_spelled(steps: list[dict[str, Any]]) -> bool:
    replaced = [step for step in steps if step["type"] == "Replace"]
    return all(step["pattern"] == {"String": _SPACE} and step["content"] == " " for step in replaced) and any(
        step["type"] in ("Replace", "Metaspace") for step in steps
    )


def _drops_first_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1)
