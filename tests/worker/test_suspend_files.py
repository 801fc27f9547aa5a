"""One rank's files of pages: bit by bit, private, and whatever has happened to them an error and nothing more."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from movers import WAIT_S, Rank, plan

from quire.worker import suspend_files
from quire.worker.page_mover import Place
from quire.worker.plan import Move, Moved, MoveKind
from quire.worker.protocol import SamplingParams
from quire.worker.snapshot import SequenceSnapshot
from quire.worker.suspend_files import SuspendDirectory

SNAPSHOT = SequenceSnapshot("r", 0, 0, 0, (1, 2, 3), 2, SamplingParams(), 9, 5, None, 2).to_bytes()


class Disk:
    """A mover with a directory, and its moves one at a time."""

    def __init__(self, root: Path, dtype: torch.dtype = torch.float32) -> None:
        self.directory = SuspendDirectory(root)
        self.rank = Rank(2, Place(disk=self.directory), dtype)
        self.pool = self.rank.kv.pool
        self._moves = 0

    def do(self, kind: MoveKind, pages: tuple[int, ...], ordinals: tuple[int, ...] = (), file: str = "0") -> Moved:
        self._moves += 1
        self.rank.mover.start(plan(Move(self._moves, kind, pages, ordinals, "", file, SNAPSHOT if kind is MoveKind.SAVE else b"")))
        (moved,) = self.rank.ended()
        return moved

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory.path))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "kv")
    yield made
    made.rank.mover.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_come_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    disk = Disk(tmp_path, dtype)
    before = disk.pool.clone()
    assert disk.do(MoveKind.SAVE, (4, 1, 2))[1:] == (3, pytest.approx(0, abs=WAIT_S), None)
    disk.pool.zero_()
    assert disk.do(MoveKind.LOAD, (0, 3), (2, 0))[1::2] == (2, None)
    assert torch.equal(disk.pool[0], before[2])
    assert torch.equal(disk.pool[3], before[4])
    assert not disk.pool[[1, 2, 4, 5]].any()
    assert disk.names() == ["0"]
    assert disk.do(MoveKind.ERASE, ()).error is None
    assert disk.names() == []
    assert disk.do(MoveKind.ERASE, ()).error is None  # of what could not be written
    disk.rank.mover.close()


def test_only_this_user_reads_them(disk: Disk) -> None:
    disk.do(MoveKind.SAVE, (1,))
    assert stat.S_IMODE(disk.directory.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(disk.directory.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((disk.directory.path / "0").stat().st_mode) == 0o600


def damaged(data: bytes, how: str) -> bytes:
    head = len(suspend_files.MAGIC)
    match how:
        case "another version":
            return data[:head] + bytes([9]) + data[head + 1 :]
        case "something else":
            return b"?" * len(data)
        case "head":
            return data[: suspend_files._FIXED + 5] + bytes([data[suspend_files._FIXED + 5] ^ 1]) + data[suspend_files._FIXED + 6 :]
        case "page":
            return data[:-1] + bytes([data[-1] ^ 1])
        case "cut":
            return data[:-7]
        case _:
            return b""


@pytest.mark.parametrize("how", ["another version", "something else", "head", "page", "cut", "empty"])
def test_what_is_damaged_is_an_error_and_the_page_is_not_touched(how: str, disk: Disk) -> None:
    disk.do(MoveKind.SAVE, (1, 2))
    file = disk.directory.path / "0"
    file.write_bytes(damaged(file.read_bytes(), how))
    before = disk.pool.clone()
    assert disk.do(MoveKind.LOAD, (5,), (1,)).error is not None
    assert torch.equal(disk.pool, before)


def test_a_file_of_pages_of_another_size_or_too_few_is_an_error(disk: Disk, tmp_path: Path) -> None:
    disk.do(MoveKind.SAVE, (1,))
    assert "page 1 of a file of 1" in str(disk.do(MoveKind.LOAD, (5,), (1,)).error)
    other = Disk(tmp_path / "other", torch.float64)
    (other.directory.path / "0").write_bytes((disk.directory.path / "0").read_bytes())
    assert "bytes where one takes" in str(other.do(MoveKind.LOAD, (5,), (0,)).error)
    other.rank.mover.close()


def test_symbolic_links_are_not_followed(disk: Disk, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    (disk.directory.path / "0.unfinished").symlink_to(mine)
    assert disk.do(MoveKind.SAVE, (1,)).error is not None
    assert mine.read_bytes() == b"precious"
    disk.do(MoveKind.SAVE, (1,), file="1")
    (disk.directory.path / "2").symlink_to(disk.directory.path / "1")
    assert disk.do(MoveKind.LOAD, (5,), (0,), file="2").error is not None
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="disk_path"):
        SuspendDirectory(tmp_path / "link")
    (tmp_path / "kv" / "quire-1").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "file").write_text("stays")
    SuspendDirectory(tmp_path / "kv").close()
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_full_disk_leaves_nothing_behind(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [700]

    def full(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(suspend_files.os, "write", full)
    assert "No space" in str(disk.do(MoveKind.SAVE, (1, 2)).error)
    assert disk.names() == []
    room[0] = 10**9
    assert disk.do(MoveKind.SAVE, (1, 2)).error is None


def test_a_mover_without_a_disk_says_so() -> None:
    rank = Rank(2, Place())
    rank.mover.start(plan(Move(0, MoveKind.SAVE, (1,), (), "", "0", SNAPSHOT)))
    assert rank.ended()[0].error == "there is no disk"
    rank.mover.close()


KILLED_WHILE_IT_WRITES = """
import os, sys
from pathlib import Path
import test_suspend_files as tests
disk = tests.Disk(Path(sys.argv[1]))
disk.do(tests.MoveKind.SAVE, (1,))
def stuck(file, data):
    os.truncate(file, 100)
    print(disk.directory.path, flush=True)
    sys.stdin.read()
tests.suspend_files._write = stuck
disk.do(tests.MoveKind.SAVE, (2,), file="1")
"""


def test_what_a_process_leaves_that_is_killed_while_it_writes_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_IT_WRITES, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert sorted(os.listdir(path)) == ["0", "1.unfinished"]
        first = SuspendDirectory(tmp_path)  # while it lives nobody touches what is its own
        assert sorted(os.listdir(path)) == ["0", "1.unfinished"]
        process.kill()
    deadline_s = time.monotonic() + WAIT_S
    second = SuspendDirectory(tmp_path)
    while path.exists():  # the system lets go of its locks a moment later
        assert time.monotonic() < deadline_s
        second.close()
        second = SuspendDirectory(tmp_path)
    assert {first.path, second.path} == set(tmp_path.iterdir())
    first.close()
    second.close()
    assert list(tmp_path.iterdir()) == []
