"""What tests ask about rendered objects."""

import functools
import importlib.resources
import json
import re

import jsonschema
from referencing import Registry, Resource

# Kinds that are defined by others. Kubernetes' own schemas do not have them.
FOREIGN = ("cert-manager.io", "gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com")


def of_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


def named(objects, kind, name):
    found = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name}: {[each['metadata']['name'] for each in of_kind(objects, kind)]}"
    return found[0]


def pods(objects):
    """(kind/name, labels, spec) of everything that makes pods."""
    for each in objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield name, each["metadata"]["labels"], each["spec"]
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            template = each["spec"]["template"]
            yield name, template["metadata"]["labels"], template["spec"]


def containers(spec):
    return spec.get("initContainers", []) + spec["containers"]


def env(objects, kind, name, container=0):
    """Environment variables with their values."""
    spec = named(objects, kind, name)["spec"]["template"]["spec"]
    return {each["name"]: each.get("value") for each in spec["containers"][container]["env"]}


def foreign(each):
    return each["apiVersion"].split("/")[0] in FOREIGN


@functools.lru_cache
def definitions(version):
    """Folder of the schemas of a Kubernetes version, which accept no unknown field, and what they refer to."""
    minor = ".".join(version.split(".")[:2])
    root = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema"
    (folder,) = [each for each in root.iterdir() if re.fullmatch(rf"v{minor}(\.0)?-local-strict", each.name)]
    resource = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return folder, (resource @ Registry()).crawl()


@functools.lru_cache
def validator(kind, api_version, version):
    """The package's own function would read several megabytes of schemas for each object."""
    folder, registry = definitions(version)
    # rbac.authorization.k8s.io/v1 is rbac-v1 there.
    group = re.sub(r"^([^./]*)(?:[.][^/]*)?/", r"\1-", api_version)
    path = folder / f"{kind.lower()}-{group}.json"
    if not path.is_file():
        return None
    resource = Resource.from_contents(json.loads(path.read_text()))
    return jsonschema.Draft202012Validator(resource.contents, registry=resource @ registry)


def validate(objects, version):
    """Checks all objects against the API of a Kubernetes version. Unknown fields are faults."""
    for each in objects:
        if foreign(each):
            continue
        found = validator(each["kind"], each["apiVersion"], version)
        if found:
            found.validate(each)
        else:
            # The resource API came with 1.34; the chart chooses the version that the cluster has.
            assert each["kind"] == "ResourceClaimTemplate", each["kind"]
        unique(each)


# Lists whose entries the API server merges by key. Server-side apply refuses two entries with the same key.
KEYS = {
    "env": ("name",),
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "volumeMounts": ("mountPath",),
    "imagePullSecrets": ("name",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}


def unique(node, path=""):
    """Checks what schemas don't: lists with keys, and ports."""
    if isinstance(node, list):
        for i, each in enumerate(node):
            unique(each, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    for name, child in node.items():
        keys = KEYS.get(name)
        if keys and isinstance(child, list) and child and isinstance(child[0], dict):
            seen = [tuple(each.get(key) for key in keys) for each in child]
            assert len(seen) == len(set(seen)), f"{path}.{name}: {seen}"
        if name == "ports" and isinstance(child, list) and child and isinstance(child[0], dict):
            names = [each["name"] for each in child if "name" in each]
            assert len(names) == len(set(names)) and all(len(each) <= 15 for each in names), f"{path}.ports: {names}"
        unique(child, f"{path}.{name}")


def mounts_have_volumes(spec, claims=()):
    volumes = {each["name"] for each in spec.get("volumes", [])} | set(claims)
    return all(mount["name"] in volumes for each in containers(spec) for mount in each.get("volumeMounts", []))
