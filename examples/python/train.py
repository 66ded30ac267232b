"""Trains a pruned model over the KV of its frozen full model with PyTorch, on one device or with FSDP.

    overfill prune --model FULL --calibration FILE --out PRUNED
    pip install torch transformers accelerate
    accelerate launch examples/python/train.py --full FULL --student PRUNED --data pairs.jsonl --out DECODE
    accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        --fsdp_state_dict_type FULL_STATE_DICT --mixed_precision bf16 examples/python/train.py ...
    overfill eval --full FULL --decode DECODE --data held-out.jsonl

The data has lines of {"prompt": .., "response": ..}, which are tokenised as `overfill distill` does. The full model computes a
prompt's KV without gradients. The student reads the response over it, without ever reading the prompt, and learns each
token from the second on: the full model predicts the first.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def examples(file, folder, max_tokens):
    """Token ids of prompts and responses."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        line = json.loads(line)
        prompt = tokenizer.encode(line["prompt"])
        response = tokenizer.encode(line["response"], add_special_tokens=False) + [tokenizer.eos_token_id]
        response = response[: max_tokens - len(prompt)]
        if prompt and len(response) > 1:
            yield prompt, response


def kept_layers(student):
    """The full model's layers that the student has."""
    return json.loads((Path(student) / "overfill.json").read_text())["kept_layers"]


def summed_loss(full, student, kept, prompt, response):
    """Negative log-probability of the response's tokens but the first, summed."""
    device = next(student.parameters()).device
    with torch.no_grad():
        past = full(input_ids=torch.tensor([prompt], device=device), use_cache=True).past_key_values
    cache = DynamicCache()
    for layer, source in enumerate(kept):
        keys, values = (past.layers[source].keys, past.layers[source].values) if hasattr(past, "layers") else past[source]
        cache.update(keys, values, layer)
    inputs = torch.tensor([response[:-1]], device=device)
    positions = torch.arange(len(prompt), len(prompt) + inputs.shape[1], device=device)
    logits = student(
        input_ids=inputs, past_key_values=cache, position_ids=positions[None], cache_position=positions, use_cache=True
    ).logits
    targets = torch.tensor(response[1:], device=device)
    return torch.nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum")


def step(full, student, kept, batch, optimizer, clip, accelerator=None):
    """One step over this process's part of a batch, example by example. Returns the loss per token and the gradient's norm."""
    processes = accelerator.num_processes if accelerator else 1
    part = batch[accelerator.process_index :: processes] if accelerator else batch
    tokens = sum(len(response) - 1 for _, response in batch)
    total = torch.zeros((), device=next(student.parameters()).device)
    for prompt, response in part:
        loss = summed_loss(full, student, kept, prompt, response)
        # Gradients are averaged over the processes, so each multiplies its own by their number.
        scaled = loss * (processes / tokens)
        accelerator.backward(scaled) if accelerator else scaled.backward()
        total += loss.detach()
    if accelerator:
        total = accelerator.reduce(total)
        norm = accelerator.clip_grad_norm_(student.parameters(), clip)
    else:
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(total) / tokens, float(norm)


def adamw(student, rate, beta2=0.98, eps=1e-8, decay=0.01):
    """AdamW as in `overfill distill`: only matrices decay."""
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, beta2), eps=eps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64, help="examples per step, over all processes")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--max-tokens", type=int, default=2048)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    # Parameters and the optimiser's state are f32; --mixed_precision decides the type of the computation.
    student = AutoModelForCausalLM.from_pretrained(arguments.student, torch_dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(arguments.full, torch_dtype="auto").to(accelerator.device).eval()
    full.requires_grad_(False)
    # Together, so that each parameter's group is known before FSDP shards it.
    student, optimizer = accelerator.prepare(student, adamw(student, arguments.learning_rate))
    kept = kept_layers(arguments.student)
    data = list(examples(arguments.data, arguments.student, arguments.max_tokens))
    # Processes with less work would wait for each other forever.
    if arguments.batch % accelerator.num_processes or not 0 < arguments.batch <= len(data):
        parser.error(
            f"--batch is {arguments.batch}, supported: multiples of {accelerator.num_processes} (processes) up to {len(data)} (examples)"
        )
    order = torch.Generator().manual_seed(0)
    waiting = []
    for number in range(arguments.steps):
        if len(waiting) < arguments.batch:
            waiting = torch.randperm(len(data), generator=order).tolist()
        batch = [data[waiting.pop()] for _ in range(arguments.batch)]
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * 0.5 * (1 + math.cos(math.pi * number / arguments.steps))
        loss, norm = step(full, student, kept, batch, optimizer, 1.0, accelerator)
        accelerator.print(f"step {number + 1}: loss {loss:.4f}, gradient norm {norm:.3f}")

    state = accelerator.get_state_dict(student)
    if accelerator.is_main_process:
        accelerator.unwrap_model(student).save_pretrained(arguments.out, state_dict=state, max_shard_size="1TB")
        # What nodes need beside weights and configuration: the tokenizer's files, and overfill.json with the kept layers.
        for file in Path(arguments.student).iterdir():
            if file.suffix in (".json", ".jinja", ".model") and not file.name.startswith(("model.safetensors", "config.json")):
                shutil.copy(file, Path(arguments.out) / file.name)


if __name__ == "__main__":
    main()
