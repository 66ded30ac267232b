"""Who owns the number of nodes.

Helm 4 applies on the server: a number in the release that someone else has changed is a conflict. Helm 3 resets it. With
both, a number that disappears from the release becomes 1. The live Deployments here look as a real API server shows them.
"""

import pytest

import kube
from examples import CHART, load
from fake_api import deployment, manager, serve

NAME = "overfill-decode-default"
SCALED = manager("kubectl", "Update", "replicas", subresource="scale")
HPA = manager("kube-controller-manager", "Update", "replicas", subresource="scale")
SET = {"overfill/replicas-set": "true"}
AUTOSCALED = [
    "--set",
    "decode.defaults.autoscaling.enabled=true,monitoring.prometheus.serverAddress=http://p:9090",
]


def replicas(helm, tmp_path, live, *arguments):
    """`spec.replicas` of the decode pool as an upgrade would render it, and whether it is marked as set."""
    with serve({NAME: live} if live else {}, tmp_path) as kubeconfig:
        text = helm.run(
            "template",
            "overfill",
            CHART,
            "--namespace",
            "overfill",
            "--dry-run=server",
            "--disable-openapi-validation",
            "--kubeconfig",
            kubeconfig,
            *arguments,
        ).stdout
    found = kube.named(load(text), "Deployment", NAME)
    count = found["spec"].get("replicas")
    marked = found["metadata"]["annotations"].get("overfill/replicas-set") == "true"
    assert marked == (count is not None)
    return count


def test_not_set_is_not_rendered(helm):
    for each in kube.of_kind(helm.objects(), "Deployment"):
        assert "replicas" not in each["spec"]


def test_zero_is_a_number(helm):
    objects = helm.objects("--set", "nodes.replicas=0,router.replicas=0")
    assert [each["spec"]["replicas"] for each in kube.of_kind(objects, "Deployment")] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_autoscaled_pools_render_no_replicas(helm, kind):
    objects = helm.objects(
        *AUTOSCALED,
        "--set",
        f"decode.defaults.autoscaling.kind={kind},nodes.replicas=3,monitoring.rules.enabled=true",
        "--set",
        "router.replicas=3,router.autoscaling.enabled=true",
    )
    counts = {each["metadata"]["name"]: each["spec"].get("replicas") for each in kube.of_kind(objects, "Deployment")}
    assert counts == {NAME: None, "overfill-prefill-default": 3, "overfill-router": None}


def test_first_install(helm, tmp_path):
    assert replicas(helm, tmp_path, None) is None
    assert replicas(helm, tmp_path, None, "--set", "nodes.replicas=2") == 2
    assert replicas(helm, tmp_path, None, "--set", "nodes.replicas=2", *AUTOSCALED) is None


# How the release last applied the Deployment: by Helm 3 (or Helm 4 in its way), or on the server by Helm 4, or by Flux.
APPLIED = {
    "client": lambda *more: manager("helm", "Update", "template", *more),
    "server": lambda *more: manager("helm", "Apply", "template", *more),
    "flux": lambda *more: manager("helm-controller", "Apply", "template", *more),
}


@pytest.mark.parametrize("way", APPLIED)
def test_never_set_stays_out_of_the_release(helm, tmp_path, way):
    """Then `kubectl scale` survives every upgrade and rollback. For an Update, defaults count as the creator's fields."""
    fields = ["replicas"] if way == "client" else []
    assert replicas(helm, tmp_path, deployment(NAME, 1, [APPLIED[way](*fields)])) is None
    assert replicas(helm, tmp_path, deployment(NAME, 5, [APPLIED[way](), SCALED])) is None
    assert replicas(helm, tmp_path, deployment(NAME, 5, [APPLIED[way](), HPA]), *AUTOSCALED) is None


@pytest.mark.parametrize("way", APPLIED)
def test_set_and_not_scaled_follows_the_value(helm, tmp_path, way):
    live = deployment(NAME, 2, [APPLIED[way]("replicas")], SET)
    assert replicas(helm, tmp_path, live, "--set", "nodes.replicas=4") == 4


@pytest.mark.parametrize("way", APPLIED)
def test_set_and_scaled_keeps_the_live_number(helm, tmp_path, way):
    live = deployment(NAME, 5, [APPLIED[way](), SCALED], SET)
    # On the server, the field is someone else's: what is not rendered stays as it is.
    assert replicas(helm, tmp_path, live, "--set", "nodes.replicas=2") == (5 if way == "client" else None)
    assert replicas(helm, tmp_path, live, "--set", "nodes.replicas=2,nodes.keepReplicas=false") == 2


@pytest.mark.parametrize("way", APPLIED)
def test_switching_autoscaling_on_keeps_the_live_number(helm, tmp_path, way):
    live = deployment(NAME, 3, [APPLIED[way]("replicas")], SET)
    assert replicas(helm, tmp_path, live, "--set", "nodes.replicas=3", *AUTOSCALED) == 3
    # The same for a value that is taken away.
    assert replicas(helm, tmp_path, live) == 3
    # Later, the autoscaler has taken the field over.
    later = deployment(NAME, 7, [APPLIED[way](), HPA], SET)
    assert replicas(helm, tmp_path, later, *AUTOSCALED) == (7 if way == "client" else None)
