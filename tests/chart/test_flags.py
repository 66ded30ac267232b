"""The chart and the binaries agree: each variable is one of the binary that gets it, each argument exists."""

import re

import pytest

import kube
from examples import CHART, EXAMPLES

ROOT = CHART.parent
SWITCHES = [
    "--set",
    "discovery.mode=externalEtcd,discovery.externalEtcd.urls[0]=https://e,discovery.externalEtcd.user=u",
    "--set",
    "discovery.externalEtcd.passwordSecretName=p,discovery.externalEtcd.tlsSecretName=s,discovery.externalEtcd.clientCertificate=true",
    "--set",
    "tls.mode=secret,tls.secretName=s,router.serveTls.mode=secret,router.serveTls.secretName=s",
    "--set",
    "router.apiKeys.keys[0].name=a,router.apiKeys.keys[0].key=0123456789abcdef0",
    "--set",
    "nodes.kvPoolTokens=32,nodes.maxWaiting=1,nodes.maxRunning=1,nodes.maxBatchTokens=64,nodes.stepTargetSeconds=1",
    "--set",
    "nodes.kvTransport=rdma,nodes.kvRdmaDevice=mlx5_0:1,nodes.allowPlainRdma=true,nodes.allowPlainNccl=true",
    "--set",
    "nodes.stepTimeoutSeconds=1,router.maxQueueSeconds=1,router.maxRunning=1,router.maxWaiting=1,router.maxBodyBytes=2048",
    "--set",
    "router.maxConnections=1,router.itlLimitSeconds=1",
    "--set",
    "router.allowedOrigins={*},router.mode={exact},router.watchShare=1,router.toolCallParser={none},router.reasoningParser={none},router.trustRequestChatTemplate=true",
]
# Folders with the flags of a service: its own and those that services share.
SOURCES = {
    "router": ("router", "cluster"),
    "prefill": ("prefill-node", "node", "cluster"),
    "decode": ("decode-node", "node", "cluster"),
    "cli": ("cli", "cluster"),
}


def source(service):
    return "\n".join(path.read_text() for folder in SOURCES[service] for path in (ROOT / folder / "src").rglob("*.rs"))


def service_of(image):
    return re.search(r"overfill-(\w+)", image)[1]


@pytest.mark.parametrize("arguments", [SWITCHES, []] + [["--values", example] for example in EXAMPLES])
def test_variables_are_flags(helm4, arguments):
    for name, _, spec in kube.pods(helm4.objects(*arguments)):
        for each in kube.containers(spec):
            if "overfill-" not in each["image"]:
                continue
            text = source(service_of(each["image"]))
            for variable in each["env"]:
                if variable["name"].startswith("OVERFILL_"):
                    assert f'"{variable["name"]}"' in text, (name, variable["name"])


def test_arguments_of_the_command_line_tool_exist(helm4):
    example = next(example for example in EXAMPLES if example.stem == "public-checkpoint-cpu")
    seen = set()
    for _, _, spec in kube.pods(helm4.objects("--values", example)):
        for each in kube.containers(spec):
            if "overfill-cli" in each["image"]:
                command = each["args"][0]
                fields = (ROOT / "cli/src" / f"{command}.rs").read_text() + (
                    ROOT / "cli/src/router_client.rs"
                ).read_text()
                for argument in each["args"]:
                    if argument.startswith("--"):
                        assert re.search(rf"\b{argument[2:].replace('-', '_')}:", fields), (command, argument)
                seen.add(command)
    assert seen == {"generate", "pull"}


def test_ports_are_those_of_the_images(helm4):
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, _, spec in kube.pods(helm4.objects()):
        for each in spec["containers"]:
            for port in each.get("ports", []):
                assert str(port["containerPort"]) in dockerfile, (name, port)


def test_paths_of_the_demo_pair_are_those_of_the_images(helm4):
    dockerfile = (ROOT / "Dockerfile").read_text()
    for role in ("prefill", "decode"):
        path = kube.env(helm4.objects(), "Deployment", f"overfill-{role}-default")["OVERFILL_MODEL"]
        folder = path.rsplit("/", 1)
        assert folder[0] in dockerfile and (ROOT / "demo" / folder[1]).is_dir()


def test_versions_agree():
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    chart = (CHART / "Chart.yaml").read_text()
    assert f"\nversion: {version}\n" in chart and f'\nappVersion: "{version}"\n' in chart
