"""Trains small SentencePiece models, and writes the ids and texts that the library gives.

    pip install sentencepiece==0.2.3 transformers==4.57.6
    python make.py [MODEL.model ...]

NAME.model and NAME.json: `cases` of a text, its ids without special tokens, and the text of these ids. Models that are given are
copied, not trained. `special` of bpe-prefix: ids that LlamaTokenizer of transformers gives for texts with special tokens.
"""

import io
import json
import pathlib
import random
import sys
import tempfile

import sentencepiece as spm
from transformers import LlamaTokenizer

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]

LINES = [line for name in ("README.md", "ARCHITECTURE.md", "docs/models.md") for line in (ROOT / name).read_text().splitlines()]
OTHERS = [
    "Ein Versuch über Größe und Maß, naïve façade, señor, São Paulo, Ångström.",
    "Привет, мир! Как дела? Это небольшой текст на русском языке.",
    "你好，世界。这是一个测试，用来检查分词器。今天天气很好。",
    "日本語のテキストです。トークナイザーを試しています。",
    "नमस्ते दुनिया, यह एक परीक्षण है।  مرحبا بالعالم، هذا اختبار.",
    "def f(x):\n    if x > 0:\n\t\treturn x ** 2\n\n\n    return {'a': [1, 2, 3]}\n",
    "banana ananas anana bananana aaaaaaa abababab abcabcabc mississippi",
    "1234567890 3.14159 1,000,000 2024-11-29 0x1F 1e-9",
    "emoji 👍🏽 👨‍👩‍👧‍👦 🇩🇪 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301 \u00a0 \u200b \ufeff",
]
EDGES = [
    "", " ", "  ", "   ", "\n", "\t", "\n\n", "a", " a", "a ", " a ", "  a  b   c    ", "\u2581", "\u2581a\u2581", "a\u2581b", "\x00", "\x7f",
    "<0x0A", "▁▁▁", " \n \n ", "\n\n\n\n\n", "        deep", "é", "e\u0301", "\r\n", "x" * 40, " " * 33 + "y", "<div></div>", "<b>bold</b>\n\n", "ﬁ ２ ①",
]


def texts():
    chance = random.Random(5)
    sample = chance.sample([line for line in LINES if line], 60) + OTHERS + EDGES
    letters = sorted(set("".join(LINES + OTHERS))) + [" "] * 30
    sample += ["".join(chance.choices(letters, k=chance.randint(1, 30))) for _ in range(60)]
    words = [word for line in LINES for word in line.split()]
    return sample + ["  ".join(chance.choices(words, k=8)) for _ in range(10)]


def train(name, **settings):
    model = io.BytesIO()
    defaults = {
        "vocab_size": 700, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
        "character_coverage": 0.98, "minloglevel": 2, "num_threads": 1,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(LINES + OTHERS * 3), model_writer=model, **(defaults | settings))
    (HERE / f"{name}.model").write_bytes(model.getvalue())


def cases(name):
    processor = spm.SentencePieceProcessor(model_file=str(HERE / f"{name}.model"))
    found = []
    for text in texts():
        ids = processor.encode(text)
        found.append({"text": text, "ids": ids, "decoded": processor.decode(ids)})
    special = []
    for legacy in (True, False) if name == "bpe-prefix" else ():
        for flags in ({}, {"add_bos_token": False}, {"add_eos_token": True}):
            tokenizer = LlamaTokenizer(str(HERE / f"{name}.model"), legacy=legacy, **flags)
            for text in ["</s>", "some text", "a</s>b", "<s>[x] the y </s> z", "the <s></s>model"]:
                special.append({"config": {"legacy": legacy} | flags, "text": text, "ids": tokenizer.encode(text)})
    (HERE / f"{name}.json").write_text(json.dumps({"cases": found, "special": special}, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(name, len(found))


if len(sys.argv) > 1:
    for path in map(pathlib.Path, sys.argv[1:]):
        (HERE / path.name).write_bytes(path.read_bytes())
        cases(path.stem)
    sys.exit()
# Llama 2 and Mistral.
train("bpe-prefix", model_type="bpe", split_digits=True, allow_whitespace_only_pieces=True)
# Gemma.
train(
    "bpe-user-defined", model_type="bpe", split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=False,
    user_defined_symbols=["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<b>", "</b>", "<start_of_turn>"],
    control_symbols=["<pad>"])
train("bpe-trimmed", model_type="bpe", remove_extra_whitespaces=True, byte_fallback=False, bos_id=-1, eos_id=1)
train("unigram-prefix", model_type="unigram")
train("unigram-trimmed", model_type="unigram", byte_fallback=False, remove_extra_whitespaces=True, add_dummy_prefix=False, bos_id=3)
train("unigram-user-defined", model_type="unigram", add_dummy_prefix=False, user_defined_symbols=["\n", "</b>"])
# Refused.
with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
    rules.write("FB01\t66 69\n")
    rules.flush()
    train("normalized", model_type="bpe", normalization_rule_name="", normalization_rule_tsv=rules.name)
for name in ["bpe-prefix", "bpe-user-defined", "bpe-trimmed", "unigram-prefix", "unigram-trimmed", "unigram-user-defined"]:
    cases(name)
