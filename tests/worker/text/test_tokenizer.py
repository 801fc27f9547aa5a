"""Tokenizers: the same ids and texts as transformers', from the same files; what is malformed or unknown is refused by name."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from quire.worker.text.gguf_tokenizer import backend_from_gguf
from quire.worker.text.pieces import UnsupportedTokenizer, byte_alphabet
from quire.worker.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three\t\ttabs\n\n\nlines \r\n end ",
    "naïve café – “quotes” … €5½",
    "日本語のテキスト 中文 한국어 ไทย العربية עברית हिन्दी",
    "👩‍👩‍👧‍👦 🧿🇩🇪 é \u200d\u00a0|\u2028|\ufeff|\x00|\x1b[0m",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2.5e-3]}  # it's I'll we've\n",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><repo_name>x <|im_start |> < |im_end|>",
    "12345 3.14159 2024-01-01 1,000,000 x1y2",
    "a" * 300 + " " * 200 + "!" * 50,
]


@pytest.fixture(scope="module")
def reference(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers makes of the same GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)


@pytest.fixture(scope="module")
def corpus(data_file: Callable[[str], Path]) -> list[str]:
    with gzip.open(data_file("prompts/mt_bench_question.jsonl.gz"), "rt") as lines:
        turns = [turn for line in lines for turn in json.loads(line)["turns"]]
    return CORPUS + turns + data_file("prompts/shakespeare_sonnets.txt").read_text().split("\n\n")


def split_as_trained(reference: Any) -> Backend:
    """Transformers' tokenizer, with every digit split off first: SmolLM2 was trained so, and transformers' reading of GGUF lacks it."""
    backend = Backend.from_str(reference.backend_tokenizer.to_str())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return backend


def test_same_ids_and_texts_as_transformers(smollm2: Tokenizer, reference: Any, corpus: list[str]) -> None:
    for text, tokens in zip(corpus, smollm2.encode_batch(corpus), strict=True):
        assert tokens == smollm2.encode(text) == reference.encode(text)
        for skip in (False, True):
            assert smollm2.decode(tokens, skip) == reference.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_same_ids_on_any_text(smollm2: Tokenizer, reference: Any) -> None:
    backend = split_as_trained(reference)

    @given(st.text(max_size=80))
    @settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        assert smollm2.encode(text) == backend.encode(text).ids

    check()


def test_digits_stand_alone_also_after_spaces(smollm2: Tokenizer) -> None:
    assert [smollm2.token_text(t) for t in smollm2.encode("x:  42")] == ["x", ":", "  ", "4", "2"]


@given(st.lists(st.integers(0, 49151), max_size=30))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_text_of_any_ids(smollm2: Tokenizer, reference: Any, tokens: list[int]) -> None:
    for skip in (False, True):
        assert smollm2.decode(tokens, skip) == reference.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_special_tokens_and_sizes(smollm2: Tokenizer, reference: Any) -> None:
    assert smollm2.vocab_size == len(reference) == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)
    assert smollm2.special_ids == {i for i, token in reference.added_tokens_decoder.items() if token.special}
    assert smollm2.max_token_bytes == max(map(len, smollm2.pieces))


def test_tokens_for_logprobs(smollm2: Tokenizer) -> None:
    first, *rest = smollm2.encode("\U0001f9ff")
    assert rest
    assert b"".join(smollm2.token_bytes(t) for t in (first, *rest)) == "\U0001f9ff".encode()
    assert smollm2.token_text(first) == "\ufffd"
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.token_bytes(10**9) == b""


def test_a_text_over_the_character_bound_is_too_long(smollm2: Tokenizer, corpus: list[str]) -> None:
    for text in corpus:
        assert len(text) <= len(smollm2.encode(text)) * smollm2.max_token_bytes


def test_threads_get_the_same_ids(smollm2: Tokenizer) -> None:
    alone = [smollm2.encode(text) for text in CORPUS]
    with ThreadPoolExecutor(4) as pool:
        assert all(list(pool.map(smollm2.encode, CORPUS)) == alone for _ in range(5))


def test_loading_a_gguf_file_imports_neither_torch_nor_transformers(smollm2_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from quire.worker.text.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(smollm2_path)!r})); print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_directory_goes_through_transformers(smollm2: Tokenizer, reference: Any, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(tmp_path)
    text = "Hello, wörld! <|im_start|>"
    assert loaded.encode(text) == smollm2.encode(text)
    assert loaded.pieces == smollm2.pieces
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(messages) == smollm2.apply_chat_template(messages)


def metadata(**changes: Any) -> dict[str, Any]:
    """A small byte-level vocabulary: the 256 bytes, "ab", "abc", and two added tokens."""
    spelled = [char for char, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    tokens = [*spelled, "ab", "abc", "<|bos|>", "<think>"]
    base = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 4],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 258,
    }
    return base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_bos_is_added_when_the_file_says_so() -> None:
    assert backend_from_gguf(metadata(add_bos_token=True)).encode("abc").ids == [258, 257]
    assert backend_from_gguf(metadata()).encode("abc").ids == [257]
    assert backend_from_gguf(metadata(pre="llama-bpe")).encode("abc").ids == [258, 257]  # Llama 3 wants it
    assert backend_from_gguf(metadata(pre="llama-bpe", add_bos_token=False)).encode("abc").ids == [257]


def test_added_tokens_stay_whole_and_only_control_tokens_are_special() -> None:
    backend = backend_from_gguf(metadata())
    assert backend.encode("ab<think>c<|bos|>").ids == [256, 259, ord("c"), 258]
    assert Tokenizer(backend, {}, None).special_ids == {258}


def test_a_control_token_outside_the_byte_alphabet_keeps_its_text() -> None:
    plain = metadata()
    tokens = [*plain["tokenizer.ggml.tokens"][:-2], "<｜end▁of▁text｜>", "<think>"]
    loaded = Tokenizer(backend_from_gguf(metadata(tokens=tokens)), {}, None)
    assert loaded.encode("a<｜end▁of▁text｜>") == [ord("a"), 258]
    assert loaded.decode([258], skip_special_tokens=False) == "<｜end▁of▁text｜>"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a 123 it's", ["a", "Ġ123", "Ġit", "'s"]),
        ("smollm", "a 123 it's", ["a", "Ġ", "1", "2", "3", "Ġit", "'s"]),
        ("qwen2", "a 123 It'S\n\n", ["a", "Ġ", "1", "2", "3", "ĠIt", "'S", "ĊĊ"]),
        ("llama-bpe", "a 12345 x", ["a", "Ġ", "123", "45", "Ġx"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(pre: str, text: str, words: list[str]) -> None:
    splitter = backend_from_gguf(metadata(pre=pre)).pre_tokenizer
    assert [word for word, _ in splitter.pre_tokenize_str(text)] == words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "klingon"}, "klingon"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "token types"),
        ({"merges": ["a"]}, "merge 'a'"),
        ({"merges": ["a nope"]}, "merge 'a nope'"),
        ({"bos_token_id": 10**6}, "bos token 1000000"),
    ],
)
def test_metadata_that_does_not_add_up_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=message):
        backend_from_gguf(metadata(**changes))


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t5.gguf"
    writer = gguf.GGUFWriter(path, "t5")
    writer.add_string("tokenizer.ggml.model", "t5")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedTokenizer, match="'t5'"):
        load_tokenizer(path)
    with pytest.raises(UnsupportedTokenizer, match="decoder"):
        Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a")), {}, None)
