"""Which tokens a sequence's grammar allows, against what its texts say; and that a matcher made anew allows the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_schemas import random_schema
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from quire.worker import constraint
from quire.worker.constraint import Allowed, Constraints, Wanted
from quire.worker.plan import NewSequence
from quire.worker.protocol import GRAMMAR_FAILED, BadRequest, SamplingParams
from quire.worker.text.grammar import Grammars, grammar_of
from quire.worker.text.tokenizer import Tokenizer, load_tokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
PAIRS = ["ab", "abc", "bc", "ca", "aa"]
HOLE, EOS, STOP, ZZ = 261, 262, 263, 264  # HOLE has no token, as in a vocabulary that was made larger
VOCAB = 275  # of the logits: no multiple of 32, and more than there are tokens


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    vocab = {token: i for i, token in enumerate([*LETTERS, *PAIRS])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "a"), ("a", "a")]
    backend = Backend(models.BPE(vocab | {"zz": ZZ}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<stop>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<eos>"}, None)
    assert [tokenizer.pieces[token] for token in (HOLE, EOS, STOP, ZZ)] == [b"", b"<eos>", b"<stop>", b"zz"]
    return tokenizer


@pytest.fixture(scope="module")
def constrained(small: Tokenizer) -> Callable[..., set[int] | str]:
    """What may follow, of a sequence that nothing is known of yet; or why nothing may."""
    constraints = Constraints(lambda: small, (EOS,), VOCAB)

    def allowed(grammar: str, output: list[int], **params: object) -> set[int] | str:
        told = SamplingParams(grammar=grammar, **params)  # type: ignore[arg-type]
        constraints.learn(NewSequence(0, (), 0, (), told, 0))
        found = allowed_after(constraints, 0, told, output)
        constraints.forget(0)
        assert found.words.shape == (-(-VOCAB // 32),)
        return found.error or tokens_of(found.words)

    return allowed


def allowed_after(constraints: Constraints, seq: int, params: SamplingParams, output: list[int]) -> Allowed:
    return constraints.allowed({7: Wanted(seq, params, np.array(output, np.int32))})[7]


def tokens_of(words: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


WORDS = st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


@settings(max_examples=200, deadline=None)
@given(words=WORDS, data=st.data())
def test_exactly_the_tokens_that_a_choice_goes_on_with(small, constrained, words: list[str], data) -> None:
    grammar = grammar_of(choice=words)
    word = data.draw(st.sampled_from(words)).encode()
    output: list[int] = []
    said = b""
    while said != word:
        token = data.draw(st.sampled_from([t for t in range(HOLE) if word[len(said) :].startswith(small.pieces[t])]))
        check_following(small, words, said, constrained(grammar, output))
        output.append(token)
        said += small.pieces[token]
    check_following(small, words, said, constrained(grammar, output))


def check_following(tokenizer: Tokenizer, words: list[str], said: bytes, found: set[int] | str) -> None:
    """By the texts: a token that some word goes on with, and the end where one is whole. Where all words go on with the same byte, the
    model's own way to write that may be all that is left."""
    whole = [word.encode() for word in words]
    left = [word for word in whole if word.startswith(said)]
    expected = {t for t in range(HOLE) if any(word.startswith(said + tokenizer.pieces[t]) for word in left)}
    if said in left:
        expected.add(EOS)
    assert isinstance(found, set)
    if said in left or len({word[len(said)] for word in left}) > 1:
        assert found == expected
    else:
        assert found
        assert found <= expected


def test_below_min_tokens_the_end_waits_if_anything_else_may_follow(constrained, small) -> None:
    grammar = grammar_of(regex="(ab)+")
    ab = small.encode("ab")
    assert constrained(grammar, ab) == {*small.encode("a"), *ab, EOS}
    assert constrained(grammar, ab, min_tokens=2) == {*small.encode("a"), *ab}
    assert constrained(grammar, [*ab, *ab], min_tokens=2) == {*small.encode("a"), *ab, EOS}
    assert constrained(grammar_of(choice=["ab"]), ab, min_tokens=9) == {EOS}
    # A stop token is one that ends it, too. Here it is all that may follow.
    assert constrained(grammar_of(regex="a+"), [], min_tokens=1, stop_token_ids=tuple(small.encode("aa"))) == set(small.encode("a"))
    assert constrained(grammar_of(regex="b"), [], min_tokens=1, stop_token_ids=tuple(small.encode("b"))) == set(small.encode("b"))


def test_special_tokens_and_what_is_no_token_are_not_text(constrained, small) -> None:
    anything = constrained(grammar_of(regex="(?s).*"), [])
    assert isinstance(anything, set)
    assert anything & {STOP, HOLE, *range(ZZ + 1, VOCAB)} == set()
    assert EOS in anything
    assert {t for t in range(HOLE) if small.pieces[t].isascii()} <= anything
    assert constrained(grammar_of(lark="start: <stop>"), []) == {STOP}


def test_more_tokens_than_logits(small) -> None:
    """The tokenizer may know ids that the model has no logits for."""
    constraints = Constraints(lambda: small, (EOS,), STOP)
    params = SamplingParams(grammar=grammar_of(choice=["zz", "a"]))
    constraints.learn(NewSequence(3, (), 0, (), params, 0))
    found = allowed_after(constraints, 3, params, [])
    assert tokens_of(found.words) == {*small.encode("a"), small.encode("z")[0]}


def test_what_it_does_not_allow_is_the_grammars_fault(constrained, small) -> None:
    for output in (small.encode("b"), [*small.encode("a"), EOS, *small.encode("a")], [VOCAB - 1]):
        assert str(constrained(grammar_of(choice=["a"]), output)).startswith(GRAMMAR_FAILED)


def test_nothing_is_read_for_a_sequence_without_a_grammar() -> None:
    def load() -> Tokenizer:
        raise AssertionError("nobody asked for a grammar")

    constraints = Constraints(load, (EOS,), VOCAB)
    constraints.learn(NewSequence(0, (), 0, (), SamplingParams(), 0))
    assert constraints.allowed({}) == {}


def test_several_at_once_each_by_its_own(small, constrained) -> None:
    """One that is refused, one in an error and two of one grammar among them."""
    constraints = Constraints(lambda: small, (EOS,), VOCAB)
    grammars = ["start: (", grammar_of(regex="[ab]+"), grammar_of(choice=["ca", "cb"]), grammar_of(regex="[ab]+"), grammar_of(regex="b")]
    outputs = [[], small.encode("ab"), small.encode("c"), [], small.encode("a")]
    for seq, grammar in enumerate(grammars):
        constraints.learn(NewSequence(seq, (), 0, (), SamplingParams(grammar=grammar), 0))
    wanted = {
        10 * seq: Wanted(seq, SamplingParams(grammar=grammar), np.array(output, np.int32))
        for seq, (grammar, output) in enumerate(zip(grammars, outputs, strict=True))
    }
    found = constraints.allowed(wanted)
    assert found.keys() == wanted.keys()
    for seq in (1, 2, 3):
        assert tokens_of(found[10 * seq].words) == constrained(grammars[seq], outputs[seq])
    for seq in (0, 4):
        assert (found[10 * seq].error or "").startswith(GRAMMAR_FAILED)


def test_preparing_refuses_and_a_failed_reading_is_tried_again(small) -> None:
    found = [OSError("the file is not there yet"), small]

    def load() -> Tokenizer:
        one = found.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    constraints = Constraints(load, (EOS,), VOCAB)
    with pytest.raises(OSError, match="not there"):
        constraints.prepare(grammar_of(regex="a"))
    constraints.prepare(grammar_of(regex="a"))
    with pytest.raises(BadRequest, match="grammar"):
        constraints.prepare("start: (")


def test_sentencepiece_puts_no_space_into_what_is_forced() -> None:
    """Such a tokenizer writes a space before whatever it is given."""
    marked = {"type": "object", "properties": {"name": {"enum": ["ab", "na"]}}, "required": ["name"], "additionalProperties": False}
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *'▁{}":,abnme', "▁{", '{"', "▁a", "na", "me", "name", "ab"]
    merges = [("▁", "{"), ("{", '"'), ("▁", "a"), ("n", "a"), ("m", "e"), ("na", "me")]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"}, None)
    assert tokenizer.decode(tokenizer.encode("{")) == "{"
    assert tokenizer.token_bytes(tokenizer.encode("{")[0]) == b" {"
    params = SamplingParams(grammar=grammar_of(json_schema=marked))
    constraints = Constraints(lambda: tokenizer, (1,), len(pieces))
    for seed in range(20):
        output = walked(constraints, params, 1, random.Random(seed))
        assert json.loads(tokenizer.decode(output))["name"] in ("ab", "na")
    # What is forced is written as the model would, which has no way to the token "ab".
    forced = SamplingParams(grammar=grammar_of(choice=["abab"]))
    assert [tokenizer.pieces[t] for t in walked(constraints, forced, 1, random.Random(0))[:-1]] == [b"a", b"b", b"a", b"b"]


def walked(constraints: Constraints, params: SamplingParams, eos: int, draw: random.Random) -> list[int]:
    """Any tokens that are allowed, until the end."""
    constraints.learn(NewSequence(0, (), 0, (), params, 0))
    output: list[int] = []
    while output[-1:] != [eos]:
        found = allowed_after(constraints, 0, params, output)
        assert found.error is None
        output.append(draw.choice(sorted(tokens_of(found.words))))
    return output


# --- the real vocabulary ---


@pytest.fixture(scope="module")
def grammars() -> tuple[Tokenizer, Grammars]:
    from quire.worker.text.source import resolve_model

    tokenizer = load_tokenizer(Path(resolve_model("smollm2")))
    return tokenizer, Grammars(tokenizer, [2])


@pytest.mark.parametrize("seed", range(12))
def test_a_matcher_made_anew_allows_what_the_first_one_does(grammars, seed: int) -> None:
    """At every token of a text that follows a random schema: after a preemption, at another replica, at another start."""
    tokenizer, _ = grammars
    draw = random.Random(seed)
    params = SamplingParams(grammar=grammar_of(json_schema=random_schema(draw)))
    constraints = Constraints(lambda: tokenizer, (2,), tokenizer.vocab_size)
    constraints.learn(NewSequence(0, (), 0, (), params, 0))
    output: list[int] = []
    while output[-1:] != [2]:
        going_on = allowed_after(constraints, 0, params, output)
        constraints.learn(NewSequence(1, (), 0, (), params, 0))
        anew = allowed_after(constraints, 1, params, output)
        assert going_on.error is None
        assert np.array_equal(anew.words, going_on.words)
        output.append(draw.choice(sorted(tokens_of(going_on.words))))
    json.loads(tokenizer.decode(output))


def test_who_comes_to_a_limit_together_goes_on_alone(grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matchers of one grammar share the states of its lexer, and each state of this one is met once."""
    import llguidance

    import quire.worker.text.grammar as module

    monkeypatch.setattr(constraint, "RENEW_TOKENS", 64)
    monkeypatch.setattr(module, "_limits", lambda: llguidance.LLParserLimits(max_lexer_states=3000, verbose_errors=False))
    tokenizer, _ = grammars
    constraints = Constraints(lambda: tokenizer, (2,), tokenizer.vocab_size)
    params = SamplingParams(grammar=grammar_of(json_schema={"type": "string", "maxLength": 5000}))
    text = tokenizer.encode('"' + "one and two and three, " * 60)
    constraints.learn(NewSequence(0, (), 0, (), params, 0))
    for length in range(len(text)):
        found = allowed_after(constraints, 0, params, text[:length])
        assert found.error is None, length
        assert text[length] in tokens_of(found.words)
    once = Grammars(tokenizer, [2]).matcher(params.grammar)  # which never is made anew
    assert not all(once.consume_token(token) and once.compute_bitmask() and not once.is_error() for token in text)
