"""A real Prometheus that scrapes the cluster, with the labels that the chart's PodMonitors and Kubernetes give."""

import json
import re
import subprocess
import urllib.parse

import yaml

from cluster import ROOT, free_ports, get, until
from rules import FILE, NAMESPACE, RELEASE, in_release

# The window of rates in this test. Production has minutes.
WINDOW = "15s"
LATE_SECONDS = 'le="0.005"'


def rendered(kind):
    """Objects of the chart's example with KEDA."""
    objects = yaml.safe_load_all((ROOT / "helm/examples/rendered/autoscaled-keda.yaml").read_text())
    return [each for each in objects if each and each["kind"] == kind]


def autoscaler_queries():
    """What KEDA asks, with the names of this cluster in place of the example's."""
    for scaled in rendered("ScaledObject"):
        query = scaled["spec"]["triggers"][0]["metadata"]["query"]
        for old, new in (('namespace="overfill",release="overfill"', f'namespace="{NAMESPACE}",release="{RELEASE}"'),
                         ('model_name=~"chat', 'model_name=~"demo|chat'), ('pool="rare"', 'pool="large"')):
            query = query.replace(old, new)
        yield query


def relabelings():
    """How the chart's PodMonitors make labels, in Prometheus's own spelling."""
    monitor = rendered("PodMonitor")[0]
    spelling = lambda name: re.sub("[A-Z]", lambda letter: "_" + letter[0].lower(), name)
    given = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]
    return [{spelling(name): value for name, value in each.items()} for each in given]


def fast(text):
    """The rules with short times, so that alerts fire within seconds. The demo pair is fast, so its limits of the
    inter-token latency and of the wait in the queue are lower."""
    slow_queue = 'leg="queue"}[5m]))) > 5'
    assert slow_queue in text, "the rule about the wait in the queue has changed"
    # How long an overloaded queue of the demo pair is depends on the machine.
    text = text.replace(slow_queue, 'leg="queue"}[5m]))) > 0.5')
    text = re.sub(r"\bfor: \w+", "for: 1s", text).replace("interval: 10s", "interval: 1s")
    text = text.replace("[30m])) >= 2", "[2m])) >= 2").replace('le="0.1"', LATE_SECONDS)
    # Two nodes freeze one after the other.
    text = re.sub(r"(increase\(overfill_migrations_total\{[^}]*\})\[5m\]", r"\1[60s]", text)
    return re.sub(r"\[\d+[mh]\]", f"[{WINDOW}]", text)


class Prometheus:
    def __init__(self, folder, processes):
        self.seen = set()
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        (folder / "rules.yaml").write_text(fast(in_release(FILE.read_text())))
        meta = "__meta_kubernetes_"
        targets = [(process.pod, process.component, process.admin) for process in processes]
        # Nobody listens there: etcd is down from the beginning.
        targets.append(("blue-etcd-0", "etcd", f"127.0.0.1:{free_ports(1)[0]}"))
        static = [
            {"targets": [address], "labels": {
                meta + "namespace": NAMESPACE, meta + "pod_name": pod,
                meta + "pod_label_app_kubernetes_io_instance": RELEASE,
                meta + "pod_label_app_kubernetes_io_component": component,
            }}
            for pod, component, address in targets
        ]
        # The Prometheus Operator adds the first two.
        relabel = [{"source_labels": [meta + "namespace"], "target_label": "namespace"},
                   {"source_labels": [meta + "pod_name"], "target_label": "pod"}, *relabelings()]
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "pods", "static_configs": static, "relabel_configs": relabel}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        with (folder / "prometheus.log").open("wb") as log:
            self.child = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        until("Prometheus scrapes the cluster", lambda: self.is_up(len(processes)))

    def is_up(self, count):
        assert self.child.poll() is None, "Prometheus has ended; its log says why"
        try:
            # While it starts, every other path is answered with 503 and a plain text.
            ready, _ = get(f"{self.url}/-/ready")
            return ready == 200 and len(self.query("up == 1")) == count
        except OSError:
            return False

    def ask(self, path, **parameters):
        status, body = get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(body)
        assert status == 200, (parameters, answer)
        return answer["data"]

    def query(self, promql):
        """The series and their values, without those that are not a number."""
        found = self.ask("query", query=promql)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found if each["value"][1] != "NaN"]

    def active(self):
        """Names of the alerts that are pending or firing now."""
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"]}

    def wait_for(self, *names, seconds=60):
        """Waits until each of these alerts has been active since the call."""
        missing = set(names)

        def seen():
            missing.difference_update(self.active())
            return not missing

        until(lambda: f"{sorted(missing)} have not become active", seen, seconds)
        self.seen.update(names)

    def stop(self):
        self.child.terminate()
        self.child.wait()
