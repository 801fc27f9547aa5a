"""benchmarks/decode_step.py: on a machine without a GPU it says so; what it drives runs in the interpreter on a tiny shape."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreter import install
from pretend_gpu import pretended


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = importlib.util.spec_from_file_location("decode_step", root / "benchmarks/decode_step.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_a_gpu(root: Path) -> None:
    command = [sys.executable, str(root / "benchmarks/decode_step.py"), "--no-peer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "this benchmark needs a CUDA device; torch finds none"


@pytest.mark.slow
def test_every_step_is_issued_ahead_and_none_is_lost(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "WARM_STEPS", 1)
    monkeypatch.setattr(script, "STEPS", 2)
    config = replace(script.shape(32, 1, 8, 16, 48, True), vocab_size=97, num_kv_heads=2)
    model = script.model_of(config, "cpu", torch.float32)
    runner = script.runner_of(model, 2, 5, "cpu", torch.float32, None)
    assert script.step_s(runner, 2, 5) > 0
    assert [slot.num_tokens for slot in runner._table._slots.values()] == [8, 8]
    assert all((runner._table.tokens(slot) >= 0).all() for slot in runner._table._slots.values())
    assert script.bytes_of(model, 2, 5) == (model.weight_bytes(), 2 * (5 + 1 + 1) * 1 * 2 * 16 * 4)


def test_the_shapes_are_those_of_their_names(script: ModuleType) -> None:
    parameters = {name: sum(torch.Size(s).numel() for s in config.shapes().values()) for name, config in script.MODELS.items()}
    assert parameters == {"1b": 1_235_814_400, "8b": 8_030_261_248}


@pytest.mark.slow
def test_it_runs_on_a_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A pretended one, on which all steps are graphs."""
    install()
    tiny = replace(script.shape(64, 2, 8, 16, 48, True), vocab_size=97, num_kv_heads=2)
    for name, value in {"WARM_STEPS": 2, "STEPS": 3, "MODELS": {"1b": tiny}}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.gpu, "copy_bandwidth", lambda: 1e9)
    result = tmp_path / "steps.json"
    monkeypatch.setattr(
        sys, "argv", ["decode_step.py", "--model", "1b", "--batch", "1,3", "--context", "40", "--no-peer", "--json", str(result)]
    )
    with pretended():
        script.main()
    lines = json.loads(result.read_text())["steps"]
    assert [(line["batch"], line["context"]) for line in lines] == [(1, 40), (3, 40)]
    assert all(line["step_ms"] > 0 for line in lines)
    assert capsys.readouterr().out.startswith("{'gpu': 'pretended'")
