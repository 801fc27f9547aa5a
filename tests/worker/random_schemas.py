"""JSON schemas at random, all of whose texts are short."""

from __future__ import annotations

import random
from typing import Any


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of strings, numbers, enumerations, arrays, objects and alternatives, nested at most `depth` deep."""
    kinds = [_string, _integer, _number, _enumeration, _boolean]
    if depth:
        kinds += [_array, _object, _object, _alternatives]
    return draw.choice(kinds)(draw, depth)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    if draw.random() < 0.3:
        return {"type": "string", "pattern": draw.choice([r"^[a-c]{1,3}$", r"^\d{2}-\d{2}$", "^(é|ß|x){2}$"])}
    least = draw.randint(0, 2)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 5)}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(-200, 200)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 500)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": "date"} if draw.random() < 0.2 else {"enum": [draw.randint(0, 99) / 4, None, True]}


def _enumeration(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample(['say "a"', "b\n", "", "日本", "a\\b", "abc", "true"], 3)}


def _boolean(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null"])}


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {"type": "array", "items": random_schema(draw, depth - 1), "minItems": least, "maxItems": least + draw.randint(0, 2)}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["name", "age", 'a "b"', "ключ", "x", "list"], draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }


def _alternatives(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
