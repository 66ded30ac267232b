"""Objects of other operators: KEDA, Prometheus, cert-manager, Gateway API, and the HPAs."""

import json
import shutil
import subprocess

import pytest
import yaml
from cloudcoil.models.cert_manager import v1 as cert_manager
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus

import kube
from examples import CHART, EXAMPLES

MODELS = {
    "Certificate": cert_manager.Certificate,
    "Issuer": cert_manager.Issuer,
    "ScaledObject": keda.ScaledObject,
    "PodMonitor": prometheus.PodMonitor,
    "ServiceMonitor": prometheus.ServiceMonitor,
    "PrometheusRule": prometheus.PrometheusRule,
}

# Gateway API v1, standard channel: the fields that the chart uses, and what they may be.
PARENTS = {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["name"]}}
HOSTS = {"type": "array", "items": {"type": "string"}}
BACKENDS = {
    "type": "array",
    "items": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "port": {"type": "integer"}},
        "required": ["name", "port"],
    },
}


def route(rule):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["parentRefs", "rules"],
        "properties": {
            "parentRefs": PARENTS,
            "hostnames": HOSTS,
            "rules": {"type": "array", "items": {"type": "object", "additionalProperties": False, "properties": rule}},
        },
    }


ROUTES = {
    "HTTPRoute": route(
        {
            "matches": {},
            "timeouts": {"properties": {"request": {"pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}}},
            "backendRefs": BACKENDS,
        }
    ),
    "GRPCRoute": route({"backendRefs": BACKENDS}),
}


def plain(node):
    """Without what pydantic adds: None, and other spellings of the same number or duration."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if value is not None}
    if isinstance(node, list):
        return [plain(each) for each in node]
    return node


def check(each):
    if each["kind"] in ROUTES:
        import jsonschema

        jsonschema.validate(each["spec"], ROUTES[each["kind"]])
        return
    # The models drop unknown fields silently, so what comes out must be what went in.
    out = MODELS[each["kind"]].model_validate(each).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert plain(out)["spec"] == each["spec"], each["metadata"]["name"]


SWITCHES = [
    "--set",
    "monitoring.rules.enabled=true,monitoring.rules.alertLabels.team=a,monitoring.rules.labels.x=y",
    "--set",
    "monitoring.prometheus.serverAddress=http://p:9090,monitoring.prometheus.authenticationRef=a",
    "--set",
    "nodes.autoscaling.enabled=true,monitoring.serviceMonitor.enabled=true,router.serveTls.mode=secret",
    "--set",
    "router.serveTls.secretName=s,discovery.mode=etcd",
]


def test_objects_of_operators_are_valid(helm4):
    seen = set()
    for arguments in [["--values", example] for example in EXAMPLES] + [SWITCHES]:
        for each in helm4.objects(*arguments):
            if kube.foreign(each):
                check(each)
                seen.add(each["kind"])
    assert seen == {*MODELS, *ROUTES}


def test_the_check_finds_unknown_fields(helm4):
    (one, *_) = kube.of_kind(helm4.objects(*SWITCHES), "ScaledObject")
    one["spec"]["fallback"]["nope"] = 1
    with pytest.raises(AssertionError):
        check(one)


def test_no_object_of_an_operator_unless_asked_for(helm4):
    assert [each["kind"] for each in helm4.objects() if kube.foreign(each)] == []


def test_queries_are_of_one_pool_of_one_release(helm4):
    for each in kube.of_kind(helm4.objects(*SWITCHES, release="one", namespace="n"), "ScaledObject"):
        role = each["metadata"]["labels"]["app.kubernetes.io/component"]
        metric = {"prefill": "overfill_prefill_backlog_seconds", "decode": "overfill_decode_load_nodes"}[role]
        trigger = each["spec"]["triggers"][0]
        labels = 'namespace="n",release="one",pool="default"'
        target = {"prefill": "1", "decode": "0.8"}[role]
        assert trigger["metadata"]["query"] == (
            f'(sum({metric}{{{labels},source="router"}}) or vector(0))'
            f' + (max({metric}{{{labels},source="nodes"}}) or vector(0))'
            ' + clamp_max(sum(overfill_requests_without_nodes{namespace="n",release="one",model_name=~"demo"}), '
            + target
            + ")"
        )
        assert trigger["metadata"]["threshold"] == target
        assert trigger["metricType"] == "AverageValue"
        assert each["spec"]["scaleTargetRef"]["name"] == each["metadata"]["name"]


def test_waiting_requests_wake_their_own_pool(helm4, tmp_path):
    """A prefill pool is woken for all variants of its model, a decode pool for its own. Names are no patterns."""
    (tmp_path / "values.yaml").write_text(
        "nodes: {autoscaling: {enabled: true}}\nmonitoring: {prometheus: {serverAddress: 'http://p'}}\n"
        "models: [{name: org/m1.5, source: {builtin: demo}}]\nprefill: {pools: [{name: p, model: org/m1.5}]}\n"
        "decode: {pools: [{name: a, model: org/m1.5}, {name: b, model: org/m1.5, servedName: small}]}\n"
    )
    objects = helm4.objects("--values", tmp_path / "values.yaml")
    names = {
        each["metadata"]["name"]: each["spec"]["triggers"][0]["metadata"]["query"]
        .split("model_name=~")[1]
        .split("}")[0]
        for each in kube.of_kind(objects, "ScaledObject")
    }
    assert names == {
        "overfill-prefill-p": '"org/m1\\\\.5|small"',
        "overfill-decode-a": '"org/m1\\\\.5"',
        "overfill-decode-b": '"small"',
    }


def test_a_pool_waits_for_its_nodes_before_it_shrinks(helm4):
    for each in kube.of_kind(helm4.objects(*SWITCHES), "ScaledObject"):
        behavior = each["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 120
        assert each["spec"]["fallback"] == {"failureThreshold": 3, "replicas": 4}


def test_hpa_reads_a_recorded_metric(helm4):
    objects = helm4.objects(
        "--set", "nodes.autoscaling.enabled=true,nodes.autoscaling.kind=hpa,monitoring.rules.enabled=true"
    )
    kube.validate(objects, "1.37.0")
    recorded = {rule.get("record") for group in rules(objects)["groups"] for rule in group["rules"]}
    for each in kube.of_kind(objects, "HorizontalPodAutoscaler"):
        metric = each["spec"]["metrics"][0]["external"]
        assert metric["metric"]["name"] in recorded
        assert metric["metric"]["selector"]["matchLabels"] == {
            "namespace": "overfill",
            "release": "overfill",
            "pool": "default",
        }
    targets = [
        each["spec"]["metrics"][0]["external"]["target"]["averageValue"]
        for each in kube.of_kind(objects, "HorizontalPodAutoscaler")
    ]
    assert sorted(targets) == ["1", "800m"]


def rules(objects):
    return kube.of_kind(objects, "PrometheusRule")[0]["spec"]


def test_rules_are_the_file(helm4):
    """What promtool tests in files/rules.yaml is what a release gets."""
    found = rules(helm4.objects("--set", "monitoring.rules.enabled=true", release="one", namespace="n"))
    text = (CHART / "files/rules.yaml").read_text().replace("$namespace", "n").replace("$release", "one")
    assert found == yaml.safe_load(text)
    assert "{{ $labels" in str(found)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: apt install prometheus)")
def test_rules_and_queries_are_promql(helm4, tmp_path):
    subprocess.run(["promtool", "check", "rules", CHART / "files/rules.yaml"], check=True)
    queries = [
        each["spec"]["triggers"][0]["metadata"]["query"]
        for each in kube.of_kind(helm4.objects(*SWITCHES), "ScaledObject")
    ]
    (tmp_path / "q.yaml").write_text(
        yaml.safe_dump(
            {"groups": [{"name": "g", "rules": [{"record": f"r{i}", "expr": q} for i, q in enumerate(queries)]}]}
        )
    )
    subprocess.run(["promtool", "check", "rules", tmp_path / "q.yaml"], check=True)


def test_dashboards(helm, tmp_path):
    chart = tmp_path / "overfill"
    shutil.copytree(CHART, chart)
    for old in (chart / "files/dashboards").glob("*.json"):
        old.unlink()
    switches = ["--set", "monitoring.dashboards.enabled=true,monitoring.dashboards.annotations.grafana_folder=LLM"]
    assert not kube.of_kind(helm.objects(*switches, chart=chart, release="none"), "ConfigMap")
    for name in ("cluster", "Prefill_nodes"):
        (chart / "files/dashboards" / f"{name}.json").write_text(json.dumps({"title": "{{ x }} $release", "uid": name}))
    found = kube.of_kind(helm.objects(*switches, chart=chart), "ConfigMap")
    assert len(found) == 2
    for each in found:
        ((name, text),) = each["data"].items()
        assert json.loads(text) == {"title": "{{ x }} $release", "uid": name.removesuffix(".json")}
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"] == {"grafana_folder": "LLM"}


def test_scrapes_meet_ports(helm4):
    """Each monitor selects pods, or Services, that have the port it names. The routers count once."""
    for kind in ("PodMonitor", "ServiceMonitor"):
        objects = helm4.objects("--set", f"monitoring.{kind[0].lower()}{kind[1:]}.enabled=true,discovery.mode=etcd")
        monitors = kube.of_kind(objects, kind)
        assert len(monitors) == 4
        for each in monitors:
            selector = each["spec"]["selector"]
            labels = selector["matchLabels"].items()
            if kind == "PodMonitor":
                ports = [
                    {port["name"] for port in spec["containers"][0]["ports"]}
                    for _, found, spec in kube.pods(objects)
                    if labels <= found.items()
                ]
                endpoint = each["spec"]["podMetricsEndpoints"][0]
            else:
                absent = [one["key"] for one in selector.get("matchExpressions", [])]
                services = [
                    one
                    for one in kube.of_kind(objects, "Service")
                    if labels <= one["metadata"]["labels"].items() and not set(absent) & set(one["metadata"]["labels"])
                ]
                ports = [{port["name"] for port in one["spec"]["ports"]} for one in services]
                endpoint = each["spec"]["endpoints"][0]
            assert len(ports) == 1 and endpoint["port"] in ports[0]
            assert {
                "sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
                "targetLabel": "release",
            } in endpoint["relabelings"]


def test_certificates_have_the_names_that_are_dialled(helm4):
    objects = helm4.objects("--set", "tls.mode=certManager,discovery.mode=etcd,discovery.etcd.replicas=3")
    secrets = {}
    for each in kube.of_kind(objects, "Certificate"):
        secrets[each["spec"]["secretName"]] = each["spec"].get("dnsNames", [])
    for name, _, spec in kube.pods(objects):
        for volume in spec["volumes"]:
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, name
    for role in ("router", "prefill", "decode"):
        assert secrets[f"overfill-{role}-tls"] == ["nodes.overfill.internal"]
    # No service gets etcd's key.
    assert kube.env(objects, "Deployment", "overfill-router")["OVERFILL_ETCD_KEY"] == "/etc/overfill/tls/tls.key"
    for name, _, spec in kube.pods(objects):
        mounted = [volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume]
        assert ("overfill-etcd-tls" in mounted) == name.startswith("StatefulSet"), name
    urls = kube.env(objects, "Deployment", "overfill-router")["OVERFILL_ETCD_URL"].split(",")
    assert [url.removeprefix("https://").removesuffix(":2379") for url in urls] == secrets["overfill-etcd-tls"]
