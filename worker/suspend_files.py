"""Sequences on disk: one rank's files of pages, and the directory that is theirs alone.

    magic, version, length of the head (8 bytes), checksum of the head, head (`_Head`), then the pages, each `page_bytes` long

A file is written under another name and renamed when it is whole. Whatever is damaged, of another version, or not there is an error of the
move that wanted it. The directory is new in each life of a process and locked as long as that lives; those whose lock is free are of dead
ones and are removed by whoever comes next.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .kv_store import KVStore
from .plan import Move, MoveKind
from .snapshot import SequenceSnapshot
from .strict_wire import BadMessage, pack, unpack

MAGIC, VERSION = b"quire-pages", 1
PREFIX = "quire-"
MOST_HEAD_BYTES = 2**30
_LENGTH, _DIGEST = 8, 16
_FIXED = len(MAGIC) + 1 + _LENGTH + _DIGEST


class _Head(NamedTuple):
    snapshot: bytes  # `SequenceSnapshot.to_bytes`
    page_bytes: int
    digests: tuple[bytes, ...]  # of each page


class SuspendDirectory:
    """A directory below `root` that is this process's alone, with mode 0700. Follows no symbolic links.

    Raises:
        ValueError: there can be none; names the option.
    """

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            above = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(above, fcntl.LOCK_EX)  # one at a time comes, and sees who is dead
                for name in os.listdir(above):
                    if name.startswith(PREFIX):
                        _remove_if_dead(above, name)
                name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
                os.mkdir(name, 0o700, dir_fd=above)
                self.fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
                fcntl.flock(self.fd, fcntl.LOCK_EX)
            finally:
                os.close(above)
        except OSError as error:
            raise ValueError(f"disk_path: {root} cannot hold suspended sequences: {error}") from None
        self.path = root / name

    def close(self) -> None:
        """Nothing in it is wanted any more."""
        _empty(self.fd)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self.fd)


class SuspendFiles:
    """What a lane does with the files of `directory` (`page_lane.Work`)."""

    def __init__(self, kv: KVStore, directory: SuspendDirectory) -> None:
        self._kv = kv
        self._directory = directory

    def open(self) -> None:
        """As `Work.open`."""

    def carry(self, move: Move) -> int:
        """As `Work.carry`.

        Raises:
            OSError: the disk is full or does not answer, or there is no such file.
            BadMessage: the file is damaged, or not of this version.
        """
        match move.kind:
            case MoveKind.SAVE:
                self._save(move)
            case MoveKind.LOAD:
                self._load(move)
            case _:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(move.file, dir_fd=self._directory.fd)
        return len(move.pages)

    def stop(self) -> None:
        """As `Work.stop`: nobody waits in it for others."""

    def close(self) -> None:
        """As `Work.close`."""
        self._directory.close()

    def _save(self, move: Move) -> None:
        SequenceSnapshot.from_bytes(move.snapshot)  # what cannot be read is not written
        digests = tuple(_digest(_bytes(self._kv.pool[page])) for page in move.pages)  # page by page: all at once may be more than is free
        head = pack(_Head(move.snapshot, self._kv.page_bytes, digests))
        start = MAGIC + bytes([VERSION]) + len(head).to_bytes(_LENGTH, "little") + _digest(head) + head
        unfinished = f"{move.file}.unfinished"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with _opened(unfinished, flags, self._directory.fd) as file:
                _write(file, start)
                for page in move.pages:
                    _write(file, _bytes(self._kv.pool[page]))
            os.rename(unfinished, move.file, src_dir_fd=self._directory.fd, dst_dir_fd=self._directory.fd)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=self._directory.fd)
            raise

    def _load(self, move: Move) -> None:
        with _opened(move.file, os.O_RDONLY | os.O_NOFOLLOW, self._directory.fd) as file:
            head, at = self._read_head(file)
            for ordinal, page in zip(move.host_pages, move.pages, strict=True):
                if ordinal >= len(head.digests):
                    raise BadMessage(f"page {ordinal} of a file of {len(head.digests)}")
                data = os.pread(file, head.page_bytes, at + ordinal * head.page_bytes)
                if _digest(data) != head.digests[ordinal]:
                    raise BadMessage(f"page {ordinal} of the file is damaged")
                target = self._kv.pool[page]
                target.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8).view(target.dtype).view(target.shape))

    def _read_head(self, file: int) -> tuple[_Head, int]:
        """The head, and where the pages begin."""
        fixed = os.pread(file, _FIXED, 0)
        magic, version, rest = fixed[: len(MAGIC)], fixed[len(MAGIC) : len(MAGIC) + 1], fixed[len(MAGIC) + 1 :]
        if magic != MAGIC or version != bytes([VERSION]):
            raise BadMessage(f"not a file of pages of version {VERSION}")
        length = int.from_bytes(rest[:_LENGTH], "little")
        if length > MOST_HEAD_BYTES:
            raise BadMessage(f"a head of {length} bytes")
        data = os.pread(file, length, _FIXED)
        if _digest(data) != rest[_LENGTH:]:
            raise BadMessage("the file is damaged: the checksum of its head is wrong")
        head = unpack(_Head, data)
        SequenceSnapshot.from_bytes(head.snapshot)
        if head.page_bytes != self._kv.page_bytes:
            raise BadMessage(f"pages of {head.page_bytes} bytes where one takes {self._kv.page_bytes}")
        return head, _FIXED + length


def _remove_if_dead(above: int, name: str) -> None:
    """Remove what is left of a process that is gone. What is no directory of this user's is left alone."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _empty(fd)
        os.rmdir(name, dir_fd=above)
    except BlockingIOError:  # it lives
        return
    finally:
        os.close(fd)


def _empty(fd: int) -> None:
    for name in os.listdir(fd):
        os.unlink(name, dir_fd=fd)


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    file = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadMessage(f"{name} is no file")
        yield file
    finally:
        os.close(file)


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _bytes(page: Tensor) -> bytes:
    return page.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()
