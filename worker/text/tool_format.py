"""How models write calls of tools: one table, and which of its rows a chat template goes by.

A new family is a new row. The parser (`tool_parser`) reads calls by it, the grammar (`tool_grammar`) makes a model write them so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls: JSON objects that have a name and arguments, and what stands around them.

    Attributes:
        name: what the option calls it, which is what vLLM calls its parser.
        signs: a chat template that says one of these writes calls so,
        but_not: unless it says one of these, too.
        marker: opens one call or several; a special token in some vocabularies.
        end: closes what the marker opened; empty: nothing does.
        bare: calls may also stand without the marker, at the beginning of the answer.
        arguments: the key of the arguments. (Both keys that there are can be read.)
        opening: what a model may write before its first call, one of these.
        between: between two calls; None: it writes one call at most.
        closing: behind the last one.
        id_length: of the ids of calls that its templates take, letters and digits; 0: any.
    """

    name: str
    signs: tuple[str, ...]
    but_not: tuple[str, ...]
    marker: str
    end: str
    bare: bool
    arguments: str
    opening: tuple[str, ...]
    between: str | None
    closing: str
    id_length: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """What an answer's text never shows."""
        return (self.marker, self.end) if self.end else (self.marker,)


HERMES = ToolFormat(  # Hermes, Qwen 2.5, Qwen 3
    name="hermes",
    signs=("<tool_call>",),
    but_not=("<function=", "<arg_key>"),  # calls in XML between the same markers
    marker="<tool_call>",
    end="</tool_call>",
    bare=False,
    arguments="arguments",
    opening=("<tool_call>\n",),
    between="\n</tool_call>\n<tool_call>\n",
    closing="\n</tool_call>",
)
LLAMA3_JSON = ToolFormat(  # Llama 3.1 to 3.3, whose templates take back no more than one call in a message
    name="llama3_json",
    signs=("<|python_tag|>", '"parameters": '),
    but_not=(),
    marker="<|python_tag|>",
    end="",
    bare=True,
    arguments="parameters",
    opening=("",),
    between=None,
    closing="",
)
MISTRAL = ToolFormat(  # Mistral and Ministral: a list; with SentencePiece it begins with a space
    name="mistral",
    signs=("[TOOL_CALLS]",),
    but_not=("[ARGS]",),  # name and arguments in no common object
    marker="[TOOL_CALLS]",
    end="",
    bare=False,
    arguments="arguments",
    opening=("[TOOL_CALLS][", "[TOOL_CALLS] ["),
    between=", ",
    closing="]",
    id_length=9,
)
FORMATS = {format.name: format for format in (HERMES, MISTRAL, LLAMA3_JSON)}


def format_of(template: str) -> ToolFormat | None:
    """The format of the calls that a chat template, which knows tools, writes; None where it is none of these."""
    for format in FORMATS.values():
        if any(sign in template for sign in format.signs) and not any(sign in template for sign in format.but_not):
            return format
    return None
