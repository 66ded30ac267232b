"""The *restricted* Pod Security Standard, tokens, and what containers may write."""

import pytest

import kube
from examples import EXAMPLES

ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def restricted(spec):
    """Violations of the *restricted* standard, as https://kubernetes.io/docs/concepts/security/pod-security-standards/
    lists its controls."""
    pod = spec.get("securityContext", {})
    faults = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    if pod.get("sysctls"):
        faults.append("sysctls")
    for volume in spec.get("volumes", []):
        kinds = set(volume) - {"name"}
        faults += [f"volume {kind}" for kind in kinds - ALLOWED_VOLUMES]
    for each in kube.containers(spec):
        context = each.get("securityContext", {})
        name = each["name"]
        if context.get("privileged"):
            faults.append(f"{name}: privileged")
        if context.get("allowPrivilegeEscalation") is not False:
            faults.append(f"{name}: allowPrivilegeEscalation")
        if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
            faults.append(f"{name}: runAsNonRoot")
        if context.get("runAsUser", pod.get("runAsUser", 1)) == 0:
            faults.append(f"{name}: runAsUser")
        profile = context.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            faults.append(f"{name}: seccompProfile")
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []):
            faults.append(f"{name}: capabilities.drop")
        faults += [f"{name}: {each}" for each in capabilities.get("add", []) if each != "NET_BIND_SERVICE"]
        faults += [f"{name}: hostPort" for port in each.get("ports", []) if port.get("hostPort")]
        if context.get("procMount", "Default") != "Default":
            faults.append(f"{name}: procMount")
    return faults


# Examples that say why they need more.
EXPECTED = {
    "h100-one-node": {"volume hostPath"},
    "prefill-h100-decode-l40s-rdma": {"node: IPC_LOCK"},
}


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_pods_are_restricted(helm4, example):
    found = set()
    for name, _, spec in kube.pods(helm4.objects("--values", example)):
        faults = restricted(spec)
        found.update(faults)
        if "prefill" not in name and "decode" not in name:
            assert faults == [], name
    assert found == EXPECTED.get(example.stem, set())


def test_the_checker_finds_faults():
    assert (
        len(restricted({"containers": [{"name": "x"}], "hostNetwork": True, "volumes": [{"name": "v", "nfs": {}}]}))
        == 6
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_pods_have_no_rights_and_write_nowhere(helm4, example):
    objects = helm4.objects("--values", example)
    assert not [each for each in objects if "rbac" in each["apiVersion"]]
    for account in kube.of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    for name, _, spec in kube.pods(objects):
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert kube.mounts_have_volumes(spec, ["data"] if name.startswith("StatefulSet") else []), name
        for each in kube.containers(spec):
            assert each["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert each["resources"]["requests"] and each["resources"]["limits"]["memory"], (name, each["name"])


def test_privileged_contexts_can_be_replaced(helm4):
    # OpenShift chooses user and group itself, and refuses given ones.
    objects = helm4.objects("--set", "nodes.podSecurityContext.runAsUser=null,nodes.podSecurityContext.fsGroup=null")
    context = kube.named(objects, "Deployment", "overfill-decode-default")["spec"]["template"]["spec"][
        "securityContext"
    ]
    assert "runAsUser" not in context and "fsGroup" not in context and context["runAsNonRoot"] is True


def test_secrets_are_mounted_for_the_group_only(helm4):
    for example in EXAMPLES:
        for _, _, spec in kube.pods(helm4.objects("--values", example)):
            for volume in spec.get("volumes", []):
                if "secret" in volume:
                    assert volume["secret"]["defaultMode"] == 0o440


def test_inline_api_keys_become_a_secret(helm4):
    import base64
    import json

    objects = helm4.objects(
        "--set",
        "router.apiKeys.keys[0].name=a,router.apiKeys.keys[0].key=0123456789abcdef0",
        "--set",
        "router.apiKeys.keys[0].requestsPerMinute=1000000,router.apiKeys.keys[0].weight=2",
    )
    data = kube.named(objects, "Secret", "overfill-api-keys")["data"]
    assert json.loads(base64.b64decode(data["keys.json"])) == [
        {"name": "a", "key": "0123456789abcdef0", "requests_per_minute": 1000000, "weight": 2}
    ]
    assert "OVERFILL_ALLOW_INSECURE" not in kube.env(objects, "Deployment", "overfill-router")


def test_services_need_tls_or_say_that_they_have_none(helm4):
    # The router's client ports are secured by keys or a certificate, the nodes' by mutual TLS.
    plain = helm4.objects()
    assert kube.env(plain, "Deployment", "overfill-router")["OVERFILL_ALLOW_INSECURE"] == "true"
    assert kube.env(plain, "Deployment", "overfill-decode-default")["OVERFILL_ALLOW_INSECURE"] == "true"
    tls = helm4.objects(
        "--set", "tls.mode=secret,tls.secretName=s,router.serveTls.mode=secret,router.serveTls.secretName=c"
    )
    for name in ("router", "prefill-default", "decode-default"):
        env = kube.env(tls, "Deployment", f"overfill-{name}")
        assert "OVERFILL_ALLOW_INSECURE" not in env
        assert env["OVERFILL_TLS_NAME"] == "nodes.overfill.internal"
    router = kube.env(tls, "Deployment", "overfill-router")
    assert router["OVERFILL_PREFILL_DNS"] == "https://overfill-prefill-default.overfill.svc:50061"
    probe = kube.named(tls, "Deployment", "overfill-router")["spec"]["template"]["spec"]["containers"][0][
        "readinessProbe"
    ]
    assert probe["httpGet"]["scheme"] == "HTTPS"
    # Nodes' admin ports never have TLS.
    probe = kube.named(tls, "Deployment", "overfill-decode-default")["spec"]["template"]["spec"]["containers"][0][
        "readinessProbe"
    ]
    assert probe["httpGet"]["scheme"] == "HTTP"
