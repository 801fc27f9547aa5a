"""`quire simulate` and `quire profile` as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cluster.simulator.speed_profile import load, parse
from quire.deploy import cli
from quire.deploy.load.playing import Pace, jobs_of
from quire.deploy.load.traces import TraceOptions, TraceRow

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{i // 4:02d}.{i % 4 * 25:02d}00000,{200 + i},{20 + i % 7}" for i in range(120)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n")
    return path


def test_it_prints_a_table_and_writes_json_and_a_picture(trace, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--replicas", "2", "--slo-ttft-ms", "100", "--json", str(out), "--png", str(picture)]
    assert cli.main(["simulate", "--trace", str(trace), *flags]) == 0
    said = capsys.readouterr()
    assert "derived from a data sheet, not measured" in said.out
    assert "120 of 120" in said.out
    assert "GPU-hours" in said.out
    assert "s of the cluster in" in said.err
    found = json.loads(out.read_text())
    assert found["summary"]["requests"] == len(found["requests"]) == 120
    assert found["summary"]["replicas_most"] == 2
    assert found["summary"]["gpu_hours"] == pytest.approx(2 * found["summary"]["duration_s"] / 3600)
    assert found["profile"]["derived"] is True
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_gives_the_same_figures(trace, tmp_path):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.json"
        flags = ["--multiply", "2.5", "--policy", "power_of_two", "--replicas", "3", "--seed", str(seed), "--json", str(out)]
        assert cli.main(["simulate", "--trace", str(trace), *flags]) == 0
        runs.append(json.loads(out.read_text())["requests"])
    assert runs[0] == runs[1] != runs[2]


def test_a_lone_request_has_four_messages_on_its_way(tmp_path):
    trace, ttfts_ms = tmp_path / "lone.csv", []
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:00.0000000,200,20\n")
    for hop_ms in ("0", "25"):
        out = tmp_path / f"{hop_ms}.json"
        assert cli.main(["simulate", "--trace", str(trace), "--hop-ms", hop_ms, "--json", str(out)]) == 0
        ttfts_ms.append(json.loads(out.read_text())["summary"]["ttft_ms"]["p50"])
    assert ttfts_ms[1] == pytest.approx(ttfts_ms[0] + 100)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--speed-profile", "nothing"], "shipped profiles: h200-llama-70b-tp4"),
        (["--policy", "luck"], "must be one of cost"),
        (["--prefill-replicas", "1"], "--prefill-replicas: must be from 0 to 0"),
        (["--from-s", "9999"], "has no request in that time"),
        (["--scale", "0.0001"], "has no request of at most"),
    ],
)
def test_what_cannot_be_is_named(trace, capsys, flags, says):
    assert cli.main(["simulate", "--trace", str(trace), *flags]) == 2
    assert says in capsys.readouterr().err


def test_copies_come_after_their_original_and_a_part_is_cut_out():
    rows = [TraceRow(100.0 + i, 10 + i, 5, (i,)) for i in range(50)]
    jobs = jobs_of(rows, TraceOptions(), Pace(from_s=10, until_s=30, speedup=2.0, multiply=3.0))
    assert len(jobs) == 60
    assert [job.arrival_s for job in jobs if job.request_id.endswith(".0")] == [i / 2 for i in range(20)]
    assert all(0 <= job.arrival_s <= (20 + 60) / 2 for job in jobs)
    assert len({job.request_id for job in jobs}) == 60
    assert {(job.prompt_tokens, job.blocks, job.block_tokens) for job in jobs} == {(10 + i, (i,), 512) for i in range(10, 30)}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a real model, on a machine that may be busy
def test_a_profile_of_this_machine_can_be_simulated(trace, tmp_path, capsys):
    path = tmp_path / "here.json"
    flags = ["--kv-pages", "64", "--max-running", "8", "--threads", "1", "--seconds", "0.1", "--name", "here", "--json", str(path)]
    assert cli.main(["profile", *flags]) == 0
    said = capsys.readouterr().out
    assert "error of the fit: median" in said
    profile = parse(path.read_text())
    assert (profile.name, profile.derived, profile.replica.pages, profile.replica.max_running) == ("here", False, 64, 8)
    assert profile.origin["versions"].keys() == {"quire", "torch", "python"}
    assert profile.error["steps"] >= 6
    assert load(str(path)) == profile
    assert cli.main(["simulate", "--trace", str(trace), "--speed-profile", str(path), "--scale", "8"]) == 0
    assert "(measured)" in capsys.readouterr().out
