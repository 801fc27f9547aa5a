"""What a PromQL query names, by a few regular expressions. Whether it is PromQL at all, `promtool` says where it is installed."""

from __future__ import annotations

import re
from typing import NamedTuple

STRING = r'"(?:[^"\\]|\\.)*"'
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([\w\s,]*)\)")
SELECTOR = re.compile(rf"([a-zA-Z_]\w*)\s*\{{((?:[^\"{{}}]|{STRING})*)\}}")
MATCHER = re.compile(rf"\s*(\w+)\s*(=~|!~|!=|=)\s*({STRING})\s*(?:,|$)")
RANGE = re.compile(r"\[(?:\d+[smhd]|\$window)\]")
FUNCTION = re.compile(r"\b(?:sum|max|avg|rate|increase|histogram_quantile|absent|scalar|vector|and|or|unless)\b")
WORD = re.compile(r"\b[a-zA-Z_]\w*")


class Matcher(NamedTuple):
    label: str
    operator: str
    value: str


class Selector(NamedTuple):
    """A series in a query, and what stands before it."""

    name: str
    matchers: tuple[Matcher, ...]
    before: str


def selectors(query: str) -> list[Selector]:
    """Every series that the query names, in its order.

    Raises:
        ValueError: brackets that do not match, or something that this does not understand.
    """
    _check_brackets(query)
    found = [(match.start(), match[1], _matchers(match[2])) for match in SELECTOR.finditer(query)]
    rest = query
    for known in (SELECTOR, GROUPING, RANGE, FUNCTION):
        rest = known.sub(lambda match: " " * len(match[0]), rest)  # what is left keeps its place
    if left := re.search(r"[\[\]{}\"$]", rest):
        raise ValueError(f"{left[0]} in {query}")
    found += [(word.start(), word[0], ()) for word in WORD.finditer(rest)]
    return [Selector(name, matchers, query[:at]) for at, name, matchers in sorted(found)]


def grouped(query: str) -> set[str]:
    """Every label that the query groups or joins by."""
    return {label.strip() for match in GROUPING.finditer(query) for label in match[1].split(",")}


def _matchers(text: str) -> tuple[Matcher, ...]:
    found, at = [], 0
    while at < len(text):
        match = MATCHER.match(text, at)
        if match is None:
            raise ValueError(f"no matcher: {text[at:]!r}")
        found.append(Matcher(match[1], match[2], match[3][1:-1]))
        at = match.end()
    return tuple(found)


def _check_brackets(query: str) -> None:
    open_: list[str] = []
    for sign in re.sub(STRING, "", query):
        if sign in "([{":
            open_.append({"(": ")", "[": "]", "{": "}"}[sign])
        elif sign in ")]}" and (not open_ or open_.pop() != sign):
            raise ValueError(f"{sign} that was not opened in {query}")
    if open_:
        raise ValueError(f"{open_[-1]} is missing in {query}")
