"""What `quire status` and `quire top` draw, character by character."""

from __future__ import annotations

import pytest
from admin_peer import STATUS

from quire.deploy.commands.top import rates_between
from quire.deploy.screen import ASCII, BLOCKS, glyphs_for, page_map, status_lines, table, top_lines

TOP = {
    **STATUS.as_json(),
    "page_maps": {"replica-0": "a" * 12 + "s" * 4 + "c" * 16 + "f" * 32},
    "tokens": {"replica-0": {"epoch": 7, "prompt": 500, "output": 1000}},
    "queue": {"requests": 3, "tokens": 170},
}


@pytest.mark.parametrize(
    ("states", "width", "rows", "drawn"),
    [
        ("", 4, 4, []),
        ("ascrmf", 8, 4, ["#S+rr."]),
        ("aaaaffff", 4, 4, ["####", "...."]),  # one page to a cell while there is room
        ("aaaaffff", 4, 1, ["##.."]),  # two to a cell
        ("affafa", 2, 1, [".#"]),  # the most frequent state
        ("afsfcf", 3, 1, ["#S+"]),  # among equals the one that is used more
        ("aaaaaaf", 2, 1, ["##"]),  # the last cell may be shorter
        ("a" * 100_000 + "f" * 100_000, 10, 4, ["#" * 10, "#" * 10, "." * 10, "." * 10]),
    ],
)
def test_a_page_map_shrinks_to_the_width(states: str, width: int, rows: int, drawn: list[str]) -> None:
    assert page_map(states, width, ASCII, rows) == drawn


def test_status_for_people() -> None:
    bar = "#" * 6 + "+" * 6 + "." * 12
    ranks = "0: pid 300 on node-a, 1: pid 301 on node-a"
    pages = f"{bar} 16 active, 16 cached of 64"
    assert status_lines(STATUS.as_json(), ASCII) == [
        "controller  pid 100",
        "ingresses   ingress-0 (pid 200)",
        "",
        f"REPLICA    STATE     MODEL  {'RANKS':<42}  {'PAGES':<{len(pages)}}  RUNNING  WAITING",
        f"replica-0  ready     tiny   {ranks}  {pages}  2        1",
        f"replica-1  starting  -      {'-':<42}  {'-':<{len(pages)}}  0        0",
        "",
        "REQUEST  REPLICA    TENANT  STATE    PROMPT  OUTPUT",
        "cmpl-1   replica-0  search  running  12      34",
        "cmpl-2   -          batch   queued   56      0",
    ]
    assert status_lines({**STATUS.as_json(), "requests": []}, ASCII)[-1] == "no requests"


def test_a_frame_of_top() -> None:
    frame = top_lines(TOP, {"replica-0": (250.4, 99.6)}, (60, 0), ASCII)
    assert frame[0] == "2 requests   3 queued (170 tokens)   250 prompt, 100 output tokens/s"[:60]
    assert frame[1].startswith("2 replicas (replica-1 starting), 1 ingresses")
    assert frame[3].startswith("replica-0  ready   2 running, 1 waiting   16 active")
    with_host = {**TOP["replicas"][0], "pages": {**TOP["replicas"][0]["pages"], "host": 5}}
    assert top_lines({**TOP, "replicas": [with_host]}, None, (120, 0), ASCII)[3].endswith("32 free of 64 pages + 5 host")
    assert frame[4:6] == ["#" * 12 + "SSSS" + "+" * 16 + "." * 28, "...."]
    assert frame[6].startswith("replica-1  starting")
    assert frame[-2:] == ["cmpl-1   replica-0  search  running  12      34", "cmpl-2   -          batch   queued   56      0"]
    assert all(len(line) <= 60 for line in frame)


def test_a_frame_fits_the_screen() -> None:
    whole = top_lines(TOP, None, (80, 0), ASCII)
    assert top_lines(TOP, None, (80, len(whole)), ASCII) == whole
    cut = top_lines(TOP, None, (80, 5), ASCII)
    assert cut == [*whole[:4], f"... {len(whole) - 4} more lines"]


def test_rates_count_within_one_life_of_a_replica() -> None:
    def top(epoch: int, prompt: int, output: int) -> dict[str, object]:
        return {"tokens": {"r": {"epoch": epoch, "prompt": prompt, "output": output}}}

    assert rates_between(top(1, 100, 50), top(1, 300, 60), 2.0) == {"r": (100.0, 5.0)}
    assert rates_between(top(1, 100, 50), top(2, 10, 5), 2.0) == {"r": (0.0, 0.0)}
    assert rates_between({"tokens": {}}, top(1, 10, 5), 2.0) == {"r": (0.0, 0.0)}


def test_blocks_only_where_they_can_be_shown() -> None:
    assert (glyphs_for("utf-8"), glyphs_for("ascii"), glyphs_for(None), glyphs_for("nonsense")) == (BLOCKS, ASCII, ASCII, ASCII)


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    assert table(("A",), [("x\x1b[2J",)]) == ["A", "x?[2J"]
