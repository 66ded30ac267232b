"""Runs the images as containers: a client's network, a network of nodes, and a router in both.

Started by `cargo xtask images --test`, in namespaces of its own: whatever is left when this process ends ends with it.
"""

import concurrent.futures
import contextlib
import json
import os
import stat
import subprocess
import time
import urllib.error
import urllib.request

VERSION = os.environ["OVERFILL_VERSION"]
USER = 65532
DEMO = "/usr/share/overfill/demo"

# A request, a drain or a start may take this long in seconds. Nothing is expected to be faster.
PATIENCE = 60
DRAIN_SECONDS = 20
# Nothing answers a client that dials a node, so only time can tell.
UNREACHABLE_SECONDS = 2

CONFINED = [
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pull=never",
]
ETCD = {"OVERFILL_ETCD_URL": "http://etcd:2379", "OVERFILL_ALLOW_INSECURE": "true"}
# The formats in which `overfill up` runs the demo pair.
NODE = ETCD | {
    "OVERFILL_WEIGHTS": "f32",
    "OVERFILL_KV_DTYPE": "f32",
    "OVERFILL_DRAIN_TIMEOUT_SECONDS": str(DRAIN_SECONDS),
}
# Ports of each container.
PORTS = {"etcd": [2379], "prefill": [50061, 9090], "decode": [50071, 50072, 9090], "router": [8080, 50051]}


def image(name):
    return f"localhost/overfill-{name}:{VERSION}"


def run(*command, **options):
    """Runs a program. Returns its standard output. An error shows both of its outputs."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **options)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def podman(*arguments):
    return run("podman", *arguments)


def inspect(container):
    return json.loads(podman("container", "inspect", container))[0]


def address(container, network):
    return inspect(container)["NetworkSettings"]["Networks"][network]["IPAddress"]


def start(name, networks, environment, *arguments, options=()):
    podman(
        "run", "--detach", "--name", name, *CONFINED, *options,
        *(f"--network={network}" for network in networks),
        *(f"--env={variable}={value}" for variable, value in environment.items()),
        image(name), *arguments,
    )


def fetch(url):
    """Returns the status of an answer, or None without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def wait_for(url, container):
    """Waits until the answer is 200. Fails at once if the container ends."""
    deadline = time.monotonic() + PATIENCE
    while fetch(url) != 200:
        state = inspect(container)["State"]
        assert state["Running"], f"{container} ended with {state['ExitCode']}"
        assert time.monotonic() < deadline, f"{url} did not become 200 within {PATIENCE} s"
        time.sleep(0.05)


def network_of(container):
    """Returns a command's beginning that runs a program of this machine on the container's network."""
    return ["nsenter", f"--net={inspect(container)['NetworkSettings']['SandboxKey']}"]


def answers(container, host, port):
    """Returns whether a TCP connection is accepted, seen from the container's network."""
    dial = f"import socket; socket.create_connection(({host!r}, {port}), {UNREACHABLE_SECONDS})"
    return subprocess.run([*network_of(container), "python3", "-c", dial], capture_output=True).returncode == 0


def start_all():
    podman("network", "create", "--internal", "nodes")
    podman("network", "create", "clients")
    start(
        "etcd", ["nodes"], {}, "--data-dir=/data", "--listen-client-urls=http://0.0.0.0:2379",
        "--advertise-client-urls=http://etcd:2379", options=["--tmpfs=/data:mode=1777"],
    )
    start("prefill", ["nodes"], NODE | {"OVERFILL_MODEL": f"{DEMO}/full", "OVERFILL_ADVERTISE_GRPC": "prefill:50061"})
    start("decode", ["nodes"], NODE | {
        "OVERFILL_MODEL": f"{DEMO}/decode",
        "OVERFILL_SERVED_MODEL_NAME": "demo",
        "OVERFILL_ADVERTISE_GRPC": "decode:50071",
        "OVERFILL_ADVERTISE_KV": "decode:50072",
    })
    start("router", ["clients", "nodes"], ETCD)
    for node in ("prefill", "decode"):
        wait_for(f"http://{address(node, 'nodes')}:9090/ready", node)
    wait_for(f"http://{address('router', 'clients')}:8080/health", "router")
    # A host on the clients' network: a container whose program is never started.
    podman("create", "--name=client", "--network=clients", image("cli"))
    podman("init", "client")


def images_have_labels_and_version():
    for name, binary in [(name, f"overfill-{name}") for name in ("router", "prefill", "decode")] + [("cli", "overfill")]:
        config = json.loads(podman("image", "inspect", image(name)))[0]["Config"]
        labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
        assert labels["version"] == VERSION, labels
        assert labels["title"] == f"overfill-{name}", labels
        for label in ("description", "licenses", "revision", "source", "vendor"):
            assert labels.get(label), f"{name} has no label {label}"
        assert config["User"] == f"{USER}:{USER}", config
        assert config["Entrypoint"] == [f"/usr/bin/{binary}"], config
        exposed = {int(port.removesuffix("/tcp")) for port in config.get("ExposedPorts", {})}
        assert exposed == set(PORTS.get(name, [])), exposed
        said = podman("run", "--rm", "--network=none", *CONFINED, image(name), "--version")
        assert said == f"{binary} {VERSION}", said


def images_have_no_shell_and_are_owned_by_root():
    for name in ("router", "prefill", "decode", "cli"):
        mounted = podman("image", "mount", image(name))
        programs = set()
        for folder, folders, files in os.walk(mounted):
            for entry in folders + files:
                path = os.path.join(folder, entry)
                status = os.lstat(path)
                inside = path.removeprefix(mounted)
                assert (status.st_uid, status.st_gid) == (0, 0), f"{name}: {inside} is not owned by root"
                if stat.S_ISLNK(status.st_mode):
                    continue
                sticky_folder = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
                assert sticky_folder or not status.st_mode & 0o022, f"{name}: others than root may write to {inside}"
                assert not status.st_mode & 0o6000, f"{name}: {inside} gives its rights to who runs it"
                if inside.split("/")[-2] in ("bin", "sbin"):
                    programs.add(entry)
        podman("image", "unmount", image(name))
        # Not only no shell: no program but ours, so nothing to run in a container that was broken into.
        ours = {"overfill" if name == "cli" else f"overfill-{name}"}
        assert programs - {"bin", "sbin"} == ours, f"{name}: {programs}"


def containers_are_confined():
    for name in PORTS:
        process = f"/proc/{inspect(name)['State']['Pid']}"
        with open(f"{process}/status") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        assert status["Uid"].split() == [str(USER)] * 4, f"{name}: {status['Uid']}"
        assert status["NoNewPrivs"] == "1", name
        assert status["Seccomp"] == "2", name
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, f"{name}: {kind} {status[kind]}"
        with open(f"{process}/mountinfo") as file:
            root = next(fields for fields in map(str.split, file) if fields[4] == "/")
        assert "ro" in root[5].split(","), f"{name}: {root}"


def client_gets_an_answer_over_http():
    body = {"model": "demo", "prompt": "kim : molde , nurse , mice , 16 .", "max_tokens": 8, "ignore_eos": True}
    url = f"http://{address('router', 'clients')}:8080/v1/completions"
    send = (
        "import sys, urllib.request; "
        "request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {'content-type': 'application/json'}); "
        "print(urllib.request.urlopen(request).read().decode())"
    )
    answer = json.loads(run(*network_of("client"), "python3", "-c", send, url, json.dumps(body)))
    assert answer["usage"]["completion_tokens"] == 8, answer
    assert answer["choices"][0]["finish_reason"] == "length", answer


def client_in_a_container_gets_an_answer_over_grpc():
    said = podman(
        "run", "--rm", "--network=clients", *CONFINED, image("cli"),
        "generate", "--router=http://router:50051", "--max-tokens=8", "--ignore-eos", "list everyone by pet ?",
    )
    assert said, "no text"


def client_reaches_no_node():
    assert answers("client", address("router", "clients"), 8080)
    ports = [(name, address(name, "nodes"), port) for name in ("etcd", "prefill", "decode") for port in PORTS[name]]
    with concurrent.futures.ThreadPoolExecutor(len(ports)) as pool:
        reached = list(pool.map(lambda port: answers("client", *port[1:]), ports))
    for (name, host, port), reached_by_client in zip(ports, reached):
        # The router shows that it is the network that keeps the client away.
        assert answers("router", host, port), f"the router can't reach {name} at {host}:{port}"
        assert not reached_by_client, f"a client reaches {name} at {host}:{port}"


def containers_end_when_asked():
    # podman kills a container that is not gone by then, and its exit code tells.
    for name in ("decode", "prefill", "router", "etcd"):
        podman("stop", f"--time={DRAIN_SECONDS}", name)
        state = inspect(name)["State"]
        assert state["ExitCode"] == 0, f"{name} ended with {state['ExitCode']} after SIGTERM"
        assert not state["OOMKilled"], name


# In this order.
CHECKS = [
    images_have_labels_and_version,
    images_have_no_shell_and_are_owned_by_root,
    start_all,
    containers_are_confined,
    client_gets_an_answer_over_http,
    client_in_a_container_gets_an_answer_over_grpc,
    client_reaches_no_node,
    containers_end_when_asked,
]


def show_logs():
    for name in PORTS:
        logs = subprocess.run(["podman", "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"--- {name}\n{logs.stdout}", flush=True)


def clean_up():
    podman("rm", "--all", "--force", "--time=0")
    for network in ("nodes", "clients"):
        with contextlib.suppress(AssertionError):
            podman("network", "rm", "--force", network)


def main():
    # podman notes there what runs, by process ids that only mean something in this namespace. It takes an empty folder of
    # state for a restart of the machine, and forgets what ran before.
    for folder in ("/run", "/dev/shm", os.environ["OVERFILL_STATE"]):
        run("mount", "-t", "tmpfs", "tmpfs", folder)
    run("ip", "link", "set", "lo", "up")
    # What a killed run left in the store.
    clean_up()
    try:
        for check in CHECKS:
            print(f"{check.__name__} ... ", end="", flush=True)
            check()
            print("ok", flush=True)
    except BaseException:
        print("FAILED", flush=True)
        show_logs()
        raise
    finally:
        clean_up()


main()
