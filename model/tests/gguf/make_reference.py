"""Generates blocks.gguf, sentencepiece.gguf and sentencepiece.json, the reference data for this folder's tests.

    pip install gguf==0.19.0 sentencepiece==0.2.3 numpy
    python make_reference.py

blocks.gguf: for every quantised type, a tensor NAME of random blocks, and NAME.f32, the values that the Python package
from llama.cpp's repository dequantises it to. sentencepiece.gguf and .json: a small BPE model trained on this project's
README, stored as GGUF metadata, and the token ids that the SentencePiece library gives.
"""

import io
import json
from pathlib import Path

import gguf
import numpy as np
import sentencepiece as spm
from gguf import GGMLQuantizationType as Type
from gguf import quants

HERE = Path(__file__).parent
ROWS, COLUMNS = 2, 256

# Offsets of a block's 16-bit floats. They are set to small values, because random bits could be infinite or NaN.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q2_K: [80, 82], Type.Q3_K: [108], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}


def blocks():
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(HERE / "blocks.gguf", "qwen2")
    for kind, scales in SCALES.items():
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 256, (ROWS, COLUMNS // elements, size), dtype=np.uint8)
        for at in scales:
            values = random.uniform(-0.1, 0.1, data.shape[:2]).astype(np.float16)
            data[:, :, at : at + 2] = values[..., None].view(np.uint8)
        data = data.reshape(ROWS, -1)
        name = kind.name.lower()
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(name + ".f32", quants.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sentencepiece():
    model = io.BytesIO()
    text = (HERE / "../../../README.md").read_text()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.99,
    )
    processor = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.get_piece_size())

    def kind(i):
        if processor.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if processor.is_control(i):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if processor.is_byte(i) else gguf.TokenType.NORMAL

    writer = gguf.GGUFWriter(HERE / "sentencepiece.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_embedding_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types([kind(i) for i in ids])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    texts = [
        "The router has no model files.", " a leading space", "two  spaces, three   spaces", "line\n\n  indented\tby a tab",
        "prefill and decode nodes share 12345 tokens", "na\u00efve \u65e5\u672c\u8a9e \U0001f469", "x", "", "  ",
        text[:2000],
    ]
    expected = [{"text": t, "ids": processor.encode(t)} for t in texts]
    (HERE / "sentencepiece.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")


blocks()
sentencepiece()
