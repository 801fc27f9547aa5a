"""Real processes: streams that are moved by hand and by a drain give the text of an undisturbed run, and no error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from streams import ENDLESS, WAIT_S, Reader, numbered
from tiny_server import Serve, save_tiny_model, until

from quire.deploy import cli

STREAMS = 6
ON = 300  # characters that it goes on for after that


def start(url: str) -> list[Reader]:
    readers = [numbered(url, number, ENDLESS) for number in range(STREAMS)]
    for reader in readers:
        assert reader.begun.wait(WAIT_S)
    return readers


@pytest.mark.ray
@pytest.mark.slow
def test_streams_that_move_notice_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--kv-pages", "1024", "--replicas", "3", "--no-rebalance"]
    with Serve(tmp_path / "log", *flags) as server:
        server.wait_ready()
        admin = server.admin

        def quire(*words: str) -> tuple[int, dict[str, Any]]:
            status = cli.main([words[0], "--admin-url", admin, *words[1:], "--json"])
            return status, json.loads(capsys.readouterr().out)

        def place(reader: Reader) -> str | None:
            return next((row["replica"] for row in server.status()["requests"] if row["id"] == reader.request_id), None)

        readers = start(server.url)
        source = place(readers[0])
        to = "replica-1" if source == "replica-0" else "replica-0"
        status, moved = quire("migrate", readers[0].request_id, "--to", to)
        assert (status, moved["outcome"], moved["source"], moved["destination"]) == (0, "moved", source, to), moved
        assert moved["pages"] > 0
        assert moved["bytes"] > 0
        assert moved["downtime_ms"] > 0
        places = {row["id"]: row["replica"] for row in server.status()["requests"]}
        here = [reader for reader in readers if places.get(reader.request_id) == to]
        status, drained = quire("drain", to)
        assert (status, drained["state"], drained["requests"]) == (0, "drained", 0)
        assert 0 < drained["moved"] <= len(here)
        assert {row["id"]: row["state"] for row in server.status()["replicas"]}[to] == "drained"
        late = numbered(server.url, 1, ENDLESS)  # nothing new goes there
        assert late.begun.wait(WAIT_S)
        assert place(late) != to
        texts = [reader.leave(len(reader.text) + ON) for reader in (*readers, late)]
        assert quire("drain", to, "--undo")[1]["state"] == "ready"
        until("nothing is left", lambda: not any(row["pages"]["active"] for row in server.status()["replicas"]), server.stderr, WAIT_S)

        calm = [numbered(server.url, number, ENDLESS) for number in (*range(STREAMS), 1)]  # nothing moves now
        assert [reader.leave(len(text))[: len(text)] for reader, text in zip(calm, texts, strict=True)] == texts
        assert 'quire_migrations_total{outcome="moved",reason="operator"} 1.0' in httpx.get(admin + "/metrics").text
