"""Each fault across values ends in one sentence that names the field."""

import re

import pytest

from examples import CHART

# Sentence, and values that cause it.
FAULTS = [
    (
        'models: two entries have the name "demo".',
        [
            "--set-json",
            'models=[{"name":"demo","source":{"builtin":"demo"}},{"name":"demo","source":{"builtin":"demo"}}]',
        ],
    ),
    (
        "models (demo): fullPath and decodePath have no meaning with source.builtin",
        ["--set-json", 'models=[{"name":"demo","fullPath":"x","source":{"builtin":"demo"}}]'],
    ),
    (
        "models (demo).source.image: image volumes need Kubernetes 1.31, and the cluster has v1.30.2.",
        ["--kube-version", "1.30.2", "--set-json", 'models=[{"name":"demo","source":{"image":{"reference":"x"}}}]'],
    ),
    (
        'decode.pools[0].model: "other" is not the name of an entry of models (demo).',
        ["--set-json", 'decode.pools=[{"name":"a","model":"other"}]'],
    ),
    (
        'decode.pools: two pools have the name "a".',
        ["--set-json", 'decode.pools=[{"name":"a","model":"demo"},{"name":"a","model":"demo"}]'],
    ),
    (
        "decode.pools[0] (a).variants: the built-in pair has no other decode models.",
        ["--set-json", 'decode.pools=[{"name":"a","model":"demo","variants":[{"servedName":"b","modelPath":"c"}]}]'],
    ),
    ("decode.pools is empty", ["--set-json", "decode.pools=[]"]),
    ("prefill.pools is empty", ["--set-json", "prefill.pools=[]"]),
    (
        'decode.pools: no pool has the model "two", which prefill pool "b" needs as its partner.',
        [
            "--set-json",
            'models=[{"name":"demo","source":{"builtin":"demo"}},{"name":"two","source":{"builtin":"demo"}}]',
            "--set-json",
            'prefill.pools=[{"name":"a","model":"demo"},{"name":"b","model":"two"}]',
        ],
    ),
    (
        'decode.pools[0] (default).kvDtype: "bf16" differs from "f32" of prefill.pools[0] (default)',
        ["--set", "decode.defaults.kvDtype=bf16"],
    ),
    (
        'prefill.pools[0] (default).kvTransport: "rdma" is not a transport of any decode pool of the model "demo".',
        ["--set", "decode.defaults.kvTransport=tcp,prefill.defaults.kvTransport=rdma"],
    ),
    (
        'prefill.pools[0] (default).kvTransport: "auto" is not a transport of any decode pool of the model "demo".',
        ["--set", "decode.defaults.kvTransport=nccl,nodes.device=cuda:0"],
    ),
    (
        'prefill.pools[0] (default).kvTransport: nccl moves KV between GPUs, and the device is "cpu".',
        ["--set", "nodes.kvTransport=nccl"],
    ),
    (
        "otherRole.placement: togetherRequired on prefill and on decode pools",
        ["--set", "nodes.otherRole.placement=togetherRequired"],
    ),
    (
        "decode.pools[0] (default).terminationGracePeriodSeconds: 60 is shorter than preStopSleepSeconds + "
        "drainTimeoutSeconds + terminationMarginSeconds = 3 + 60 + 10 = 73",
        ["--set", "decode.defaults.terminationGracePeriodSeconds=60"],
    ),
    (
        "router.terminationGracePeriodSeconds: 30 is shorter than preStopSleepSeconds + drainTimeoutSeconds",
        ["--set", "router.terminationGracePeriodSeconds=30"],
    ),
    (
        "prefill.pools[0] (default).strategy: maxSurge and maxUnavailable are both 0",
        ["--set", "nodes.strategy.maxSurge=0%"],
    ),
    ("router.strategy: maxSurge and maxUnavailable are both 0", ["--set", "router.strategy.maxSurge=0"]),
    (
        "prefill.pools[0] (default).pdb.maxUnavailable: 0 would block every drain",
        ["--set", "nodes.pdb.maxUnavailable=0"],
    ),
    ("router.pdb.maxUnavailable: 0% would block every drain", ["--set", "router.pdb.maxUnavailable=0%"]),
    (
        "prefill.pools[0] (default).autoscaling.minReplicas: 5 is above maxReplicas, 4.",
        ["--set", "nodes.autoscaling.enabled=true,nodes.autoscaling.minReplicas=5"],
    ),
    (
        "router.autoscaling.minReplicas: 9 is above maxReplicas, 6.",
        ["--set", "router.autoscaling.enabled=true,router.autoscaling.minReplicas=9"],
    ),
    (
        "router.autoscaling: the share of the requested CPU needs router.resources.requests.cpu.",
        ["--set", "router.autoscaling.enabled=true,router.resources.requests.cpu=null"],
    ),
    ("autoscaling.kind: keda needs monitoring.prometheus.serverAddress", ["--set", "nodes.autoscaling.enabled=true"]),
    (
        "autoscaling.scaleDownStabilizationSeconds: 300 is shorter than loadSeconds, 900",
        ["--set", "nodes.autoscaling.enabled=true,nodes.autoscaling.loadSeconds=900"],
    ),
    (
        "autoscaling.fallbackReplicas: 9 is above maxReplicas, 4.",
        [
            "--set",
            "nodes.autoscaling.enabled=true,nodes.autoscaling.fallbackReplicas=9,monitoring.prometheus.serverAddress=http://p",
        ],
    ),
    (
        "autoscaling.minReplicas: 0 makes requests wait 120 seconds (loadSeconds) for a node, but router.maxQueueSeconds, 60, is shorter.",
        [
            "--set",
            "nodes.autoscaling.enabled=true,nodes.autoscaling.minReplicas=0,monitoring.prometheus.serverAddress=http://p",
        ],
    ),
    (
        "autoscaling.minReplicas: 0 needs kind keda",
        ["--set", "nodes.autoscaling.enabled=true,nodes.autoscaling.minReplicas=0,nodes.autoscaling.kind=hpa"],
    ),
    (
        "autoscaling.kind: hpa needs monitoring.rules.enabled",
        ["--set", "nodes.autoscaling.enabled=true,nodes.autoscaling.kind=hpa"],
    ),
    ("device: cpu would leave the 2 GPUs of gpu.count idle", ["--set", "nodes.gpu.count=2"]),
    ("weights: int4 needs device cpu, not cuda:0.", ["--set", "nodes.device=cuda:0,nodes.weights=int4"]),
    (
        "modelPath has no meaning with source.builtin",
        ["--set-json", 'decode.pools=[{"name":"a","model":"demo","modelPath":"x"}]'],
    ),
    (
        'resourceClaims: two claims have the name "gpu".',
        [
            "--set-json",
            'nodes.resourceClaims=[{"name":"gpu","resourceClaimName":"a"},{"name":"gpu","resourceClaimName":"b"}]',
        ],
    ),
    (
        "router.service: httpPort and grpcPort are both 80.",
        ["--set", "router.service.httpPort=80,router.service.grpcPort=80"],
    ),
    (
        "router.apiKeys: existingSecret and keys are both set",
        [
            "--set",
            "router.apiKeys.existingSecret=s,router.apiKeys.keys[0].name=a,router.apiKeys.keys[0].key=0123456789abcdef0",
        ],
    ),
    (
        'router.apiKeys.keys: two keys have the name "a".',
        [
            "--set-json",
            'router.apiKeys.keys=[{"name":"a","key":"0123456789abcdef0"},{"name":"a","key":"0123456789abcdef1"}]',
        ],
    ),
    ("tests.apiKeySecret.name: helm test needs an API key", ["--set", "router.apiKeys.existingSecret=s"]),
    ("router.serveTls.secretName: mode secret needs", ["--set", "router.serveTls.mode=secret"]),
    ("router.serveTls.certManager.issuerRef: mode certManager needs", ["--set", "router.serveTls.mode=certManager"]),
    ("tls.secretName: mode secret needs", ["--set", "tls.mode=secret"]),
    (
        "discovery.etcd.persistence.enabled: 3 members need it",
        ["--set", "discovery.mode=etcd,discovery.etcd.replicas=3,discovery.etcd.persistence.enabled=false"],
    ),
    ("discovery.externalEtcd.urls: mode externalEtcd needs", ["--set", "discovery.mode=externalEtcd"]),
    (
        'discovery.externalEtcd.passwordSecretName: user "u" needs',
        [
            "--set",
            "discovery.mode=externalEtcd,discovery.externalEtcd.urls[0]=http://e:2379,discovery.externalEtcd.user=u",
        ],
    ),
    (
        "discovery.externalEtcd.tlsSecretName: https://e:2379 needs",
        ["--set", "discovery.mode=externalEtcd,discovery.externalEtcd.urls[0]=https://e:2379"],
    ),
    (
        "discovery.externalEtcd.tlsSecretName: clientCertificate needs",
        [
            "--set",
            "discovery.mode=externalEtcd,discovery.externalEtcd.urls[0]=http://e:2379,discovery.externalEtcd.clientCertificate=true",
        ],
    ),
    (
        "monitoring: podMonitor and serviceMonitor are both enabled",
        ["--set", "monitoring.podMonitor.enabled=true,monitoring.serviceMonitor.enabled=true"],
    ),
    ("ingress.grpc.hosts is empty", ["--set", "ingress.grpc.enabled=true"]),
    ("gateway.httpRoute.parentRefs is empty", ["--set", "gateway.httpRoute.enabled=true"]),
    (
        "commonLabels: app.kubernetes.io/name is the chart's own",
        ["--set-json", 'commonLabels={"app.kubernetes.io/name":"x"}'],
    ),
]


def message(helm, arguments):
    result = helm.run("template", "x", CHART, *arguments, check=False)
    assert result.returncode != 0, "not refused"
    found = re.search(r"execution error at \([^)]*\): (.*)", result.stderr)
    assert found, result.stderr
    return found[1]


@pytest.mark.parametrize("sentence,arguments", FAULTS, ids=[re.sub(r"\W+", "-", fault[0])[:50] for fault in FAULTS])
def test_fault_is_one_sentence(helm, sentence, arguments):
    text = message(helm, arguments)
    assert sentence in text
    assert text.endswith(".") and "\n" not in text


def test_every_refusal_is_tested(helm4):
    """Each `fail` of the templates is met by a case above."""
    messages = [message(helm4, arguments) for _, arguments in FAULTS]
    for path in sorted((CHART / "templates").rglob("*.tpl")):
        for text in re.findall(r'fail \(?(?:printf )?"((?:[^"\\]|\\.)*)"', path.read_text()):
            pattern = re.compile(".*".join(re.escape(part) for part in re.split(r"%[a-z]", text)))
            assert any(pattern.fullmatch(each) for each in messages), f"{path.name}: {text}"
