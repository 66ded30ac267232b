"""`promtool` on the rule file: it is valid, and each alert fires for its cause, after its time, and for nothing else."""

import subprocess

import pytest
import yaml

import rules
from cases import CASES, CHANGE, LOOK, series

RULES = "rules.yaml"


def promtool(folder, tests):
    """Runs tests, each a pair of series and {query: samples} at the time LOOK."""
    (folder / RULES).write_text(rules.in_release(rules.FILE.read_text()))
    document = {
        "rule_files": [RULES],
        "evaluation_interval": "1m",
        "tests": [
            {"interval": "1m", "input_series": given, "promql_expr_test": expected} for given, expected in tests
        ],
    }
    (folder / "tests.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", "tests.yaml"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def firing(alert, minute=LOOK, *, labels=None, severity=None):
    """Which series of an alert fire at a minute: one with these labels, or none."""
    name = f'ALERTS{{alertname="{alert}",alertstate="firing"' + (f',severity="{severity}"' if severity else "") + "}"
    samples = []
    if labels is not None:
        labels = {"alertname": alert, "alertstate": "firing", "severity": severity, "namespace": rules.NAMESPACE,
                  "release": rules.RELEASE, **labels}
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        samples = [{"labels": f"ALERTS{{{text}}}", "value": 1}]
    return {"expr": name, "eval_time": f"{minute}m", "exp_samples": samples}


def test_the_file_is_valid():
    subprocess.run(["promtool", "check", "rules", rules.FILE], check=True)


def test_no_alert_is_active_while_all_is_well(tmp_path):
    promtool(tmp_path, [(series({}), [{"expr": "ALERTS", "eval_time": f"{LOOK}m", "exp_samples": []}])])


def test_every_alert_has_a_case():
    assert {case.alert for case in CASES} == rules.alerts()
    severities = {(rule["alert"], rule["labels"]["severity"]) for rule in rules.rules() if "alert" in rule}
    assert {(case.alert, case.severity) for case in CASES} == severities


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}-{case.severity}")
def test_it_fires_for_its_cause_only(case, tmp_path):
    (rule,) = [rule for rule in rules.rules() if rule.get("alert") == case.alert and rule["labels"]["severity"] == case.severity]
    fires = [firing(case.alert, labels=case.labels, severity=case.severity)]
    if "for" in rule:
        # Not at once.
        fires.append(firing(case.alert, CHANGE if case.severity == "critical" or "Late" not in case.alert else 10, severity=case.severity))
    promtool(tmp_path, [(series(case.fires), fires), (series(case.quiet), [firing(case.alert, severity=case.severity)])])


def test_other_releases_fire_nothing(tmp_path):
    """The same faults under another name."""
    for case in CASES:
        for each in (given := series(case.fires)):
            each["series"] = each["series"].replace(f'release="{rules.RELEASE}"', 'release="green"')
        # A release without any series has no router.
        expected = {"expr": 'ALERTS{alertname!="OverfillNoRouter"}', "eval_time": f"{LOOK}m", "exp_samples": []}
        promtool(tmp_path, [(given, [expected])])
