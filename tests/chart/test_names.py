"""Names with dots and of any length, and two releases that never mix."""

import re

import kube

LONG = "a" * 53
LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


def names(objects):
    return {(each["kind"], each["metadata"]["name"]) for each in objects}


def check(objects):
    assert len(names(objects)) == len(objects), "two objects have the same name"
    for each in objects:
        name = each["metadata"]["name"]
        assert len(name) <= 63 and LABEL.match(name), (each["kind"], name)
        for value in each["metadata"]["labels"].values():
            assert len(value) <= 63, value
    for name, labels, _ in kube.pods(objects):
        assert all(len(value) <= 63 for value in labels.values()), name
    for each in kube.of_kind(objects, "StatefulSet"):
        # The label controller-revision-hash is this name and 11 more characters.
        assert len(each["metadata"]["name"]) <= 52


EVERYTHING = [
    "--set",
    "discovery.mode=etcd,discovery.etcd.replicas=3,tls.mode=certManager",
    "--set",
    "monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,monitoring.dashboards.enabled=true",
    "--set",
    "router.serveTls.mode=certManager,router.serveTls.certManager.issuerRef.name=i",
    "--set",
    "models[0].name=Org.Model_v1.5,models[0].source.hub.full=a/b,models[0].source.hub.size=1Gi",
    "--set",
    "prefill.pools[0].name=p,prefill.pools[0].model=Org.Model_v1.5",
    "--set",
    "decode.pools[0].name=d,decode.pools[0].model=Org.Model_v1.5",
]


def test_names_are_valid(helm):
    for release in ("x", "1", "my.release", "a-overfill", LONG, "a." + "b" * 51, "9" * 53):
        check(helm.objects(*EVERYTHING, release=release))


def test_long_pool_names(helm4):
    pools = {}
    for release in ("x", LONG):
        for pool in ("p" * 63, "p" * 62 + "q", "1"):
            objects = helm4.objects(
                "--set-json",
                f'decode.pools=[{{"name":"{pool}","model":"demo"}},{{"name":"other","model":"demo"}}]',
                release=release,
            )
            check(objects)
            pools[release, pool] = {name for kind, name in names(objects) if kind == "Deployment"}
    assert not pools["x", "p" * 63] & pools["x", "p" * 62 + "q"] - {
        "x-overfill-router",
        "x-overfill-prefill-default",
        "x-overfill-decode-other",
    }


def test_names_with_dots_differ_from_names_with_dashes(helm4):
    assert not names(helm4.objects(release="a.b")) & names(helm4.objects(release="a-b"))
    # Model names are not object names, except for downloads.
    one = helm4.objects(*EVERYTHING)
    other = helm4.objects(*[argument.replace("Model_v1.5", "Model-v1.5") for argument in EVERYTHING])
    claims = lambda objects: names(kube.of_kind(objects, "PersistentVolumeClaim"))
    assert not claims(one) & claims(other)


def selected(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def test_two_releases_never_mix(helm4):
    """In one namespace: no Service, policy, monitor or Deployment of one selects pods of the other."""
    switches = ["--set", "discovery.mode=etcd,monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true"]
    one, two = helm4.objects(*switches, release="one"), helm4.objects(*switches, release="two")
    assert not names(one) & names(two)
    for objects, others in ((one, two), (two, one)):
        for each in objects:
            spec = each.get("spec", {})
            found = []
            if each["kind"] == "Service":
                found.append(spec["selector"])
            for field in ("selector", "podSelector"):
                if "matchLabels" in spec.get(field, {}):
                    found.append(spec[field]["matchLabels"])
            for selector in found:
                assert selector, each
                for name, labels, _ in kube.pods(others):
                    assert not selected(selector, labels), (each["kind"], each["metadata"]["name"], name)
    prefix = {
        kube.env(each, "Deployment", f"{name}-overfill-router")["OVERFILL_ETCD_PREFIX"]
        for each, name in ((one, "one"), (two, "two"))
    }
    assert prefix == {"overfill/one", "overfill/two"}
    rules = str(kube.of_kind(one, "PrometheusRule")[0]["spec"])
    assert 'release="one"' in rules and "$release" not in rules and "$namespace" not in rules
    recorded = [rule for group in kube.of_kind(one, "PrometheusRule")[0]["spec"]["groups"] for rule in group["rules"]]
    assert all('namespace="overfill",release="one"' in rule["expr"] for rule in recorded)


def test_etcd_prefix_has_the_namespace(helm4):
    env = kube.env(helm4.objects("--set", "discovery.mode=etcd", namespace="n"), "Deployment", "overfill-router")
    assert env["OVERFILL_ETCD_PREFIX"] == "n/overfill"
    assert env["OVERFILL_ETCD_URL"] == "http://overfill-etcd-0.overfill-etcd.n.svc:2379"
    assert "OVERFILL_PREFILL_DNS" not in env


def test_routers_use_no_nodes_of_another_release(helm4):
    for name in ("router", "prefill-default", "decode-default"):
        assert (
            kube.env(helm4.objects(namespace="n"), "Deployment", f"overfill-{name}")["OVERFILL_CLUSTER"] == "n/overfill"
        )


def test_selectors_never_change(helm4):
    """Selectors of Deployments can't be changed: they hold neither version nor anything that values set."""
    for each in kube.of_kind(
        helm4.objects("--set", "commonLabels.team=a,image.tag=x,nodes.podLabels.b=c"), "Deployment"
    ):
        selector = each["spec"]["selector"]["matchLabels"]
        assert set(selector) <= {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
            "overfill/pool",
        }
        assert selected(selector, each["spec"]["template"]["metadata"]["labels"])
        assert each["spec"]["template"]["metadata"]["labels"]["team"] == "a"
