"""Tools in prompts: as each family's template has them, in words where a template knows none, and which format a template means."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from tool_models import FAMILIES, LLAMA, MISTRAL, QWEN, family
from transformers.utils.chat_template_utils import render_jinja_template

from quire.worker.config import ServerOptions
from quire.worker.protocol import BadRequest
from quire.worker.text.chat_template import ChatTemplate
from quire.worker.text.tokenizer import Tokenizer
from quire.worker.text.tool_format import FORMATS, HERMES, LLAMA3_JSON
from quire.worker.text.tool_format import MISTRAL as MISTRAL_FORMAT
from quire.worker.text.tool_parser import Call, CallReading, ToolParser
from quire.worker.text.tool_prompt import in_words

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "description": "The time; é", "parameters": {"type": "object", "properties": {}}},
}


def call(id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


ASKED: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Paris?"}]
CALLED = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call("abcdefghi", city="Paris")]}]
ANSWERED = [*CALLED, {"role": "tool", "content": "21", "tool_call_id": "abcdefghi", "name": "get_weather"}]


@pytest.mark.parametrize("source", [QWEN, LLAMA, MISTRAL])
@pytest.mark.parametrize("messages", [ASKED, CALLED, ANSWERED])
@pytest.mark.parametrize("tools", [[WEATHER, TIME], []])
def test_renders_as_transformers_does(source: str, messages: list[Any], tools: list[Any]) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected = render_jinja_template([messages], tools=tools or None, chat_template=source, add_generation_prompt=True, **special)[0][0]
    template = ChatTemplate(source, special)
    assert template.knows_tools
    assert template.render(messages, True, tools=tools) == expected


def test_which_format_a_template_means() -> None:
    assert ChatTemplate(QWEN, {}).tool_format is HERMES
    assert ChatTemplate(LLAMA, {}).tool_format is LLAMA3_JSON
    assert ChatTemplate(MISTRAL, {}).tool_format is MISTRAL_FORMAT
    assert ChatTemplate(QWEN.replace('{"name": ', "<function="), {}).tool_format is None, "Qwen3-Coder's are XML"
    assert ChatTemplate("{{ tools }}{{ messages }}", {}).tool_format is None
    for source in ("{{ messages[0].content }} tools", "{# tools #}[TOOL_CALLS]", None, "{% if %}"):
        template = ChatTemplate(source, {})
        assert (template.knows_tools, template.tool_format) == (False, HERMES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_that_a_template_writes_is_read_as_one(name: str, smollm2: Tokenizer) -> None:
    tokenizer = family(name, smollm2)
    before, after = (tokenizer.apply_chat_template(messages, False) for messages in (ASKED, CALLED))
    assert after.startswith(before)
    assert tokenizer.tool_format is not None
    written = after.removeprefix(before).removeprefix("<assistant>\n").removeprefix("<|im_start|>assistant")
    parser = ToolParser(CallReading(tokenizer.tool_format, frozenset({"get_weather"})))
    assert Call(0, "get_weather") in parser.push(written)


def test_in_words_for_a_template_that_knows_none(smollm2: Tokenizer) -> None:
    assert not smollm2.knows_tools
    assert smollm2.tool_format is HERMES
    text = smollm2.apply_chat_template(ANSWERED, True, {}, [WEATHER, TIME])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather", ' in text
    assert "The time; é" in text
    assert text.endswith(
        "<|im_start|>user\nWeather in Paris?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n21\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.apply_chat_template(ASKED) == smollm2.apply_chat_template(ASKED, True, {}, [])


def test_several_calls_and_answers_in_words() -> None:
    messages = [
        {"role": "assistant", "content": "Both.", "tool_calls": [call("1", a=1), call("2", a="cut")]},
        {"role": "tool", "content": "x"},
        {"role": "tool", "content": "y"},
        {"role": "user", "content": "So?"},
    ]
    assert in_words(messages, []) == [
        {
            "role": "assistant",
            "content": 'Both.\n<tool_call>\n{"name": "get_weather", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"a": "cut"}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\nx\n</tool_response>\n<tool_response>\ny\n</tool_response>"},
        {"role": "user", "content": "So?"},
    ]
    assert [message["role"] for message in in_words(messages, [WEATHER])][:2] == ["system", "assistant"]
    assert "tool_calls" in messages[0], "what is given stays as it is"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    takes_parts = ChatTemplate("{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}|{% endfor %}", {})
    assert takes_parts.render(parts, True, tools=[WEATHER]).endswith("|a\nb|")


def test_in_words_where_there_is_no_system() -> None:
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    drops = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    for source in (refuses, drops):
        text = ChatTemplate(source, {}).render(ASKED[1:], True, tools=[WEATHER])
        assert text.startswith("[user] # Tools")
        assert text.endswith("</tool_call>\n\nWeather in Paris?")
        text = ChatTemplate(source, {}).render(CALLED[2:], True, tools=[WEATHER])
        assert text.startswith("[user] # Tools")
        assert "[assistant] <tool_call>" in text


def test_ids_that_a_template_would_refuse(smollm2: Tokenizer) -> None:
    tokenizer = family("mistral", smollm2)
    long = "call_0123456789abcdef"
    messages = [
        *ASKED[1:],
        {"role": "assistant", "content": "", "tool_calls": [call(long), call("abcdefghi"), call("é" * 9)]},
        {"role": "tool", "content": "21", "tool_call_id": long},
    ]
    text = tokenizer.apply_chat_template(messages, False, {}, [WEATHER])
    ids = [part.partition('"')[0] for part in text.split('"id": "')[1:]]
    assert [len(id) for id in ids] == [9] * 3
    assert all(id.isascii() and id.isalnum() for id in ids)
    assert ids[1] == "abcdefghi"
    assert len(set(ids)) == 3
    assert f'"call_id": "{ids[0]}"' in text


def test_what_a_template_refuses_is_a_bad_request(smollm2: Tokenizer) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call("1"), call("2")]}]
    with pytest.raises(BadRequest, match="single tool-calls"):
        family("llama", smollm2).apply_chat_template(messages, True, {}, [WEATHER])
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(BadRequest) as caught:
        family("qwen", smollm2).apply_chat_template(ASKED, True, {}, [deep])
    assert caught.value.field == "messages"


def test_a_template_of_its_own_for_tools(smollm2: Tokenizer) -> None:
    plain = "plain{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(smollm2._backend, {}, plain, "{{ tools | length }}<tool_call>{{ messages[-1].content }}")
    assert tokenizer.apply_chat_template(ASKED) == "plainBe brief.Weather in Paris?"
    assert tokenizer.apply_chat_template(ASKED, True, {}, [WEATHER]) == "1<tool_call>Weather in Paris?"
    assert tokenizer.tool_format is HERMES


def test_the_option_names_the_formats() -> None:
    (option,) = (field for field in fields(ServerOptions) if field.name == "tool_call_format")
    assert option.metadata["choices"] == ("auto", *FORMATS)
