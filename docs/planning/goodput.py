#!/usr/bin/env python3
"""Goodput at equal hardware: docs/planning/goodput.py [--overfill BINARY] PROFILE FLAGS-OF-PLAN...

Asks `overfill plan` at rising rates how many nodes each arrangement needs to meet the limits, and prints the highest rate that
N nodes of this machine carry. Example:
  docs/planning/goodput.py profile.json --prompt-tokens 1024 --output-tokens 128 --ttft-p95-seconds 0.5 --itl-p95-seconds 0.02
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def needed(overfill, profile, flags, rate):
    """Nodes by arrangement. Missing: the limits can't be met."""
    command = [overfill, "plan", "--profile", profile, "--rate", f"{rate:.6g}", "--headroom", "0", "--json", *flags]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
    plan = json.loads(done.stdout)
    return {row["name"]: row["nodes"] for row in plan["comparison"] if row.get("nodes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overfill", type=Path, default=ROOT / "target/release/overfill")
    parser.add_argument("--from-rate", type=float, default=0.1)
    parser.add_argument("--nodes", type=lambda text: [int(part) for part in text.split(",")], default=[2, 4], help="N,N,...")
    parser.add_argument("--step", type=float, default=1.1, help="ratio of two rates that are tried")
    parser.add_argument("profile")
    args, flags = parser.parse_known_args()
    best, rate = {}, args.from_rate
    while True:
        found = needed(args.overfill, args.profile, flags, rate)
        for name, nodes in found.items():
            for count in args.nodes:
                if sum(nodes) <= count:
                    best[name, count] = (rate, nodes)
        if all(sum(nodes) > max(args.nodes) for nodes in found.values()):
            break
        rate *= args.step
    print(f"{json.load(open(args.profile))['machine']}; {' '.join(flags)}; rates in steps of {args.step}")
    print("| nodes | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for count in args.nodes:
        cells = []
        for name in found:
            rate, nodes = best.get((name, count), (0, []))
            split = f" ({' + '.join(map(str, nodes))})" if len(nodes) > 1 else ""
            cells.append(f"{rate:.3g}/s{split}" if rate else "none")
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
