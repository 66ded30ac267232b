"""Writes tests/golden/ropes.json: what transformers computes with rotary embeddings of each kind, at lengths before and beyond
the original context.

    pip install torch transformers==4.57.6 && python tests/golden/make/ropes.py

Each case is a golden model with some fields of its config.json changed. `frequencies` and `attention_factor` are those of
transformers at the end, `prompts` the most likely tokens after prompts that long_prompts.py defines. Overfill uses one set of
frequencies for all sequences of a model: the one for the longest. So transformers first sees a sequence of `served` tokens;
it goes back to the original frequencies only for shorter ones than the original context.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(GOLDEN))
import long_prompts  # noqa: E402

MODEL = "llama-untied/full"
HALF = json.loads((GOLDEN / MODEL / "config.json").read_text())["head_dim"] // 2
SHORT = [round(1 + 0.02 * i, 3) for i in range(HALF)]
LONG = [round(1 + 0.1 * i * i, 3) for i in range(HALF)]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
CASES = [
    dict(fields={"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, lengths=[40, 200]),
    dict(fields={"rope_scaling": YARN, "rope_theta": 10000.0}, lengths=[40, 200]),
    dict(
        fields={"rope_scaling": YARN | {"attention_factor": 0.9, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
        lengths=[40, 200],
    ),
    dict(fields={"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, "rope_theta": 10000.0}, lengths=[200]),
    # Without a stated original context, it is the whole one.
    dict(fields={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 128}, lengths=[40, 200]),
    dict(fields={"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64}, lengths=[100, 256], served=256),
    dict(fields={"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}, "max_position_embeddings": 64}, lengths=[40, 64]),
    dict(
        fields={"rope_scaling": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 64},
        lengths=[65, 200],
    ),
    dict(
        fields={"rope_scaling": LONGROPE, "max_position_embeddings": 64, "original_max_position_embeddings": 64},
        lengths=[40, 64],
    ),
    dict(fields={"rope_scaling": LONGROPE | {"factor": 8.0}, "max_position_embeddings": 512}, lengths=[40, 300]),
]


def compute(fields, lengths, served=None):
    config = AutoConfig.from_pretrained(GOLDEN / MODEL)
    for field, value in fields.items():
        setattr(config, field, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {}
    for file in (GOLDEN / MODEL).glob("*.safetensors"):
        tensors |= {name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}
    model.load_state_dict(tensors)
    if served:
        model(torch.tensor([long_prompts.prompt(served)]))
    prompts = []
    for length in lengths:
        logits = model(torch.tensor([long_prompts.prompt(length)])).logits
        prompts.append({"tokens": length} | {"top": long_prompts.step(logits)["top"]})
    rotary = model.model.rotary_emb
    return {
        "model": MODEL,
        "fields": fields,
        "frequencies": [float(f) for f in rotary.inv_freq],
        "attention_factor": float(rotary.attention_scaling),
        "prompts": prompts,
    }


@torch.no_grad()
def main():
    cases = [compute(**case) for case in CASES]
    lines = ",\n".join(json.dumps(case) for case in cases)
    (GOLDEN / "ropes.json").write_text(f'{{"reference": "{long_prompts.REFERENCE}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
