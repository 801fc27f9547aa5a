"""Chat templates: transformers' rendering, a sandbox that holds, and errors that name the field."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from quire.worker.protocol import BadRequest
from quire.worker.text import chat_template
from quire.worker.text.chat_template import ChatTemplate
from quire.worker.text.tokenizer import Tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 < 3 & {{ 4 }}?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?\n"},
]
TEMPLATES = {
    "loop": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}go{% endif %}\n",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ pad_token }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected = render_jinja_template([CHAT], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **special)[0][0]
    assert ChatTemplate(TEMPLATES[name], special).render(CHAT, prompt) == expected


def test_the_default_model_s_template(smollm2: Tokenizer) -> None:
    assert smollm2.has_chat_template
    assert smollm2.apply_chat_template([{"role": "user", "content": "hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_values_are_seen_beside_what_the_template_sees_anyway() -> None:
    source = "{{ bos_token }}{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ messages[0].content }}{{ tools }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    plain = template.render(CHAT, True)
    assert template.render(CHAT, True, {"enable_thinking": False}) == plain.replace("<s>", "<s><no>")
    assert template.render(CHAT, True, {"bos_token": "x", "messages": "x", "tools": "x"}) == plain
    guarded = ChatTemplate("{{ raise_exception('no') }}{{ range(3) | list }}", {})
    with pytest.raises(BadRequest, match="no"):
        guarded.render(CHAT, True, {"raise_exception": "x", "range": "x"})


def test_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHAT, True) == str(datetime.now().year)


def test_parts_are_joined_where_the_template_wants_a_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert ChatTemplate("{{ messages[0].content }}", {}).render(messages, True) == "a\nb"
    reads = "{% for p in messages[0].content %}({{ p.text }}){% endfor %}"
    assert ChatTemplate(reads, {}).render(messages, True) == "(a)(b)"
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "assistant", "content": None}], True) == ""


@pytest.mark.parametrize("content", [3, {"type": "text"}, [{"type": "image_url", "image_url": "x"}], ["a"], [{"type": "text", "text": 1}]])
def test_content_that_is_not_text_is_refused(content: object) -> None:
    with pytest.raises(BadRequest) as caught:
        ChatTemplate("{{ messages }}", {}).render([CHAT[0], {"role": "user", "content": content}], True)
    assert caught.value.field == "messages[1].content"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "rejects"),
        ("{{ messages[0].nope.deeper }}", "rejects"),
        ("{{ 1 // 0 }}", "rejects"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "rejects"),
        ("{{ messages.append(1) }}", "rejects"),
        ("{% for i in range(10**9) %}x{% endfor %}", "rejects"),
        ("{% if %}", "cannot be compiled"),
        (None, "no chat template"),
    ],
)
def test_faults_become_a_bad_request(source: str | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        ChatTemplate(source, {}).render(CHAT, True)
    assert caught.value.field == "messages"


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    template = ChatTemplate("{% for i in range(100) %}{{ messages[0].content }}{% endfor %}", {})
    assert len(template.render([{"role": "user", "content": "x" * 10}], True)) == 1000
    with pytest.raises(BadRequest, match="1000 characters"):
        template.render([{"role": "user", "content": "x" * 11}], True)
