"""The chart: what it renders is what Kubernetes and KubeRay take, and its parts agree with each other."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from chart import CHART, EXAMPLES, FOREIGN, KUBERNETES, HelmError, Object, Release, helm, ray_service_schema, template
from image import read_dockerfile

from quire.deploy.application import Arguments, models_of

# Values that together turn everything on.
EVERYTHING: Object = {
    "monitoring.podMonitor.enabled": True,
    "monitoring.prometheusRule.enabled": True,
    "monitoring.dashboards.enabled": True,
    "ingress": {"enabled": True, "host": "llm.example.com", "className": "nginx", "tlsSecret": "tls", "annotations": {"a": "b"}},
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.com"]},
    "gcsFaultTolerance": {"enabled": True, "redisAddress": "rediss://redis:6380", "existingSecret": "redis", "usernameKey": "user"},
    "hub": {"existingSecret": "hub", "cacheClaim": "cache"},
    "weights.claims": [{"claimName": "models", "mountPath": "/models", "subPath": "a"}],
    "networkPolicy.admin": [{"podSelector": {}}],
    "networkPolicy.egress.extra": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 4318}]}],
    "commonLabels": {"team": "search"},
    "podAnnotations": {"note": "x"},
    "serviceAccount.annotations": {"role": "y"},
    "image.pullSecrets": ["registry"],
    "head.env": [{"name": "A", "value": "b"}],
    "head.rayStartParams": {"log-color": "false"},
    "models": [
        {"name": "one", "replicas": 2, "tp": 4, "podsPerReplica": 2, "runtimeClassName": "nvidia", "rayStartParams": {"verbose": ""}},
        {"name": "two", "replicas": 2, "prefillReplicas": 1, "autoscaling": {"enabled": True, "minReplicas": 2}},
    ],
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}, "data": {"a": "b"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ include \"quire.fullname\" . }}-text'}\n",
    ],
}
VARIANTS: dict[str, tuple[tuple[Path, ...], Object]] = {
    "defaults": ((), {}),
    "everything": ((), EVERYTHING),
    "open": ((), {"apiKeys.allowAnonymous": True, "rayAuth.mode": "disabled", "networkPolicy.enabled": False, "drain.enabled": False}),
    "incremental": (
        (),
        {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade", "incremental": {"gatewayClassName": "istio"}}},
    ),
    **{example.stem: ((example,), {}) for example in EXAMPLES},
}
# What must exist before the chart is installed: kind -> value paths that name it.
OUTSIDE = re.compile(r"^(quire-(tenants|admin|ray-auth|metrics)|hugging-face|redis|hub|tls|llm-example-com)$")


@pytest.fixture(scope="session", params=VARIANTS, name="release")
def _release(request: pytest.FixtureRequest) -> Release:
    files, values = VARIANTS[request.param]
    return Release(template(*files, values=values))


@pytest.mark.parametrize("files", [(), *((example,) for example in EXAMPLES)], ids=["defaults", *(e.stem for e in EXAMPLES)])
def test_lint(files: tuple[Path, ...]):
    helm("lint", "--strict", str(CHART), *(word for file in files for word in ("-f", str(file))))


def test_kubernetes_takes_every_object(release: Release):
    for found in release.objects:
        if found["kind"] not in {*FOREIGN, "RayService"}:
            kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_kuberay_takes_the_ray_service(release: Release, data_file: Any):
    schema = ray_service_schema(data_file("kuberay-crds/ray.io_rayservices.yaml.gz"))
    (service,) = release.of("RayService")
    faults = [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in schema.iter_errors(service)]
    assert faults == []


def test_no_two_objects_share_a_name_and_all_lie_in_the_namespace(release: Release):
    names = [(found["kind"], found["metadata"]["name"]) for found in release.objects]
    assert len(set(names)) == len(names)
    assert {found["metadata"].get("namespace", "llm") for found in release.objects} == {"llm"}
    assert all(len(name) <= 63 for _, name in names)


def test_every_selector_selects_a_pod(release: Release):
    # KubeRay adds these to the pods.
    pods = [{**release.head["metadata"]["labels"], "ray.io/node-type": "head"}]
    pods += [{**group["template"]["metadata"]["labels"], "ray.io/group": group["groupName"]} for group in release.groups]
    for found in release.objects:
        spec = found.get("spec", {})
        for selector in (spec.get("podSelector"), spec.get("selector")):
            if selector is not None:
                wanted = selector["matchLabels"].items()
                assert any(wanted <= pod.items() for pod in pods), found["metadata"]["name"]
    for budget in release.of("PodDisruptionBudget"):
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        assert sum(wanted <= pod.items() for pod in pods) == 1, budget["metadata"]["name"]


def test_a_budget_leaves_room_to_evict_a_replica(release: Release):
    specs = [budget["spec"] for budget in release.of("PodDisruptionBudget")]
    budgets = {spec["selector"]["matchLabels"].get("ray.io/group"): spec for spec in specs}
    for group in release.groups:
        if group["groupName"] in budgets:
            assert 0 < budgets[group["groupName"]]["minAvailable"] < group["minReplicas"]
        else:
            assert group["minReplicas"] <= 2


def test_ports_agree(release: Release):
    port = release.serve["http_options"]["port"]
    names: dict[str, set[int]] = {}
    for _, pod in release.pods():
        numbers = [found["containerPort"] for container in pod["spec"]["containers"] for found in container.get("ports", ())]
        assert len(set(numbers)) == len(numbers)
        for container in pod["spec"]["containers"]:
            declared = {found["name"]: found["containerPort"] for found in container.get("ports", ())}
            for name, number in declared.items():
                names.setdefault(name, set()).add(number)
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in declared
    assert names["serve"] == {port}
    for found in release.of("Ingress"):
        (path,) = found["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"]["port"]["number"] == port
    for found in release.of("HTTPRoute"):
        assert found["spec"]["rules"][0]["backendRefs"][0]["port"] == port
    for found in release.of("PodMonitor"):
        assert {endpoint["port"] for endpoint in found["spec"]["podMetricsEndpoints"]} <= set(names)
    rules = [rule for found in release.of("NetworkPolicy") for rule in found["spec"]["ingress"]]
    assert {opened["port"] for rule in rules for opened in rule.get("ports", ())} <= set().union(*names.values())


def test_the_service_that_kuberay_makes_of_the_head_has_the_admin_ports(release: Release):
    # It lists what the first container declares: `kubectl port-forward service/...-head-svc` and the drain hook go through it.
    first, *beside = release.head["spec"]["containers"]
    listed = {found["name"]: str(found["containerPort"]) for found in first["ports"]}
    told = [argument.partition("=")[2] for container in beside for argument in container["args"] if argument.startswith("--admin-port=")]
    assert [listed.get(f"admin-{index}") for index in range(len(release.groups))] == told
    assert not any("ports" in container for container in beside)


def test_only_pods_that_have_a_server_are_asked_for_its_metrics():
    (monitor,) = Release(template(values=EVERYTHING)).of("PodMonitor")
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        keeps = [rule["sourceLabels"] for rule in endpoint.get("relabelings", ()) if rule.get("action") == "keep"]
        assert keeps == ([["__meta_kubernetes_pod_ready"]] if endpoint["port"] == "serve" else [])


def test_routes_lead_to_the_service_that_kuberay_makes(release: Release):
    (service,) = release.of("RayService")
    wanted = f"{service['metadata']['name']}-serve-svc"
    for found in release.of("Ingress"):
        assert found["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] == wanted
    for found in release.of("HTTPRoute"):
        assert found["spec"]["rules"][0]["backendRefs"][0]["name"] == wanted
    for pod in release.of("Pod"):
        assert pod["spec"]["containers"][0]["args"][0] == f"http://{wanted}:{release.serve['http_options']['port']}"


def references(node: Any) -> list[tuple[str, str | None]]:
    """(Secret, key) of every reference below a node; key None for a whole Secret."""
    if isinstance(node, list):
        return [found for part in node for found in references(part)]
    if not isinstance(node, dict):
        return []
    found: list[tuple[str, str | None]] = []
    for name, part in node.items():
        if name in ("secretKeyRef", "credentials"):
            found.append((part["name"], part["key"]))
        elif name == "secret" and isinstance(part, dict):
            found += [(part["secretName"], item["key"]) for item in part.get("items", ())] or [(part["secretName"], None)]
        elif name == "authOptions" and "secretName" in part:
            found.append((part["secretName"], "auth_token"))
        elif name != "secretName":
            found += references(part)
    return found


def test_every_secret_that_is_named_exists_or_is_the_operators(release: Release):
    made = {secret["metadata"]["name"]: set(secret["data"]) for secret in release.of("Secret")}
    used = [reference for found in release.objects for reference in references(found)]
    for name, key in used:
        if name in made:
            assert key is None or key in made[name], (name, key)
        else:
            assert OUTSIDE.match(name), name
    assert set(made) <= {name for name, _ in used}


def test_every_volume_is_mounted_and_every_mount_has_one(release: Release):
    for name, pod in release.pods():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
        mounted = {mount["name"] for container in pod["spec"]["containers"] for mount in container.get("volumeMounts", ())}
        if name == "head" and release.ray["rayClusterConfig"]["enableInTreeAutoscaling"]:
            mounted |= {mount["name"] for mount in release.ray["rayClusterConfig"]["autoscalerOptions"]["volumeMounts"]}
        assert volumes == mounted, name


def test_every_service_account_exists(release: Release):
    made = {account["metadata"]["name"] for account in release.of("ServiceAccount")}
    assert {pod["spec"]["serviceAccountName"] for _, pod in release.pods()} == made
    for name, pod in release.pods():
        needs_the_api = name == "head" and release.ray["rayClusterConfig"]["enableInTreeAutoscaling"]
        assert pod["spec"]["automountServiceAccountToken"] is needs_the_api


def test_every_container_is_confined_and_bounded(release: Release):
    for name, pod in release.pods():
        context = pod["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"}), name
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", ()))
    for name, container in release.containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        for bound in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][bound]), name
    if release.ray["rayClusterConfig"]["enableInTreeAutoscaling"]:
        options = release.ray["rayClusterConfig"]["autoscalerOptions"]
        assert options["securityContext"]["readOnlyRootFilesystem"]
        assert {"requests", "limits"} == set(options["resources"])


def test_no_image_is_latest(release: Release):
    images = {container["image"] for _, container in release.containers()}
    assert len(images) == 1
    assert re.fullmatch(r".+:\d+\.\d+\.\d+-(cuda|cpu)", images.pop())


def test_a_pod_drains_before_it_is_killed(release: Release):
    ports = {}
    for container in release.head["spec"]["containers"][1:]:
        (argument,) = [argument for argument in container["args"] if argument.startswith("--admin-port=")]
        ports[container["name"].removeprefix("admin-")] = argument.partition("=")[2]
    for group in release.groups:
        spec = group["template"]["spec"]
        hook = spec["containers"][0].get("lifecycle")
        if hook is None:
            continue
        command = hook["preStop"]["exec"]["command"][-1]
        waits_s = int(re.search(r"--wait-s (\d+)", command)[1])
        assert waits_s + 20 <= spec["terminationGracePeriodSeconds"]
        assert f'--admin-url "http://$FQ_RAY_IP:{ports[group["groupName"]]}"' in command


def test_the_drain_hook_is_a_command_line_that_quire_takes(release: Release):
    from quire.deploy.cli import parser

    for group in release.groups:
        hook = group["template"]["spec"]["containers"][0].get("lifecycle")
        if hook is not None:
            words = hook["preStop"]["exec"]["command"][-1].replace('"', "").split()
            assert words[:2] == ["exec", "quire"]
            args = parser().parse_args(words[2:])
            assert (args.command, args.node) == ("drain", "$HOSTNAME")


def test_ray_serve_takes_its_configuration(release: Release):
    from ray.serve.schema import ServeDeploySchema

    told = ServeDeploySchema.model_validate(release.serve)
    assert [(app.name, app.route_prefix, app.import_path) for app in told.applications] == [("quire", "/", "quire.deploy.serve_app:build")]
    deployment = told.applications[0].deployments[0]
    # One to a pod at most, and never more than there are pods: it would wait for another.
    assert deployment.max_replicas_per_node == 1
    assert deployment.num_replicas == max(1, sum(group["minReplicas"] for group in release.groups))
    on_the_head = deployment.ray_actor_options.num_cpus == 0  # where Ray has no CPUs to give
    assert on_the_head is not release.ray["excludeHeadPodFromServeSvc"]
    assert ("node:__internal_head__" in (deployment.ray_actor_options.resources or {})) is on_the_head


def test_the_applications_arguments_are_models_that_quire_takes(release: Release):
    models = models_of(Arguments.model_validate(release.serve["applications"][0]["deployments"][0]["user_config"]))
    assert list(models) == [group["groupName"] for group in release.groups]
    for group, options in zip(release.groups, models.values(), strict=True):
        assert dict(label.split("=") for label in options.cluster.node_label) == group["labels"]
        ranks = options.cluster.replicas * options.engine.parallel.tp
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        if options.engine.model.device == "cuda":
            assert int(limits["nvidia.com/gpu"]) * group["replicas"] == ranks
        assert int(limits["cpu"]) * group["replicas"] > ranks
        if options.server.api_key_file is not None:
            mounts = {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
            assert options.server.api_key_file.rpartition("/")[0] in mounts
    namespaces = [argument for _, container in release.containers() for argument in container.get("args", ()) if "--namespace=" in argument]
    assert namespaces == [f"--namespace={options.cluster.namespace}" for options in models.values()]


def test_its_import_path_builds_the_deployment_that_it_configures(release: Release):
    from ray._common.utils import import_attr

    (app,) = release.serve["applications"]
    built = import_attr(app["import_path"])({})
    assert [built._bound_deployment.name] == [deployment["name"] for deployment in app["deployments"]]


def test_the_tenants_file_that_the_chart_makes_is_one():
    from quire.deploy.tenants_file import load_tenants
    from quire.worker.config import ServerOptions

    for values in ({}, {"apiKeys.tenants": [{"name": "a", "keys": ["k" * 20], "weight": 2}]}):
        (secret,) = [made for made in template(values=values) if made["metadata"]["name"] == "test-quire-api-keys"]
        text = base64.b64decode(secret["data"]["tenants.yaml"]).decode()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            keys, _ = load_tenants(ServerOptions(api_key_file=file.name))
        assert keys.tenant(base64.b64decode(secret["data"]["api-key"])) in ("a", "default")


def test_gpus_follow_the_ranks():
    release = Release(template(values=EVERYTHING))
    one, two = release.groups
    assert (one["replicas"], one["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == (4, "2")
    assert (two["minReplicas"], two["maxReplicas"]) == (2, 4)
    assert two["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    cpu = Release(template(values={"models[0]": {"name": "a", "device": "cpu"}}))
    assert set(cpu.groups[0]["template"]["spec"]["containers"][0]["resources"]["limits"]) == {"cpu", "memory"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "get secret test-quire-api-keys"),
        ({"apiKeys.existingSecret": "mine"}, "a tenant in the Secret mine"),
        ({"apiKeys.tenants": [{"name": "a", "keys": ["k" * 20]}]}, "a tenant in `apiKeys.tenants`"),
        ({"apiKeys.allowAnonymous": True}, "WARNING: apiKeys.allowAnonymous is on"),
    ],
)
def test_the_notes_say_where_a_key_comes_from(values: Object, says: str, tmp_path: Path):
    # Helm shows notes only of what it installs, so here they are a template like the others.
    chart = shutil.copytree(CHART, tmp_path / "chart")
    (chart / "templates" / "NOTES.txt").rename(chart / "NOTES.txt")
    (chart / "templates" / "notes.yaml").write_text('notes: |\n  {{- tpl (.Files.Get "NOTES.txt") . | nindent 2 }}\n')
    sets = [word for name, value in values.items() for word in ("--set-json", f"{name}={json.dumps(value)}")]
    notes = yaml.safe_load(helm("template", "test", str(chart), "-n", "llm", "-s", "templates/notes.yaml", *sets))["notes"]
    assert says in notes
    assert "service/test-quire-head-svc 8001" in notes


def test_extra_objects_are_templates():
    names = {found["metadata"]["name"] for found in template(values=EVERYTHING) if found["kind"] == "ConfigMap"}
    assert {"test-more", "test-quire-text"} <= names


def test_a_pod_does_not_change_with_the_version_of_the_chart():
    # KubeRay would take that for another cluster, and start one.
    for _, pod in [*Release(template()).pods()][:2]:
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pod["metadata"]["labels"])


def test_readme_and_schema_are_current():
    done = subprocess.run([sys.executable, str(CHART / "generate.py"), "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_every_value_is_described():
    text = (CHART / "README.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)

    def leaves(node: Any, path: str) -> list[str]:
        if path in described:
            return []
        if not isinstance(node, dict) or not node:
            return [path]
        return [leaf for name, part in node.items() for leaf in leaves(part, f"{path}.{name}" if path else name)]

    assert leaves(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), "") == []


def test_the_readme_tells_of_every_example():
    text = (CHART / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[ci/([\w-]+)\.yaml\]", text, re.MULTILINE) == [example.stem for example in EXAMPLES]


def test_the_app_version_is_that_of_quire():
    import quire

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == quire.__version__
    assert read_dockerfile().args["VARIANT"] == "cuda"


WRONG = [
    ({"modles": []}, "modles"),
    ({"models": []}, "models"),
    ({"models[0]": {"name": "a", "tpp": 2}}, "tpp"),
    ({"models[0]": {"model": "x"}}, "name is required"),
    ({"models[0]": {"name": "Upper"}}, "models.0.name"),
    ({"models[0]": {"name": "a", "tp": 0}}, "tp"),
    ({"models[0]": {"name": "a", "tp": "2"}}, "tp"),
    ({"models[0]": {"name": "a", "tp": 3, "podsPerReplica": 2}}, "podsPerReplica 2 must divide tp 3"),
    ({"models[0]": {"name": "a", "prefillReplicas": 1}}, "there must be more replicas"),
    ({"models[0]": {"name": "a", "autoscaling": {"enabled": True, "minReplicas": 5}}}, "minReplicas is above maxReplicas"),
    ({"models[0]": {"name": "a", "autoscaling": {"policy": "guess"}}}, "policy"),
    ({"models[0]": {"name": "a", "tp": 8}}, "resources.limits.cpu: must be whole and at least 9"),
    ({"models[0]": {"name": "a", "options": {"kv-memroy": "1GiB"}}}, "kv-memroy"),
    ({"models[0]": {"name": "a", "options": {"max-running": "many"}}}, "max-running"),
    ({"models[0]": {"name": "a", "options": {"page-link": "carrier-pigeon"}}}, "page-link"),
    ({"models[0]": {"name": "a", "options": {"tp": 2}}}, "tp"),
    ({"models[0]": {"name": "a", "rayStartParams": {"num-cpus": "8"}}}, "num-cpus"),
    ({"models[0]": {"name": "a", "tolerations": [{"key": "x", "effect": "Never"}]}}, "effect"),
    ({"models[0]": {"name": "a", "resources": {"limits": {"memory": "64 GB"}}}}, "memory"),
    ({"models": [{"name": "a"}, {"name": "a"}]}, "the name a is given twice"),
    ({"serve.options": {"max-bodie": 1}}, "max-bodie"),
    ({"serve.port": 80}, "port"),
    ({"image.tag": "latest"}, "tag"),
    ({"image.variant": "rocm"}, "variant"),
    ({"image.digest": "sha256:12"}, "digest"),
    ({"rayAuth.mode": "off"}, "mode"),
    ({"apiKeys.tenants": [{"name": "a"}]}, "keys is required"),
    ({"apiKeys.tenants": [{"name": "a", "keys": ["short"]}]}, "keys"),
    ({"podSecurityContext.runAsNonRoot": False}, "runAsNonRoot"),
    ({"podSecurityContext.runAsUser": 0}, "runAsUser"),
    ({"containerSecurityContext.allowPrivilegeEscalation": True}, "allowPrivilegeEscalation"),
    ({"upgrade.strategy": "Rolling"}, "strategy"),
    ({"upgrade.strategy": "NewClusterWithIncrementalUpgrade"}, "gatewayClassName"),
    ({"gcsFaultTolerance": {"enabled": True}}, "redisAddress"),
    ({"gcsFaultTolerance.redisAddress": "redis:6379"}, "redisAddress"),
    ({"ingress.enabled": True}, "ingress.host"),
    ({"httpRoute.enabled": True}, "httpRoute.parentRefs"),
    ({"networkPolicy.clients": [{}]}, "clients"),
    ({"networkPolicy.clients": [{"namespaceSelecter": {}}]}, "namespaceSelecter"),
    ({"weights.claims": [{"claimName": "a", "mountPath": "models"}]}, "mountPath"),
    ({"drain.timeoutSeconds": -1}, "timeoutSeconds"),
    ({"monitoring.podMonitor.interval": "often"}, "interval"),
    ({"monitoring.grafana": {}}, "grafana"),
]


@pytest.mark.parametrize(("values", "says"), WRONG, ids=[f"{says}-{number}" for number, (_, says) in enumerate(WRONG)])
def test_wrong_values_are_refused(values: Object, says: str):
    with pytest.raises(HelmError, match=re.escape(says)):
        template(values=values)


def test_the_schema_is_closed_everywhere():
    import json

    def walk(node: Any, path: str) -> None:
        if isinstance(node, list):
            for number, part in enumerate(node):
                walk(part, f"{path}/{number}")
        elif isinstance(node, dict):
            if node.get("type") == "object":
                assert "additionalProperties" in node, path  # false, or what each must be
                assert node["additionalProperties"] is not True, path
            for name, part in node.items():
                walk(part, f"{path}/{name}")

    walk(json.loads((CHART / "values.schema.json").read_text(encoding="utf-8")), "")
