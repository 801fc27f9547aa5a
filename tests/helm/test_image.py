"""The image's entry points, run as the image would run them: from the Dockerfile's file list, as its user, on a read-only root."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator

import pytest
from image import ROOT, Image, ignored, read_dockerfile

CHART = ROOT / "helm"


def test_the_context_holds_what_is_copied_and_nothing_else():
    copied = read_dockerfile().copied
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in tracked:
        inside = any(name == source or name.startswith(f"{source}/") for source in copied)
        assert ignored(name) != inside, name
    assert ignored("deploy/__pycache__/cli.cpython-311.pyc")
    assert ignored("kernels/cpu.so")


def test_the_user_is_not_root_and_its_number_is_that_of_the_chart(values):
    assert read_dockerfile().user == "{runAsUser}:{runAsGroup}".format(**values["podSecurityContext"])


def test_the_chart_names_the_ray_that_is_installed(values):
    assert read_dockerfile().args["RAY_VERSION"] == values["rayVersion"]


@pytest.mark.slow
def test_quire_is_the_one_that_was_copied(image: Image):
    done = image.run("python", "-c", "import os, quire; print(quire.__file__, os.getuid(), os.geteuid())")
    assert re.fullmatch(r"/opt/quire/lib/python3\.\d+/site-packages/quire/__init__\.py 65532 65532\n", done.stdout), done.stderr


@pytest.mark.slow
def test_nothing_of_it_can_be_written(image: Image):
    done = image.run("sh", "-c", "touch /opt/quire/x || touch /usr/x || touch /x || touch /home/quire/x /tmp/x /dev/shm/quire-test")
    assert done.returncode == 0
    assert done.stderr.count("cannot touch") == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", ["quire --help", "quire env", "python -m quire.deploy.cli --version"])
def test_entry_points(image: Image, command: str):
    done = image.run(*command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "quire" in done.stdout


@pytest.mark.slow
def test_the_application_that_serve_deploys_can_be_imported(image: Image):
    done = image.run("python", "-c", "import quire.deploy.serve_app")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def serving(image: Image) -> Iterator[str]:
    """The URL of the image's default command; with free ports, and a pool that leaves room for others."""
    command = [*image.dockerfile.command, "--port=0", "--admin-port=0", "--kv-memory=64MB"]
    with subprocess.Popen(image.command(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            line = served.stdout.readline()
            ready = re.fullmatch(r"Quire is ready on http://0\.0\.0\.0:(\d+)\n", line)
            if ready is None:
                served.send_signal(signal.SIGTERM)
                pytest.fail(f"{line!r} {served.communicate(timeout=60)[1]}")
            yield f"http://127.0.0.1:{ready[1]}"
            served.send_signal(signal.SIGTERM)
            out, err = served.communicate(timeout=60)
            assert served.returncode == 0, out + err
        finally:
            served.kill()


@pytest.mark.slow
def test_the_default_command_serves_and_answers_the_hook_of_helm_test(image: Image, serving: str):
    done = image.run("python", "-c", (CHART / "files" / "answers.py").read_text(), serving, "60", "smollm2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"smollm2: '.+'\n", done.stdout)
