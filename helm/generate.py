"""Writes what follows from other files: README.md's table of values, the options of Quire in values.schema.json, Grafana's dashboards.

    python helm/generate.py            writes all
    python helm/generate.py --check    says whether they are current (exit status 1 when not)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from grafana import dashboard

from quire.deploy.options import options
from quire.worker.config import ServerOptions
from quire.worker.options import Option

CHART = Path(__file__).resolve().parent
BEGIN, END = "<!-- values: written by generate.py -->", "<!-- end of values -->"
# What the chart itself sets, from its own values.
OWN = set("model device tp ray_address namespace replicas prefill_replicas span_nodes node_label served_model_name".split())
OWN |= set("host port api_key api_key_file ingresses admin_host admin_port admin_token".split())
OWN |= set("autoscaler min_replicas max_replicas".split())


def readme() -> str:
    """README.md with the table of values.yaml."""
    text = (CHART / "README.md").read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    rows = [f"| `{path}` | `{default}` | {said} |" for path, default, said in table((CHART / "values.yaml").read_text(encoding="utf-8"))]
    return "\n".join([head + BEGIN, "", "| value | default | what it does |", "|---|---|---|", *rows, "", END + tail])


def table(text: str) -> Iterator[tuple[str, str, str]]:
    """(path, default as JSON, what it does) of every value that has a `# --` comment."""
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, path: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            here = f"{path}.{key.value}" if path else key.value
            said = _comment(lines, key.start_mark.line)
            if said is not None:
                default = json.dumps(yaml.SafeLoader("").construct_object(value, deep=True), ensure_ascii=False)
                yield here, default.replace("|", "\\|"), said.replace("|", "\\|")
            elif isinstance(value, yaml.MappingNode):
                yield from walk(value, here)

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        yield from walk(root, "")


def _comment(lines: list[str], line: int) -> str | None:
    """The comment that begins with `# --` right above a line."""
    said: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        said.insert(0, lines[line].lstrip().lstrip("#").strip())
        if said[0].startswith("-- "):
            return " ".join([said[0][3:], *said[1:]])
    return None


def schema() -> str:
    """values.schema.json with the options that there are now."""
    path = CHART / "values.schema.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    for option in options():
        if option.name not in OWN:
            (server if option.owner is ServerOptions else engine)[option.flag.removeprefix("--")] = _type(option)
    whole["definitions"]["engineOptions"]["properties"] = engine
    whole["definitions"]["serveOptions"]["properties"] = server
    return json.dumps(whole, indent=2) + "\n"


def _type(option: Option) -> dict[str, Any]:
    if option.choices:
        return {"enum": list(option.choices)}
    if option.kind == "bytes":
        return {"type": ["integer", "string"]}
    if option.kind == "list":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": {bool: "boolean", int: "integer", float: "number"}.get(option.type, "string")}


def files() -> dict[str, str]:
    """Name -> what is to be in it."""
    sources = sorted((CHART / "dashboards").glob("*.yaml"))
    dashboards = {f"dashboards/{path.stem}.json": dashboard(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sources}
    return {"README.md": readme(), "values.schema.json": schema(), **dashboards}


def main(check: bool) -> int:
    stale = {name: text for name, text in files().items() if not _is(CHART / name, text)}
    for name, text in stale.items():
        if check:
            sys.stdout.write(f"helm/{name} is not current: run `python helm/generate.py`\n")
        else:
            (CHART / name).write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
