#!/usr/bin/env python3
"""Prompts from Debian's documents, and what a full model answers: docs/quality/make_data.py --full MODEL --out DIR

It writes chats as JSON lines, for `overfill distill` and `overfill eval`: `train.jsonl`, and prompts that training never sees:
`held-out.jsonl` of the same kinds, over other paragraphs, and `other-kinds.jsonl` of other kinds, over those other paragraphs.

The texts are paragraphs of two Debian packages, which are downloaded and unpacked but not installed: debian-policy and
developers-reference. Both are under the GNU General Public License, version 2 or later (`usr/share/doc/*/copyright` in OUT/debian).
The model answers through `overfill up`, at temperature 0, so the same model writes the same data.
"""

import argparse
import concurrent.futures
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ["debian-policy", "developers-reference"]
SOURCES = ["usr/share/doc/debian-policy/policy.html/_sources", "usr/share/developers-reference/_sources"]
# A paragraph of one of these lengths, in characters, says something and leaves room for an answer.
LENGTHS = range(250, 600)
KINDS = {
    "summary": "Summarize the following text in two sentences.",
    "explanation": "Explain the following text to a beginner.",
    "questions": "Write three questions that the following text answers.",
    "points": "List the most important points of the following text.",
}
OTHER_KINDS = {
    "letter": "Turn the following text into a short email to a colleague.",
    "readers": "Who should read the following text, and why?",
    "example": "Give an example of a situation in which the following text applies.",
}
# One paragraph of this many is held out.
HELD_OUT = 12
END_SECONDS = 30


def paragraphs(folder):
    """Plain paragraphs of the documents, in an order that only their text decides."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES], cwd=folder, check=True, stdout=sys.stderr)
    for package in sorted(folder.glob("*.deb")):
        print(package.name, flush=True)
        subprocess.run(["dpkg", "--extract", package, folder], check=True)
    found = set()
    for source in SOURCES:
        files = sorted((folder / source).glob("*.rst.txt"))
        if not files:
            sys.exit(f"{source} has no documents: the packages have changed")
        for file in files:
            for block in file.read_text().split("\n\n"):
                text = " ".join(block.split())
                # References and markup that a reader of plain text does not want.
                text = re.sub(r":[a-z:]+:`([^`<]*?)(?: <[^>]*>)?`", r"\1", text)
                text = re.sub(r"`([^`<]*?) <[^>]*>`__?", r"\1", text)
                text = text.replace("``", "`").replace("**", "")
                is_prose = text[:1].isalpha() and text.endswith((".", "!", "?")) and not re.search(r"\.\. |::|\|", text)
                if len(text) in LENGTHS and is_prose:
                    found.add(text)
    return sorted(found, key=digest)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def prompts(texts):
    """Prompts by file, each with its kind."""
    files = {"train": [], "held-out": [], "other-kinds": []}
    for text in texts:
        is_held_out = int(digest(text), 16) % HELD_OUT == 0
        for kind, task in KINDS.items():
            files["held-out" if is_held_out else "train"].append((kind, f"{task}\n\n{text}"))
        if is_held_out:
            files["other-kinds"] += [(kind, f"{task}\n\n{text}") for kind, task in OTHER_KINDS.items()]
    for name in files:
        files[name].sort(key=lambda prompt: digest(prompt[1]))
    return files


def ask(url, prompt, max_tokens):
    """The whole answer, or nothing if it is cut."""
    body = {"model": "full", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        choice = json.load(response)["choices"][0]
    return choice["message"]["content"] if choice["finish_reason"] == "stop" else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True, help="the full model: a folder, a .gguf file or a hub id")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--train", type=int, default=1200, help="number of training prompts")
    parser.add_argument("--held-out", type=int, default=80, help="number of prompts in each of the other files")
    parser.add_argument("--answer-tokens", type=int, default=160, help="longer answers are left out")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--overfill", type=pathlib.Path, default=ROOT / "target/release/overfill")
    args = parser.parse_args()
    if not args.overfill.exists():
        parser.error(f"{args.overfill} is missing: cargo build --release -p overfill-cli")

    files = prompts(paragraphs(args.out / "debian"))
    command = [args.overfill, "up", "--full", f"full={args.full}", "--weights", args.weights, "--kv-pool-tokens", "32768",
               "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--print", "json"]
    server = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if not line:
            sys.exit("overfill up did not start")
        url = json.loads(line)["http"]
        with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
            for name, wanted in files.items():
                wanted = wanted[: args.train if name == "train" else args.held_out]
                answers = pool.map(lambda prompt: ask(url, prompt[1], args.answer_tokens), wanted)
                with (args.out / f"{name}.jsonl").open("w") as file:
                    kept = 0
                    for (kind, prompt), answer in zip(wanted, answers):
                        if answer:
                            chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                            file.write(json.dumps({"messages": chat, "kind": kind}) + "\n")
                            kept += 1
                print(f"{name}: {kept} of {len(wanted)} answers are whole", flush=True)
    finally:
        server.terminate()
        server.wait(END_SECONDS)


if __name__ == "__main__":
    main()
