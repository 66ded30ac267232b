#!/usr/bin/env python3
"""A plan and a simulation against a measurement on this machine: docs/planning/compare.py [--overfill BINARY] [--pair demo|small]

Profiles a pair, starts it with `overfill up`, puts load on it, and prints what `overfill plan` and `overfill simulate` expect
of the same cluster and load. Profile and measurement take turns, since the speed of a shared machine changes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Requests per second, prompt tokens, answer tokens.
LOADS = {
    "demo": [
        (5, "64", "64"),
        (20, "64", "64"),
        (20, "lognormal:64,256,600", "uniform:16,128"),
        (60, "uniform:16,128", "uniform:16,128"),
    ],
    "small": [(0.5, "256", "64"), (1, "256", "64"), (1, "lognormal:200,800,1500", "uniform:16,128"), (2, "256", "64")],
}
LIMITS = ["--ttft-p95-seconds", "10", "--itl-p95-seconds", "10"]


def output(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def models(overfill, pair, folder):
    """The full model, the pruned one, and the flags that load them."""
    if pair == "demo":
        return ROOT / "demo/full", ROOT / "demo/decode", ["--weights", "f32", "--kv-dtype", "f32"]
    # Written by the first measurement that needs them.
    output(overfill, "bench", "engine", "--models-dir", folder, "--runs", 1, "--decode-tokens", 1, "--batch", 1, "--json")
    return folder / "small", folder / "small-overfill", []


def measured(overfill, http, seed, load, seconds):
    """p50 and p95 of TTFT and ITL in seconds, as the client sees them."""
    rate, prompt, answer = load
    run = json.loads(output(
        overfill, "bench", "serve", "--http-url", http, "--rate", rate, "--duration-seconds", seconds, "--prompt-tokens", prompt,
        "--output-tokens", answer, "--seed", seed, "--json",
    ))
    if run["errors"]:
        print(f"  failed requests: {run['errors']}")
    return {name: [run[f"{name}_seconds"][p] for p in ("p50", "p95")] for name in ("ttft", "itl")}


def planned(overfill, profile, seed, load):
    rate, prompt, answer = load
    plan = json.loads(output(
        overfill, "plan", "--profile", profile, "--rate", rate, "--prompt-tokens", prompt, "--output-tokens", answer,
        "--prefill-nodes", 1, "--decode-nodes", 1, "--one-machine", "--seed", seed, *LIMITS, "--json",
    ))["latency"]
    return {name: [plan[f"{name}_seconds"][i] for i in (0, 2)] for name in ("ttft", "itl")}


def simulated(overfill, profile, seed, load):
    rate, prompt, answer = load
    run = json.loads(output(
        overfill, "simulate", "--profile", profile, "--rate", rate, "--prompt-tokens", prompt, "--output-tokens", answer,
        "--duration-seconds", max(60, 1000 / rate), "--one-machine", "--seed", seed, "--json",
    ))
    return {name: [run[f"{name}_seconds"][p] for p in ("p50", "p95")] for name in ("ttft", "itl")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--overfill", type=Path, default=ROOT / "target/release/overfill")
    parser.add_argument("--pair", choices=LOADS, default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8)
    args = parser.parse_args()
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.json"
        full, decode, flags = models(args.overfill, args.pair, Path(folder))
        for round_ in range(args.rounds):
            output(args.overfill, "bench", "profile", "--full", full, "--decode", decode, *flags, "--out", profile)
            up = [args.overfill, "up", "--full", full, "--decode", decode, *flags, "--print", "json"]
            cluster = subprocess.Popen(
                [*up, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            try:
                http = "http://" + json.loads(cluster.stdout.readline())["http"].removeprefix("http://")
                for i, load in enumerate(LOADS[args.pair]):
                    # Another seed each time: repeated prompts would come from the prefix cache.
                    seed = len(LOADS[args.pair]) * round_ + i
                    real = measured(args.overfill, http, seed, load, args.seconds)
                    plan = planned(args.overfill, profile, seed, load)
                    simulation = simulated(args.overfill, profile, seed, load)
                    for name in ("ttft", "itl"):
                        for j, share in enumerate(("p50", "p95")):
                            errors.setdefault((i, name, share), []).append((real[name][j], plan[name][j], simulation[name][j]))
            finally:
                cluster.terminate()
                cluster.wait()
    print(f"{os.cpu_count()} cores; {args.rounds} rounds of {args.seconds} s; all times in milliseconds")
    print("| requests/s | prompt | answer | | measured | planned / measured | simulated / measured |")
    print("|---|---|---|---|---|---|---|")
    for (i, name, share), values in errors.items():
        listed = lambda values, digits: ", ".join(f"{value:.{digits}f}" for value in values)
        rate, prompt, answer = LOADS[args.pair][i]
        print(
            f"| {rate} | {prompt} | {answer} | {name.upper()} {share} | {listed([1e3 * r for r, _, _ in values], 2)} |"
            f" {listed([p / r for r, p, _ in values], 2)} | {listed([s / r for r, _, s in values], 2)} |"
        )
    for name, j in (("planned", 1), ("simulated", 2)):
        ratios = [value[j] / value[0] for values in errors.values() for value in values]
        print(f"{name}: {sum(0.8 <= ratio <= 1.2 for ratio in ratios)} of {len(ratios)} within 20 %")


if __name__ == "__main__":
    main()
