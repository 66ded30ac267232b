"""Makes golden pairs of families with random weights, with all of their files, and what transformers computes with them.

    pip install torch transformers==4.57.6 && python tests/golden/make/pairs.py [NAME ...]

The decode model of a pair is the full model with fewer hidden and intermediate channels, and fewer layers if `kept_layers`
says so. Windows and original contexts are so short that most prompts go beyond them. long_prompts.py adds long.json.
"""

import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(GOLDEN))
import long_prompts  # noqa: E402

# Tokenizer, chat template, prompts and texts are those of this pair.
SOURCE = GOLDEN / "qwen3"
TEXT_FILES = ["chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
EOS = 1

COMMON = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=EOS,
    pad_token_id=None,
)
# hidden and intermediate channels that the decode model keeps.
KEPT = (27, 61)

PAIRS = {
    "gemma2": dict(
        class_name="Gemma2ForCausalLM",
        config=dict(
            model_type="gemma2",
            sliding_window=24,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=9.0,
            rope_theta=10000.0,
        ),
        embedding=0.2,
    ),
    "gemma3": dict(
        class_name="Gemma3ForCausalLM",
        config=dict(
            model_type="gemma3_text",
            num_hidden_layers=6,
            sliding_window=37,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        embedding=0.2,
        # The configuration states the pattern, as older ones on the hub do.
        without=["layer_types", "_sliding_window_pattern"],
        stated=dict(sliding_window_pattern=3),
        kept_layers=[0, 1, 2, 4, 5],
    ),
    "phi3": dict(
        class_name="Phi3ForCausalLM",
        config=dict(
            model_type="phi3",
            hidden_size=64,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=128,
            sliding_window=260,
            tie_word_embeddings=True,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.15, 1.6, 2.7, 5.5, 9.0],
            },
        ),
        embedding=0.3,
        # Prompts beyond the original context only: transformers goes back to the short factors below it.
        prompts=[129, 150, 177],
    ),
    "olmo2": dict(
        class_name="Olmo2ForCausalLM",
        config=dict(model_type="olmo2", rope_theta=500000.0, rms_norm_eps=1e-6),
    ),
    "smollm3": dict(
        class_name="SmolLM3ForCausalLM",
        config=dict(
            model_type="smollm3",
            rope_theta=50000.0,
            no_rope_layer_interval=3,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
        embedding=0.4,
    ),
    "granite": dict(
        class_name="GraniteForCausalLM",
        config=dict(
            model_type="granite",
            embedding_multiplier=2.0,
            residual_multiplier=0.6,
            attention_multiplier=0.11,
            logits_scaling=0.5,
            tie_word_embeddings=True,
        ),
        embedding=0.2,
    ),
    "mistral": dict(
        class_name="MistralForCausalLM",
        config=dict(model_type="mistral", sliding_window=40, num_hidden_layers=3),
    ),
}


def randomise(model, embedding, around_zero):
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(0.25 * torch.randn_like(parameter) + (0.0 if around_zero else 1.0))
        elif "embed_tokens" in name:
            parameter.copy_(embedding * torch.randn_like(parameter))
        else:
            gain = 2.5 if "lm_head" in name else 1.2
            parameter.copy_(gain / parameter.shape[1] ** 0.5 * torch.randn_like(parameter))


def cut(tensors, full, hidden, inner, layers):
    """The tensors of the decode model."""
    out = {}
    for name, tensor in tensors.items():
        layer = None
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            if int(number) not in layers:
                continue
            layer = layers.index(int(number))
            name = f"model.layers.{layer}.{rest}"
        rows = columns = None
        if "embed_tokens" in name or "lm_head" in name or "_proj" in name and "o_proj" not in name and "down" not in name:
            columns = hidden
        if "o_proj" in name or "down_proj" in name or "layernorm" in name or name == "model.norm.weight":
            rows = hidden
        if "gate_proj" in name or "up_proj" in name:
            rows = inner[layer]
        if "gate_up_proj" in name:
            rows = torch.cat([inner[layer], inner[layer] + full.intermediate_size])
        if "down_proj" in name:
            columns = inner[layer]
        tensor = tensor if rows is None else tensor[rows]
        out[name] = (tensor if columns is None else tensor[:, columns]).contiguous()
    return out


def write(folder, config, class_name, tensors, pair):
    folder.mkdir(parents=True)
    for file in TEXT_FILES:
        shutil.copy(SOURCE / "full" / file, folder / file)
    stated = config.to_diff_dict() | pair.get("stated", {}) | {"architectures": [class_name], "dtype": "bfloat16"}
    for field in pair.get("without", []):
        if not (field == "layer_types" and folder.name == "decode"):
            stated.pop(field, None)
    (folder / "config.json").write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make(name, seed):
    pair = PAIRS[name]
    fields = COMMON | pair["config"]
    model_type = fields.pop("model_type")
    torch.manual_seed(seed)
    full = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(full, dtype=torch.float32)
    randomise(model, pair.get("embedding", 1.0), "gemma" in name)
    tied = full.tie_word_embeddings
    tensors = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items() if not (tied and "lm_head" in n)}
    kept_layers = pair.get("kept_layers", list(range(full.num_hidden_layers)))
    hidden = torch.randperm(full.hidden_size)[: KEPT[0]].sort().values
    inner = [torch.randperm(full.intermediate_size)[: KEPT[1]].sort().values for _ in kept_layers]
    small = AutoConfig.for_model(model_type, **fields)
    small.hidden_size, small.intermediate_size, small.num_hidden_layers = KEPT[0], KEPT[1], len(kept_layers)
    if getattr(full, "layer_types", None):
        small.layer_types = [full.layer_types[layer] for layer in kept_layers]
    target = GOLDEN / name
    shutil.rmtree(target, ignore_errors=True)
    write(target / "full", full, pair["class_name"], tensors, pair)
    write(target / "decode", small, pair["class_name"], cut(tensors, full, hidden, inner, kept_layers), pair)
    if "kept_layers" in pair:
        (target / "decode/overfill.json").write_text(json.dumps({"version": 1, "kept_layers": kept_layers}, indent=2) + "\n")
    source = json.loads((SOURCE / "expected.json").read_text())
    lengths = pair.get("prompts")
    prompts = [long_prompts.prompt(n) for n in lengths] if lengths else [case["prompt"] for case in source["cases"]]
    cases = long_prompts.cases(target, prompts)
    (target / "expected.json").write_text(
        json.dumps({"reference": long_prompts.REFERENCE, "cases": cases, "text": source["text"], "chat": source["chat"]}) + "\n"
    )
    long_prompts.write(target)
    steps = [step for case in cases for arm in ("two_stage", "full_only") for step in case[arm]]
    return all(step["token"] != EOS for step in steps)


@torch.no_grad()
def main():
    for name in sys.argv[1:] or PAIRS:
        seed = next(seed for seed in range(100) if make(name, seed))
        print(name, "seed", seed)


if __name__ == "__main__":
    main()
