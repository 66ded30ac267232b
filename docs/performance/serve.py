#!/usr/bin/env python3
"""`overfill up` and llama.cpp's llama-server on this machine, in turns: docs/performance/serve.py LLAMA_SERVER WORK_DIR

LLAMA_SERVER is the program, built by you with llama-quantize beside it (llama.cpp's source also comes inside PyPI's
llama-cpp-python sdist). WORK_DIR takes a few hundred MB of models, which are kept. The model is SmolLM2-135M-Instruct, which
`cargo xtask real` downloads. `overfill bench serve` puts the same load on both servers.
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
FORMATS = {"int8": "Q8_0", "int4": "Q4_0"}
START_SECONDS = 120
END_SECONDS = 30


@contextlib.contextmanager
def running(command, log, **options):
    """Runs a server until the block ends."""
    with log.open("w") as file:
        server = subprocess.Popen([str(part) for part in command], stderr=file, text=True, **options)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(END_SECONDS)


@contextlib.contextmanager
def ours(args, weights):
    """Our cluster. Yields its URL."""
    command = [args.overfill, "up", "--full", f"smollm2={args.model}", "--weights", weights, "--http", "127.0.0.1:0",
               "--grpc", "127.0.0.1:0", "--print", "json"]
    log = args.work / "overfill.log"
    with running(command, log, stdout=subprocess.PIPE) as server:
        line = server.stdout.readline()
        if not line:
            sys.exit(f"overfill up did not start:\n{log.read_text()}")
        yield json.loads(line)["http"]


@contextlib.contextmanager
def theirs(args, weights):
    """llama-server. Yields its URL."""
    kind = FORMATS[weights]
    model = args.work / f"smollm2-{kind}.gguf"
    if not model.exists():
        unfinished = model.with_suffix(".unfinished")
        quantize = args.llama_server.with_name("llama-quantize")
        subprocess.run([quantize, "--allow-requantize", args.model, unfinished, kind], check=True, stdout=subprocess.DEVNULL)
        unfinished.rename(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As many slots as clients, each with room for a request.
    slots = max(args.clients)
    context = slots * (args.prompt_tokens + args.output_tokens + 128)
    command = [args.llama_server, "--model", model, "--host", "127.0.0.1", "--port", port, "--threads", os.cpu_count(),
               "--parallel", slots, "--ctx-size", context]
    log, url = args.work / "llama-server.log", f"http://127.0.0.1:{port}"
    with running(command, log, stdout=subprocess.DEVNULL) as server:
        end = time.monotonic() + START_SECONDS
        while True:
            # A server that still loads answers with an error.
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if server.poll() is not None or time.monotonic() >= end:
                sys.exit(f"llama-server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield url


def processor_seconds():
    """Of all programs, and of those that this one started and that have ended."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, children.ru_utime + children.ru_stime


def measure(args, url, clients, seed):
    """Output tokens per second, mean TTFT and mean time between tokens, both in milliseconds."""
    requests = clients * args.requests_per_client
    command = [
        args.overfill, "bench", "serve", "--http-url", url, "--model", "smollm2", "--prompts", "text", "--json",
        "--concurrency", clients, "--requests", requests, "--prompt-tokens", args.prompt_tokens,
        "--output-tokens", args.output_tokens, "--seed", seed,
    ]
    # It shows why a request failed.
    environment = {**os.environ, "RUST_LOG": "warn"}
    run = json.loads(subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE, env=environment).stdout)
    if run["output_tokens"] != requests * args.output_tokens:
        sys.exit(f"{url}: {requests} requests gave {run['output_tokens']} tokens, not {args.output_tokens} each: {run['errors']}")
    ttft = run["ttft_seconds"]["mean"]
    itl = (run["e2e_seconds"]["mean"] - ttft) / (args.output_tokens - 1)
    return run["output_tokens_per_second"], 1000 * ttft, 1000 * itl


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_server", type=pathlib.Path, metavar="LLAMA_SERVER")
    parser.add_argument("work", type=pathlib.Path, metavar="WORK_DIR")
    parser.add_argument("--rounds", type=int, default=3, help="in each, both servers run once")
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64, help="at least 2")
    parser.add_argument("--overfill", type=pathlib.Path, default=ROOT / "target/release/overfill")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "target/real/smollm2.gguf")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    print("Medians; the ratio is that of each round, median and range. Above 1, Overfill is better.\n")
    print("| | llama-server | Overfill | ratio | from | to |\n|---|---|---|---|---|---|")
    others = []
    for weights in args.weights:
        rounds = []
        for number in range(args.rounds):
            sides = []
            for server in (theirs, ours):
                began, (busy, own) = time.monotonic(), processor_seconds()
                # A new server has no prompts in its caches.
                with server(args, weights) as url:
                    sides.append([measure(args, url, clients, 100 * number + clients) for clients in args.clients])
                wall, (busy_then, own_then) = time.monotonic() - began, processor_seconds()
                others.append((busy_then - busy - (own_then - own)) / wall / os.cpu_count())
            rounds.append(sides)
        for at, clients in enumerate(args.clients):
            for which, what in enumerate(["tokens per second", "TTFT, ms", "time between tokens, ms"]):
                pairs = [(their[at][which], our[at][which]) for their, our in rounds]
                ratios = [our / their if which == 0 else their / our for their, our in pairs]
                their, our = (statistics.median(column) for column in zip(*pairs))
                print(
                    f"| {FORMATS[weights]} / {weights}, {clients} at once: {what} | {their:.3g} | {our:.3g} "
                    f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |",
                    flush=True,
                )
    # A server whose threads wait for each other loses more by this than its share.
    print(f"\nOther programs used {100 * min(others):.0f} to {100 * max(others):.0f} % of the processors.")


if __name__ == "__main__":
    main()
