#!/usr/bin/env python3
"""Decoders for a real checkpoint, made with equal data, and their scores: docs/quality/real_pair.py --full MODEL --data DIR --work DIR

DIR is the output of make_data.py. For each share of channels that is cut, each seed and each budget of training examples, it trains
three decoders of the same shape:

- overfill: pruned, and fine-tuned over the full model's KV; scored in the modes draft, refresh and exact,
- pruned-only: pruned, and fine-tuned alone,
- scratch: random weights, trained alone.

All of a seed and a budget see the same examples in the same order, once each. Results are appended to WORK/cells.jsonl, and what is
there is not done again, so the command may be stopped and started. The tables are printed at the end.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ["held-out", "other-kinds"]


def run(args, *command):
    subprocess.run([str(args.overfill), *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def pruned(args, ratio):
    """The model that is cut, which all arms start from. It is made once."""
    out = args.work / f"pruned-{ratio}"
    if not out.exists():
        unfinished = out.with_name(out.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        run(args, "prune", "--model", args.full, "--calibration", args.data / "train.jsonl", "--samples", 256, "--ratio", ratio, "--out", unfinished)
        unfinished.rename(out)
    return out


def examples(args, seed, budget):
    """The first `budget` examples in the order of a seed, so that a larger budget begins with a smaller one."""
    out = args.work / f"data-{seed}-{budget}.jsonl"
    lines = (args.data / "train.jsonl").read_text().splitlines()
    random.Random(seed).shuffle(lines)
    if len(lines) < budget:
        raise SystemExit(f"{args.data}/train.jsonl has {len(lines)} examples, not {budget}")
    out.write_text("\n".join(lines[:budget]) + "\n")
    return out


def train(args, arm, ratio, seed, budget):
    """Trains a decoder. Returns its folder and the seconds."""
    out = args.work / f"model-{arm}-{ratio}-{seed}-{budget}"
    shutil.rmtree(out, ignore_errors=True)
    more = {"overfill": ["--full", args.full], "pruned-only": [], "scratch": ["--random-init"]}[arm]
    rate = args.scratch_learning_rate if arm == "scratch" else args.learning_rate
    began = time.monotonic()
    run(args, "distill", "--student", pruned(args, ratio), *more, "--data", examples(args, seed, budget), "--no-shuffle",
        "--steps", budget // args.batch, "--batch", args.batch, "--max-tokens", 640, "--seed", seed, "--learning-rate", rate,
        "--warmup-share", 0.06, "--final-share", 0.05, "--save-dtype", "bf16", "--out", out)
    return out, time.monotonic() - began


def score(args, arm, model):
    """Scores by file and way of answering."""
    models = {"overfill": ["--full", args.full, "--decode", model, "--arms", "draft,refresh,exact"],
              "pruned-only": ["--full", args.full, "--pruned", model, "--arms", "pruned-only"],
              "scratch": ["--full", args.full, "--scratch", model, "--arms", "scratch"]}
    scores = {}
    for file in FILES:
        out = args.work / "scores.json"
        run(args, "eval", *(models[arm] if arm != "full" else ["--full", args.full, "--arms", "full"]), "--data", args.data / f"{file}.jsonl",
            "--weights", "bf16", "--kv-dtype", "bf16", "--json", out)
        scores[file] = json.loads(out.read_text())
    return scores


def cells(args):
    """All measurements, in an order in which the first ones already tell something."""
    yield {"arm": "full", "ratio": 0, "seed": 0, "examples": 0}
    for budget in sorted(args.examples):
        for seed in args.seeds:
            for ratio in args.ratios:
                for arm in args.arms:
                    yield {"arm": arm, "ratio": ratio, "seed": seed, "examples": budget}


def measure(args):
    path = args.work / "cells.jsonl"
    key = lambda cell: (cell["arm"], cell["ratio"], cell["seed"], cell["examples"])
    done = {key(json.loads(line)) for line in path.read_text().splitlines()} if path.exists() else set()
    for cell in cells(args):
        if key(cell) in done:
            continue
        if cell["arm"] == "full":
            model, seconds = args.full, 0
        else:
            model, seconds = train(args, cell["arm"], cell["ratio"], cell["seed"], cell["examples"])
        cell |= {"seconds": round(seconds), "scores": score(args, cell["arm"], model)}
        with path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps({**cell, "scores": "..."}), flush=True)
        if cell["arm"] != "full" and not args.keep:
            shutil.rmtree(model)
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(all_cells):
    """Means over seeds, with the lowest and the highest."""
    for file in FILES:
        print(f"\n### {file}\n\n| cut | examples | arm | cross-entropy | agreement | seeds |\n|---|---|---|---|---|---|")
        rows = collections.defaultdict(list)
        for cell in all_cells:
            for arm, values in cell["scores"][file].items():
                rows[cell["ratio"], cell["examples"], arm].append(values)
        for (ratio, budget, arm), values in sorted(rows.items()):
            def spread(name):
                numbers = [found for each in values if (found := value(each, name)) is not None]
                if not numbers:
                    return "-"
                return f"{statistics.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"
            print(f"| {ratio:.0%} | {budget} | {arm} | {spread('cross_entropy_nats_per_token')} | {spread('agreement')} | {len(values)} |")


def value(scores, name):
    """A number of an arm, if it has it. Agreement is over all positions."""
    if name != "agreement":
        return scores[name]
    if "agreement_with_full" not in scores:
        return None
    ranges = scores["agreement_with_full"]["by_position"]
    return sum(each["share"] * each["tokens"] for each in ranges) / sum(each["tokens"] for each in ranges)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True, help="the full model, from which the data are")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.45])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--arms", nargs="+", default=["overfill", "pruned-only", "scratch"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--scratch-learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", action="store_true", help="keep the trained models")
    parser.add_argument("--overfill", type=pathlib.Path, default=ROOT / "target/release/overfill")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tables(measure(args))


if __name__ == "__main__":
    main()
