"""A cluster of real processes: a router, two prefill nodes, two decode nodes."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).parents[2]
BINARY = pathlib.Path(os.environ.get("OVERFILL_BINARIES", ROOT / "target/debug")) / "overfill"
DEADLINE_SECONDS = 60


def until(what, condition, seconds=DEADLINE_SECONDS):
    """Waits until `condition()` is true, and returns its value. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"after {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.2)


def free_ports(count):
    """Ports that nobody uses now. A process that starts again needs the port that it had."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def get(url, body=None, timeout=10):
    """Sends a request. Returns the status and the body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


class Process:
    """One process of the cluster, with the labels that Kubernetes would give it."""

    def __init__(self, pod, component, arguments, admin, folder):
        self.pod, self.component, self.admin = pod, component, f"127.0.0.1:{admin}"
        self.arguments, self.log = arguments, folder / f"{pod}.log"
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            command = [BINARY, self.component, *self.arguments, "--exit-with-stdin"]
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def kill(self):
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()
        self.child.stdin.close()

    def freeze(self):
        self.child.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.child.send_signal(signal.SIGCONT)

    def answers(self, path):
        try:
            return get(f"http://{self.admin}{path}", timeout=2)[0] == 200
        except OSError:
            return False


class Cluster:
    """The demo pair. The router's queue and the KV of one decode pool are small, so that they can be filled."""

    def __init__(self, folder):
        ports = free_ports(15)
        node = ["--weights", "f32", "--kv-dtype", "f32"]
        self.processes = []
        urls = {"prefill": [], "decode": []}
        for role in urls:
            for number in range(2):
                listen, admin, kv = ports.pop(), ports.pop(), ports.pop()
                urls[role].append(f"http://127.0.0.1:{listen}")
                model = ROOT / "demo" / ("full" if role == "prefill" else "decode")
                more = ["--model", model, "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}"]
                if role == "decode":
                    more += ["--served-model-name", "demo", "--kv-listen", f"127.0.0.1:{kv}", "--max-running", "24",
                             "--kv-pool-tokens", "65536" if number else "8192"]
                pool = "large" if role == "decode" and number else "main"
                more += ["--pool", pool]
                self.processes.append(Process(f"blue-{role}-{pool}-{number}", role, node + more, admin, folder))
        http, grpc, etcd = ports
        self.url = f"http://127.0.0.1:{http}"
        router = ["--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{grpc}", "--max-waiting", "100", "--watch-share", "1",
                  "--max-queue-seconds", "20", "--node-timeout-seconds", "3",
                  # Nobody listens there.
                  "--etcd-url", f"https://127.0.0.1:{etcd}", "--etcd-ca", pathlib.Path(__file__).parent / "expired.pem"]
        for role, addresses in urls.items():
            router += [f"--{role}-url", ",".join(addresses)]
        self.router = Process("blue-router-0", "router", router, http, folder)
        self.processes.append(self.router)
        self.loads = []
        until("the cluster serves requests", lambda: all(p.answers("/health") for p in self.processes))

    def of(self, role):
        return [process for process in self.processes if process.component == role]

    def load(self, *options):
        """Starts load. It ends with `calm`."""
        command = [BINARY, "bench", "serve", "--http-url", self.url, "--model", "demo", "--duration-seconds", "600",
                   "--warm-up-requests", "0", *options]
        self.loads.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    def calm(self):
        """Ends all load, and thaws what is frozen."""
        while self.loads:
            load = self.loads.pop()
            load.kill()
            load.wait()
        for process in self.processes:
            process.thaw()

    def stop(self):
        self.calm()
        for process in self.processes:
            if process.child.poll() is None:
                process.kill()


class Clients:
    """Clients that repeat one action until the block ends."""

    def __init__(self, action, count=2):
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(action,), daemon=True) for _ in range(count)]

    def run(self, action):
        while not self.ended.is_set():
            with contextlib.suppress(OSError):
                action()

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()
