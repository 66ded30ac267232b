"""Pools: overrides, devices, drain, disruption, discovery."""

import hashlib

import pytest

import kube
from examples import EXAMPLES


def deployment(objects, name):
    return kube.named(objects, "Deployment", f"overfill-{name}")


def node(objects, name):
    return deployment(objects, name)["spec"]["template"]["spec"]["containers"][0]


POOLS = """
nodes:
  kvPoolTokens: 1000000
  nodeSelector: {zone: a}
  tolerations: [{key: t}]
  drainTimeoutSeconds: 100
prefill:
  defaults: {maxBatchTokens: 2048, nodeSelector: {kind: big}}
  pools:
    - {name: a, model: demo}
    - name: b
      model: demo
      replicas: 0
      kvPoolTokens: 4096
      nodeSelector: {zone: null, kind: small}
      tolerations: []
      strategy: {maxSurge: 0, maxUnavailable: 1}
      pdb: {enabled: false}
      drainTimeoutSeconds: 0
      preStopSleepSeconds: 0
      keepReplicas: false
      image: {repository: other/prefill, tag: "2"}
      resources: {requests: {memory: 1Gi}, limits: {cpu: 2}}
decode:
  pools:
    - {name: a, model: demo}
    - {name: fast, model: demo, servedName: demo-fast}
"""


@pytest.fixture
def pools(helm4, tmp_path):
    (tmp_path / "values.yaml").write_text(POOLS)
    return helm4.objects("--values", tmp_path / "values.yaml")


def test_overrides(pools):
    a, b = (deployment(pools, f"prefill-{name}")["spec"]["template"]["spec"] for name in "ab")
    assert a["nodeSelector"] == {"zone": "a", "kind": "big"} and b["nodeSelector"] == {"kind": "small"}
    assert a["tolerations"] == [{"key": "t"}] and "tolerations" not in b
    assert kube.env(pools, "Deployment", "overfill-prefill-a")["OVERFILL_KV_POOL_TOKENS"] == "1000000"
    assert kube.env(pools, "Deployment", "overfill-prefill-b")["OVERFILL_KV_POOL_TOKENS"] == "4096"
    assert kube.env(pools, "Deployment", "overfill-prefill-a")["OVERFILL_MAX_BATCH_TOKENS"] == "2048"
    assert "OVERFILL_MAX_BATCH_TOKENS" not in kube.env(pools, "Deployment", "overfill-decode-a")
    assert deployment(pools, "prefill-b")["spec"]["replicas"] == 0
    assert deployment(pools, "prefill-b")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert node(pools, "prefill-b")["image"] == "ghcr.io/other/prefill:2"
    assert node(pools, "prefill-b")["resources"] == {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": 2}}
    assert {each["metadata"]["name"] for each in kube.of_kind(pools, "PodDisruptionBudget")} == {
        "overfill-router",
        "overfill-prefill-a",
        "overfill-decode-a",
        "overfill-decode-fast",
    }


VARIANTS = """
models: [{name: chat, source: {pvc: {claimName: models}}, fullPath: full, decodePath: decode}]
prefill: {pools: [{name: a, model: chat}]}
decode: {pools: [{name: a, model: chat, variants: [{servedName: code, modelPath: code/v2}, {servedName: full, modelPath: full}]}]}
"""


def test_variants_share_a_pool(helm4, tmp_path):
    (tmp_path / "values.yaml").write_text(VARIANTS)
    objects = helm4.objects("--values", tmp_path / "values.yaml")
    decode = kube.env(objects, "Deployment", "overfill-decode-a")
    assert (decode["OVERFILL_MODEL"], decode["OVERFILL_VARIANT"]) == ("/models/decode", "code=/models/code/v2,full=/models/full")
    assert "OVERFILL_VARIANT" not in kube.env(objects, "Deployment", "overfill-prefill-a")
    assert kube.env(objects, "Deployment", "overfill-router")["OVERFILL_SERVED_MODEL"] == "chat,code,full"


def test_grace_covers_the_drain(pools):
    a, b = (deployment(pools, f"prefill-{name}")["spec"]["template"]["spec"] for name in "ab")
    assert a["terminationGracePeriodSeconds"] == 3 + 100 + 10
    assert a["containers"][0]["lifecycle"]["preStop"] == {"sleep": {"seconds": 3}}
    # The kubelet refuses to sleep for 0 seconds before 1.32.
    assert b["terminationGracePeriodSeconds"] == 10 and "lifecycle" not in b["containers"][0]
    assert kube.env(pools, "Deployment", "overfill-prefill-b")["OVERFILL_DRAIN_TIMEOUT_SECONDS"] == "0"
    assert deployment(pools, "router")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 5 + 600 + 10


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_every_example_drains(helm4, example):
    for each in kube.of_kind(helm4.objects("--values", example), "Deployment"):
        spec = each["spec"]["template"]["spec"]
        env = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
        drain = int(env["OVERFILL_DRAIN_TIMEOUT_SECONDS"])
        sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] >= drain + sleep + 1
        # A rollout may not count as failed while a model is still loading.
        probe = spec["containers"][0]["startupProbe"]
        assert each["spec"]["progressDeadlineSeconds"] > probe["failureThreshold"] * probe["periodSeconds"]


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.stem for example in EXAMPLES])
def test_budgets_never_block(helm4, example):
    objects = helm4.objects("--values", example)
    budgets = kube.of_kind(objects, "PodDisruptionBudget")
    for each in budgets:
        assert "minAvailable" not in each["spec"] and each["spec"]["maxUnavailable"] not in (0, "0%")
        assert each["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    for name, labels, _ in kube.pods(objects):
        if name.startswith(("Deployment", "StatefulSet")):
            mine = [each for each in budgets if each["spec"]["selector"]["matchLabels"].items() <= labels.items()]
            # Two budgets for one pod are an error of every eviction.
            assert len(mine) == 1, name


def test_headless_services_publish_nodes_that_are_not_ready(pools):
    for each in kube.of_kind(pools, "Service"):
        node_service = each["metadata"]["labels"]["app.kubernetes.io/component"] in ("prefill", "decode")
        assert each["spec"].get("publishNotReadyAddresses", False) is node_service
        if node_service:
            assert each["spec"]["clusterIP"] == "None"


def test_routers_look_for_all_pools(pools):
    env = kube.env(pools, "Deployment", "overfill-router")
    assert env["OVERFILL_PREFILL_DNS"] == ",".join(
        f"http://overfill-prefill-{name}.overfill.svc:50061" for name in "ab"
    )
    assert env["OVERFILL_DECODE_DNS"] == ",".join(
        f"http://overfill-decode-{name}.overfill.svc:50071" for name in ("a", "fast")
    )
    assert env["OVERFILL_SERVED_MODEL"] == "demo,demo-fast"
    services = {each["metadata"]["name"] for each in kube.of_kind(pools, "Service")}
    for url in (env["OVERFILL_PREFILL_DNS"] + "," + env["OVERFILL_DECODE_DNS"]).split(","):
        assert url.split("//")[1].split(".")[0] in services


def test_services_reach_their_containers(helm4):
    for example in EXAMPLES:
        objects = helm4.objects("--values", example)
        for service in kube.of_kind(objects, "Service"):
            found = [
                spec for _, labels, spec in kube.pods(objects) if service["spec"]["selector"].items() <= labels.items()
            ]
            assert len(found) == 1, service["metadata"]["name"]
            names = {port["name"] for port in found[0]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_devices(helm4):
    objects = helm4.objects(
        "--set",
        "nodes.device=cuda:0,nodes.gpu.count=2,nodes.rdma.count=1",
        "--set-json",
        'nodes.resourceClaims=[{"name":"nic","resourceClaimTemplateName":"nic"}]',
    )
    container = node(objects, "decode-default")
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2", "rdma/hca": "1"}
    assert container["resources"]["claims"] == [{"name": "nic"}]
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    pod = deployment(objects, "decode-default")["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == [{"name": "nic", "resourceClaimTemplateName": "nic"}]
    off = helm4.objects("--set", "nodes.rdma.count=1,nodes.rdma.ipcLock=false")
    assert node(off, "decode-default")["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(
    "version,api", [("1.32.1", "v1beta1"), ("1.33.1", "v1beta2"), ("1.34.0-gke.1", "v1"), ("1.37.0", "v1")]
)
def test_claims_are_in_the_clusters_api(helm4, version, api):
    objects = helm4.objects(
        "--set-json", 'nodes.resourceClaims=[{"name":"gpu","spec":{"devices":{}}}]', version=version
    )
    templates = kube.of_kind(objects, "ResourceClaimTemplate")
    assert {each["apiVersion"] for each in templates} == {f"resource.k8s.io/{api}"} and len(templates) == 2


@pytest.mark.parametrize(
    "placement,kind,rule",
    [
        ("together", "podAffinity", "preferred"),
        ("apart", "podAntiAffinity", "preferred"),
        ("apartRequired", "podAntiAffinity", "required"),
    ],
)
def test_placement(helm4, placement, kind, rule):
    objects = helm4.objects(
        "--set",
        f"nodes.otherRole.placement={placement}",
        "--set-json",
        'nodes.affinity={"podAffinity":{"preferredDuringSchedulingIgnoredDuringExecution":[{"weight":1,"podAffinityTerm":{"topologyKey":"x"}}]}}',
    )
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        affinity = deployment(objects, f"{role}-default")["spec"]["template"]["spec"]["affinity"]
        term = affinity[kind][f"{rule}DuringSchedulingIgnoredDuringExecution"][-1]
        term = term.get("podAffinityTerm", term)
        assert term["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == other
        assert affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["weight"] == 1


def test_extra_env_replaces(helm4):
    objects = helm4.objects(
        "--set-json", 'nodes.extraEnv=[{"name":"RUST_LOG","value":"debug"},{"name":"A","value":"b"}]'
    )
    env = kube.env(objects, "Deployment", "overfill-decode-default")
    assert env["RUST_LOG"] == "debug" and env["A"] == "b"
    kube.unique(deployment(objects, "decode-default"))


def test_extra_pod_spec(helm4):
    objects = helm4.objects(
        "--set-json", 'nodes.extraPodSpec={"hostAliases":[{"ip":"1.2.3.4"}],"securityContext":{"fsGroup":7}}'
    )
    pod = deployment(objects, "decode-default")["spec"]["template"]["spec"]
    assert pod["hostAliases"] and pod["securityContext"]["fsGroup"] == 7 and pod["securityContext"]["runAsNonRoot"]
    kube.validate(objects, "1.37.0")


def test_images(helm4):
    digest = "sha256:" + "0" * 64
    objects = helm4.objects(
        "--set", f"image.registry=r.io,image.tag=v9,image.decode.digest={digest},image.prefill.tag=v8"
    )
    assert node(objects, "router")["image"] == "r.io/overfill/overfill-router:v9"
    assert node(objects, "prefill-default")["image"] == "r.io/overfill/overfill-prefill:v8"
    assert node(objects, "decode-default")["image"] == f"r.io/overfill/overfill-decode@{digest}"
    # A pool's own tag is stronger than the role's digest.
    objects = helm4.objects("--set", f"image.decode.digest={digest},decode.defaults.image.tag=cuda")
    assert node(objects, "decode-default")["image"] == "ghcr.io/overfill/overfill-decode:cuda"


def test_image_of_a_numeric_version(helm4):
    objects = helm4.objects("--set-string", "image.tag=1e3")
    assert node(objects, "router")["image"].endswith(":1e3")


def folder(model):
    """Folder of a hub model in its claim: a name with a slash gets a hash."""
    return f"{model.replace('/', '-')}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def test_models(helm4):
    def mount(source, paths='"fullPath":"f","decodePath":"d/m.gguf",'):
        objects = helm4.objects("--set-json", f'models=[{{"name":"demo",{paths}"source":{source}}}]')
        kube.validate(objects, "1.37.0")
        env = [
            kube.env(objects, "Deployment", f"overfill-{role}-default")["OVERFILL_MODEL"]
            for role in ("prefill", "decode")
        ]
        return env, deployment(objects, "decode-default")["spec"]["template"]["spec"]

    env, pod = mount('{"pvc":{"claimName":"c","subPath":"s"}}')
    assert env == ["/models/f", "/models/d/m.gguf"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "s"} in pod["containers"][0][
        "volumeMounts"
    ]
    env, pod = mount('{"hostPath":{"path":"/m"}}', "")
    assert (
        env == ["/models", "/models"]
        and {"name": "models", "hostPath": {"path": "/m", "type": "Directory"}} in pod["volumes"]
    )
    _, pod = mount('{"image":{"reference":"r/m:1"}}')
    assert {"name": "models", "image": {"reference": "r/m:1", "pullPolicy": "IfNotPresent"}} in pod["volumes"]
    env, pod = mount('{"hub":{"full":"a/b","decode":"a/c","existingClaim":"x"}}', "")
    assert env == [f"/models/{folder('a/b')}", f"/models/{folder('a/c')}"]
    assert pod["initContainers"][0]["args"][-2:] == [f"/models/{folder('a/c')}", "a/c"]


def test_one_download_per_model(helm4):
    def job(*arguments):
        objects = helm4.objects(
            "--set-json",
            'models=[{"name":"demo","source":{"hub":{"full":"a/b","decode":"a/c","size":"1Gi"}}}]',
            *arguments,
        )
        assert len(kube.of_kind(objects, "PersistentVolumeClaim")) == 1
        return kube.of_kind(objects, "Job")

    (one,) = job()
    spec = one["spec"]["template"]["spec"]
    assert [each["args"][-1] for each in kube.containers(spec)] == ["a/b", "a/c"]
    # A Job can't be changed: another image makes another Job, and nothing else does.
    assert job("--set", "image.cli.tag=v2")[0]["metadata"]["name"] != one["metadata"]["name"]
    assert job("--set", "nodes.kvPoolTokens=32,image.router.tag=v2")[0]["metadata"]["name"] == one["metadata"]["name"]
    # A Job's labels can't be changed either.
    assert job("--set", "commonLabels.team=a")[0]["metadata"]["name"] != one["metadata"]["name"]
