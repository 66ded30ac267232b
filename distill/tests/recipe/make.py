"""Writes expected.json: one step of examples/python/train.py on the demo pair.

    pip install "torch>=1.13" "transformers>=4.46,<5" accelerate && python distill/tests/recipe/make.py

The optimiser's epsilon is 1, so the first step changes a parameter by g / (|g| + 1): what is compared shows the gradients'
size, not only their sign. Of each parameter, the change's norm and its product with a fixed vector are stored.
"""

import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def main():
    spec = importlib.util.spec_from_file_location("train", ROOT / "examples/python/train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    full, student = (
        AutoModelForCausalLM.from_pretrained(ROOT / "demo" / name, torch_dtype=torch.float32, attn_implementation="eager")
        for name in ("full", "decode")
    )
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    batch = list(train.examples(HERE / "pairs.jsonl", ROOT / "demo/decode", 2048))
    optimizer = train.adamw(student, rate=1.0, eps=1.0, decay=0.0)
    kept = train.kept_layers(ROOT / "demo/decode")
    loss, norm = train.step(full, student, kept, batch, optimizer, clip=1e9)
    changes = {}
    for name, parameter in student.named_parameters():
        change = (parameter.detach() - before[name]).double().flatten()
        vector = torch.cos(0.7 * torch.arange(len(change), dtype=torch.float64))
        changes[name] = {"norm": float(change.norm()), "along": float(change @ vector)}
    expected = {
        "torch": torch.__version__,
        "tokens": sum(len(response) - 1 for _, response in batch),
        "loss": loss,
        "gradient_norm": norm,
        "changes": changes,
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
