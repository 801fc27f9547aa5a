"""The arguments of the application on Ray Serve, and what is built of them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from quire.deploy.application import Arguments, models_of
from quire.worker.options import OptionError


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
