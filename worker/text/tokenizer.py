"""Text to token ids and back, for a GGUF file or a Hugging Face directory, behind one class.

Nothing here imports torch; transformers is imported only for a directory (and for SentencePiece in a GGUF file).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from .chat_template import NOTHING, ChatTemplate
from .gguf_header import read_header
from .gguf_tokenizer import backend_from_gguf, special_token
from .pieces import UnsupportedTokenizer, pieces_of
from .tool_format import ToolFormat

_GGUF_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Tokenizer:
    """One model's tokenizer. Immutable, so it may be called from several threads.

    Attributes:
        vocab_size: one more than the highest token id.
        bos_token_id, eos_token_id: None where the model has none.
        special_ids: control tokens, which `skip_special_tokens` leaves out of texts.
        max_token_bytes: length of the longest token. A text of more than `n * max_token_bytes` characters cannot be `n` tokens.
        pieces: the bytes of each token, by id.
        texts: the text of each token, by id; None where its bytes alone are not whole characters.
        shown_texts: the same with "" for special tokens.
        drops_first_space: a text's first space is not shown (SentencePiece).
    """

    def __init__(self, backend: Backend, special_tokens: dict[str, str], template: str | None, tool_template: str | None = None) -> None:
        """Args: the model's tokenizer, its special tokens by role (`bos_token`, ...), the source of its chat template, and of the one that
        it has for conversations with tools, if that is another one."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._template = ChatTemplate(template, special_tokens)
        self._tool_template = ChatTemplate(tool_template, special_tokens) if tool_template is not None else self._template
        self.pieces, self.drops_first_space = pieces_of(backend)
        self.vocab_size = len(self.pieces)
        self.max_token_bytes = max(map(len, self.pieces), default=1)
        self.bos_token_id = self._id(special_tokens.get("bos_token"))
        self.eos_token_id = self._id(special_tokens.get("eos_token"))
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.texts = [_whole(piece) for piece in self.pieces]
        self.shown_texts = list(self.texts)
        for token in self.special_ids:
            self.shown_texts[token] = ""
        self._texts_showing: dict[frozenset[int], list[str | None]] = {frozenset(): self.shown_texts}

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._template.exists

    @property
    def knows_tools(self) -> bool:
        """Whether the model's own chat template shows tools; otherwise they are put in words."""
        return self._tool_template.knows_tools

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools, as far as its chat template says; None where that is no format that can be read."""
        return self._tool_template.tool_format

    def texts_showing(self, tokens: frozenset[int]) -> list[str | None]:
        """`shown_texts`, but with the texts of these special tokens."""
        texts = self._texts_showing.get(tokens)
        if texts is None:
            texts = list(self.shown_texts)
            for token in tokens:
                texts[token] = self.texts[token]
            self._texts_showing[tokens] = texts
        return texts

    def special_id(self, text: str) -> int | None:
        """The special token that is written so."""
        token = self._id(text)
        return token if token in self.special_ids else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become those tokens, as in transformers."""
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on several cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `tokens`. Ids without a token add nothing; bytes that are not UTF-8 become U+FFFD."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self.token_bytes(token) for token in tokens if token not in hidden).decode("utf-8", "replace")
        return text[1:] if self.drops_first_space and text.startswith(" ") else text

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        values: Mapping[str, Any] = NOTHING,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """The conversation as the text that the model continues; encode it without special tokens. Arguments as of `ChatTemplate.render`.

        Raises:
            BadRequest: the model has no template, or the template rejects the messages.
        """
        template = self._tool_template if tools else self._template
        return template.render(messages, add_generation_prompt, values, tools)

    def token_bytes(self, token: int) -> bytes:
        """The token's bytes; a part of a character is possible, and so is nothing."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def token_text(self, token: int) -> str:
        """The token as text, with U+FFFD for bytes that are not whole characters."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the model at `path` (what `resolve_model` returned).

    Raises:
        UnsupportedTokenizer: a kind that is not supported, named in the message.
        GgufError: the GGUF file's header does not add up.
    """
    return _from_gguf(path) if path.suffix == ".gguf" else _from_transformers(path)


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return _from_transformers(path.parent, gguf_file=path.name)
    if kind != "gpt2":
        raise UnsupportedTokenizer(f"GGUF tokenizer {kind!r} is not supported ('gpt2' and 'llama' are)")
    backend = backend_from_gguf(metadata)
    template, tool_template = (_text(metadata.get(f"tokenizer.chat_template{which}")) for which in ("", ".tool_use"))
    special_tokens = {}
    for role, which in _GGUF_ROLES.items():
        token = special_token(metadata, which)
        if token is not None:
            special_tokens[role] = metadata["tokenizer.ggml.tokens"][token]
    return Tokenizer(backend, special_tokens, template, tool_template)


def _from_transformers(directory: Path, **which: str) -> Tokenizer:
    from transformers import AutoTokenizer  # takes seconds

    loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False, **which)
    if not loaded.is_fast:
        raise UnsupportedTokenizer(f"{type(loaded).__name__} has no `tokenizers` form (tokenizer.json), which is needed")
    templates = loaded.chat_template if isinstance(loaded.chat_template, dict) else {"default": loaded.chat_template}
    special_tokens = dict(loaded.special_tokens_map)
    return Tokenizer(loaded.backend_tokenizer, special_tokens, templates.get("default"), templates.get("tool_use"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
