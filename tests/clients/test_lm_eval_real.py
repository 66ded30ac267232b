"""lm-evaluation-harness, unmodified, scores SmolLM2 at OVERFILL_URL. The model is a GGUF file, which has no tokenizer that the
harness could load, so it asks the router. OVERFILL_EXPECTED is a file of tests/real with the results of transformers."""

import json
import os
import pathlib
import tempfile
import unittest

from lm_eval_tasks import evaluate, post

MODEL = os.environ["OVERFILL_MODEL"]
# Of each token, in nats.
TOLERANCE = 1e-3


class Harness(unittest.TestCase):
    def test_log_likelihoods_are_those_of_transformers(self):
        cases = json.loads(pathlib.Path(os.environ["OVERFILL_EXPECTED"]).read_text())["cases"]
        # The harness counts space at the end of a context as part of the continuation.
        cases = [case for case in cases if case["text"] == case["text"].rstrip()]
        self.assertGreaterEqual(len(cases), 3)
        docs, expected = [], []
        for case in cases:
            tokens = [step["token"] for step in case["steps"]]
            text = post("/detokenize", {"tokens": tokens})["prompt"]
            # Another text could have the same tokens, but this one must have them.
            whole = post("/tokenize", {"prompt": case["text"] + text, "add_special_tokens": False})["tokens"]
            self.assertEqual(whole, case["prompt"] + tokens)
            docs.append({"context": case["text"], "continuation": text})
            expected.append((sum(dict(step["top"])[step["token"]] for step in case["steps"]), len(tokens)))
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "documents.jsonl"
            file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
            task = {
                "task": "score", "dataset_path": "json", "output_type": "loglikelihood", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder}, "target_delimiter": "",
                "doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}", "metric_list": [{"metric": "acc"}],
            }
            results, samples = evaluate("local-completions", "/v1/completions", {"model": MODEL}, [task])
        for sample, (value, tokens) in zip(samples["score"], expected, strict=True):
            [[(found, greedy)]] = sample["resps"]
            self.assertAlmostEqual(float(found), value, delta=TOLERANCE * tokens)
            self.assertTrue(greedy)
        self.assertEqual(results["score"]["acc,none"], 1)


if __name__ == "__main__":
    unittest.main()
