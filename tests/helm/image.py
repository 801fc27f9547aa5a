"""The image without Docker: what the Dockerfile copies, installed where it installs it, run as it would be run.

A private mount namespace makes it so: the root file system is read-only, /tmp and the home directory are fresh, the virtual environment
lies at its place, and the process has the image's user, its environment, no capabilities and no way to get any. The packages that
Quire needs come from the environment of the tests instead of an index.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = Path(sysconfig.get_path("purelib"))

# As root in a namespace of its own: $1 is the folder that holds `quire` (the virtual environment), $2 what to keep of /root.
_ENTER = """
set -e
work=$1 keep=$2; shift 2
mount --make-rprivate /
hide=$(mktemp -d)
mkdir $hide/quire $hide/root
mount --bind "$work/quire" $hide/quire
mount --bind /root $hide/root
mount -t tmpfs -o mode=755 tmpfs /root
for path in $keep; do mkdir -p /root/$path; mount --bind $hide/root/$path /root/$path; done
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir /opt/quire
mount --bind $hide/quire /opt/quire
mount -t tmpfs -o mode=755 tmpfs /home
install -d -o 65532 -g 65532 /home/quire
mount -o remount,ro,bind /
mount -t tmpfs -o mode=1777 tmpfs /tmp
cd /home/quire
exec "$@"
"""


@dataclass(frozen=True)
class Dockerfile:
    """What the last stage says, and what the build copies from the context."""

    copied: tuple[str, ...]
    env: dict[str, str]
    user: str
    workdir: str
    entrypoint: list[str]
    command: list[str]
    args: dict[str, str]


def read_dockerfile() -> Dockerfile:
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    last = max(i for i, (word, _) in enumerate(lines) if word == "FROM")
    final = [(word, rest) for word, rest in lines[last:]]

    def one(word: str) -> str:
        (found,) = [rest for name, rest in final if name == word]
        return found

    env = dict(pair.split("=", 1) for name, rest in final if name == "ENV" for pair in shlex.split(rest))
    copies = [rest.split()[:-1] for word, rest in lines if word == "COPY" and not rest.startswith("--from")]
    args = dict(rest.split("=", 1) for word, rest in lines if word == "ARG" and "=" in rest)
    return Dockerfile(
        tuple(source for sources in copies for source in sources),
        env,
        one("USER"),
        one("WORKDIR"),
        json.loads(one("ENTRYPOINT")),
        json.loads(one("CMD")),
        args,
    )


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out of the context: the last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parts = [path, *map(str, Path(path).parents)]
        if any(fnmatch(part, pattern) or (pattern.startswith("**/") and fnmatch(Path(part).name, pattern[3:])) for part in parts):
            out = not line.startswith("!")
    return out


def copy_context(to: Path) -> None:
    """What the COPY lines copy, less what .dockerignore leaves out."""
    for source in read_dockerfile().copied:
        files = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
        for file in files:
            name = str(file.relative_to(ROOT))
            if file.is_file() and not ignored(name):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, to / name)


class Image:
    """The file system of the image, in a folder."""

    def __init__(self, folder: Path) -> None:
        """Installs it.

        Skips the test where that cannot be: without root, or without the right to mount.
        """
        self.dockerfile = read_dockerfile()
        self._folder = folder
        (folder / "quire").mkdir()
        if os.geteuid() != 0 or self._as_root("true").returncode != 0:
            pytest.skip("needs root and mount namespaces, to become another user on a read-only root")
        if self._as_root(sys.executable, "-c", "").returncode != 0:
            pytest.skip(f"{sys.executable} is not there in the image's view of this machine")
        copy_context(folder / "src")
        self._install()

    def command(self, *command: str) -> list[str]:
        """What runs a command as a container of the image would; for `subprocess`."""
        user, group = self.dockerfile.user.split(":")
        drop = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
        drop += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        env = {**self.dockerfile.env, "OMP_NUM_THREADS": "2"}
        return self._enter(*drop, "env", "-i", *(f"{name}={value}" for name, value in env.items()), *command)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*command), capture_output=True, text=True, timeout=240, check=False)

    def _install(self) -> None:
        """A virtual environment with the wheel of what was copied; what the wheel needs is found where the tests find it."""
        # `pip install` writes paths into scripts, so this happens where they will be; the wheel is built before, where it may write.
        src = self._folder / "src"
        wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(self._folder), str(src)]
        subprocess.run(wheel, check=True, timeout=240)
        (built,) = self._folder.glob("quire-*.whl")
        shutil.copy(built, self._folder / "quire")
        made = self._as_root(
            "sh",
            "-ec",
            f"{sys.executable} -m venv --without-pip /opt/quire; "
            f"{sys.executable} -m pip --python /opt/quire/bin/python install -q --no-deps --no-index /opt/quire/{built.name}",
        )
        if made.returncode:
            raise RuntimeError(made.stderr)
        (installed,) = (self._folder / "quire").glob("lib/python3*/site-packages")
        (installed / "of_the_tests.pth").write_text(f"{PACKAGES}\n")

    def _enter(self, *command: str) -> list[str]:
        keep = [str(path.relative_to("/root")) for path in (Path(sys.base_prefix), PACKAGES) if path.is_relative_to("/root")]
        return ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self._folder), " ".join(keep), *command]

    def _as_root(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._enter(*command), capture_output=True, text=True, timeout=240, check=False)
