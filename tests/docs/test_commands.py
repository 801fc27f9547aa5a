"""What the documents say is said of what there is: commands, flags, values, files. Nothing is run here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import BLOCKS, PAGES, ROOT, SHELL, Block, Page

from quire.deploy import cli, options

QUIRE = next(a.choices for a in cli.parser()._actions if a.dest == "command")
SCHEMA = json.loads((ROOT / "helm" / "values.schema.json").read_text())
FOLDERS = ("deploy", "cluster", "worker", "kernels", "tests", "benchmarks", "helm", "docs")
by_where = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_where
def test_a_block_of_commands_says_who_runs_it(block: Block):
    if block.language not in (*SHELL, "python"):
        assert block.language in ("", "yaml", "json", "mermaid")
        return
    kind, _, rest = block.mark.partition(":")
    if kind == "not run":
        assert len(rest.split()) >= 2, "no reason"
    elif kind.startswith("run by "):
        assert (ROOT / kind.removeprefix("run by ")).is_file()
    else:
        assert (kind, rest) in (("run", ""), ("run", " serve")), f"put a mark above the fence: {block.mark!r}"


@by_page
def test_commands_stand_in_fenced_blocks(page: Page):
    assert re.findall(r"^ {4,}(?:\$ )?(?:quire|curl|python|pip|helm|kubectl) .*", page.prose, re.MULTILINE) == []


@by_where
def test_a_block_parses(block: Block):
    if block.language == "yaml":
        assert list(yaml.safe_load_all(block.text)) != [None]
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language in SHELL:
        for command in block.commands():
            for flag, value in pairwise(command):
                if command[0] == "curl" and flag in ("-d", "--data") and value.startswith("{"):
                    json.loads(value)


def test_words_of_a_command_are_found():
    text = "A=1 quire status --json > x | python -c 'a\nb'  # quire no\n\nexport B=$(kubectl get x)\nquire top &\n"
    text += "cat > f <<'E'\nquire no\nE\n"
    found = list(Block("x", 1, "sh", text, "").commands())
    assert found == [["quire", "status", "--json"], ["python", "-c", "a\nb"], ["kubectl", "get", "x"], ["quire", "top"], ["cat"]]


@by_where
def test_quire_takes_its_flags(block: Block):
    for command in block.commands() if block.language in SHELL else ():
        if command[0].rpartition("/")[2] != "quire" or {"--help", "--version"} & set(command):
            continue
        if any(word.startswith("$") for word in command):
            command = [word if not word.startswith("$") else "x" for word in command]
        arguments = vars(cli.parser().parse_args(command[1:]))
        if arguments["command"] == "serve":
            options.build({name: value for name, value in arguments.items() if name != "config"})


@by_page
def test_quire_has_the_commands_and_flags_that_the_text_names(page: Page):
    for code in page.inline:
        for command in re.findall(r"\bquire [a-z][^`|]*", code):
            name, *words = command.split()[1:]
            assert name in QUIRE, command
            flags = re.findall(r"--[a-z][a-z-]*", " ".join(words))
            assert [flag for flag in flags if flag not in QUIRE[name]._option_string_actions] == [], command
    known = {flag for parser in QUIRE.values() for flag in parser._option_string_actions} | _flags_of_benchmarks()
    told = {flag for code in page.inline if code.startswith("--") for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code)}
    assert told - known == set()


def _flags_of_benchmarks() -> set[str]:
    return {flag for path in (ROOT / "benchmarks").glob("*.py") for flag in re.findall(r'"(--[a-z][a-z0-9-]*)"', path.read_text())}


def _source(script: Path) -> str:
    """Of a script, and of those beside it that it imports."""
    text = script.read_text()
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)]
    return text + "".join(path.read_text() for path in beside if path.is_file())


@by_where
def test_scripts_are_there_and_take_their_flags(block: Block):
    for command in block.commands() if block.language in SHELL else ():
        script = next((word for word in command if word.endswith(".py")), None)
        if script is not None and not script.startswith("-"):
            source = _source(ROOT / script)
            flags = [word.partition("=")[0] for word in command if word.startswith("--")]
            assert [flag for flag in flags if f'"{flag}"' not in source] == [], command
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def _has_value(path: str) -> bool:
    """Whether the chart's schema knows a value; what a map holds is free."""
    node: Any = SCHEMA
    for part in path.replace("[]", ".[]").split("."):
        node = SCHEMA["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        if part == "[]":
            node = node.get("items")
        elif part in node.get("properties", {}):
            node = node["properties"][part]
        else:
            return node.get("type") == "object" and node.get("additionalProperties", True) is not False
        if node is None:
            return False
    return True


@by_where
def test_helm_knows_the_values_that_are_set(block: Block):
    for command in block.commands() if block.language in SHELL else ():
        if command[0] != "helm" or command[1] == "repo":
            continue
        for flag, word in pairwise(command):
            if flag.startswith("--set"):
                assert _has_value(word.partition("=")[0]), word
            elif flag == "-f" and "/" in word:
                assert (ROOT / word).is_file(), word


def _values_in(code: str) -> Iterator[str]:
    found = re.fullmatch(r"([a-z]\w*)((?:\[\]|\.\w+)+)(?:: .*)?", code)
    if found and found[1] in SCHEMA["properties"]:
        yield found[1] + found[2]


@by_page
def test_the_chart_has_the_values_that_the_text_names(page: Page):
    assert [path for code in page.inline for path in _values_in(code) if not _has_value(path)] == []


@by_page
def test_files_and_modules_that_the_text_names_are_there(page: Page):
    for code in page.inline:
        path = code.partition("::")[0].split()[-1]
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", path) and "NAME" not in path:
            assert list(ROOT.glob(path)), code
        elif found := re.fullmatch(r"(?:quire\.)?(cluster|worker|deploy|kernels)\.(\w+)\*?((?:[.:]\w+)*)", code):
            assert list(ROOT.glob(f"{found[1]}/**/{found[2]}*")), code


def test_a_value_that_is_not_there_is_found():
    assert _has_value("image.repository")
    assert _has_value("models[].tp")
    assert _has_value("models[].nodeSelector.pool")
    assert not _has_value("image.repo")
    assert not _has_value("models[].tpp")
