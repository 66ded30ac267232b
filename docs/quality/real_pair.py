#!/usr/bin/env python3
"""Decoders for a real checkpoint, made with equal data, and their scores: docs/quality/real_pair.py --full MODEL --data DIR --work DIR

DIR is the output of make_data.py. For each budget of training examples, each seed and each share of channels that is cut, it trains
three decoders of the same shape:

- overfill: pruned, and fine-tuned over the full model's KV; scored in the modes draft, refresh and exact,
- pruned-only: pruned, and fine-tuned alone,
- scratch: random weights, trained alone.

All three see the same examples in the same order, once each, and have the same budget of response tokens. Results are appended to
WORK/cells.jsonl, and what is there is not done again, so the command may be stopped and started. The tables are printed at the end.
Those of docs/quality.md: docs/quality/real_pair.py --tables docs/quality/real-pair.jsonl
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ["held-out", "other-kinds"]
ARMS = ["overfill", "pruned-only", "scratch"]
END_SECONDS = 30


def run(args, *command):
    """Runs a subcommand of overfill. Returns the seconds of processor time that it took."""
    before = os.times()
    subprocess.run([str(args.overfill), *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def finished(out, make):
    """Makes a folder once: what was interrupted is made again. Returns what `make` has returned, which stands in the folder."""
    note = out / "cost.json"
    if not note.exists():
        unfinished = out.with_name(out.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        cost = make(unfinished)
        (unfinished / note.name).write_text(json.dumps(cost))
        unfinished.rename(out)
    return json.loads(note.read_text())


def pruned(args, ratio):
    """The model that is cut, which all arms start from."""
    out = args.work / f"pruned-{ratio}"
    finished(out, lambda folder: run(args, "prune", "--model", args.full, "--calibration", args.data / "train.jsonl", "--samples", 256,
                                     "--ratio", ratio, "--out", folder))
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
    """Trains a decoder. Returns its folder, the processor seconds and the checksum of its weights."""
    out = args.work / f"model-{arm}-{ratio}-{seed}-{budget}"
    more = {"overfill": ["--full", args.full], "pruned-only": [], "scratch": ["--random-init"]}[arm]
    student, data = pruned(args, ratio), examples(args, seed, budget)
    seconds = finished(out, lambda folder: run(
        args, "distill", "--student", student, *more, "--data", data, "--no-shuffle", "--steps", budget // args.batch,
        "--batch", args.batch, "--max-tokens", 640, "--seed", seed, "--learning-rate", args.learning_rate,
        "--warmup-share", 0.06, "--final-share", 0.05, "--save-dtype", "bf16", "--out", folder))
    weights = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return out, {"processor_seconds": round(seconds), "sha256": weights}


def score(args, models):
    """Scores by file and way of answering. Without models: those of the full model."""
    flags = ["--arms", "full"]
    if models:
        flags = ["--decode", models["overfill"], "--pruned", models["pruned-only"], "--scratch", models["scratch"],
                 "--arms", "draft,refresh,exact,pruned-only,scratch"]
    scores = {}
    for file in FILES:
        out = args.work / "scores.json"
        run(args, "eval", "--full", args.full, *flags, "--data", args.data / f"{file}.jsonl", "--weights", "bf16", "--kv-dtype", "bf16",
            "--json", out)
        scores[file] = json.loads(out.read_text())
    return scores


def answers(args, flags, mode):
    """Greedy answers to the first prompts of each file."""
    command = [args.overfill, "up", "--weights", "bf16", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json", *flags]
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if not line:
            raise SystemExit("overfill up did not start")
        url = json.loads(line)["http"]
        found = []
        for file in FILES:
            for chat in (args.data / f"{file}.jsonl").read_text().splitlines()[: args.samples]:
                body = {"model": "sample", "messages": json.loads(chat)["messages"][:1], "max_tokens": 160, "temperature": 0, "overfill_mode": mode}
                request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
                with urllib.request.urlopen(request, timeout=600) as response:
                    found.append(json.load(response)["choices"][0]["message"]["content"])
        return found
    finally:
        server.terminate()
        server.wait(END_SECONDS)


def write_samples(args, models, path):
    """Answers of the full model and of all arms side by side."""
    pair = ["--full", f"sample={args.full}", "--decode", f"sample={models['overfill']}"]
    columns = {"full model": answers(args, ["--full", f"sample={args.full}"], "draft"),
               "draft": answers(args, pair, "draft"), "refresh": answers(args, pair, "refresh")}
    for arm in ["pruned-only", "scratch"]:
        columns[arm] = answers(args, ["--full", f"sample={models[arm]}"], "draft")
    prompts = [json.loads(chat)["messages"][0]["content"] for file in FILES
               for chat in (args.data / f"{file}.jsonl").read_text().splitlines()[: args.samples]]
    path.write_text(json.dumps([{"prompt": prompt, **{name: column[i] for name, column in columns.items()}}
                                for i, prompt in enumerate(prompts)], indent=1))


def check_settings(args):
    """Results with other settings must not be mixed."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"full": str(args.full), "batch": args.batch, "learning_rate": args.learning_rate,
                **{file: digest(args.data / f"{file}.jsonl") for file in ["train", *FILES]}}
    path = args.work / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
    if json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} has other settings: choose another folder for --work")


def measure(args):
    check_settings(args)
    path = args.work / "cells.jsonl"
    key = lambda cell: (cell["ratio"], cell["seed"], cell["examples"])
    done = {key(json.loads(line)) for line in path.read_text().splitlines()} if path.exists() else set()
    # In an order in which the first ones already tell something.
    wanted = [(ratio, seed, budget) for budget in sorted(args.examples) for seed in args.seeds for ratio in args.ratios]
    for ratio, seed, budget in [(0, 0, 0), *wanted]:
        cell = {"ratio": ratio, "seed": seed, "examples": budget}
        if key(cell) in done:
            continue
        models, cell["arms"] = {}, {}
        for arm in ARMS if budget else []:
            models[arm], cell["arms"][arm] = train(args, arm, ratio, seed, budget)
        cell["scores"] = score(args, models)
        if (ratio, seed, budget) == (args.ratios[0], args.seeds[0], max(args.examples)):
            write_samples(args, models, args.work / "samples.json")
        with path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps({**cell, "scores": "..."}), flush=True)
        if not args.keep:
            for model in models.values():
                shutil.rmtree(model)
    return [json.loads(line) for line in path.read_text().splitlines()]


def tables(all_cells):
    """Means over seeds, with the lowest and the highest; then what the training cost, and checksums."""
    for file in FILES:
        print(f"\n### {file}\n\n| cut | examples | arm | nats per token | agreement | common prefix | seeds |\n|---|---|---|---|---|---|---|")
        rows = collections.defaultdict(list)
        for cell in all_cells:
            for arm, values in cell["scores"][file].items():
                # Mode exact writes what the full model writes.
                if arm != "exact":
                    rows[cell["ratio"], cell["examples"], arm].append(values)
        for (ratio, budget, arm), values in sorted(rows.items()):
            numbers = [spread([number(each, name) for each in values], 3) for name in ["nats", "agreement", "common_prefix"]]
            print(f"| {ratio:.0%} | {budget} | {arm} | {' | '.join(numbers)} | {len(values)} |")

    print("\n### Mode exact\n\n| cut | examples | prompts | drafts accepted | tokens per verdict | seeds |\n|---|---|---|---|---|---|")
    rows = collections.defaultdict(list)
    for cell in all_cells:
        for file in FILES:
            if "exact" in cell["scores"][file]:
                rows[cell["ratio"], cell["examples"], file].append(cell["scores"][file]["exact"]["drafting"])
    for (ratio, budget, file), values in sorted(rows.items()):
        accepted = spread([each["accepted_tokens"] / each["drafted_tokens"] for each in values], 2)
        verdict = spread([each["verdict_tokens"] / each["verdicts"] for each in values], 2)
        print(f"| {ratio:.0%} | {budget} | {file} | {accepted} | {verdict} | {len(values)} |")

    print("\n### Training\n\n| cut | examples | arm | seed | processor seconds | SHA-256 of model.safetensors |\n|---|---|---|---|---|---|")
    for cell in sorted(all_cells, key=lambda cell: (cell["ratio"], cell["examples"], cell["seed"])):
        for arm, made in cell["arms"].items():
            print(f"| {cell['ratio']:.0%} | {cell['examples']} | {arm} | {cell['seed']} | {made['processor_seconds']} | `{made['sha256'][:16]}` |")


def spread(numbers, digits):
    """The mean, and the lowest and the highest number."""
    if None in numbers:
        return "-"
    mean, low, high = (f"{number:.{digits}f}" for number in (statistics.mean(numbers), min(numbers), max(numbers)))
    return mean if len(numbers) == 1 else f"{mean} ({low} to {high})"


def number(scores, name):
    """A number of an arm; none if it has none. Agreement is over all positions."""
    if name == "nats":
        return scores["cross_entropy_nats_per_token"]
    agreement = scores.get("agreement_with_full")
    if agreement is None:
        return None
    if name == "common_prefix":
        return agreement["common_prefix_share"]
    ranges = agreement["by_position"]
    return sum(each["share"] * each["tokens"] for each in ranges) / sum(each["tokens"] for each in ranges)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", help="the full model, from which the data are")
    parser.add_argument("--data", type=pathlib.Path, help="folder of the data")
    parser.add_argument("--work", type=pathlib.Path, help="folder for models and results")
    parser.add_argument("--tables", type=pathlib.Path, metavar="CELLS.jsonl", help="only print the tables of these results")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.45, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--examples", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=2, help="number of prompts of each file that are answered side by side")
    parser.add_argument("--keep", action="store_true", help="keep the trained models")
    parser.add_argument("--overfill", type=pathlib.Path, default=ROOT / "target/release/overfill")
    args = parser.parse_args()
    if args.tables:
        tables([json.loads(line) for line in args.tables.read_text().splitlines()])
        return
    if not (args.full and args.data and args.work):
        parser.error("--full, --data and --work are needed")
    if not args.overfill.exists():
        parser.error(f"{args.overfill} is missing: cargo build --release -p overfill-cli")
    if any(budget % args.batch for budget in args.examples):
        parser.error("--batch must divide each of --examples")
    args.work.mkdir(parents=True, exist_ok=True)
    tables(measure(args))


if __name__ == "__main__":
    main()
