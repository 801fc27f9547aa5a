"""The arguments of the application on Ray Serve, and what is built of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from quire.cluster.upgrading import hindrance, shared, version
from quire.deploy.application import Arguments, ModelArguments, models_of
from quire.deploy.options import options
from quire.worker.config import AutoscalingOptions, LimitOptions, QuireOptions
from quire.worker.options import OptionError, assemble


def models(*given: dict[str, Any], **options: Any) -> Any:
    return models_of(Arguments.model_validate({"models": list(given), "options": options}))


def test_options_of_all_models_and_of_one():
    small, large = models(
        {"name": "small"}, {"name": "large", "options": {"tp": 4, "kv-memory": "2GiB", "log_level": "debug"}}, **{"log-level": "error"}
    ).values()
    assert (small.engine.model.served_model_name, small.cluster.namespace, small.server.log_level) == ("small", "quire-small", "error")
    assert (large.engine.parallel.tp, large.engine.cache.kv_memory, large.server.log_level) == (4, 2**31, "debug")
    assert (large.cluster.namespace, large.cluster.ray_address) == ("quire-large", "auto")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"name": "Big"}, "models: Big: name: must be up to 63 small letters"),
        ({"name": "a", "options": {"kv-memroy": 1}}, "models: a: kv-memroy: there is no such option here; did you mean kv-memory?"),
        ({"name": "a", "options": {"tp": 0}}, "models: a: tp: must be from 1"),
        ({"name": "a", "options": {"tp": 1, "t-p": 1}}, "models: a: t-p: there is no such option here"),
        ({"name": "a", "options": {"kv-memory": 5, "kv_memory": 5}}, "models: a: kv_memory: is given twice"),
        ({"name": "a", "options": {"port": 1}}, "models: a: port: there is no such option here"),
        ({"name": "a", "options": {"namespace": "x"}}, "there is no such option here"),
        ({"name": "a", "options": {"prefill-replicas": 1}}, "models: a: prefill-replicas 1: there must be more replicas (now 1)"),
        ({"name": "a", "options": {"autoscaler": "queue"}}, "models: a: --autoscaler queue: needs --max-replicas"),
    ],
)
def test_what_is_wrong_is_said(model: dict[str, Any], says: str):
    with pytest.raises(OptionError) as error:
        models(model)
    assert says in str(error.value)


def test_names_are_different():
    with pytest.raises(OptionError, match="models: a: name: is given twice"):
        models({"name": "a"}, {"name": "a"})


@pytest.mark.parametrize("args", [{}, {"models": []}, {"models": [{}]}, {"models": [{"name": "a", "tp": 1}]}, {"models": [{"name": 1}]}])
def test_arguments_have_a_fixed_shape(args: dict[str, Any]):
    with pytest.raises(ValidationError):
        Arguments.model_validate(args)


def test_the_application_is_built_and_nothing_is_started():
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ray.serve import Application

    from quire.deploy.serve_app import build

    args = {"models": [{"name": "a", "options": {"grace-s": 5}}, {"name": "b", "options": {"grace-s": 50}}]}
    built = build(args)
    assert isinstance(built, Application)
    config = built._bound_deployment._deployment_config
    assert (built._bound_deployment.name, config.user_config) == ("Ingress", args)
    assert config.graceful_shutdown_timeout_s > 50
    assert build({})._bound_deployment._deployment_config.user_config is None
    with pytest.raises(OptionError, match="models: B: name"):
        build({"models": [{"name": "B"}]})


DOC = Path(__file__).parents[2] / "docs" / "ray-serve.md"


def test_the_page_shows_the_arguments_and_an_example_that_builds() -> None:
    text = DOC.read_text()
    fields = {*Arguments.model_fields, *(f"models[].{name}" for name in ModelArguments.model_fields)}
    assert set(re.findall(r"^\| `([a-z.\[\]]+)` \|", text, re.MULTILINE)) == fields
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example
    (app,) = yaml.safe_load(example[1])["applications"]
    assert list(models_of(Arguments.model_validate(app["deployments"][0]["user_config"]))) == ["small"]


def test_the_page_says_which_options_are_not_here() -> None:
    refused = re.search(r"Options that a process of `quire serve` has and this has not are refused: (.*?)\n\n", DOC.read_text(), re.DOTALL)
    assert refused
    named = {name.replace("-", "_") for name in re.findall(r"`([a-z-]+)`", refused[1])}
    assert named == {
        "host",
        "port",
        "ingresses",
        "ray_address",
        "namespace",
        "served_model_name",
        "admin_host",
        "admin_port",
        "admin_token",
    }
    for name in named:
        with pytest.raises(OptionError, match="there is no such option here"):
            models({"name": "a", "options": {name: 1}})


def test_the_page_says_what_each_option_does_in_an_upgrade() -> None:
    said = {}
    for start in ("the controller's options", "the replicas' options", "what pages"):
        row = re.search(rf"^\| {start}[^|]*\|", DOC.read_text(), re.MULTILINE)
        assert row
        said[start] = {name.replace("-", "_") for name in re.findall(r"`([a-z-]+)`", row[0])}
    is_so: dict[str, set[str]] = {start: set() for start in said}
    old = QuireOptions()
    for option in options():
        new = assemble(old, {option.path: "another value"})
        if option.name == "prefill_replicas" or option.owner in (LimitOptions, AutoscalingOptions) or shared(old) == shared(new):
            continue
        kind = (
            "what pages" if hindrance(old, new) else "the replicas' options" if version(old) != version(new) else "the controller's options"
        )
        is_so[kind].add(option.name)
    is_so["what pages"] -= {"served_model_name"}
    is_so["the controller's options"] -= {"seed"}
    assert said == is_so
