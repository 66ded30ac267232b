"""values.yaml, its schema and its documentation: each value is checked, documented, and does something."""

import json

import jsonschema
import pytest

import generate
import probes
from examples import CHART, EXAMPLES

SCHEMA, ROWS = generate.schema_and_rows((CHART / "values.yaml").read_text())

# Not for the templates, only with a cluster at hand (test_replicas.py), or a limit of others (test_refusals.py).
SEEN_ELSEWHERE = {"enabled", "nodes.keepReplicas", "router.keepReplicas", "nodes.autoscaling.loadSeconds"}


@pytest.mark.parametrize("path", list(generate.generated()), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path):
    assert path.read_text() == generate.generated()[path], "run `cargo xtask chart generate`"


def test_a_value_without_a_comment_is_an_error():
    with pytest.raises(generate.Undocumented, match="b.c has no comment"):
        generate.schema_and_rows("# A.\na: 1\nb:\n  c: 2\n")


def closed(schema, path="", seen=()):
    """Objects with properties that accept unknown ones."""
    if isinstance(schema, list):
        return [fault for i, each in enumerate(schema) for fault in closed(each, f"{path}[{i}]", seen)]
    if not isinstance(schema, dict):
        return []
    faults = []
    if "properties" in schema and schema.get("additionalProperties") is not False:
        faults.append(path)
    for key, each in schema.items():
        faults += closed(each, f"{path}/{key}", seen)
    return faults


def test_schema_is_closed():
    # A parent chart's globals are not this chart's.
    assert closed(SCHEMA) == ["/properties/global"]
    jsonschema.Draft7Validator.check_schema(SCHEMA)


def unknown_keys(values, path=()):
    """Every place where an unknown key may be put: the values with one more key each."""
    if isinstance(values, dict):
        yield path, {**values, "unknownKey": 1}
        for key, each in values.items():
            for where, changed in unknown_keys(each, (*path, key)):
                yield where, {**values, key: changed}
    if isinstance(values, list):
        for i, each in enumerate(values):
            for where, changed in unknown_keys(each, (*path, i)):
                yield where, [*values[:i], changed, *values[i + 1 :]]


# What Kubernetes or others define, where the chart does not judge.
FREE = {
    "commonLabels",
    "commonAnnotations",
    "labels",
    "annotations",
    "podLabels",
    "podAnnotations",
    "nodeSelector",
    "affinity",
    "tolerations",
    "topologySpreadConstraints",
    "podSecurityContext",
    "securityContext",
    "extraPodSpec",
    "behavior",
    "global",
    "resourceAttributes",
    "alertLabels",
    "spec",
    "parentRefs",
    "requests",
    "limits",
    "triggerMetadata",
    "clientsFrom",
    "metricsFrom",
    "otlpTo",
}


def test_unknown_keys_are_refused_at_every_level():
    import yaml

    validator = jsonschema.Draft7Validator(SCHEMA)
    files = [CHART / "values.yaml", *EXAMPLES]
    count = 0
    for file in files:
        values = yaml.safe_load(file.read_text())
        assert list(validator.iter_errors(values)) == [], file.name
        for path, changed in unknown_keys(values):
            if not FREE & set(path):
                assert list(validator.iter_errors(changed)), f"{file.name}: {path}"
                count += 1
    assert count > 150


def test_helm_refuses_what_the_schema_refuses(helm):
    for values in (
        '{"nope":1}',
        '{"nodes":{"gpu":{"nope":1}}}',
        '{"decode":{"pools":[{"name":"a","model":"demo","nope":1}]}}',
        '{"router":{"maxQueueSeconds":0}}',
        '{"decode":{"pools":[{"name":"A.b","model":"demo"}]}}',
        '{"models":[{"name":"demo","source":{}}]}',
        '{"models":[{"name":"demo","source":{"builtin":"demo","pvc":{"claimName":"c"}}}]}',
        '{"decode":{"defaults":{"maxBatchTokens":3}}}',
        '{"image":{"tag":1.1}}',
        '{"models":[{"name":"demo","source":{"hub":{"full":"a/b"}}}]}',
    ):
        result = helm.run(
            "template",
            "x",
            CHART,
            *sum((["--set-json", f"{k}={json.dumps(v)}"] for k, v in json.loads(values).items()), []),
            check=False,
        )
        assert result.returncode != 0 and "schema" in result.stderr, values


def leaf(path):
    schema = SCHEMA
    for key in path.split("."):
        schema = schema["properties"][key]
    return schema


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_value_does_something(helm4, row):
    """With its feature on, another value gives other output."""
    path, default = row[0], row[1]
    no_dashboards = path.startswith("monitoring.dashboards.") and not list((CHART / "files/dashboards").glob("*.json"))
    if path in SEEN_ELSEWHERE or no_dashboards:
        return
    context = probes.context(path)
    value = probes.other(path, leaf(path), default)
    before = helm4.text(*context)
    after = helm4.text(*context, "--set-json", f"{path}={json.dumps(value)}")
    if before == after:
        pytest.fail(f"{path}={value!r} changes nothing", pytrace=False)
