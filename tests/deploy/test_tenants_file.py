"""Keys and tenants: what a file may say, and that what is wrong in it is named without the keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.cluster.tenants import TenantLimits
from quire.deploy.tenants_file import load_tenants
from quire.worker.config import ServerOptions

SECRET = "sk-very-secret"


@pytest.fixture
def load(tmp_path: Path):
    def write_and_load(text: str, *api_key: str, name: str = "keys"):
        path = tmp_path / name
        path.write_text(text)
        return load_tenants(ServerOptions(api_key=api_key, api_key_file=str(path)))

    return write_and_load


def test_keys_come_from_options_and_from_lines_each_a_tenant_of_its_own(load) -> None:
    keys, limits = load("one\n\n  two  \n", "zero")
    assert len(keys) == 3
    tenants = {keys.tenant(key) for key in (b"zero", b"one", b"two")}
    assert len(tenants) == 3
    assert None not in tenants
    assert not any("one" in name for name in tenants)
    assert keys.tenant(b"") is None
    assert limits == ()


def test_without_a_file_only_the_options_count() -> None:
    keys, limits = load_tenants(ServerOptions(api_key=("a",)))
    assert len(keys) == 1
    assert limits == ()
    assert len(load_tenants(ServerOptions())[0]) == 0


def test_a_file_without_keys_does_not_open_the_server(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no API key"):
        load("\n \n")
    with pytest.raises(ValueError, match="empty"):
        load_tenants(ServerOptions(api_key=("",)))
    with pytest.raises(OSError, match="missing"):
        load_tenants(ServerOptions(api_key_file=str(tmp_path / "missing")))


def test_tenants_with_keys_weights_and_limits(load) -> None:
    keys, limits = load(
        """
# who may use it
tenants:
  - name: search
    keys: ["sk-1", "sk-2"]
    weight: 2
    requests_per_s: 0.5
    tokens_per_min: 100000
    max_concurrent: 32
    max_pages: 4096
  - {name: batch, keys: [sk-3], weight: null}
""",
        "alone",
    )
    assert limits == (TenantLimits("search", 2.0, 0.5, 100000.0, 32, 4096), TenantLimits("batch"))
    assert [keys.tenant(key) for key in (b"sk-1", b"sk-2", b"sk-3", b"sk-4")] == ["search", "search", "batch", None]
    assert keys.tenant(b"alone") not in (None, "search", "batch")


TENANT = f"tenants: [{{name: a, keys: [{SECRET}], %s}}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TENANT % "wieght: 2", "tenant a: wieght: there is no such field; did you mean weight?"),
        (TENANT % "weight: 0", "tenant a: weight: must be a number above 0 (got 0)"),
        (TENANT % "weight: .inf", "tenant a: weight: must be a number above 0 (got inf)"),
        (TENANT % "weight: .nan", "tenant a: weight: must be a number above 0 (got nan)"),
        (TENANT % "weight: heavy", "tenant a: weight: must be a number above 0 (got 'heavy')"),
        (TENANT % "requests_per_s: -1", "tenant a: requests_per_s: must be a number above 0 (got -1)"),
        (TENANT % "tokens_per_min: true", "tenant a: tokens_per_min: must be a number above 0 (got True)"),
        (TENANT % "max_concurrent: 1.5", "tenant a: max_concurrent: must be a whole number of at least 1 (got 1.5)"),
        (TENANT % "max_pages: 0", "tenant a: max_pages: must be a whole number of at least 1 (got 0)"),
        ("tenants: [{name: a, keys: []}]", "tenant a: keys: must be a list of API keys, and not empty"),
        ("tenants: [{name: a}]", "tenant a: keys: must be a list of API keys, and not empty"),
        ("tenants: [{name: a, keys: [12345]}]", "tenant a: keys: each must be text"),
        ("tenants: [{name: a, keys: ['']}]", "tenant a: keys: each must be text"),
        (f"tenants: [{{name: a, keys: [{SECRET}, {SECRET}]}}]", "tenant a: keys: one of them is given twice"),
        (
            f"tenants: [{{name: a, keys: [{SECRET}]}}, {{name: b, keys: [{SECRET}]}}]",
            "tenant b: keys: one of them is given twice, or",
        ),
        (f"tenants: [{{name: a, keys: [{SECRET}]}}, {{name: a, keys: [x]}}]", "tenant a: name: is given twice"),
        (f"tenants: [{{keys: [{SECRET}]}}]", "tenant 1: name: must be"),
        (f"tenants: [{{name: 'a b', keys: [{SECRET}]}}]", "tenant 1: name: must be"),
        ("tenants: [a]", "tenant 1: must be fields with values"),
        ("tenants: []", "tenants: must be a list of tenants, and not empty"),
        ("tenants:", "tenants: must be a list of tenants, and not empty"),
        (f"tenants: []\nkeys: [{SECRET}]", "keys: there is no such field"),
        (f"version: 1\ntenants: [{{name: a, keys: [{SECRET}]}}]", "version: there is no such field"),
        (f"tenants:\n  - name: a\n    keys: [{SECRET}: [", "is not YAML (line 3)"),
    ],
)
def test_a_wrong_file_is_refused_by_file_tenant_and_field(load, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        load(text)
    assert str(caught.value).startswith(f"{tmp_path / 'keys'}: ")
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_yaml_file_is_never_read_as_lines_of_keys(load) -> None:
    with pytest.raises(ValueError, match="tenants"):
        load("tenant:\n  - name: a\n", name="keys.yaml")
    with pytest.raises(ValueError, match="also given by --api-key"):
        load("tenants: [{name: a, keys: [same]}]", "same")
