"""Importance of channels, computed independently in NumPy from the published rule.

Usage: importance.py MODEL_FOLDER < {"samples": [[token ids]], "hidden": n, "intermediate": n, "norm": "l1" | "l2"}
Prints {"hidden": [kept channels], "intermediate": [[kept channels] per layer]}. Needs only numpy.
"""

import json
import pathlib
import sys

import numpy as np


def read_tensors(folder):
    """All tensors of a folder's safetensors files, as float64."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        blob = path.read_bytes()
        size = int.from_bytes(blob[:8], "little")
        for name, info in json.loads(blob[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            data = blob[8 + size + start : 8 + size + end]
            if info["dtype"] == "BF16":
                values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[info["dtype"]])
            tensors[name] = values.astype(np.float64).reshape(info["shape"])
    return tensors


def frequencies(config, head_dim):
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type") != "llama3":
        return inverse
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    wave = 2 * np.pi / inverse
    smooth = np.clip((original / wave - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


class Model:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_tensors(folder)
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.tensors[name + ".weight"]

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T + self.tensors.get(name + ".bias", 0.0)

    def attention(self, x, layer):
        n, prefix = len(x), f"model.layers.{layer}.self_attn."
        angles = np.arange(n)[:, None] * frequencies(self.config, self.head_dim)[None]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def project(kind, heads):
            y = self.linear(x, f"{prefix}{kind}_proj").reshape(n, heads, self.head_dim)
            if kind != "v":
                if f"{prefix}{kind}_norm.weight" in self.tensors:
                    y = self.norm(y, f"{prefix}{kind}_norm")
                a, b = np.split(y, 2, -1)
                y = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
            return np.repeat(y, self.heads // heads, 1)

        q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self.linear(np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1), f"{prefix}o_proj")

    def scores(self, tokens):
        """Scores of one sample: hidden channels, and the intermediate channels of each layer."""
        x = self.tensors["model.embed_tokens.weight"][tokens]
        hidden, intermediate = 0.0, []
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            normed = self.norm(x, f"{prefix}input_layernorm")
            hidden = hidden + np.abs(normed.mean(0))
            x = x + self.attention(normed, layer)
            normed = self.norm(x, f"{prefix}post_attention_layernorm")
            hidden = hidden + np.abs(normed.mean(0))
            gate = self.linear(normed, f"{prefix}mlp.gate_proj")
            inner = gate / (1 + np.exp(-gate)) * self.linear(normed, f"{prefix}mlp.up_proj")
            intermediate.append(inner.mean(0))
            x = x + self.linear(inner, f"{prefix}mlp.down_proj")
        return hidden, intermediate


def main():
    task = json.load(sys.stdin)
    model = Model(pathlib.Path(sys.argv[1]))
    order = {"l1": 1, "l2": 2}[task["norm"]]
    samples = [model.scores(tokens) for tokens in task["samples"]]

    def keep(per_sample, count):
        over_samples = np.linalg.norm(np.stack(per_sample), ord=order, axis=0)
        return sorted(np.argsort(-over_samples, kind="stable")[:count].tolist())

    layers = model.config["num_hidden_layers"]
    intermediate = [keep([s[1][layer] for s in samples], task["intermediate"]) for layer in range(layers)]
    print(json.dumps({"hidden": keep([s[0] for s in samples], task["hidden"]), "intermediate": intermediate}))


main()
