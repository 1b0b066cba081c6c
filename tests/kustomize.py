"""What of Kustomize the manifests use: resources, strategic merge patches, images, files as config maps.

A patch that names nothing, or a file that is not there, is an error, as it is with the real one.
"""

from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "patches", "images", "configMapGenerator"}
# Lists whose items strategic merging tells apart by a key; all others are replaced as a whole.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
Manifest = dict[str, Any]


def build(directory: Path) -> list[Manifest]:
    """Return what `kubectl kustomize` would print for `directory`, as plain data."""
    made = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert set(made) <= KNOWN, f"not understood here: {set(made) - KNOWN}"
    manifests: list[Manifest] = []
    for name in made.get("resources", ()):
        path = directory / name
        manifests += build(path) if path.is_dir() else read(path)
    for generated in made.get("configMapGenerator", ()):
        assert generated["options"]["disableNameSuffixHash"], "names with a hash are not understood here"
        data = {name: (directory / name).read_text() for name in generated["files"]}
        named = {"name": generated["name"], "namespace": generated["namespace"]}
        manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": data})
    for patch in made.get("patches", ()):
        changes = read(directory / patch["path"]) if "path" in patch else [yaml.safe_load(patch["patch"])]
        deletions = [change for change in changes if change.get("$patch") == "delete"]
        assert len(deletions) < 2, "kustomize 5 crashes where one patch deletes twice (kustomize#5471)"
        for change in changes:
            apply(change, manifests)
    for manifest in manifests:
        if "namespace" in made and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = made["namespace"]
        for container in containers(manifest):
            for image in made.get("images", ()):
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
    return manifests


def read(path: Path) -> list[Manifest]:
    """Return the manifests of a file."""
    return [manifest for manifest in yaml.safe_load_all(path.read_text()) if manifest]


def identity(manifest: Manifest) -> tuple[str, str]:
    """Return what a patch finds a manifest by."""
    return manifest["kind"], manifest["metadata"]["name"]


def apply(change: Manifest, manifests: list[Manifest]) -> None:
    """Merge a patch into the one manifest that it names, or take that out."""
    (target,) = [manifest for manifest in manifests if identity(manifest) == identity(change)]
    if change.get("$patch") == "delete":
        manifests.remove(target)
    else:
        merge(target, change)


def merge(target: Any, change: Any) -> None:
    """Merge `change` into `target`, in place."""
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            merge(target[name], value)
        elif isinstance(value, list) and name in KEYS and isinstance(target.get(name), list):
            merge_list(target[name], value, KEYS[name])
        else:
            target[name] = value


def merge_list(target: list[Any], change: list[Any], key: str) -> None:
    """Merge items by their key; new ones go to the end."""
    for item in change:
        known = [other for other in target if other[key] == item[key]]
        if known:
            merge(known[0], item)
        else:
            target.append(item)


def pod(manifest: Manifest) -> Manifest | None:
    """Return the pod template of a workload; None of anything else."""
    return manifest.get("spec", {}).get("template")


def containers(manifest: Manifest) -> list[Manifest]:
    """Return a workload's containers, those that run before the others too."""
    spec = (pod(manifest) or {}).get("spec", {})
    return [*spec.get("initContainers", ()), *spec.get("containers", ())]
