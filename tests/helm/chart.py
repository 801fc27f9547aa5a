"""Helm on the chart, and what Kubernetes would say of the result."""

from __future__ import annotations

import functools
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from image import ROOT

CHART = ROOT / "helm"
EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))
HELM = Path(sys.executable).parent / "helm"
KUBERNETES = "1.34"
# Kinds of operators whose schemas are not here.
FOREIGN = {"HTTPRoute", "PodMonitor", "PrometheusRule"}
Object = dict[str, Any]


class HelmError(Exception):
    """What helm says when it refuses."""


def helm(*command: str) -> str:
    """The output of helm; HelmError with its words when it fails."""
    done = subprocess.run([str(HELM), *command], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def template(*files: Path, values: Object | None = None) -> list[Object]:
    """The objects of a release `test` in the namespace `llm`; `values` go over those of the files."""
    with_files = [word for file in files for word in ("-f", str(file))]
    with_values = [word for name, value in (values or {}).items() for word in ("--set-json", f"{name}={json.dumps(value)}")]
    return [doc for doc in yaml.safe_load_all(helm("template", "test", str(CHART), "-n", "llm", *with_files, *with_values)) if doc]


@dataclass(frozen=True)
class Release:
    """What one set of values deploys."""

    objects: list[Object]

    def of(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    @property
    def ray(self) -> Object:
        """The spec of the one RayService."""
        (service,) = self.of("RayService")
        return service["spec"]

    @property
    def groups(self) -> list[Object]:
        return self.ray["rayClusterConfig"]["workerGroupSpecs"]

    @property
    def serve(self) -> Object:
        return yaml.safe_load(self.ray["serveConfigV2"])

    @property
    def head(self) -> Object:
        """The pod template of the head."""
        return self.ray["rayClusterConfig"]["headGroupSpec"]["template"]

    def pods(self) -> Iterator[tuple[str, Object]]:
        """(name, pod template) of every pod that there will be."""
        yield "head", self.head
        for group in self.groups:
            yield group["groupName"], group["template"]
        for pod in self.of("Pod"):
            yield pod["metadata"]["name"], pod

    def containers(self) -> Iterator[tuple[str, Object]]:
        for name, pod in self.pods():
            for container in pod["spec"]["containers"]:
                yield f"{name}/{container['name']}", container


def strict(schema: Any) -> Any:
    """A schema of a custom resource that refuses what it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    told = {name: part if name in ("enum", "default", "required") else strict(part) for name, part in schema.items()}
    open_ended = "additionalProperties" in told or told.get("x-kubernetes-preserve-unknown-fields")
    if told.get("type") == "object" and "properties" in told and not open_ended:
        told["additionalProperties"] = False
    return told


@functools.cache
def ray_service_schema(file: Path) -> jsonschema.Draft7Validator:
    """The v1 schema of RayService in the gzipped CRD."""
    crd = yaml.safe_load(gzip.decompress(file.read_bytes()))
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)
