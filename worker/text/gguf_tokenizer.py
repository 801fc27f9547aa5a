"""A byte-level BPE tokenizer from a GGUF file's metadata, in a fraction of the time that transformers takes for it.

How text is split before merging is not in the file, only its name (`tokenizer.ggml.pre`); the splits here are those
that the models were trained with (and that llama.cpp uses).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from .pieces import UnsupportedTokenizer, byte_alphabet

_CONTROL, _USER_DEFINED = 3, 4  # token types; the rest are ordinary
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Family(NamedTuple):
    split: str | None = None  # regular expression; None: GPT-2's
    single_digits: bool = False
    ignore_merges: bool = False  # a word that is a token is not merged up to it
    bos: bool = False  # prepended unless the file says otherwise


_FAMILIES = {
    "default": _Family(),
    "gpt-2": _Family(),
    "smollm": _Family(single_digits=True),
    "llama-bpe": _Family(_LLAMA3_SPLIT, ignore_merges=True, bos=True),
    "qwen2": _Family(_QWEN2_SPLIT),
}


def backend_from_gguf(metadata: dict[str, Any]) -> Backend:
    """The tokenizer that the metadata describes.

    Raises:
        UnsupportedTokenizer: a pre-tokenizer that is not known here, or vocabulary, merges and types that do not fit together.
    """
    name = metadata.get("tokenizer.ggml.pre", "default")
    family = _FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedTokenizer(f"GGUF pre-tokenizer {name!r} is not supported ({', '.join(sorted(_FAMILIES))} are)")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UnsupportedTokenizer(f"the GGUF file has {len(tokens)} tokens but {len(types)} token types")
    backend = Backend(_bpe(tokens, types, _strings(metadata, "tokenizer.ggml.merges"), family))
    backend.pre_tokenizer = _pre_tokenizer(family)
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
        added = [AddedToken(t, normalized=False, special=kind == _CONTROL) for t, of in zip(tokens, types, strict=True) if of == kind]
        add([token for token in added if token.content])
    _surround(backend, metadata, family)
    return backend


def special_token(metadata: dict[str, Any], which: str) -> int | None:
    """Id of the "bos", "eos", "unknown" or "padding" token, if the file names one."""
    token = metadata.get(f"tokenizer.ggml.{which}_token_id")
    count = len(metadata["tokenizer.ggml.tokens"])
    if token is not None and not (isinstance(token, int) and 0 <= token < count):
        raise UnsupportedTokenizer(f"the GGUF file's {which} token {token!r} is not one of its {count} tokens")
    return token


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UnsupportedTokenizer(f"the GGUF file has no list of strings {key}")
    return value


def _bpe(tokens: list[str], types: list[int], merges: list[str], family: _Family) -> models.BPE:
    spelling = {byte: char for char, byte in byte_alphabet().items()}
    alphabet = frozenset(spelling.values())
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if types[index] not in (_CONTROL, _USER_DEFINED) and not alphabet.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode())
        vocab.setdefault(token, index)
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise UnsupportedTokenizer(f"the GGUF file has the merge {merge!r}, whose parts or result are not tokens")
        pairs.append((left, right))
    return models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, ignore_merges=family.ignore_merges)


def _pre_tokenizer(family: _Family) -> pre_tokenizers.PreTokenizer:
    if family.split is not None:
        split = pre_tokenizers.Split(Regex(family.split), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if family.single_digits else words


def _surround(backend: Backend, metadata: dict[str, Any], family: _Family) -> None:
    """What `add_special_tokens` puts before and after a text."""
    ends = []
    for which, default in (("bos", family.bos), ("eos", False)):
        token = special_token(metadata, which)
        wanted = metadata.get(f"tokenizer.ggml.add_{which}_token", default)
        ends.append([(backend.id_to_token(token), token)] if wanted and token is not None else [])
    if ends[0] or ends[1]:
        single = [*(name for name, _ in ends[0]), "$A", *(name for name, _ in ends[1])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends[0] + ends[1])
