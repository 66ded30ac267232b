"""The committed files: dashboards are those of panels.py, and rules and dashboards keep releases apart."""

import json
import pathlib
import re

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import dashboards
import panels
import rules

DOCS = pathlib.Path(__file__).parents[2] / "docs"
LABELS = 'namespace="$namespace",release="$release"'
# Words in PromQL that are no metrics.
WORDS = {"sum", "max", "min", "avg", "count", "by", "on", "unless", "and", "or", "rate", "increase", "changes", "absent", "group_left",
         "histogram_quantile", "time"}


def test_dashboards_are_up_to_date():
    """`python tests/monitoring/dashboards.py` writes them."""
    for dashboard in panels.ALL:
        assert (dashboards.FOLDER / f"{dashboard.name}.json").read_text() == dashboards.text(dashboard)
    assert {path.stem for path in dashboards.FOLDER.glob("*.json")} == {dashboard.name for dashboard in panels.ALL}


@pytest.mark.parametrize("path", sorted(dashboards.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_grafana_knows_all_fields(path):
    """Grafana's own models keep every field that we write."""
    plugins.register_default_plugins()
    given = json.loads(path.read_text())
    read = json.loads(JSONEncoder(sort_keys=True, indent=None).encode(Dashboard.from_json(given)))
    lost = list(missing(given, read))
    assert not lost


def missing(given, read, path=""):
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            if value is not None:
                yield from missing(value, read.get(key), f"{path}/{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for index, pair in enumerate(zip(given, read)):
            yield from missing(*pair, f"{path}/{index}")
    elif given != read:
        yield f"{path}: {given!r} became {read!r}"


def test_dashboards_name_no_source_and_no_release():
    for dashboard in rules.dashboards():
        assert "uid" not in dashboard
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [each["name"] for each in dashboard["templating"]["list"]][:3] == ["datasource", "namespace", "release"]


def test_panels_do_not_overlap():
    for dashboard in rules.dashboards():
        cells = [
            (x, y)
            for panel in dashboard["panels"]
            for place in [panel["gridPos"]]
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_each_selector_is_of_one_release():
    queries = [target["expr"] for dashboard in rules.dashboards() for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [rule["expr"] for rule in rules.rules("$namespace", "$release")]
    for query in queries:
        assert all(LABELS in selector for selector in rules.selectors(query)), query
        # Without selectors, windows and label lists, only functions and numbers are left.
        rest = rules.SELECTOR.sub(" ", query)
        rest = re.sub(r"\[[^]]*\]( offset \d+h)?|(by|on) \([^)]*\)|0\.\d+", " ", rest)
        assert set(re.findall(r"[a-zA-Z_:][\w:]*", rest)) <= WORDS, query


def test_each_metric_is_documented():
    text = (DOCS / "metrics.md").read_text()
    queries = [target["expr"] for dashboard in rules.dashboards() for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [rule["expr"] for rule in rules.rules()]
    names = {name for query in queries for name in re.findall(r"\b(?:vllm:|overfill_)\w+", query)}
    for name in names - rules.recorded():
        assert name in text or re.sub("_(bucket|sum|count)$", "", name) in text, name


def test_each_alert_has_a_runbook_and_each_runbook_an_alert():
    headings = re.findall(r"^## (Overfill\w+)$", (DOCS / "runbooks.md").read_text(), re.MULTILINE)
    assert len(headings) == len(set(headings)) and set(headings) == rules.alerts()
    for rule in rules.rules():
        if "alert" in rule:
            assert rule["annotations"]["runbook_url"].endswith(f"/docs/runbooks.md#{rule['alert'].lower()}")
            assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_each_fault_has_alerts():
    """The table of faults in runbooks.md names alerts that exist, and every fault of reliability.md."""
    table = (DOCS / "runbooks.md").read_text().partition("## Faults")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(Overfill\w+)`", table)) <= rules.alerts()
    reliability = (DOCS / "reliability.md").read_text()
    rows = reliability.partition("| fault of the node |")[2].partition("\n\n")[0].splitlines()[2:]
    faults = [row.split("|")[1].strip() for row in rows]
    assert len(faults) > 4 and all(f"| {fault} |" in table for fault in faults), faults
