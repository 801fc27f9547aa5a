"""kill -9 of every kind of process while streams run: benchmarks/recovery.py on a tiny model with two ranks to each of two replicas.

The benchmark is what finds violations, so first it is shown that it does find them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tiny_server import save_tiny_model

TIMEOUT_S = 800.0
SIZE = {"--replicas": "2", "--tp": "2", "--ingresses": "2", "--streams": "12", "--tokens": "200", "--rounds": "4"}


@pytest.fixture(scope="module")
def recovery(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recovery", root / "benchmarks" / "recovery.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["recovery"] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")  # where a script finds its neighbours
        spec.loader.exec_module(module)
    return module


@pytest.mark.ray
@pytest.mark.slow
def test_killing_any_process_costs_clients_a_pause_and_nothing_else(root: Path, tmp_path: Path, data_file: Callable[[str], Path]) -> None:
    model = tmp_path / "model"
    save_tiny_model(model)
    text = data_file("prompts/shakespeare_sonnets.txt")
    flags = [part for pair in SIZE.items() for part in pair]
    command = [sys.executable, str(root / "benchmarks" / "recovery.py"), "--model", str(model), "--text", str(text), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert [r["wrong"] for r in found["rounds"]] == [[]] * 4
    assert found["totals"]["by_kind"].keys() == {"leader", "rank", "controller", "ingress"}
    assert sum(r["hit"] for r in found["rounds"] if r["kind"] in ("leader", "rank")) > 0


def test_what_a_client_must_not_see_is_found(recovery: ModuleType) -> None:
    calm = recovery.Stream({}, text="abcdef", tokens=6)
    same = replace(calm)
    for wrong in (
        replace(calm, text="abcabcdef", tokens=9),  # repeated
        replace(calm, text="abdef", tokens=5),  # lost
        replace(calm, tokens=7),
        replace(calm, error="HTTP 503"),
        replace(calm, text="abc", tokens=None, error="the stream was cut"),
    ):
        assert len(recovery.differences([calm, calm], [same, wrong], set())) == 1
        assert recovery.differences([calm, calm], [same, wrong], set())[0].startswith("stream 1: ")
    assert recovery.differences([calm, calm], [same, same], set()) == []


def test_only_what_a_killed_ingress_cut_is_excused_and_its_text_was_right_until_then(recovery: ModuleType) -> None:
    calm = recovery.Stream({}, text="abcdef", tokens=6)
    cut = replace(calm, text="abc", tokens=None, error="the stream was cut")
    assert recovery.differences([calm], [cut], {0}) == []
    assert recovery.differences([calm], [replace(cut, text="abd")], {0}) == ["stream 0: was cut, and its text was wrong before that"]
    assert len(recovery.differences([calm], [replace(calm, text="abc", tokens=3)], {0})) == 1  # ended, but early


def test_pages_in_use_and_missing_processes_are_found(recovery: ModuleType) -> None:
    rank = {"rank": 0, "pid": 3, "node": "n"}
    replica = {"id": "replica-0", "state": "ready", "ranks": [rank], "pages": {"total": 8, "free": 6, "cached": 2, "active": 0}}
    status = {"controller": {"pid": 1}, "ingresses": [{"id": "ingress-0", "pid": 2}], "replicas": [replica], "requests": []}
    assert recovery.at_rest(status)
    assert not recovery.at_rest({**status, "replicas": [{**replica, "pages": {**replica["pages"], "active": 1}}]})
    assert not recovery.at_rest({**status, "replicas": [{**replica, "pages": {**replica["pages"], "free": 5}}]})
    assert not recovery.at_rest({**status, "requests": [{"id": "a"}]})
    wanted = recovery.argparse.Namespace(replicas=1, tp=1, ingresses=1)
    assert recovery.complete(status, wanted)
    assert not recovery.complete(status, wanted, gone=3)
    assert not recovery.complete({**status, "ingresses": []}, wanted)
    assert not recovery.complete({**status, "replicas": [{**replica, "state": "starting"}]}, wanted)
    assert [(v.kind, v.pid) for v in recovery.victims(status)] == [("controller", 1), ("ingress", 2), ("leader", 3)]
