"""checkov on the rendered examples."""

import json
import os
import subprocess

import pytest

from examples import EXAMPLES, RENDERED

CHECKOV = os.environ.get("OVERFILL_CHECKOV")

# Findings that are meant, and why.
MEANT = {
    # The kubelet pulls an image once per digest or version; tags of releases never move.
    "CKV_K8S_15": "imagePullPolicy is not Always",
    # Digests of images exist only after a release. The values `digest` take them.
    "CKV_K8S_43": "an image without digest",
    # A limit of CPU slows inference down at random; requests share the CPU fairly.
    "CKV_K8S_11": "no limit of CPU",
    # API keys reach `helm test` through a variable, as the command line tool reads them.
    "CKV_K8S_35": "a secret in a variable",
    # A node with RDMA pins memory. Only pools that ask for it get the capability.
    "CKV_K8S_25": "the capability IPC_LOCK",
    # The pod of helm test, and the download, need no probes.
    "CKV_K8S_8": "no liveness probe",
    "CKV_K8S_9": "no readiness probe",
}


@pytest.mark.skipif(not CHECKOV, reason="OVERFILL_CHECKOV does not name the program checkov")
def test_checkov_finds_nothing_new():
    files = [argument for example in EXAMPLES for argument in ("-f", RENDERED / example.name)]
    result = subprocess.run(
        [CHECKOV, "--framework", "kubernetes", "--output", "json", "--quiet", "--compact", *files],
        capture_output=True,
        text=True,
        env={**os.environ, "LOG_LEVEL": "ERROR"},
    )
    report = json.loads(result.stdout)
    summary = report["summary"]
    assert summary["passed"] > 1000 and summary["parsing_errors"] == 0
    found = {
        (each["check_id"], each["check_name"], each["file_path"], each["resource"])
        for each in report["results"]["failed_checks"]
    }
    new = sorted(each for each in found if each[0] not in MEANT)
    assert new == []
    assert {each[0] for each in found} == set(MEANT), "a finding that is meant no longer occurs"
