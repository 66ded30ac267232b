"""The rule file and the dashboards, as a release has them, and as tests read them."""

import json
import re

import yaml

from dashboards import FOLDER

FILE = FOLDER.parent / "rules.yaml"
NAMESPACE, RELEASE = "serving", "blue"
# A metric with labels. Names of metrics may contain a colon.
SELECTOR = re.compile(r"(?:[a-zA-Z_][a-zA-Z0-9_:]*)?\{[^{}]*\}")


def in_release(text, namespace=NAMESPACE, release=RELEASE):
    """Replaces the placeholders, as the chart does."""
    return text.replace("$namespace", namespace).replace("$release", release)


def rules(namespace=NAMESPACE, release=RELEASE):
    """All rules of a release."""
    return [rule for group in yaml.safe_load(in_release(FILE.read_text(), namespace, release))["groups"] for rule in group["rules"]]


def alerts():
    """Names of all alerts."""
    return {rule["alert"] for rule in rules() if "alert" in rule}


def recorded():
    """Names of all metrics that the rules record."""
    return {rule["record"] for rule in rules() if "record" in rule}


def dashboards():
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def queries(window, namespace=NAMESPACE, release=RELEASE):
    """Queries of all panels: (dashboard, panel, PromQL)."""
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield dashboard["title"], panel["title"], filled(target["expr"], window, namespace, release)


def filled(query, window="1m", namespace=NAMESPACE, release=RELEASE):
    """A query with values for Grafana's variables. `All` stands for `.*`."""
    query = in_release(query, namespace, release).replace("$__rate_interval", window)
    return query.replace("$model", ".*").replace("$pool", ".*")


def selectors(query):
    """The series that a query reads. Metrics without labels are no selectors: a test refuses them."""
    return SELECTOR.findall(query)
