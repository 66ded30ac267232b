"""Writes a Llama of random bf16 weights as a GGUF file, for llama-bench: python random_gguf.py FILE HIDDEN INTERMEDIATE

Heads, layers and vocabulary are those of Llama-3.2-3B. Needs the packages numpy and gguf.
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 28, 24, 8, 128, 128256
MOSTLY_BF16 = 32

path, hidden, intermediate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
out = GGUFWriter(path, "llama")
out.add_block_count(LAYERS)
out.add_context_length(131072)
out.add_embedding_length(hidden)
out.add_feed_forward_length(intermediate)
out.add_head_count(HEADS)
out.add_head_count_kv(KV_HEADS)
out.add_key_length(HEAD_DIM)
out.add_value_length(HEAD_DIM)
out.add_rope_dimension_count(HEAD_DIM)
out.add_rope_freq_base(500000.0)
out.add_layer_norm_rms_eps(1e-5)
out.add_vocab_size(VOCABULARY)
out.add_tokenizer_model("no_vocab")
out.add_file_type(MOSTLY_BF16)

# One random block, repeated: what is in the weights changes no time.
values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32) / np.sqrt(hidden)
halves = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def matrix(name, rows, columns):
    data = np.resize(halves, rows * columns).reshape(rows, columns).view(np.uint8)
    out.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)


def ones(name):
    out.add_tensor(name, np.ones(hidden, dtype=np.float32))


matrix("token_embd.weight", VOCABULARY, hidden)
ones("output_norm.weight")
for layer in range(LAYERS):
    block = f"blk.{layer}."
    ones(block + "attn_norm.weight")
    ones(block + "ffn_norm.weight")
    matrix(block + "attn_q.weight", HEADS * HEAD_DIM, hidden)
    matrix(block + "attn_k.weight", KV_HEADS * HEAD_DIM, hidden)
    matrix(block + "attn_v.weight", KV_HEADS * HEAD_DIM, hidden)
    matrix(block + "attn_output.weight", hidden, HEADS * HEAD_DIM)
    matrix(block + "ffn_gate.weight", intermediate, hidden)
    matrix(block + "ffn_up.weight", intermediate, hidden)
    matrix(block + "ffn_down.weight", hidden, intermediate)

out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
