"""The services with exactly the environment that the chart gives them, and the command of `helm test`.

Pods have an address each; here, all processes share one, so every port is moved to a free one.
"""

import os
import pathlib
import random
import re
import socket
import subprocess
import time
import urllib.request

import pytest

import kube
from examples import CHART

BINARIES = os.environ.get("OVERFILL_BINARIES")
SERVICES = {"router": "overfill-router", "prefill-default": "overfill-prefill", "decode-default": "overfill-decode"}

pytestmark = pytest.mark.skipif(not BINARIES, reason="OVERFILL_BINARIES does not name a folder with the binaries")


class Pods:
    def __init__(self, objects, folder):
        self.objects, self.folder = objects, folder
        self.ports = {}
        self.processes = {}

    def port(self, service, port):
        """The free port that stands for a port of a pod."""
        while (service, port) not in self.ports:
            # Below the ports that the system gives to clients.
            number = random.randrange(20000, 32000)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", number)) != 0 and number not in self.ports.values():
                    self.ports[service, port] = number
        return self.ports[service, port]

    def moved(self, service, text):
        """A value of the chart as it must be without pods: hosts, ports and paths of the images."""
        for name in SERVICES:
            host = "overfill" if name == "router" else f"overfill-{name}"
            text = re.sub(
                rf"{host}\.overfill\.svc:(\d+)", lambda found, name=name: f"127.0.0.1:{self.port(name, found[1])}", text
            )
        text = re.sub(r"^0\.0\.0\.0:(\d+)$", lambda found: f"0.0.0.0:{self.port(service, found[1])}", text)
        return text.replace("/usr/share/overfill/demo", str(CHART.parent / "demo")).replace(
            "$(POD_NAME)", f"{service}-0"
        )

    def environment(self, service, variables):
        fields = {"metadata.name": f"{service}-0", "status.podIP": "127.0.0.1"}
        found = {}
        for each in variables:
            value = each.get("value")
            if value is None:
                value = fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            found[each["name"]] = self.moved(service, value)
        return {**found, "HOME": str(self.folder)}

    def start(self, service):
        pod = kube.named(self.objects, "Deployment", f"overfill-{service}")["spec"]["template"]["spec"]
        container = pod["containers"][0]
        self.processes[service] = subprocess.Popen(
            [pathlib.Path(BINARIES) / SERVICES[service], *container.get("args", [])],
            env=self.environment(service, container["env"]),
            stdout=subprocess.DEVNULL,
            stderr=open(self.folder / f"{service}.log", "w"),
        )

    def wait(self, service, path):
        pod = kube.named(self.objects, "Deployment", f"overfill-{service}")["spec"]["template"]["spec"]
        probe = pod["containers"][0][{"/startup": "startupProbe", "/ready": "readinessProbe"}[path]]["httpGet"]
        (number,) = [each["containerPort"] for each in pod["containers"][0]["ports"] if each["name"] == probe["port"]]
        url = f"http://127.0.0.1:{self.port(service, str(number))}{probe['path']}"
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.processes[service].poll() is None, (self.folder / f"{service}.log").read_text()
            try:
                return urllib.request.urlopen(url, timeout=5).status
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"{url}: no success\n" + (self.folder / f"{service}.log").read_text())


@pytest.fixture
def pods(helm4, tmp_path):
    pods = Pods(helm4.objects("--values", CHART / "examples" / "laptop.yaml"), tmp_path)
    yield pods
    for process in pods.processes.values():
        process.terminate()
    assert [process.wait(60) for process in pods.processes.values()] == [0] * len(pods.processes)


def test_a_release_answers(pods):
    for service in SERVICES:
        pods.start(service)
    for path in ("/startup", "/ready"):
        for service in SERVICES:
            pods.wait(service, path)
    container = kube.named(pods.objects, "Pod", "overfill-test")["spec"]["containers"][0]
    result = subprocess.run(
        [pathlib.Path(BINARIES) / "overfill", *container["args"]],
        env=pods.environment("router", container["env"]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    # Nodes have the names of their pods.
    assert '"prefill_node":"prefill-default-0"' in result.stderr and '"decode_node":"decode-default-0"' in result.stderr
    url = f"http://127.0.0.1:{pods.port('router', '8080')}/metrics"
    metrics = urllib.request.urlopen(url, timeout=5).read().decode()
    # What the queries of autoscalers ask for.
    for metric in ("overfill_prefill_backlog_seconds", "overfill_decode_load_nodes"):
        for source in ("router", "nodes"):
            assert re.search(rf'^{metric}{{(?=[^}}]*pool="default")(?=[^}}]*source="{source}")', metrics, re.M), (
                metric,
                source,
            )
    assert 'overfill_requests_without_nodes{model_name="demo"} 0' in metrics
