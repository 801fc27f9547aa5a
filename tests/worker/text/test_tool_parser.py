"""Calls in texts: of every format, of what models write instead, and the same however the text is cut."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.worker.text.tool_format import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, ToolFormat
from quire.worker.text.tool_parser import Arguments, Call, CallReading, Content, Piece, ToolParser

NAMES = frozenset({"get_weather", "f", "g"})
PARIS = '{"city": "Paris", "days": [1, {"a": "}]\\"{"}]}'
Calls = list[tuple[str, str]]


def read(pushes: list[str], reading: CallReading) -> tuple[str, Calls, list[Piece]]:
    """The content, the calls, and the pieces as they came."""
    parser = ToolParser(reading)
    pieces = [piece for push in pushes for piece in parser.push(push)] + parser.finish()
    content, calls = "", list[tuple[str, str]]()
    for piece in pieces:
        match piece:
            case Content(text):
                assert text
                content += text
            case Call(call, name):
                assert call == len(calls), "in order"
                calls.append((name, ""))
            case Arguments(call, text):
                assert text
                assert call == len(calls) - 1
                calls[call] = (calls[call][0], calls[call][1] + text)
    assert parser.calls == len(calls)
    return content, calls, pieces


def every_way(text: str) -> list[list[str]]:
    """The text whole, in characters, cut at each place, and cut at each two places that are not far apart."""
    cuts = [[text[:a], text[a:b], text[b:]] for a in range(len(text) + 1) for b in range(a, min(len(text), a + 14) + 1)]
    return [[text], list(text), *cuts]


def wrapped(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


W = '{"name": "get_weather", "arguments": ' + PARIS + "}"
F = '{"name": "f", "arguments": {}}'
LW, LF = W.replace("arguments", "parameters"), F.replace("arguments", "parameters")
CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, "", "", []),
    (HERMES, "Hello\n", "Hello\n", []),
    (HERMES, wrapped(W), "", [("get_weather", PARIS)]),
    (HERMES, "Let me see. \n" + wrapped(W), "Let me see.", [("get_weather", PARIS)]),
    (HERMES, f"{wrapped(W)}\n{wrapped(F)}\n", "", [("get_weather", PARIS), ("f", "{}")]),
    (HERMES, f"a{wrapped(W)}\n b{wrapped(F)} c", "a\n b c", [("get_weather", PARIS), ("f", "{}")]),
    (HERMES, wrapped('{"arguments": {"a": 1}, "name": "f"}'), "", [("f", '{"a": 1}')]),
    (HERMES, wrapped('{"type": "function", "name": "f", "id": "1", "arguments": {}}'), "", [("f", "{}")]),
    (HERMES, wrapped('{"name": "f"}'), "", [("f", "{}")]),
    (HERMES, wrapped('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [("f", '{"a": 1}')]),
    (HERMES, wrapped('{\n "name" : "f" ,\n "arguments" : {\n} }'), "", [("f", "{\n}")]),
    (HERMES, f"<tool_call>[{W}, {F}]</tool_call>", "", [("get_weather", PARIS), ("f", "{}")]),
    (HERMES, f"<tool_call>{W}\n{F}</tool_call>", "", [("get_weather", PARIS), ("f", "{}")]),
    (HERMES, f"<tool_call>{F}<tool_call>{F}", "", [("f", "{}"), ("f", "{}")]),
    (HERMES, f"<tool_call>{F}<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", [("f", "{}")]),
    (HERMES, wrapped(F) + " </tool_call>", " </tool_call>", [("f", "{}")]),
    (HERMES, "<<tool_call" + wrapped(F), "<<tool_call", [("f", "{}")]),
    (HERMES, wrapped(F + "}"), "}", [("f", "{}")]),  # a bracket too many
    (HERMES, wrapped('{"name": "f", "arguments": {} ?'), " ?", [("f", "{}")]),
    (HERMES, "a <tool_call> b </tool_call> c", "a <tool_call> b </tool_call> c", []),
    (HERMES, wrapped('{"name": "h", "arguments": {}}'), wrapped('{"name": "h", "arguments": {}}'), []),
    (HERMES, wrapped('{"name": 5}'), wrapped('{"name": 5}'), []),
    (HERMES, wrapped('{"name": "f", "arguments": 5}'), wrapped('{"name": "f", "arguments": 5}'), []),
    (HERMES, wrapped('{"name": "f", "colour": {}}'), wrapped('{"name": "f", "colour": {}}'), []),
    (HERMES, wrapped('{"name": "f", "arguments": "\\"\\ud800"}'), wrapped('{"name": "f", "arguments": "\\"\\ud800"}'), []),
    (HERMES, wrapped("[]"), wrapped("[]"), []),
    (HERMES, "</tool_call> is an end", "</tool_call> is an end", []),
    (HERMES, F, F, []),  # without the marker it is text
    (HERMES, "<tool_call>" + wrapped(F), "<tool_call>", [("f", "{}")]),
    (HERMES, 'x<tool_call>{"name": "get_wea', 'x<tool_call>{"name": "get_wea', []),  # cut off
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}', "", [("f", "{}")]),
    (HERMES, "<tool_call>" + F + "\n</tool_", "", [("f", "{}")]),
    (LLAMA3_JSON, LW, "", [("get_weather", PARIS)]),
    (LLAMA3_JSON, "<|python_tag|>" + LW, "", [("get_weather", PARIS)]),
    (LLAMA3_JSON, f" \n{LW}; {LF}", "", [("get_weather", PARIS), ("f", "{}")]),
    (LLAMA3_JSON, f"So: <|python_tag|>{LW}<|python_tag|>{LF}", "So:", [("get_weather", PARIS), ("f", "{}")]),
    (LLAMA3_JSON, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (LLAMA3_JSON, '{"type": "function", "function": "f", "parameters": {}}', "", [("f", "{}")]),
    (LLAMA3_JSON, '{"name": "Ann", "age": 41}', '{"name": "Ann", "age": 41}', []),
    (LLAMA3_JSON, '  {"age": 41, "name": "f"}', '  {"age": 41, "name": "f"}', []),
    (LLAMA3_JSON, f"So: {LF}", f"So: {LF}", []),
    (LLAMA3_JSON, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA3_JSON, f"{LF}; and so on", "; and so on", [("f", "{}")]),
    (MISTRAL, f"[TOOL_CALLS][{W}, {F}]", "", [("get_weather", PARIS), ("f", "{}")]),
    (MISTRAL, f'Yes.[TOOL_CALLS] [{F[:-1]}, "id": "abc"}}] ', "Yes.", [("f", "{}")]),
    (MISTRAL, f"[TOOL_CALLS]{F}", "", [("f", "{}")]),
    (MISTRAL, f"[TOOL_CALLS][{F}, 5]", ", 5]", [("f", "{}")]),
    (MISTRAL, "[[TOOL_CALLS", "[[TOOL_CALLS", []),
    (MISTRAL, "[TOOL_CALLS]f{}", "[TOOL_CALLS]f{}", []),
]


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_any_way_of_cutting_gives_the_same(format: ToolFormat, text: str, content: str, calls: Calls) -> None:
    for pushes in every_way(text):
        assert read(pushes, CallReading(format, NAMES))[:2] == (content, calls), pushes


# Pieces of which texts are made that begin like calls, and sometimes are some.
SHREDS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<", "</", "[", "]", "{", "}", '{"name": "f"', '"name": ', '"f"',
    ', "arguments": ', ', "parameters": {', '"arguments": {', '"', "\\", ",", ";", ":", " ", "\n", "x", "é", F, LW,
]  # fmt: skip
texts = st.lists(st.sampled_from(SHREDS), max_size=14).map("".join)


@settings(max_examples=300, deadline=None)
@given(format=st.sampled_from(list(FORMATS.values())), text=texts, data=st.data())
def test_any_text_cut_anywhere(format: ToolFormat, text: str, data: st.DataObject) -> None:
    options: Any = {name: data.draw(st.booleans()) for name in ("forced", "single")}
    hidden = frozenset(format.markers) if data.draw(st.booleans()) else frozenset[str]()
    reading = CallReading(format, NAMES, hidden, **options)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    content, calls, _ = whole = read([text], reading)
    pushes = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert read(pushes, reading)[:2] == whole[:2]
    assert read(list(text), reading)[:2] == whole[:2]
    assert all(name in NAMES for name, _ in calls)
    if hidden:
        assert not any(marker in content for marker in hidden)
    elif not calls and not reading.forced:
        assert content == text, "nothing is lost"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS.values())),
    arguments=st.lists(st.dictionaries(st.text(), json_values), min_size=1, max_size=3),
    ascii=st.booleans(),
    data=st.data(),
)
def test_what_the_format_writes_is_read_back(format: ToolFormat, arguments: list[Any], ascii: bool, data: st.DataObject) -> None:
    arguments = arguments[:1] if format.between is None else arguments
    written = [json.dumps(each, ensure_ascii=ascii) for each in arguments]
    bodies = [f'{{"name": "f", "{format.arguments}": {each}}}' for each in written]
    text = data.draw(st.sampled_from(format.opening)) + (format.between or "").join(bodies) + format.closing
    size = data.draw(st.integers(1, 9))
    content, calls, _ = read([text[i : i + size] for i in range(0, len(text), size)], CallReading(format, NAMES))
    assert (content, calls) == ("", [("f", each) for each in written])


def test_a_call_comes_as_it_is_written() -> None:
    parser = ToolParser(CallReading(HERMES, NAMES))
    assert parser.push("Well") == [Content("Well")]
    assert parser.push(", <") == [Content(",")]
    assert parser.push('tool_call>{"name": "f"') == []
    assert parser.push(', "arguments": {"a') == [Call(0, "f"), Arguments(0, '{"a')]
    assert parser.push('": "</tool_call>') == [Arguments(0, '": "</tool_call>')]
    assert parser.push('"}}</tool_call> <tool_call>' + F + "x") == [
        Arguments(0, '"}'),
        Call(1, "f"),
        Arguments(1, "{}"),
        Content("x"),
    ]
    assert parser.finish() == []


def test_hidden_markers_are_never_shown() -> None:
    text = "a [TOOL_CALLS] b [TOOL_CALLS]"
    assert read([text], CallReading(MISTRAL, NAMES))[0] == text
    assert read([text], CallReading(MISTRAL, NAMES, frozenset({"[TOOL_CALLS]"})))[0] == "a  b "
    stray = "a</tool_call> b"
    assert read([stray], CallReading(HERMES, NAMES, frozenset(HERMES.markers)))[0] == "a b"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>\n{"na', []),
        ('<tool_call>\n{"name": "f', []),
        ('<tool_call>\n{"name": "f"', [("f", "")]),
        ('<tool_call>\n{"name": "f", "arguments": {"a"', [("f", '{"a"')]),
        (wrapped(F) + '\n<tool_call>\n{"na', [("f", "{}")]),
    ],
)
def test_a_forced_call_that_is_cut_off_is_no_content(text: str, calls: Calls) -> None:
    for pushes in every_way(text):
        assert read(pushes, CallReading(HERMES, NAMES, forced=True))[:2] == ("", calls)


def test_a_single_call_ends_the_answer() -> None:
    parser = ToolParser(CallReading(HERMES, NAMES, single=True))
    assert parser.push("a" + wrapped(F)[:-1]) == [Content("a"), Call(0, "f"), Arguments(0, "{}")]
    assert parser.done
    assert parser.unread == len("\n</tool_call")
    assert parser.push(wrapped(F)) == []
    assert parser.unread == len(wrapped(F))
    assert parser.finish() == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "f", "arguments": ' + '{"a":[' * 5_000,
        '<tool_call>{"arguments": ' + '{"a":"<tool_call>",' * 5_000,
        " " * 100_000,
        "<tool_call" * 10_000,
        "<tool_call>" * 10_000,
        '<tool_call>{"name": "' + "\\" * 100_000,
        wrapped(F) * 3_000,
    ],
    ids=lambda text: text[:40],
)
def test_hostile_texts_take_no_long(text: str) -> None:
    began = time.perf_counter()
    content, calls, _ = read([text[i : i + 3] for i in range(0, len(text), 3)], CallReading(HERMES, NAMES))
    assert time.perf_counter() - began < 10.0  # a second; what grew with the square would take minutes
    assert calls or content == text
