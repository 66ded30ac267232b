"""Writes NAME/long.json for each golden pair, in the format of expected.json: prompts of 150 to 900 tokens.

    pip install torch transformers==4.57.6 && python tests/golden/long_prompts.py

The reference is transformers' own model class over the folder, loaded with `from_pretrained(dtype=float32)`. For `two_stage`
the decode model gets the layers that it needs from the full model's cache. A formula defines the prompts, so that a
reader can reproduce them: token i of n is 4 + (37 i^2 + 11 i) mod 316.
"""

import json
import pathlib

import torch
from transformers import AutoModelForCausalLM, DynamicCache

LENGTHS = [150, 300, 500, 900]
STEPS = 24
TOP = 5


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def step(logits):
    logprobs = torch.log_softmax(logits[0, -1].double(), -1)
    top = torch.topk(logprobs, TOP)
    pairs = [[int(token), round(float(logprob), 5)] for logprob, token in zip(top.values, top.indices)]
    return {"token": pairs[0][0], "top": pairs}


def prefill(model, prompt):
    out = model(torch.tensor([prompt]), past_key_values=DynamicCache(config=model.config), use_cache=True)
    return step(out.logits), out.past_key_values


def decode(model, cache, first):
    steps = [first]
    while len(steps) < STEPS:
        out = model(torch.tensor([[steps[-1]["token"]]]), past_key_values=cache, use_cache=True)
        steps.append(step(out.logits))
    return steps


def handed_over(cache, config, kept_layers):
    decode_cache = DynamicCache(config=config)
    for index, layer in enumerate(kept_layers):
        decode_cache.update(cache.layers[layer].keys.clone(), cache.layers[layer].values.clone(), index)
    return decode_cache


@torch.no_grad()
def main():
    for pair in sorted(pathlib.Path(__file__).parent.iterdir()):
        if not (pair / "expected.json").exists():
            continue
        full, small = load(pair / "full"), load(pair / "decode")
        provenance = pair / "decode/overfill.json"
        kept_layers = json.loads(provenance.read_text()).get("kept_layers") if provenance.exists() else None
        kept_layers = kept_layers or range(full.config.num_hidden_layers)
        cases = []
        for length in LENGTHS:
            prompt = [4 + (i * i * 37 + i * 11) % 316 for i in range(length)]
            first, cache = prefill(full, prompt)
            small_cache = handed_over(cache, small.config, kept_layers)
            two_stage, full_only = decode(small, small_cache, first), decode(full, cache, first)
            cases.append({"prompt": prompt, "two_stage": two_stage, "full_only": full_only})
        reference = "transformers from_pretrained(dtype=float32)"
        (pair / "long.json").write_text(json.dumps({"reference": reference, "cases": cases}) + "\n")
        print(pair.name, [[s["token"] for s in case["full_only"][:12]] for case in cases])


if __name__ == "__main__":
    main()
