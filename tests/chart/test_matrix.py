"""Switches in combination, with both Helms, against both ends of the supported versions."""

import itertools

import pytest

import kube
from examples import CHART, NEWEST, OLDEST
from fake_api import serve

DISCOVERY = {
    "dns": [],
    "etcd": ["discovery.mode=etcd", "discovery.etcd.replicas=3"],
    "etcd-empty": ["discovery.mode=etcd", "discovery.etcd.persistence.enabled=false"],
    "external": [
        "discovery.mode=externalEtcd",
        "discovery.externalEtcd.urls[0]=https://e:2379",
        "discovery.externalEtcd.tlsSecretName=s",
        "discovery.externalEtcd.user=u",
        "discovery.externalEtcd.passwordSecretName=p",
    ],
}
TLS = {
    "plain": [],
    "secret": ["tls.mode=secret", "tls.secretName=s", "router.serveTls.mode=secret", "router.serveTls.secretName=c"],
    "cert-manager": [
        "tls.mode=certManager",
        "router.serveTls.mode=certManager",
        "router.serveTls.certManager.issuerRef.name=i",
    ],
    "cert-manager-issuer": [
        "tls.mode=certManager",
        "tls.certManager.issuerRef.name=i",
        "tls.certManager.issuerRef.kind=ClusterIssuer",
    ],
}
REST = {
    "little": [
        "tests.enabled=false",
        "networkPolicy.enabled=false",
        "serviceAccount.create=false",
        "router.headlessService=false",
        "nodes.pdb.enabled=false",
        "router.pdb.enabled=false",
    ],
    "much": [
        "nodes.autoscaling.enabled=true",
        "monitoring.prometheus.serverAddress=http://p",
        "monitoring.podMonitor.enabled=true",
        "monitoring.rules.enabled=true",
        "monitoring.dashboards.enabled=true",
        "telemetry.otlpEndpoint=https://o",
        "router.autoscaling.enabled=true",
        "ingress.http.enabled=true",
        "ingress.http.hosts[0].host=h",
        "ingress.grpc.enabled=true",
        "ingress.grpc.hosts[0].host=g",
        "gateway.httpRoute.enabled=true",
        "gateway.httpRoute.parentRefs[0].name=g",
        "router.apiKeys.keys[0].name=a",
        "router.apiKeys.keys[0].key=0123456789abcdef0",
        "router.service.type=LoadBalancer",
        "router.service.loadBalancerClass=c",
        "network.ipFamilyPolicy=PreferDualStack",
        "network.listenHost=[::]",
        "nodes.sharedMemory.enabled=true",
        "nodes.runtimeClassName=nvidia",
        "nodes.schedulerName=s",
        "router.page=true",
    ],
}
CASES = list(itertools.product(DISCOVERY, TLS, REST))


@pytest.mark.parametrize("discovery,tls,rest", CASES, ids=["-".join(case) for case in CASES])
def test_combination_is_valid(helm, discovery, tls, rest):
    arguments = [part for switch in DISCOVERY[discovery] + TLS[tls] + REST[rest] for part in ("--set", switch)]
    for version in (OLDEST, NEWEST):
        objects = helm.objects(*arguments, version=version)
        kube.validate(objects, version)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))
    for name, _, spec in kube.pods(objects):
        assert kube.mounts_have_volumes(spec, ["data"] if name.startswith("StatefulSet") else []), name


def test_notes_say_what_comes_next(helm, tmp_path):
    with serve({}, tmp_path) as kubeconfig:
        result = helm.run(
            "install",
            "x",
            CHART,
            "--dry-run=client",
            "--namespace",
            "n",
            "--kubeconfig",
            kubeconfig,
            "--disable-openapi-validation",
        )
    notes = result.stdout.split("NOTES:")[1]
    assert "kubectl -n n port-forward svc/x-overfill 8080:8080" in notes and "helm -n n test x" in notes
    assert "WARNING: services talk without TLS" in notes and "WARNING: clients need no API key" in notes
    assert "curl http://localhost:8080/v1/completions" in notes and '"model": "demo"' in notes
