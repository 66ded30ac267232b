"""A release in the cluster of the current kubeconfig, by kubectl and Helm."""

import json
import os
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import tools
from examples import CHART

NAMESPACE = os.environ.get("OVERFILL_NAMESPACE", "overfill-test")
RELEASE = "overfill"
EXAMPLE = CHART / "examples" / "laptop.yaml"
# Seconds that anything may take.
PATIENCE = int(os.environ.get("OVERFILL_PATIENCE_SECONDS", "300"))


def settings(tag):
    """Values that say where the images are."""
    found = []
    if registry := os.environ.get("OVERFILL_IMAGE_REGISTRY"):
        found += ["--set", f"image.registry={registry}"]
    if prefix := os.environ.get("OVERFILL_IMAGE_PREFIX"):
        for component in ("router", "prefill", "decode", "cli"):
            found += ["--set", f"image.{component}.repository={prefix}{component}"]
    if tag:
        found += ["--set-string", f"image.tag={tag}"]
    return found


def run(command, *, check=True, text=None):
    print("$", " ".join(map(str, command)), flush=True)
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, input=text)
    if check and result.returncode != 0:
        raise AssertionError(f"{command[0]} {command[1]}: {result.stdout}{result.stderr}")
    return result.stdout


def kubectl(*arguments, **more):
    return run([tools.kubectl(), "--namespace", NAMESPACE, *arguments], **more)


def get(*arguments):
    return json.loads(kubectl("get", *arguments, "--output", "json"))


def unreachable():
    """Why there is no cluster to test with, or nothing."""
    result = subprocess.run([str(tools.kubectl()), "version", "--request-timeout=10s"], capture_output=True, text=True)
    return (result.stderr.strip().splitlines() or ["kubectl failed"])[-1] if result.returncode else ""


class Release:
    def __init__(self, helm):
        self.helm = helm

    def run(self, verb, *arguments):
        return run([self.helm, verb, RELEASE, *arguments, "--namespace", NAMESPACE])

    def upgrade(self, *arguments, tag=None):
        """Installs or upgrades, and waits until all pods are ready."""
        self.run("upgrade", CHART, "--install", "--values", EXAMPLE, *settings(tag), *arguments)
        self.settle()

    def rollback(self, revision):
        self.run("rollback", revision)
        self.settle()

    def revision(self):
        history = json.loads(self.run("history", "--output", "json"))
        return history[-1]["revision"]

    def settle(self):
        for name in deployments():
            kubectl("rollout", "status", f"deployment/{name}", f"--timeout={PATIENCE}s")


def deployments():
    items = get("deployments", "--selector", f"app.kubernetes.io/instance={RELEASE}")["items"]
    return {each["metadata"]["name"]: each["spec"]["replicas"] for each in items}


def until(what, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {PATIENCE} s"
        time.sleep(1)


class Load:
    """A pod that sends requests, in the cluster, so that nothing on the way to it is replaced."""

    def __init__(self, name, seconds):
        self.name = name
        router = get("deployment", f"{RELEASE}-router")["spec"]["template"]["spec"]["containers"][0]
        image = "cli".join(router["image"].rsplit("router", 1))
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "load",
                        "image": image,
                        "args": [
                            "bench",
                            "serve",
                            "--json",
                            "--rate",
                            "4",
                            "--duration-seconds",
                            str(seconds),
                            "--prompt-tokens",
                            "uniform:16,64",
                            "--output-tokens",
                            "uniform:8,64",
                            "--http-url",
                            f"http://{RELEASE}.{NAMESPACE}.svc:8080",
                        ],
                        "env": [{"name": "HOME", "value": "/tmp"}],
                        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "readOnlyRootFilesystem": True,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            },
        }
        kubectl("delete", "pod", name, "--ignore-not-found", "--wait")
        kubectl("apply", "--filename", "-", text=json.dumps(pod))
        until("the load's start", lambda: self.phase() != "Pending")

    def phase(self):
        return get("pod", self.name)["status"].get("phase")

    def report(self):
        """Waits for the end, and gives the program's report."""
        until("the load's end", lambda: self.phase() in ("Succeeded", "Failed"))
        text = kubectl("logs", self.name)
        return json.loads(text[text.index("{") :])
