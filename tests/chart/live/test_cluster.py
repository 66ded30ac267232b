"""The chart on a real cluster: `cargo xtask kubernetes`.

Needs a kubeconfig, and images that the cluster can pull. Variables:

    OVERFILL_IMAGE_REGISTRY   registry of the images (default: the chart's)
    OVERFILL_IMAGE_PREFIX     repository without the component, for example `overfill-`
    OVERFILL_IMAGE_TAG        tag of the images (default: the chart's appVersion)
    OVERFILL_NEXT_TAG         tag to upgrade to (default: the same images, with another setting)
    OVERFILL_NAMESPACE        namespace, made and deleted by the test (default: overfill-test)
    OVERFILL_DRAIN_MACHINE    1: also drain and uncordon the machine of a decode node; needs a second machine
    OVERFILL_PATIENCE_SECONDS time that anything may take (default: 300)
"""

import json
import os

import pytest
from cluster import CHART, NAMESPACE, RELEASE, Load, Release, deployments, get, kubectl, unreachable, until

import tools

TAG = os.environ.get("OVERFILL_IMAGE_TAG")
NEXT = os.environ.get("OVERFILL_NEXT_TAG")
ROUTER, PREFILL, DECODE = (f"{RELEASE}-{name}" for name in ("router", "prefill-default", "decode-default"))

REASON = unreachable()
pytestmark = pytest.mark.skipif(
    bool(REASON),
    reason=f"NO CLUSTER, NOTHING WAS TESTED. Point KUBECONFIG at one and run `cargo xtask kubernetes` again. kubectl: {REASON}",
)


@pytest.fixture(scope="module", params=["helm3", "helm4"])
def release(request):
    """A release in a namespace that enforces the *restricted* standard. The tests below go on from one another."""
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    kubectl("create", "namespace", NAMESPACE)
    kubectl(
        "label",
        "namespace",
        NAMESPACE,
        "pod-security.kubernetes.io/enforce=restricted",
        "pod-security.kubernetes.io/warn=restricted",
    )
    release = Release(tools.helm(request.param))
    release.upgrade(tag=TAG)
    yield release
    release.run("uninstall", "--wait")
    kubectl("delete", "namespace", NAMESPACE, "--wait")


def check(report):
    assert report["errors"] == {}, report["errors"]
    assert report["requests"] == report["succeeded"] > 0


def test_helm_test(release):
    release.run("test", "--logs")


def test_pods_have_what_the_chart_says(release):
    pods = get("pods", "--selector", f"app.kubernetes.io/instance={RELEASE}")["items"]
    assert pods
    for pod in pods:
        assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume], "a token is mounted"
        assert all(each["restartCount"] == 0 for each in pod["status"].get("containerStatuses", []))


def test_scale_survives_upgrade_and_rollback(release):
    first = release.revision()
    for name in (ROUTER, PREFILL, DECODE):
        kubectl("scale", f"deployment/{name}", "--replicas=2")
    release.settle()
    release.upgrade("--set", "logs.level=debug", tag=TAG)
    assert deployments() == {ROUTER: 2, PREFILL: 2, DECODE: 2}
    release.rollback(first)
    assert deployments() == {ROUTER: 2, PREFILL: 2, DECODE: 2}


def test_pools_scale_up_and_down_under_load(release):
    load = Load("load-scale", 90)
    for replicas in (3, 1, 2):
        for name in (PREFILL, DECODE):
            kubectl("scale", f"deployment/{name}", f"--replicas={replicas}")
            release.settle()
    check(load.report())


@pytest.mark.parametrize("strategy", [(1, 0), (0, 1)], ids=["surge", "no-spare-machine"])
def test_update_and_rollback_under_load(release, strategy):
    surge, unavailable = strategy
    switches = ["--set", f"nodes.strategy.maxSurge={surge},nodes.strategy.maxUnavailable={unavailable}"]
    release.upgrade(*switches, tag=TAG)
    before = release.revision()
    load = Load(f"load-update-{surge}", 120)
    release.upgrade(*switches, "--set", "logs.level=info\\,overfill=debug", tag=NEXT)
    release.rollback(before)
    check(load.report())


def test_rollback_in_the_middle_of_an_update(release):
    before = release.revision()
    load = Load("load-middle", 90)
    release.run("upgrade", CHART, "--reuse-values", "--set", "logs.level=warn")
    until(
        "the first new pod",
        lambda: any(
            each["status"].get("updatedReplicas")
            for each in get("deployments", "--selector", f"app.kubernetes.io/instance={RELEASE}")["items"]
        ),
    )
    release.rollback(before)
    check(load.report())


def test_evictions_under_load(release):
    """What a drain of a machine does to each pod, one after another. No budget may refuse forever."""
    load = Load("load-evict", 120)
    for name in (ROUTER, PREFILL, DECODE):
        component = name.split("-")[1]
        for pod in get(
            "pods", "--selector", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={component}"
        )["items"]:
            evict(pod["metadata"]["name"])
            release.settle()
    check(load.report())


def evict(pod):
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"

    def accepted():
        try:
            kubectl("create", "--raw", path, "--filename", "-", text=json.dumps(body))
        except AssertionError as refusal:
            assert "disruption budget" in str(refusal), refusal
            return False
        return True

    until(f"the eviction of {pod}", accepted)


@pytest.mark.skipif(os.environ.get("OVERFILL_DRAIN_MACHINE") != "1", reason="OVERFILL_DRAIN_MACHINE is not 1")
def test_drain_of_a_machine_under_load(release):
    machine = get("pods", "--selector", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=decode")[
        "items"
    ][0]["spec"]["nodeName"]
    load = Load("load-drain", 120)
    try:
        kubectl(
            "drain",
            machine,
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--timeout=300s",
            "--pod-selector",
            f"app.kubernetes.io/instance={RELEASE}",
        )
        release.settle()
    finally:
        kubectl("uncordon", machine)
    check(load.report())


def test_pool_of_one_can_be_drained(release):
    """A budget that allows nothing would hold up the machine."""
    kubectl("scale", f"deployment/{DECODE}", "--replicas=1")
    release.settle()
    (pod,) = get("pods", "--selector", f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=decode")[
        "items"
    ]
    evict(pod["metadata"]["name"])
    release.settle()
    release.run("test")


def test_switching_autoscaling_on_keeps_the_number(release):
    """The router's HPA needs no other operator. Without metrics, it leaves the number alone."""
    kubectl("scale", f"deployment/{ROUTER}", "--replicas=3")
    release.settle()
    release.upgrade("--set", "router.autoscaling.enabled=true,router.autoscaling.minReplicas=3", tag=TAG)
    assert deployments()[ROUTER] == 3
