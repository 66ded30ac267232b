"""lm-evaluation-harness, unmodified, scores the demo pair at OVERFILL_URL. OVERFILL_TOKENIZER is the folder of the full model."""

import os
import pathlib
import tempfile
import unittest

import transformers

import lm_eval_tasks
from lm_eval_tasks import evaluate, post

MODEL, TOKENIZER = os.environ["OVERFILL_MODEL"], os.environ["OVERFILL_TOKENIZER"]
DOCUMENTS = 12


class Harness(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.docs = list(lm_eval_tasks.documents(DOCUMENTS))
        cls.choose, cls.write = lm_eval_tasks.write(pathlib.Path(folder.name), cls.docs)
        cls.tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)

    def expected(self, doc, choice):
        """The log-likelihood of an answer, of token ids and prompt log-probabilities, and whether every token is the best."""
        context, whole = (self.tokenizer(text).input_ids for text in (doc["context"], f"{doc['context']} {choice}"))
        # The space after the context is part of its last token, which the harness takes without it.
        tokens = whole[len(context) :]
        answer = post("/v1/completions", {"model": MODEL, "prompt": context + tokens, "prompt_logprobs": 1, "max_tokens": 1})
        entries = answer["choices"][0]["prompt_logprobs"][len(context) :]
        values = [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens, strict=True)]
        best = [max(one["logprob"] for one in entry.values()) for entry in entries]
        return sum(values), values == best

    def test_log_likelihoods(self):
        for options in ({}, {"batch_size": 4}, {"num_concurrent": 4}):
            with self.subTest(options):
                arguments = {
                    "model": MODEL, "tokenizer": TOKENIZER, "tokenizer_backend": "huggingface", "add_bos_token": True, **options,
                }
                results, samples = evaluate("local-completions", "/v1/completions", arguments, [self.choose])
                right = 0
                for doc, sample in zip(self.docs, samples["choose"], strict=True):
                    self.assertEqual(sample["doc"], doc)
                    expected = [self.expected(doc, choice) for choice in doc["choices"]]
                    found = [(float(value), bool(best)) for ((value, best),) in sample["resps"]]
                    for one, other in zip(found, expected, strict=True):
                        self.assertAlmostEqual(one[0], other[0], places=3)
                        self.assertEqual(one[1], other[1])
                    values = [value for value, _ in expected]
                    right += values.index(max(values)) == doc["right"]
                self.assertAlmostEqual(results["choose"]["acc,none"], right / DOCUMENTS)
                # The full model knows its task.
                self.assertGreaterEqual(right, DOCUMENTS - 1)

    def test_answers(self):
        """Both stages of the pair write the answers."""
        chats = ("local-chat-completions", "/v1/chat/completions", {"model": MODEL}, {"apply_chat_template": True})
        texts = ("local-completions", "/v1/completions", {"model": MODEL, "tokenizer": TOKENIZER, "add_bos_token": True}, {})
        for model, path, arguments, options in (chats, texts):
            with self.subTest(model):
                results, samples = evaluate(model, path, {**arguments, "num_concurrent": 4}, [self.write], **options)
                right = 0
                for doc, sample in zip(self.docs, samples["write"], strict=True):
                    body = {"model": MODEL, "max_tokens": 60, "temperature": 0}
                    if "chat" in path:
                        body["messages"] = [{"role": "user", "content": doc["context"]}]
                    else:
                        body["prompt"] = doc["context"]
                    [choice] = post(path, body)["choices"]
                    text = choice["message"]["content"] if "chat" in path else choice["text"]
                    self.assertEqual(sample["resps"], [[text]])
                    right += text.strip() == doc["choices"][doc["right"]]
                self.assertAlmostEqual(results["write"]["exact_match,stripped"], right / DOCUMENTS)
                self.assertGreaterEqual(right, DOCUMENTS - 1)


if __name__ == "__main__":
    unittest.main()
