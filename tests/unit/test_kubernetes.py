"""The manifests fit Kubernetes's schemas, refer to what there is, and let nothing through that no hop names."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from infra.settings import Settings
from infra.stack import parts
from tests import kustomize
from tests.unit.test_compose import NOT_SETTINGS, OF_ONE_MACHINE, as_flags, flags

K8S = Path(__file__).parents[2] / "infra" / "k8s"
OVERLAYS = ("small", "gpu")
VERSIONS = ("1.30", "1.33", "1.37")
WORKLOADS = ("Deployment", "StatefulSet", "Job")
SECRETS = {"everloop-database": {"url", "password"}, "everloop-engine": {"key"}, "everloop-prefect": {"auth"}}
CLUSTER_WIDE = ("Namespace",)
# Of the flows' work, not yet of these settings.


@pytest.fixture(params=OVERLAYS)
def manifests(request):
    return kustomize.build(K8S / "overlays" / request.param)


def of(manifests, *kinds):
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def name_of(manifest):
    return manifest["metadata"]["name"]


def fill(value, values):
    """Put values where a pool's template names them, as Prefect does."""
    if isinstance(value, dict):
        return {name: fill(inner, values) for name, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, values) for inner in value]
    if isinstance(value, str) and (whole := re.fullmatch(r"{{ (\w+) }}", value)):
        return values[whole[1]]
    return re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], value) if isinstance(value, str) else value


def night(manifests):
    """Return the job that Prefect makes of the pool's template, with the template's defaults."""
    pool = [made for made in of(manifests, "ConfigMap") if name_of(made) == "everloop-pool"]
    if not pool:
        return []
    template = json.loads(pool[0]["data"]["pool.json"])
    values = {name: field.get("default", {}) for name, field in template["variables"]["properties"].items()}
    job = fill(template["job_configuration"]["job_manifest"], values | {"name": "night", "command": []})
    job["metadata"]["name"] = "night"
    return [job]


def workloads(manifests):
    return [*of(manifests, *WORKLOADS), *night(manifests)]


@pytest.mark.parametrize("version", VERSIONS)
def test_they_fit_the_published_schemas(manifests, version):
    for manifest in [*manifests, *night(manifests)]:
        kubernetes_validate.validate(manifest, version, strict=True)
    slip = copy.deepcopy(of(manifests, "Deployment")[0])
    slip["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(slip, version, strict=True)


def in_one_order(value, name=""):
    """Return it with lists that are merged by a key in the order of that: a merge may put new items anywhere."""
    if isinstance(value, dict):
        return {key: in_one_order(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        found = [in_one_order(inner) for inner in value]
        return sorted(found, key=lambda item: item[kustomize.KEYS[name]]) if name in kustomize.KEYS else found
    return value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_itself_makes_the_same_of_them(overlay):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here: what is merged is told by tests/kustomize.py alone")
    directory = K8S / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    real, ours = (
        {kustomize.identity(m): in_one_order(m) for m in made}
        for made in (yaml.safe_load_all(done.stdout), kustomize.build(directory))
    )
    assert real == ours


def test_nothing_is_named_twice_and_all_is_in_one_namespace(manifests):
    names = [kustomize.identity(manifest) for manifest in manifests]
    assert len(names) == len(set(names))
    assert {m["metadata"].get("namespace") for m in manifests if m["kind"] not in CLUSTER_WIDE} == {"everloop"}


def test_every_file_is_used():
    for directory in (K8S / "base", *(K8S / "overlays" / name for name in OVERLAYS)):
        text = (directory / "kustomization.yaml").read_text()
        unused = [path.name for path in directory.iterdir() if path.name not in text]
        assert unused == ["kustomization.yaml"], unused


def test_what_pods_refer_to_is_there(manifests):
    there = {kind: {name_of(m) for m in of(manifests, kind)} for kind in ("ConfigMap", "PersistentVolumeClaim")}
    keys = {name_of(m): set(m["data"]) for m in of(manifests, "ConfigMap")} | SECRETS
    for workload in workloads(manifests):
        spec = kustomize.pod(workload)["spec"]
        claimed = {t["metadata"]["name"] for t in workload["spec"].get("volumeClaimTemplates", ())}
        for volume in spec["volumes"]:
            claim, config = volume.get("persistentVolumeClaim"), volume.get("configMap")
            assert claim is None or claim["claimName"] in there["PersistentVolumeClaim"]
            assert config is None or config["name"] in there["ConfigMap"]
        volumes = {volume["name"] for volume in spec["volumes"]} | claimed
        for container in kustomize.containers(workload):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name_of(workload)
            for variable in container.get("env", ()):
                for source in variable.get("valueFrom", {}).values():
                    assert source["key"] in keys[source["name"]], variable
            for source in container.get("envFrom", ()):
                config, secret = source.get("configMapRef"), source.get("secretRef")
                assert config is None or config["name"] in there["ConfigMap"]
                assert secret is None or secret["optional"], "what is not in README.md need not be there"
        account = spec.get("serviceAccountName")
        assert account is None or account in {name_of(m) for m in of(manifests, "ServiceAccount")}


def test_services_budgets_and_scalers_select_what_runs(manifests):
    labels = {
        name_of(m): kustomize.pod(m)["metadata"]["labels"] for m in of(manifests, "Deployment", "StatefulSet")
    }

    def selected(wanted):
        return [name for name, has in labels.items() if wanted.items() <= has.items()]

    for manifest in of(manifests, "Deployment", "StatefulSet"):
        assert selected(manifest["spec"]["selector"]["matchLabels"]) == [name_of(manifest)]
    for service in of(manifests, "Service"):
        (target,) = selected(service["spec"]["selector"])
        workload = next(m for m in manifests if kustomize.identity(m)[1] == target and m["kind"] in WORKLOADS)
        offered = {p["containerPort"] for c in kustomize.containers(workload) for p in c.get("ports", ())}
        assert {port["port"] for port in service["spec"]["ports"]} == offered, name_of(service)
    for budget in of(manifests, "PodDisruptionBudget"):
        assert len(selected(budget["spec"]["selector"]["matchLabels"])) == 1
    for scaler in of(manifests, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in {kustomize.identity(m) for m in manifests}
        kept = next((b for b in of(manifests, "PodDisruptionBudget") if name_of(b) == name_of(scaler)), None)
        assert kept is None or scaler["spec"]["minReplicas"] > kept["spec"].get("minAvailable", 0)


def test_every_hop_has_a_policy_at_both_ends(manifests):
    policies = {name_of(m): m["spec"] for m in of(manifests, "NetworkPolicy")}
    deny = policies["default-deny"]
    assert deny["podSelector"] == {} and set(deny["policyTypes"]) == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & set(deny), "nothing is let through by it"
    pods = [kustomize.pod(m)["metadata"]["labels"] for m in workloads(manifests)]
    hops = {label.partition("/to-")[2] for has in pods for label in has if "/to-" in label}
    assert hops == {name.removeprefix("to-") for name in policies if name.startswith("to-")} - {"dns"}
    for hop in hops - {"kubernetes"}:
        out, into = policies[f"to-{hop}"], policies[hop]
        assert out["podSelector"] == into["ingress"][0]["from"][0]["podSelector"]
        assert into["podSelector"] == out["egress"][0]["to"][0]["podSelector"]
        assert out["egress"][0]["ports"] == into["ingress"][0]["ports"]
        ports = {port["port"] for port in out["egress"][0]["ports"]}
        service = next(m for m in of(manifests, "Service") if name_of(m) == hop)
        assert ports == {port["port"] for port in service["spec"]["ports"]}, hop


# What the code of each part connects to.
HOPS = {
    "api": {"postgres", "engine", "reward"},
    "relay": {"postgres", "kafka"},
    "ledger": {"postgres", "kafka"},
    "reconciler": {"postgres", "engine"},
    "reward": {"postgres", "kafka"},
    "flows": {"postgres", "engine", "reward", "prefect"},
    "night": {"postgres", "engine", "reward", "prefect"},
    "training": {"prefect", "kubernetes"},
    "migrate": {"postgres"},
    "kafka": {"kafka"},
}


def test_each_part_makes_its_own_hops_and_no_others(manifests):
    for workload in workloads(manifests):
        labels = kustomize.pod(workload)["metadata"]["labels"]
        made = {label.partition("/to-")[2] for label in labels if "/to-" in label}
        assert made == HOPS.get(labels["app.kubernetes.io/component"], set()), name_of(workload)


def test_no_container_is_root_or_may_become_it_and_each_is_bounded(manifests):
    for workload in workloads(manifests):
        spec = kustomize.pod(workload)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec.get("serviceAccountName") or spec["automountServiceAccountToken"] is False, name_of(workload)
        for container in kustomize.containers(workload):
            allowed = container["securityContext"]
            assert allowed["capabilities"] == {"drop": ["ALL"]} and allowed["allowPrivilegeEscalation"] is False
            assert allowed["readOnlyRootFilesystem"] or container["name"] == "kafka"
            for kind in ("requests", "limits"):
                assert container["resources"][kind]["cpu"] and container["resources"][kind]["memory"]
            assert re.search(r":\S*\d+\.\d+", container["image"]), f"{container['image']} is not pinned"


def test_what_stays_up_is_probed(manifests):
    for workload in of(manifests, "Deployment", "StatefulSet"):
        for container in workload["spec"]["template"]["spec"]["containers"]:
            assert {"livenessProbe", "readinessProbe"} <= set(container), name_of(workload)


def test_the_parts_of_up_are_there_and_started_alike(manifests, tmp_path):
    settings = Settings(home=tmp_path, base_model=str(tmp_path), prefect_url="http://prefect")
    running = {name_of(m): m["spec"]["template"]["spec"]["containers"][0] for m in of(manifests, "Deployment")}
    for part in (part for part in parts.embedded_parts(settings, set()) if part.name not in OF_ONE_MACHINE):
        assert part.name in running
        checked = ["--with-healthcheck"] if part.name == "flows" else []
        assert running[part.name]["command"][1:] == [*part.command[1:], *checked]
    kinds = {name_of(m) for m in of(manifests, "StatefulSet", "Deployment")}
    assert {"postgres", "kafka", "prefect", "engine", "engine-more"} <= kinds
    gpu = "nvidia.com/gpu" in running["engine"]["resources"]["limits"]
    maximum = next(m for m in manifests if name_of(m) == "everloop-settings")["data"].get(
        "EVERLOOP_MAX_MODEL_TOKENS"
    )
    settings = settings.model_copy(update={"max_model_tokens": int(maximum or 2048), "engine_gpu_share": 0.9})
    for name in ("engine", "engine-more"):
        told = dict(flag.removeprefix("--").partition("=")[::2] for flag in running[name]["args"])
        assert flags(told) == flags(as_flags(settings, gpu=gpu))


def test_every_setting_that_is_given_exists(manifests):
    known = {f"EVERLOOP_{name.upper()}" for name in Settings.model_fields} | NOT_SETTINGS
    given = {name for m in of(manifests, "ConfigMap") for name in m["data"]}
    given |= {v["name"] for w in workloads(manifests) for c in kustomize.containers(w) for v in c.get("env", ())}
    ours = {name for name in given if name.startswith("EVERLOOP_")}
    assert ours <= known, ours - known


def test_no_secret_stands_in_a_manifest(manifests):
    assert of(manifests, "Secret") == []
    for workload in workloads(manifests):
        for container in kustomize.containers(workload):
            for variable in container.get("env", ()):
                if re.search("PASSWORD|DATABASE_URL|TOKEN|_KEY$", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_engines_scale_by_their_queue_and_the_ledger_by_its_lag():
    scalers = {name_of(m): m for m in of(kustomize.build(K8S / "overlays" / "gpu"), "HorizontalPodAutoscaler")}
    (waiting,) = scalers["engine-more"]["spec"]["metrics"]
    assert waiting["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    (lag,) = scalers["ledger"]["spec"]["metrics"]
    assert lag["external"]["metric"] == {
        "name": "everloop_consumer_lag_records",
        "selector": {"matchLabels": {"consumer": "receipts"}},
    }


def test_gpus_are_asked_for_on_the_nodes_that_have_them():
    manifests = kustomize.build(K8S / "overlays" / "gpu")
    pools = {}
    for workload in workloads(manifests):
        spec = kustomize.pod(workload)["spec"]
        wants = [c for c in spec["containers"] if "nvidia.com/gpu" in c["resources"]["limits"]]
        if wants:
            assert any(t["key"] == "nvidia.com/gpu" for t in spec["tolerations"])
            pools[name_of(workload)] = spec["nodeSelector"]["everloop.dev/pool"]
            assert "-gpu:" in wants[0]["image"]
    assert pools == {"engine": "engine", "engine-more": "engine", "night": "training"}


def test_prefect_asks_for_what_it_is_sent(manifests):
    sent = {}
    for workload in workloads(manifests):
        component = kustomize.pod(workload)["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in kustomize.containers(workload):
            for variable in container.get("env", ()):
                if variable["name"].endswith("_API_AUTH_STRING"):
                    sent.setdefault(component, {})[variable["name"]] = variable["valueFrom"]["secretKeyRef"]
    askers = {name for name, hops in HOPS.items() if "prefect" in hops} & {
        kustomize.pod(w)["metadata"]["labels"]["app.kubernetes.io/component"] for w in workloads(manifests)
    }
    askers -= {"night"}  # a job's pod gets it from the worker that Prefect tells to start it
    secret = {"name": "everloop-prefect", "key": "auth"}
    assert sent == {name: {"PREFECT_API_AUTH_STRING": secret} for name in askers} | {
        "prefect": {"PREFECT_SERVER_API_AUTH_STRING": secret}
    }


def test_engines_ask_for_the_key_that_is_sent_to_them(manifests):
    keys = {}
    for workload in workloads(manifests):
        component = kustomize.pod(workload)["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in kustomize.containers(workload):
            for variable in container.get("env", ()):
                if variable["name"] == "EVERLOOP_ENGINE_KEY":
                    keys[component] = tuple(variable["valueFrom"]["secretKeyRef"].items())
    parts_here = {
        kustomize.pod(w)["metadata"]["labels"]["app.kubernetes.io/component"] for w in workloads(manifests)
    }
    askers = {name for name, hops in HOPS.items() if "engine" in hops} & parts_here
    assert set(keys) == askers | {"engine", "engine-more"} and len(set(keys.values())) == 1
