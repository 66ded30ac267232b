"""AIPerf, unmodified, puts load on the cluster at OVERFILL_URL. OVERFILL_TOKENIZER is the folder of the model."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

REQUESTS, OUTPUT_TOKENS = 24, 12
URL, MODEL = os.environ["OVERFILL_URL"].removesuffix("/v1"), os.environ["OVERFILL_MODEL"]


class AIPerf(unittest.TestCase):
    def profile(self, endpoint, *options):
        """The report of one run."""
        command = [
            pathlib.Path(sys.executable).with_name("aiperf"), "profile", "--model", MODEL, "--url", URL,
            "--endpoint-type", endpoint, "--tokenizer", os.environ["OVERFILL_TOKENIZER"], "--ui-type", "none",
            "--request-count", str(REQUESTS), "--concurrency", "4", "--isl", "40", "--osl", str(OUTPUT_TOKENS),
            "--extra-inputs", "ignore_eos:true", "--random-seed", "1", *options,
        ]
        with tempfile.TemporaryDirectory() as folder:
            command += ["--output-artifact-dir", folder]
            # With this variable, it takes no folder for a tokenizer.
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
            self.assertEqual(ended.returncode, 0, ended.stdout + ended.stderr)
            read = lambda name: json.loads((pathlib.Path(folder) / name).read_text())
            # It also reads the router's metrics.
            self.assertIn("vllm:request_success", read("server_metrics_export.json")["metrics"])
            return read("profile_export_aiperf.json")

    def check(self, report):
        self.assertEqual(report["request_count"]["avg"], REQUESTS)
        self.assertEqual(report.get("error_request_count", {"avg": 0})["avg"], 0)
        self.assertEqual(report.get("error_summary", []), [])
        lengths = report["output_sequence_length"]
        self.assertEqual((lengths["min"], lengths["max"]), (OUTPUT_TOKENS, OUTPUT_TOKENS))

    def test_streamed_chats(self):
        report = self.profile("chat", "--streaming", "--use-server-token-count")
        self.check(report)
        self.assertEqual(report["time_to_first_token"]["count"], REQUESTS)

    def test_whole_completions(self):
        self.check(self.profile("completions", "--use-server-token-count"))


if __name__ == "__main__":
    unittest.main()
