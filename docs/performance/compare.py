#!/usr/bin/env python3
"""Ours and llama.cpp's on this machine, in turns: docs/performance/compare.py LLAMA_BENCH_DIR WORK_DIR

LLAMA_BENCH_DIR holds llama-bench and llama-quantize, built by you (llama.cpp's source also comes inside PyPI's
llama-cpp-python sdist). WORK_DIR takes about 25 GB of random models, which are kept. Needs numpy and gguf.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OVERFILL = HERE / "../../target/release/overfill"
# llama.cpp's quantised types want multiples of 32: the pruned widths, 1689 and 4505, are padded for it, not for us.
MODELS = {"pruned": ("llama-3.2-3b-overfill", 1696, 4512), "full": ("llama-3.2-3b", 3072, 8192)}
FORMATS = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}
# Tokens before those whose decoding is timed, as in `overfill bench engine`.
CONTEXT_TOKENS = 128


def output(*command):
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def gguf(args, model, kind):
    """The file of random weights, made if it is not there."""
    _, hidden, intermediate = MODELS[model]
    path = args.work / f"{model}-{kind}.gguf"
    if not path.exists():
        if kind == "bf16":
            output(sys.executable, HERE / "random_gguf.py", path, hidden, intermediate)
        else:
            output(args.tools / "llama-quantize", gguf(args, model, "bf16"), path, kind)
    return path


def theirs(args, model, weights):
    """Tokens per second of prefill and decode."""
    bench = [args.tools / "llama-bench", "-m", gguf(args, model, FORMATS[weights]), "-t", os.cpu_count(), "-r", 1, "-o", "json"]
    prefill = json.loads(output(*bench, "-p", args.prefill_tokens, "-n", 0))
    decode = json.loads(output(*bench, "-p", 0, "-n", args.decode_tokens, "-d", CONTEXT_TOKENS))
    return prefill[0]["avg_ts"], decode[0]["avg_ts"]


def ours(args, model, weights):
    geometry = MODELS[model][0]
    report = json.loads(output(
        OVERFILL, "bench", "engine", "--geometry", geometry, "--models-dir", args.work, "--weights", weights, "--runs", 1,
        "--batch", 1, "--prefill-tokens", args.prefill_tokens, "--decode-tokens", args.decode_tokens, "--json",
    ))
    values = {line["name"]: line["value"] for line in report}
    return values[f"prefill, {geometry}"], values[f"decode, {geometry}, batch 1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", type=Path, metavar="LLAMA_BENCH_DIR")
    parser.add_argument("work", type=Path, metavar="WORK_DIR")
    parser.add_argument("--rounds", type=int, default=3, help="in each, both programs run once")
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=FORMATS, default=list(FORMATS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    print("Tokens per second, medians; the ratio is that of each round, median and range.\n")
    print("| | llama.cpp | Overfill | ratio | from | to |\n|---|---|---|---|---|---|")
    for model in args.models:
        for weights in args.weights:
            rounds = [(theirs(args, model, weights), ours(args, model, weights)) for _ in range(args.rounds)]
            for i, stage in enumerate(["prefill", "decode"]):
                pairs = [(their[i], our[i]) for their, our in rounds]
                ratios = [our / their for their, our in pairs]
                their, our = (statistics.median(column) for column in zip(*pairs))
                print(
                    f"| {model}, {stage}: {FORMATS[weights]} / {weights} | {their:.3g} | {our:.3g} "
                    f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
