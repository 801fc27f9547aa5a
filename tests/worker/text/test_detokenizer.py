"""Text streams: joined deltas equal the whole text, characters stay whole, stop strings are found where a plain search finds them."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from quire.worker.text.detokenizer import StopMatch, TextOptions, TextStream
from quire.worker.text.tokenizer import Tokenizer

VOCAB = 49152
relaxed = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Parts of characters, spaces, control tokens and ids past the vocabulary all occur often.
token_ids = st.one_of(st.integers(0, 20), st.integers(17, 300), st.integers(0, VOCAB - 1), st.integers(VOCAB, VOCAB + 100))


def chunks(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted({cut % (len(tokens) + 1) for cut in cuts}), len(tokens)]
    return [tokens[a:b] for a, b in itertools.pairwise(edges)]


def run(tokenizer: Tokenizer, pushes: list[list[int]], options: TextOptions) -> tuple[str, TextStream, list[str]]:
    stream = TextStream(tokenizer, options)
    deltas = [stream.push(push) for push in pushes]
    deltas.append(stream.finish())
    return "".join(deltas), stream, deltas


def plain_search(tokenizer: Tokenizer, tokens: list[int], options: TextOptions) -> tuple[str, StopMatch | None]:
    """The whole text, searched character by character for the first stop string that is complete after min_tokens."""
    whole = tokenizer.decode(tokens, options.skip_special_tokens)
    known = [certain_length(tokenizer, tokens[:n], options) for n in range(len(tokens))] + [len(whole)]
    for end in range(1, len(whole) + 1):
        used = next(n for n, length in enumerate(known) if length >= end)
        ended = [stop for stop in options.stop if whole[:end].endswith(stop)]
        if ended and used >= options.min_tokens:
            stop = max(ended, key=len)
            return whole[: end if options.include_stop else end - len(stop)], StopMatch(stop, used)
    return whole, None


def certain_length(tokenizer: Tokenizer, tokens: list[int], options: TextOptions) -> int:
    """Characters that are certain after these tokens: all but the beginning of one at the end."""
    hidden = tokenizer.special_ids if options.skip_special_tokens else ()
    return len(codecs.utf_8_decode(b"".join(tokenizer.token_bytes(t) for t in tokens if t not in hidden), "replace", False)[0])


@given(st.lists(token_ids, max_size=40), st.lists(st.integers(0, 1000), max_size=10), st.booleans())
@relaxed
def test_deltas_join_to_the_decoded_text(smollm2: Tokenizer, tokens: list[int], cuts: list[int], skip: bool) -> None:
    text, stream, _ = run(smollm2, chunks(tokens, cuts), TextOptions(skip_special_tokens=skip))
    assert text == smollm2.decode(tokens, skip)
    assert len(stream.offsets) == len(tokens)


@given(st.text(max_size=60), st.lists(st.integers(0, 1000), max_size=20))
@relaxed
def test_real_text_never_shows_half_a_character(smollm2: Tokenizer, text: str, cuts: list[int]) -> None:
    tokens = smollm2.encode(text)
    assume(smollm2.decode(tokens, False) == text)  # the vocabulary lacks the first bytes of some rare characters
    joined, _, deltas = run(smollm2, chunks(tokens, cuts), TextOptions(skip_special_tokens=False))
    assert joined == text
    assert all("\ufffd" not in delta for delta in deltas) or "\ufffd" in text


@given(
    st.data(),
    st.lists(st.one_of(st.sampled_from([66, 67, 68, 69, 216, 198, 253, 260]), token_ids), max_size=40),
    st.lists(st.integers(0, 1000), max_size=10),
    st.sampled_from([0, 0, 3, 12]),
    st.booleans(),
)
@relaxed
def test_stop_strings_are_those_of_a_plain_search(
    smollm2: Tokenizer, data: st.DataObject, tokens: list[int], cuts: list[int], min_tokens: int, include: bool
) -> None:
    whole = smollm2.decode(tokens)
    parts = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 8)).map(lambda p: whole[p[0] : p[0] + p[1]])
    stops = data.draw(st.lists(st.one_of(parts, st.text(alphabet="abcd \ufffd", max_size=3)).filter(bool), min_size=1, max_size=4))
    options = TextOptions(tuple(stops), include, min_tokens)
    text, stream, _ = run(smollm2, chunks(tokens, cuts), options)
    expected_text, expected_match = plain_search(smollm2, tokens, options)
    assert (text, stream.stopped) == (expected_text, expected_match)
    if stream.stopped:
        assert len(stream.offsets) == stream.stopped.tokens


def ids(tokenizer: Tokenizer, *words: str) -> list[int]:
    return [token for word in words for token in tokenizer.encode(word)]


def test_what_may_begin_a_stop_string_waits(smollm2: Tokenizer) -> None:
    stream = TextStream(smollm2, TextOptions(stop=("END",)))
    assert stream.push(ids(smollm2, "a E")) == "a "
    assert stream.push(ids(smollm2, "N")) == ""
    assert stream.push(ids(smollm2, "x")) == "ENx"
    assert stream.push(ids(smollm2, "E")) == ""
    assert stream.finish() == "E"
    assert stream.stopped is None


def test_a_stop_string_within_a_push_counts_its_tokens(smollm2: Tokenizer) -> None:
    tokens = ids(smollm2, "o", "n", "e", "#", "#", "t", "w", "o")
    stream = TextStream(smollm2, TextOptions(stop=("##",)))
    assert stream.push(tokens) == "one"
    assert stream.stopped == StopMatch("##", 5)
    assert stream.push(tokens) == ""
    assert stream.finish() == ""


def test_an_ignored_stop_string_can_still_begin_another(smollm2: Tokenizer) -> None:
    tokens = ids(smollm2, "a", "b", "a", "b", "c")
    text, stream, _ = run(smollm2, [[t] for t in tokens], TextOptions(stop=("ab", "babc"), min_tokens=5))
    assert (text, stream.stopped) == ("a", StopMatch("babc", 5))


def test_an_unfinished_character_comes_out_at_the_end(smollm2: Tokenizer) -> None:
    tokens = smollm2.encode("\U0001f9ff")
    assert len(tokens) > 1
    stream = TextStream(smollm2)
    assert stream.push(tokens[:-1]) == ""
    assert stream.finish() == smollm2.decode(tokens[:-1])


def test_offsets_are_where_tokens_begin(smollm2: Tokenizer) -> None:
    tokens = ids(smollm2, "Hello", " wide") + smollm2.encode("\U0001f9ff") + ids(smollm2, "!")
    _, stream, _ = run(smollm2, [tokens], TextOptions(stop=(" w-",)))
    parts = len(smollm2.encode("\U0001f9ff"))
    assert stream.offsets == [0, 5, *[10] * parts, 11]


def test_every_sonnet_streams_unchanged(smollm2: Tokenizer, data_file: Callable[[str], Path]) -> None:
    text = data_file("prompts/shakespeare_sonnets.txt").read_text()
    tokens = smollm2.encode(text)
    stream = TextStream(smollm2, TextOptions(stop=("\n\nnever", "###")))
    assert "".join([stream.push((token,)) for token in tokens]) + stream.finish() == text


@pytest.fixture
def sentencepiece() -> Tokenizer:
    """A Llama 2 style vocabulary: U+2581 for spaces, bytes as tokens."""
    words = ["<unk>", "<s>", "\u2581Hi", "\u2581the", "re", "\u2581", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend, {"bos_token": "<s>"}, None)


@pytest.mark.parametrize("tokens", [[1, 2, 3, 4, 6], [5, 5, 2], [4, 2], [1, 1], [2, *(7 + byte for byte in "é€".encode()), 5]])
def test_sentencepiece_text_equals_its_own_decoder(sentencepiece: Tokenizer, tokens: list[int]) -> None:
    expected = sentencepiece._backend.decode(tokens, skip_special_tokens=True)
    assert sentencepiece.decode(tokens) == expected
    assert run(sentencepiece, [[t] for t in tokens], TextOptions())[0] == expected


def test_a_completion_keeps_the_space_that_sentencepiece_drops(sentencepiece: Tokenizer) -> None:
    assert run(sentencepiece, [[3, 4]], TextOptions(continues=True))[0] == " there"
    assert run(sentencepiece, [[3, 4]], TextOptions())[0] == "there"


def test_special_tokens_that_are_shown_nevertheless(smollm2: Tokenizer) -> None:
    """Also behind half a character, which takes another way through the code."""
    shown, hidden = sorted(smollm2.special_ids)[:2]
    half = smollm2.encode("\N{ROSE}")[:1]
    stream = TextStream(smollm2, TextOptions(but_show=frozenset({shown})))
    assert stream.push([shown, hidden]) == smollm2.token_text(shown)
    assert stream.push([*half, hidden]) == ""
    assert stream.push([shown]) == "\ufffd" + smollm2.token_text(shown)
    assert smollm2.shown_texts[shown] == "", "for other streams it is hidden"
