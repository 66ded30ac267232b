#!/usr/bin/env python3
"""Four variants that take turns on one long context: docs/performance/variants.py

Agents work like this: a planner, a coder, a critic and a writer read the same growing text. Three ways to serve them, in turns:

- shared: one prefill node, and one decode node that serves all four (`--shared-decode-nodes`),
- apart: one prefill node, and a decode node for each,
- copies: four clusters, each with a full model that prefills and decodes.

All decode models are the unpruned full model here: what variants share does not depend on their weights. The model is SmolLM2-135M-Instruct,
which `cargo xtask real` downloads.
"""

import argparse
import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
VARIANTS = ["planner", "coder", "critic", "writer"]
END_SECONDS = 30


@contextlib.contextmanager
def cluster(args, *more):
    """Runs `overfill up`. Yields what it prints."""
    command = [args.overfill, "up", "--full", f"full={args.model}", "--weights", args.weights, "--kv-pool-tokens", args.pool_tokens,
               "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json", *more]
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = server.stdout.readline()
        if not line:
            sys.exit("overfill up did not start")
        yield json.loads(line)
    finally:
        server.terminate()
        server.wait(END_SECONDS)


@contextlib.contextmanager
def ways(args, name):
    """Runs a way to serve. Yields the cluster of each variant, and the name of the model there."""
    decode = [f"--decode={variant}={args.model}" for variant in VARIANTS]
    with contextlib.ExitStack() as stack:
        if name == "copies":
            yield [(stack.enter_context(cluster(args)), "full") for _ in VARIANTS]
        else:
            one = stack.enter_context(cluster(args, *decode, *(["--shared-decode-nodes"] if name == "shared" else [])))
            yield [(one, variant) for variant in VARIANTS]


def metric(process, name, labels=""):
    """The sum of a metric's series of a node."""
    text = urllib.request.urlopen(f"{process['admin']}/metrics", timeout=10).read().decode()
    series = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for found, value in series if labels in found)


def turn(url, model, prompt, args):
    """Sends the context. Returns the answer's token ids, the TTFT and the whole time in seconds."""
    body = {"model": model, "prompt": prompt, "max_tokens": args.output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    began, first, ids = time.monotonic(), None, []
    with urllib.request.urlopen(request, timeout=600) as events:
        for line in events:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    sys.exit(f"{model}: {event['error']}")
                new = [token for choice in event["choices"] for token in choice.get("token_ids") or []]
                if new and first is None:
                    first = time.monotonic() - began
                ids += new
    return ids, first, time.monotonic() - began


def session(args, seed, served):
    """One context and all turns over it. Returns TTFTs, output tokens per second, KV that was sent and KV that is kept, in bytes."""
    context = [(seed * 7919 + i * 31) % 20000 + 100 for i in range(args.context_tokens)]
    ttfts, seconds, tokens = [], 0, 0
    for number in range(args.turns):
        one, model = served[number % len(served)]
        ids, first, whole = turn(one["http"], model, context, args)
        context += ids
        # What the next one is told.
        context += [(seed * 104729 + number * 17 + i) % 20000 + 100 for i in range(args.turn_tokens)]
        ttfts.append(first)
        seconds, tokens = seconds + whole, tokens + len(ids)
    clusters = {one["http"]: one for one, _ in served}.values()
    nodes = [process for one in clusters for process in one["processes"] if process["role"] in ("prefill", "decode")]
    decode = [node for node in nodes if node["role"] == "decode"]
    sent = sum(metric(node, "overfill_transfer_bytes_total") for node in decode)
    blocks = sum(metric(node, "overfill_kv_blocks", 'state="cached"') + metric(node, "overfill_kv_blocks", 'state="held"') for node in nodes)
    return ttfts, tokens / seconds, sent, blocks * args.block_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="in each, all ways run once")
    parser.add_argument("--context-tokens", type=int, default=1500)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--turn-tokens", type=int, default=24, help="added to the context after each answer")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--weights", default="int8")
    parser.add_argument("--pool-tokens", type=int, default=8192)
    parser.add_argument("--overfill", type=pathlib.Path, default=ROOT / "target/release/overfill")
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "target/real/smollm2.gguf")
    args = parser.parse_args()
    # Of SmolLM2-135M in bf16: 30 layers, keys and values, 3 heads of 64, 16 tokens.
    args.block_bytes = 30 * 2 * 3 * 64 * 16 * 2

    names = ["shared", "apart", "copies"]
    rounds = []
    for number in range(args.rounds):
        results = {}
        for name in names:
            with ways(args, name) as served:
                results[name] = session(args, number + 1, served)
        rounds.append(results)

    print(f"Medians of {args.rounds} rounds. A context of {args.context_tokens} tokens, {args.turns} turns.\n")
    print("| | " + " | ".join(names) + " | copies / shared, by round |\n|" + "---|" * (len(names) + 2))

    def row(what, value, unit=1):
        values = [statistics.median(value(results[name]) for results in rounds) for name in names]
        ratios = [value(results["copies"]) / value(results["shared"]) for results in rounds]
        print(f"| {what} | " + " | ".join(f"{each / unit:.3g}" for each in values)
              + f" | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")

    first = len(VARIANTS)
    row("TTFT of the first turn, ms", lambda result: result[0][0], 1e-3)
    row("mean TTFT of each variant's first turn but the first, ms", lambda result: statistics.mean(result[0][1:first]), 1e-3)
    row("mean TTFT of later turns, ms", lambda result: statistics.mean(result[0][first:]), 1e-3)
    row("output tokens per second, prefill included", lambda result: result[1])
    row("KV sent, MB", lambda result: result[2], 1e6)
    row("KV kept on all nodes, MB", lambda result: result[3], 1e6)


if __name__ == "__main__":
    main()
