"""Writes NAME/long.json for each golden pair, in the format of expected.json: prompts of 150 to 900 tokens.

    pip install torch transformers==4.57.6 && python tests/golden/long_prompts.py

The reference is transformers' own model class over the folder, in float32. For `two_stage` the decode model gets the layers
that it needs from the full model's cache. A formula defines the prompts, so that a reader can reproduce them: token i of n is
4 + (37 i^2 + 11 i) mod 316.
"""

import json
import pathlib

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

LENGTHS = [150, 300, 500, 900]
STEPS = 24
TOP = 5
REFERENCE = "transformers in float32"


def prompt(length):
    return [4 + (i * i * 37 + i * 11) % 316 for i in range(length)]


def load(folder):
    stated = json.loads((folder / "config.json").read_text())
    # Set one by one: Phi-3's configuration class refuses rope factors of heads that do not fill the hidden size.
    config = AutoConfig.from_pretrained(folder.parent / "full")
    for field in ["hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "no_rope_layers"]:
        if field in stated:
            setattr(config, field, stated[field])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model


def step(logits):
    logprobs = torch.log_softmax(logits[0, -1].double(), -1)
    top = torch.topk(logprobs, TOP)
    pairs = [[int(token), round(float(logprob), 5)] for logprob, token in zip(top.values, top.indices)]
    return {"token": pairs[0][0], "top": pairs}


def prefill(model, tokens):
    # Without a configuration, the cache keeps all keys and values, also of layers with windows.
    out = model(torch.tensor([tokens]), past_key_values=DynamicCache(), use_cache=True)
    return step(out.logits), out.past_key_values


def decode(model, cache, first, steps=STEPS):
    steps_made = [first]
    while len(steps_made) < steps:
        out = model(torch.tensor([[steps_made[-1]["token"]]]), past_key_values=cache, use_cache=True)
        steps_made.append(step(out.logits))
    return steps_made


def handed_over(cache, kept_layers):
    decode_cache = DynamicCache()
    for index, layer in enumerate(kept_layers):
        decode_cache.update(cache.layers[layer].keys.clone(), cache.layers[layer].values.clone(), index)
    return decode_cache


def cases(pair, prompts):
    """What a pair generates after each prompt."""
    full, small = load(pair / "full"), load(pair / "decode")
    provenance = pair / "decode/overfill.json"
    kept_layers = json.loads(provenance.read_text()).get("kept_layers") if provenance.exists() else None
    kept_layers = kept_layers or range(full.config.num_hidden_layers)
    out = []
    for tokens in prompts:
        first, cache = prefill(full, tokens)
        small_cache = handed_over(cache, kept_layers)
        two_stage, full_only = decode(small, small_cache, first), decode(full, cache, first)
        out.append({"prompt": tokens, "two_stage": two_stage, "full_only": full_only})
    return out


def write(pair):
    made = cases(pair, [prompt(length) for length in LENGTHS])
    (pair / "long.json").write_text(json.dumps({"reference": REFERENCE, "cases": made}) + "\n")
    return made


@torch.no_grad()
def main():
    for pair in sorted(pathlib.Path(__file__).parent.iterdir()):
        if (pair / "expected.json").exists():
            made = write(pair)
            print(pair.name, [[s["token"] for s in case["full_only"][:12]] for case in made])


if __name__ == "__main__":
    main()
