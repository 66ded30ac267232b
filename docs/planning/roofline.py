#!/usr/bin/env python3
"""A profile from data sheets, not from a measurement: docs/planning/roofline.py h100|l40s > profile.json

A step takes the longer of its arithmetic and its memory traffic, at the shares of the peak that inference engines reach. The
pair: Llama 3.2 3B, and the same model with half of its MLP and head widths pruned away, in bf16.
"""

import json
import sys

# Data sheets of NVIDIA: dense bf16 in FLOP/s, memory bandwidth in bytes/s, memory in bytes.
GPUS = {
    "h100": ("NVIDIA H100 SXM", 989e12, 3.35e12, 80e9),
    "l40s": ("NVIDIA L40S", 362e12, 0.864e12, 48e9),
}
# Shares of the peak, and the fixed cost of a step: assumptions.
COMPUTE_SHARE, BANDWIDTH_SHARE, STEP_SECONDS = 0.5, 0.75, 200e-6
# A link of 200 Gbit/s.
LINK_BYTES_PER_SECOND = 25e9
PARAMETERS = {"full": 3.2e9, "pruned": 1.8e9}
# Keys and values of 28 layers with 8 heads of 128 numbers of 2 bytes.
KV_BYTES_PER_TOKEN = 2 * 28 * 8 * 128 * 2


def step(gpu, parameters, rows, context_tokens):
    _, flops, bandwidth, _ = GPUS[gpu]
    arithmetic = 2 * parameters * rows / (COMPUTE_SHARE * flops)
    traffic = (2 * parameters + rows * context_tokens * KV_BYTES_PER_TOKEN) / (BANDWIDTH_SHARE * bandwidth)
    return STEP_SECONDS + max(arithmetic, traffic)


def model(gpu, name):
    # A prefill step reads the KV before its chunk once for all its rows, which the arithmetic hides.
    prefill = [
        {"rows": rows, "context_tokens": 0, "seconds": step(gpu, PARAMETERS[name], rows, 0)} for rows in (16, 128, 512, 2048, 8192)
    ]
    decode = [
        {"rows": rows, "context_tokens": context, "seconds": step(gpu, PARAMETERS[name], rows, context)}
        for rows in (1, 8, 32, 128)
        for context in (128, 4096)
    ]
    return {"name": f"llama-3.2-3b-{name}", "start_seconds": 30, "prefill": prefill, "decode": decode}


def main():
    if len(sys.argv) != 2 or sys.argv[1] not in GPUS:
        sys.exit(__doc__)
    gpu = sys.argv[1]
    name, _, _, memory = GPUS[gpu]
    tokens = int((0.9 * memory - 2 * PARAMETERS["full"]) / KV_BYTES_PER_TOKEN)
    print(json.dumps({
        "format": 1,
        "machine": f"{name}, computed from its data sheet, not measured",
        "device": "cuda:0",
        "weights": "bf16",
        "kv_dtype": "bf16",
        "kv_pool_tokens": tokens,
        "kv_bytes_per_token": KV_BYTES_PER_TOKEN,
        "transfer_bytes_per_second": LINK_BYTES_PER_SECOND,
        "full": model(gpu, "full"),
        "pruned": model(gpu, "pruned"),
    }))


if __name__ == "__main__":
    main()
