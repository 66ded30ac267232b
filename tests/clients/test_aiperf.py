"""AIPerf, unmodified, puts load on the cluster at OVERFILL_URL. OVERFILL_TOKENIZER is the folder of the model."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

REQUESTS, OUTPUT_TOKENS = 24, 12


class AIPerf(unittest.TestCase):
    def test_streamed_chats(self):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                pathlib.Path(sys.executable).with_name("aiperf"), "profile", "--url", os.environ["OVERFILL_URL"].removesuffix("/v1"),
                "--model", os.environ["OVERFILL_MODEL"], "--tokenizer", os.environ["OVERFILL_TOKENIZER"],
                "--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--extra-inputs", "ignore_eos:true",
                "--request-count", str(REQUESTS), "--concurrency", "4", "--isl", "40", "--osl", str(OUTPUT_TOKENS),
                "--random-seed", "1", "--ui-type", "none", "--output-artifact-dir", folder,
            ]
            # With this variable, it takes no folder for a tokenizer.
            environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
            self.assertEqual(ended.returncode, 0, ended.stdout + ended.stderr)
            read = lambda name: json.loads((pathlib.Path(folder) / name).read_text())
            report, metrics = read("profile_export_aiperf.json"), read("server_metrics_export.json")["metrics"]
        self.assertEqual(report["request_count"]["avg"], REQUESTS)
        self.assertEqual((report["error_summary"], report["request_error_rate"]["avg"]), ([], 0))
        for name in ("output_sequence_length", "usage_completion_tokens"):
            self.assertEqual((report[name]["min"], report[name]["max"]), (OUTPUT_TOKENS, OUTPUT_TOKENS))
        self.assertEqual(report["time_to_first_token"]["count"], REQUESTS)
        # It also reads the router's metrics.
        self.assertIn("vllm:request_success", metrics)


if __name__ == "__main__":
    unittest.main()
