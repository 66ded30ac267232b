"""Who may reach what: the NetworkPolicies, simulated."""

import ipaddress

import pytest

import kube
from examples import EXAMPLES


class Network:
    """Pods of a release and of others, and the policies of the release's namespace."""

    def __init__(self, objects):
        self.policies = kube.of_kind(objects, "NetworkPolicy")
        self.pods = {}
        for _, labels, spec in kube.pods(objects):
            component = labels["app.kubernetes.io/component"]
            self.pods.setdefault(component, {"namespace": "overfill", "labels": labels, "spec": spec})
        self.pods["client"] = {"namespace": "apps", "labels": {"app": "web"}}
        self.pods["neighbour"] = {"namespace": "overfill", "labels": {"app": "web"}}
        self.pods["prometheus"] = {"namespace": "monitoring", "labels": {"app": "prometheus"}}
        self.pods["dns"] = {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}
        self.pods["collector"] = {"namespace": "observability", "labels": {}}
        self.pods["internet"] = {"ip": "93.184.216.34"}
        other = {**self.pods["router"]["labels"], "app.kubernetes.io/instance": "other"}
        self.pods["other release's router"] = {"namespace": "overfill", "labels": other}

    def allows(self, source, target, port, protocol="TCP"):
        source, target = self.pods[source], self.pods[target]
        return self.side(source, target, "egress", "to", port, protocol) and self.side(
            target, source, "ingress", "from", port, protocol
        )

    def side(self, pod, peer, side, field, port, protocol):
        """No policy that selects the pod: everything. Otherwise what any rule of them allows."""
        mine = [
            policy["spec"]
            for policy in self.policies
            if pod.get("namespace") == policy["metadata"]["namespace"]
            and matches(policy["spec"]["podSelector"], pod["labels"])
            and side.capitalize() in policy["spec"]["policyTypes"]
        ]
        if not mine:
            return True
        return any(
            # A rule without ports allows all.
            ("ports" not in rule or any(each["port"] == port and each["protocol"] == protocol for each in rule["ports"]))
            and (field not in rule or any(self.is_peer(each, peer) for each in rule[field]))
            for spec in mine
            for rule in spec.get(side, [])
        )

    def is_peer(self, rule, peer):
        if "ipBlock" in rule:
            return "ip" in peer and ipaddress.ip_address(peer["ip"]) in ipaddress.ip_network(rule["ipBlock"]["cidr"])
        if "ip" in peer:
            return False
        namespace = {"kubernetes.io/metadata.name": peer["namespace"]}
        if "namespaceSelector" in rule:
            if not matches(rule["namespaceSelector"], namespace):
                return False
        elif peer["namespace"] != "overfill":
            return False
        return matches(rule.get("podSelector", {}), peer["labels"])


def matches(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


# Pods and ports of a release.
PORTS = {"router": (8080, 50051), "prefill": (50061, 9090), "decode": (50071, 50072, 9090), "etcd": (2379, 2380, 2381)}


def reachable(network, source):
    return {
        (target, port)
        for target, ports in PORTS.items()
        if target in network.pods and target != source
        for port in ports
        if network.allows(source, target, port)
    }


CLIENT = {("router", 8080), ("router", 50051)}


def test_who_reaches_what(helm4):
    network = Network(helm4.objects())
    assert reachable(network, "client") == CLIENT
    assert reachable(network, "neighbour") == CLIENT
    assert reachable(network, "other release's router") == CLIENT
    assert reachable(network, "internet") == CLIENT
    assert reachable(network, "prometheus") == CLIENT | {("prefill", 9090), ("decode", 9090)}
    assert reachable(network, "router") == {("prefill", 50061), ("decode", 50071)}
    assert reachable(network, "prefill") == {("decode", 50072)}
    assert reachable(network, "decode") == set()
    assert reachable(network, "test") == {("router", 50051)}


def test_nccl_needs_all_ports_between_nodes(helm4):
    network = Network(helm4.objects("--set", "nodes.kvTransport=nccl,nodes.device=cuda:0"))
    assert network.allows("prefill", "decode", 43210) and network.allows("decode", "prefill", 43210)
    for source in ("router", "client", "neighbour"):
        assert not network.allows(source, "decode", 43210) and not network.allows(source, "prefill", 43210)
    assert not network.allows("decode", "router", 43210)


def test_etcd_is_for_services_only(helm4):
    network = Network(helm4.objects("--set", "discovery.mode=etcd,discovery.etcd.replicas=3"))
    for source in ("router", "prefill", "decode"):
        assert ("etcd", 2379) in reachable(network, source)
        assert ("etcd", 2380) not in reachable(network, source)
    assert network.allows("etcd", "etcd", 2380) and network.allows("etcd", "etcd", 2379)
    for source in ("client", "neighbour", "test", "other release's router"):
        assert not {port for target, port in reachable(network, source) if target == "etcd"}
    assert ("etcd", 2381) in reachable(network, "prometheus")


def test_ways_out(helm4):
    network = Network(helm4.objects("--set", "telemetry.otlpEndpoint=http://collector.observability:4317"))
    for source in ("router", "prefill", "decode"):
        assert network.allows(source, "dns", 53, "UDP") and network.allows(source, "dns", 53)
        assert network.allows(source, "collector", 4317)
        assert not network.allows(source, "collector", 80)
        assert not network.allows(source, "internet", 443)
        assert not network.allows(source, "internet", 4317)
    assert not Network(helm4.objects()).allows("router", "collector", 4317)


def test_only_the_download_reaches_the_hub(helm4):
    example = next(example for example in EXAMPLES if example.stem == "public-checkpoint-cpu")
    network = Network(helm4.objects("--values", example))
    assert network.allows("download", "internet", 443) and network.allows("download", "dns", 53, "UDP")
    assert reachable(network, "download") == set()
    for source in ("router", "prefill", "decode", "test"):
        assert not network.allows(source, "internet", 443)


def test_clients_can_be_named(helm4):
    network = Network(
        helm4.objects(
            "--set-json",
            'networkPolicy.clientsFrom=[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"apps"}}}]',
        )
    )
    assert reachable(network, "client") == CLIENT
    assert reachable(network, "neighbour") == set()
    assert reachable(network, "test") == {("router", 50051)}
    assert reachable(network, "prometheus") >= {("router", 8080)}


def test_external_etcd(helm4):
    example = next(example for example in EXAMPLES if example.stem == "external-etcd")
    network = Network(helm4.objects("--values", example))
    for source in ("router", "prefill", "decode"):
        assert network.allows(source, "internet", 2379) and not network.allows(source, "internet", 443)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_every_pod_is_under_a_policy(helm4, example):
    objects = helm4.objects("--values", example)
    policies = [each["spec"]["podSelector"] for each in kube.of_kind(objects, "NetworkPolicy")]
    for name, labels, _ in kube.pods(objects):
        assert any(matches(selector, labels) for selector in policies), name


def test_off(helm4):
    assert not kube.of_kind(helm4.objects("--set", "networkPolicy.enabled=false"), "NetworkPolicy")
