"""Writes the log-probabilities that transformers gives for published checkpoints, over the dequantised weights of a GGUF file.

    pip install torch==2.15.0 transformers==4.57.6 gguf==0.19.0 sentencepiece==0.2.3
    python expect.py FOLDER

FOLDER is that of fetch.py. Writes smollm2.json and gemma3.json: prompts, their token ids, and greedy steps of `{token, top}`; `top`
lists five `[token, natural-log probability]`, best first. The gguf package dequantises; transformers computes in float32. Token ids
come from the `tokenizers` library with SmolLM2's published settings, and from SentencePiece for Gemma.
"""

import json
import pathlib
import sys

import gguf
import sentencepiece
import sentencepiece.sentencepiece_model_pb2 as proto
import tokenizers
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
LLAMA = LAYER | {"ffn_norm": "post_attention_layernorm"}
GEMMA = LAYER | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

TEXTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "In 1969, the first humans landed on the Moon.  The year 2024\nwas 55 years later — c'est la vie! 日本語, \U0001f44d.",
]


class File:
    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)

    def __getitem__(self, key):
        return self.reader.fields[key].contents()

    def state(self, layer_names, change):
        state = {}
        for tensor in self.reader.tensors:
            weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            name = TOP.get(tensor.name)
            if not name:
                _, layer, rest = tensor.name.split(".", 2)
                module, kind = rest.rsplit(".", 1)
                name = f"model.layers.{layer}.{layer_names[module]}.{kind}"
            state[name] = change(name, weight)
        return state


def load(model, state):
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def smollm2(file):
    heads, kv_heads, hidden = (
        file["llama.attention.head_count"], file["llama.attention.head_count_kv"], file["llama.embedding_length"])

    def change(name, weight):
        # The converter interleaves the two halves of each head.
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                return weight.reshape(count, -1, 2, hidden).transpose(1, 2).reshape(weight.shape)
        return weight

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=file["llama.feed_forward_length"], num_hidden_layers=file["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=file["llama.vocab_size"],
        max_position_embeddings=file["llama.context_length"], rope_theta=file["llama.rope.freq_base"], tie_word_embeddings=True,
        rms_norm_eps=1e-5)
    model = load(LlamaForCausalLM(config), file.state(LLAMA, change))

    tokens = file["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, levels])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, file["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=file["tokenizer.chat_template"], bos_token=tokens[1], eos_token=tokens[2])
    return model, fast.encode, fast


def gemma3(file):
    layers = file["gemma3.block_count"]
    config = Gemma3TextConfig(
        hidden_size=file["gemma3.embedding_length"], intermediate_size=file["gemma3.feed_forward_length"],
        num_hidden_layers=layers, num_attention_heads=file["gemma3.attention.head_count"],
        num_key_value_heads=file["gemma3.attention.head_count_kv"], head_dim=file["gemma3.attention.key_length"],
        query_pre_attn_scalar=file["gemma3.attention.key_length"], vocab_size=len(file["tokenizer.ggml.tokens"]),
        max_position_embeddings=file["gemma3.context_length"], rope_theta=file["gemma3.rope.freq_base"],
        rope_local_base_freq=10000.0, sliding_window=file["gemma3.attention.sliding_window"], rms_norm_eps=1e-6,
        layer_types=["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)],
        attn_implementation="eager")
    # The converter adds 1 to the weights of norms.
    change = lambda name, weight: weight - 1 if "norm" in name else weight
    model = load(Gemma3ForCausalLM(config), file.state(GEMMA, change))

    parts = proto.ModelProto()
    tokens, kinds = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    for id, (token, score, kind) in enumerate(zip(tokens, file["tokenizer.ggml.scores"], kinds)):
        # The converter writes spaces in user-defined pieces as such.
        unknown = id == file["tokenizer.ggml.unknown_token_id"]
        parts.pieces.add(piece=token.replace(" ", "▁") if kind == 4 else token, score=score, type=2 if unknown else kind)
    parts.trainer_spec.model_type = 2
    parts.trainer_spec.byte_fallback = True
    for field, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding")):
        setattr(parts.trainer_spec, field, file[f"tokenizer.ggml.{key}_token_id"])
    parts.normalizer_spec.name = "identity"
    parts.normalizer_spec.add_dummy_prefix = False
    parts.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=parts.SerializeToString())
    bos = file["tokenizer.ggml.bos_token_id"]
    return model, lambda text: [bos, *processor.encode(text)], None


@torch.no_grad()
def steps(model, prompt, count):
    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        values, tokens = out.logits[0, -1].double().log_softmax(-1).topk(5)
        top = [[int(token), round(float(value), 5)] for token, value in zip(tokens, values)]
        found.append({"token": top[0][0], "top": top})
        ids = tokens[:1].reshape(1, 1)
    return found


def write(name, file, make, long_words):
    model, encode, chat = make(file)
    cases = []
    # A prompt that is longer than a sliding window.
    long = " ".join(f"{word} {number}" for number, word in enumerate(["apple", "river", "stone", "cloud"] * 60))[:long_words]
    for text, count in [(text, 12) for text in TEXTS] + [(long, 4)]:
        prompt = encode(text)
        cases.append({"text": text, "prompt": prompt, "steps": steps(model, prompt, count)})
        print(name, len(prompt), [step["token"] for step in cases[-1]["steps"]])
    out = {"cases": cases}
    if chat:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = chat.apply_chat_template(messages, add_generation_prompt=True)
        answer = steps(model, prompt, 8)
        out["chat"] = {
            "messages": messages, "prompt_tokens": len(prompt), "text": chat.decode([step["token"] for step in answer]),
            "steps": len(answer),
        }
        print(out["chat"])
    lines = ",\n ".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    rest = "".join(f",\n\"{key}\": " + json.dumps(value, ensure_ascii=False) for key, value in out.items() if key != "cases")
    (HERE / f"{name}.json").write_text("{\"cases\": [\n " + lines + "]" + rest + "}\n")


folder = pathlib.Path(sys.argv[1])
write("smollm2", File(folder / "smollm2.gguf"), smollm2, 1000)
write("gemma3", File(folder / "gemma3.gguf"), gemma3, 3000)
