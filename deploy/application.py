"""What the application on Ray Serve is told: its arguments, and the configuration of each model that follows.

    models:
      - {name: small, options: {model: Qwen/Qwen3-4B, replicas: 2}}
    options: {api-key-file: /etc/quire/tenants.yaml}

Options are those of `quire serve`, by name (docs/configuration.md); those above stand for every model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field

from ..cluster.autoscaling_setup import autoscaler_of
from ..worker.config import QuireOptions
from ..worker.options import OptionError, suggest
from . import options
from .api.schemas import Strict

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# What is each command's own: there is no such process here, or Serve decides it.
_NOT_HERE = frozenset("host port ingresses ray_address namespace served_model_name admin_host admin_port admin_token".split())
DIGEST_CHARS = 8
RAY_ADDRESS = "auto"  # the cluster that Serve runs on


class ModelArguments(Strict):
    """A model: its name in the API, and its options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Arguments(Strict):
    """The arguments of `quire.deploy.serve_app:build`. The first model answers requests that name none."""

    models: list[ModelArguments] = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


def namespace_of(name: str) -> str:
    """The Ray namespace of a model: where its controller and its replicas are found."""
    return f"quire-{name}"


def namespaces_of(name: str, there: Iterable[str]) -> list[str]:
    """Of the namespaces that there are, those of a model: first those of configurations that could not take over in its own, then that."""
    beside = re.compile(f"{re.escape(namespace_of(name))}-[0-9a-f]{{{DIGEST_CHARS}}}")
    return sorted((n for n in there if n == namespace_of(name) or beside.fullmatch(n)), key=lambda n: (n == namespace_of(name), n))


def models_of(arguments: Arguments) -> dict[str, QuireOptions]:
    """Name -> the whole configuration of each model, in order.

    Raises:
        OptionError: a name is given twice or cannot be one, or options are wrong; says which, of which model.
    """
    models: dict[str, QuireOptions] = {}
    for model in arguments.models:
        where = f"models: {model.name}"
        if not _NAME.fullmatch(model.name):
            raise OptionError(f"{where}: name: must be up to 63 small letters, digits and dashes")
        if model.name in models:
            raise OptionError(f"{where}: name: is given twice")
        built = options.build(_checked("options", arguments.options) | _checked(where, model.options))
        _agree(where, built)
        models[model.name] = _named(model.name, built)
    return models


def _agree(where: str, built: QuireOptions) -> None:
    """Raises OptionError when options do not go together."""
    cluster = built.cluster
    if cluster.prefill_replicas >= cluster.replicas and cluster.prefill_replicas:
        raise OptionError(f"{where}: prefill-replicas {cluster.prefill_replicas}: there must be more replicas (now {cluster.replicas})")
    try:
        autoscaler_of(built)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from None


def _checked(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as `options.build` takes flags."""
    known = {option.name: option for option in options.options() if option.name not in _NOT_HERE}
    values = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise OptionError(f"{where}: {key}: there is no such option here{suggest(key, known)}")
        if name in values:
            raise OptionError(f"{where}: {key}: is given twice")
        values[name] = known[name].read(value, f"{where}: {key}")
    return values


def _named(name: str, built: QuireOptions) -> QuireOptions:
    model = replace(built.engine.model, served_model_name=name)
    cluster = replace(built.cluster, ray_address=RAY_ADDRESS, namespace=namespace_of(name))
    return replace(built, engine=replace(built.engine, model=model), cluster=cluster)
