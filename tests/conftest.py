"""What every test gets: few threads, no Ray unless it says so, and the way to real data."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CORES = sorted(os.sched_getaffinity(0))
# Before torch is imported anywhere: tests share the machine.
if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for what computes here; its neighbour has the other. What a test starts as a process of its own sees them all.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_getaffinity = lambda pid: set(CORES[:1])
else:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, len(CORES))))

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """`-m gpu --pretend-gpu` runs the tests for a GPU where there is none."""
    parser.addoption("--pretend-gpu", action="store_true", help="a GPU of Triton's interpreter and NumPy (tests/kernels/pretend_gpu.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Kernel tests run in Triton's interpreter unless the GPU ones were asked for; Triton must know before it is imported."""
    if config.option.markexpr != "gpu" or config.option.pretend_gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.option.pretend_gpu:
        sys.path.insert(0, str(ROOT / "tests" / "kernels"))
        import interpreter
        from pretend_gpu import pretended

        interpreter.install()
        gpu = pretended()
        gpu.__enter__()
        config.add_cleanup(lambda: gpu.__exit__(None, None, None))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first, so that two processes of tests end at about the same time.

    In one process it must be so anyway: other tests leave threads behind that have used OpenMP, and where it counts more of those than
    there are cores, it puts them to sleep between any two loops, so that one core does nearly everything.
    """
    items.sort(key=lambda item: next((place for place, mark in enumerate(("first", "ray", "slow")) if item.get_closest_marker(mark)), 3))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only files that have such a test are imported: others may need packages that a GPU machine lacks."""
    if config.option.markexpr != "gpu" or not (collection_path.is_dir() or collection_path.name.startswith("test_")):
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    found = any(file.parent.name == "kernels" or "pytest.mark.gpu" in file.read_text() for file in files)
    return None if found else True


@pytest.fixture(autouse=True)
def _root_log() -> Iterator[None]:
    """Where a test sends the log, to a stream that is closed after it, no other does."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit test that starts Ray, or joins one, fails."""
    if request.node.get_closest_marker("ray"):
        return
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        return

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this test starts Ray; mark it with pytest.mark.ray, or test the undecorated class")

    monkeypatch.setattr(ray, "init", refuse)
    # Ray also starts itself on the first remote call; that goes through the same function, looked up here.
    monkeypatch.setattr(ray._private.worker, "init", refuse)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """`data_file("prompts/shakespeare_sonnets.txt")`: the path of a real data file, or the test is skipped.

    Looked for in $QUIRE_DATA, else in ../shared/data beside the repository.
    """
    base = Path(os.environ.get("QUIRE_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        path = base / name
        if not path.is_file():
            pytest.skip(f"{name} is not in {base}; set QUIRE_DATA to a directory that has it")
        return path

    return find


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No QUIRE_* variable of the developer's shell reaches the command line under test."""
    for name in [name for name in os.environ if name.startswith("QUIRE_")]:
        monkeypatch.delenv(name)
