"""Real processes: a call is the same whatever happens to the request that writes it, and the client is not told."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_server import Serve, save_tiny_model

from quire.deploy import cli

LENGTH = 4000  # characters, and so tokens, of the argument: enough for all that happens meanwhile
NOTE: Any = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {"properties": {"text": {"type": "string", "pattern": f"^[a-z ]{{{LENGTH}}}$"}}, "required": ["text"]},
    },
}


def pieces(client: openai.OpenAI, choice: Any) -> Any:
    """(id of the request, piece of a call) as they come."""
    asked: Any = {"model": client.models.list().data[0].id, "messages": [{"role": "user", "content": "Hi"}], "tools": [NOTE]}
    for chunk in client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False, seed=1, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            yield chunk.id, piece.function
        if chunk.choices[0].finish_reason is not None:
            assert chunk.choices[0].finish_reason == "tool_calls"


@pytest.mark.ray
@pytest.mark.slow
def test_a_call_goes_on_at_another_replica_after_a_move_and_after_a_death(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with Serve(tmp_path / "log", "--model", str(tmp_path / "model"), "--kv-pages", "1024", "--replicas", "2", "--no-rebalance") as server:
        server.wait_ready()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            calm = "".join(piece.arguments for _, piece in pieces(client, "required"))
            assert re.fullmatch(f"[a-z ]{{{LENGTH}}}", json.loads(calm)["text"])
            stream = pieces(client, "required")
            request, begun = next(stream)
            assert begun.name == "note"
            written = next(stream)[1].arguments
            places = {row["id"]: row["replica"] for row in server.status()["requests"]}
            source, to = places[request], next(row["id"] for row in server.status()["replicas"] if row["id"] != places[request])
            assert cli.main(["migrate", "--admin-url", server.admin, request, "--to", to, "--json"]) == 0
            moved = json.loads(capsys.readouterr().out)
            assert (moved["outcome"], moved["source"]) == ("moved", source)
            (pid,) = (row["ranks"][0]["pid"] for row in server.status()["replicas"] if row["id"] == to)
            assert {row["id"]: row["replica"] for row in server.status()["requests"]}[request] == to
            os.kill(pid, signal.SIGKILL)
            written += "".join(piece.arguments for _, piece in stream)
            assert written == calm
