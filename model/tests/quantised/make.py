"""Writes tiny quantised checkpoints, and the weights and logits that they must give.

Needs torch 2.15, transformers 4.57.6, safetensors and compressed-tensors 0.20.1:

    python make.py

Each folder NAME/ has config.json and model.safetensors as the libraries of its format write them, and expected.safetensors: some
dequantised matrices, and `logits` of the prompt TOKENS. compressed-tensors packs and decompresses its own formats. The others
follow the formulas of the code that reads them: `QuantLinear.forward` of AutoGPTQ 0.7.1 (qlinear_cuda.py), `dequantize_gemm` of
AutoAWQ, and FineGrainedFP8 of transformers. Scales are widened to float32 before they are multiplied, as Overfill does, so the
matrices must be equal bit by bit. transformers computes the logits in float32 over the dequantised weights.
"""

import json
import pathlib

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
TOKENS = [(7 * i + 3) % 40 for i in range(12)]
KEPT = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"]

# Whole words and groups.
EVEN = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
# The last word of a row, or of a column of zeros, is part empty.
ODD = {"hidden_size": 36, "intermediate_size": 44, "head_dim": 6}


def rand(shape, low, high, generator):
    return torch.rand(shape, generator=generator) * (high - low) + low


def integers(shape, low, high, generator):
    return torch.randint(low, high + 1, shape, generator=generator)


def pack(values, bits, dim, order=None):
    """Packs unsigned integers into int32 along `dim`, the first in the lowest bits, or in the given order."""
    per_word = 32 // bits
    values = values.to(torch.int64).movedim(dim, -1)
    values = values.reshape(*values.shape[:-1], -1, per_word)
    if order:
        values = values[..., order]
    words = sum(values[..., i] << (bits * i) for i in range(per_word))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return words.to(torch.int32).movedim(-1, dim).contiguous()


def fp8(block=None, per_row=False, dtype=torch.float32, name="weight_scale"):
    """quant_method fp8: a scale per tensor, per row or per block."""

    def make(shape, generator):
        rows, columns = shape
        height, width = block or (1 if per_row else rows, columns)
        blocks = (-(-rows // height), -(-columns // width))
        scale = rand(blocks, 5e-4, 2e-3, generator).to(dtype)
        each = scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        weight = (torch.randn(shape, generator=generator) * 0.15 / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scale if block or per_row else scale.reshape(())
        return {"weight": weight, name: stored, "input_scale": torch.tensor(0.5)}, weight.float() * each

    return make


def compressed(scheme, scale_shape, zero=None, dtype=torch.bfloat16):
    """compressed-tensors, by the package itself. `scale_shape` and `zero` are functions of the matrix' shape and scheme."""
    format = scheme["format"]
    parsed = QuantizationScheme(targets=["Linear"], weights=scheme["weights"])
    compressor = BaseCompressor.get_value_from_registry(format)
    bits, kind = scheme["weights"]["num_bits"], scheme["weights"]["type"]

    def make(shape, generator):
        high = 448 if kind == "float" else 2 ** (bits - 1)
        scale = rand(scale_shape(shape), 0.2 / high, 0.6 / high, generator).to(dtype)
        state = {"weight": torch.randn(shape, generator=generator) * 0.2, "weight_scale": scale.float()}
        if zero:
            half = 2 ** (bits - 1)
            state["weight_zero_point"] = integers(scale_shape(shape), -half, half - 1, generator).to(torch.int8)
        stored = compressor.compress(state, parsed)
        expected = compressor.decompress(stored, parsed)["weight"]
        stored["weight_scale"] = scale
        assert expected.dtype == torch.float32 and torch.equal(stored["weight_scale"].float(), state["weight_scale"])
        return stored, expected

    return make


def ordered(make, group_size):
    """Activation order of earlier versions of compressed-tensors: weight_g_idx has the group of each column."""

    def with_order(shape, generator):
        stored, _ = make(shape, generator)
        rows, columns = shape
        index = (torch.arange(columns) // group_size)[torch.randperm(columns, generator=generator)]
        packed = stored["weight_packed"]
        values = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], -1).reshape(rows, -1)[:, :columns] - 8
        return stored | {"weight_g_idx": index.to(torch.int32)}, values * stored["weight_scale"].float()[:, index]

    return with_order


def gptq(bits, group_size, desc_act, sym, version=1):
    def make(shape, generator):
        rows, columns = shape
        groups = 1 if group_size == -1 else columns // group_size
        high = 2**bits - 1
        values = integers((columns, rows), 0, high, generator)
        # The first version stores zeros less one, so it has no 0.
        zeros = torch.full((groups, rows), (high + 1) // 2) if sym else integers((groups, rows), 1, high, generator)
        scales = rand((groups, rows), 0.3 / high, 0.9 / high, generator).half()
        index = torch.arange(columns) // (columns if group_size == -1 else group_size)
        if desc_act:
            index = index[torch.randperm(columns, generator=generator)]
        stored = {
            "qweight": pack(values, bits, 0),
            "qzeros": pack(zeros - (1 if version == 1 else 0), bits, 1),
            "scales": scales,
            "g_idx": index.to(torch.int32),
            # AutoGPTQ writes a bias of zeros for layers that have none.
            "bias": torch.zeros(rows, dtype=torch.float16),
        }
        return stored, (scales.float()[index] * (values - zeros[index])).T.contiguous()

    return make


def awq(group_size):
    def make(shape, generator):
        rows, columns = shape
        groups = columns // group_size
        values = integers((columns, rows), 0, 15, generator)
        zeros = integers((groups, rows), 0, 15, generator)
        scales = rand((groups, rows), 0.02, 0.06, generator).half()
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        stored = {"qweight": pack(values, 4, 1, order), "qzeros": pack(zeros, 4, 1, order), "scales": scales}
        each = [part.repeat_interleave(group_size, 0) for part in (zeros, scales.float())]
        return stored, ((values - each[0]) * each[1]).T.contiguous()

    return make


def config_of(scheme, **more):
    weights = {"actorder": None, "dynamic": False, "observer": "minmax"} | scheme["weights"]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme["format"],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | more


def ct(format, num_bits, kind, strategy, symmetric=True, group_size=None, block_structure=None):
    weights = {"num_bits": num_bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": group_size, "block_structure": block_structure}
    return {"format": format, "weights": weights}


per_tensor = lambda shape: (1,)
per_row = lambda shape: (shape[0], 1)
per_group = lambda size: lambda shape: (shape[0], shape[1] // size)
per_block = lambda height, width: lambda shape: (-(-shape[0] // height), -(-shape[1] // width))

CT = {
    "compressed-float-tensor": (ct("float-quantized", 8, "float", "tensor"), per_tensor, False, EVEN),
    "compressed-float-channel": (ct("float-quantized", 8, "float", "channel"), per_row, False, ODD),
    "compressed-float-block": (
        ct("float-quantized", 8, "float", "block", block_structure=[16, 20]), per_block(16, 20), False, EVEN),
    "compressed-int-channel": (ct("int-quantized", 8, "int", "channel"), per_row, False, ODD),
    "compressed-int-group": (ct("int-quantized", 8, "int", "group", symmetric=False, group_size=4), per_group(4), True, ODD),
    "compressed-packed-4-group": (ct("pack-quantized", 4, "int", "group", group_size=16), per_group(16), False, EVEN),
    "compressed-packed-4-zeros": (
        ct("pack-quantized", 4, "int", "group", symmetric=False, group_size=4), per_group(4), True, ODD),
    "compressed-packed-8-channel": (
        ct("pack-quantized", 8, "int", "channel", symmetric=False), per_row, True, ODD),
}

GPTQ = {"quant_method": "gptq", "damp_percent": 0.1, "true_sequential": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

CASES = {
    "fp8-tensor": (fp8(), {"quant_method": "fp8", "activation_scheme": "static"}, EVEN),
    "fp8-row": (fp8(per_row=True, dtype=torch.bfloat16), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, EVEN),
    "fp8-block": (
        fp8((20, 12), name="weight_scale_inv"), FP8 | {"fmt": "e4m3", "weight_block_size": [20, 12]}, EVEN),
    "gptq-4": (gptq(4, 16, False, True), GPTQ | {"bits": 4, "group_size": 16, "sym": True, "desc_act": False}, EVEN),
    "gptq-4-order": (gptq(4, 8, True, False), GPTQ | {"bits": 4, "group_size": 8, "sym": False, "desc_act": True}, EVEN),
    "gptq-8-v2": (
        gptq(8, -1, False, False, 2),
        GPTQ | {"bits": 8, "group_size": -1, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}, EVEN),
    "awq": (awq(16), AWQ, EVEN),
} | {name: (compressed(scheme, shape, zero), config_of(scheme), sizes) for name, (scheme, shape, zero, sizes) in CT.items()}
actorder = ct("pack-quantized", 4, "int", "group", group_size=16)
actorder["weights"]["actorder"] = "group"
CASES["compressed-packed-4-order"] = (
    ordered(CASES["compressed-packed-4-group"][0], 16), config_of(actorder), EVEN)

# Names of the tensors, where they aren't those of a causal language model.
NAMES = {
    "fp8-block": lambda name: name.removeprefix("model."),
    "awq": lambda name: f"language_model.{name}",
    "compressed-packed-4-group": lambda name: name.replace("model.", "model.language_model.", 1),
}


def write(name, make, quantization, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=64, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, **sizes)
    model = LlamaForCausalLM(config).eval()
    stored, expected = {}, {}
    state = model.state_dict()
    for key, value in state.items():
        if key == "lm_head.weight":
            continue
        module = key.removesuffix(".weight")
        if value.ndim == 2 and "layers" in key:
            parts, weight = make(tuple(value.shape), generator)
            assert weight.shape == value.shape and weight.dtype == torch.float32, key
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            if module in KEPT:
                expected[key] = weight.contiguous()
        else:
            weight = (rand(value.shape, 0.5, 1.5, generator) if value.ndim == 1 else torch.randn(value.shape, generator=generator))
            stored[key] = weight.half()
            weight = stored[key].float()
        value.copy_(weight)
    with torch.no_grad():
        expected["logits"] = model(torch.tensor([TOKENS])).logits[0].contiguous()
    rename = NAMES.get(name, lambda name: name)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    save_file({rename(key): value.contiguous() for key, value in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "torch_dtype": "float16",
    } | sizes
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}, indent=1) + "\n")


for seed, (name, (make, quantization, sizes)) in enumerate(CASES.items()):
    write(name, make, quantization, sizes, seed)
    print(name)
