"""Writes the Grafana dashboards of the chart from their description in panels.py.

python dashboards.py           writes helm/files/dashboards/*.json
"""

import json
import pathlib

import panels

FOLDER = pathlib.Path(__file__).parents[2] / "helm/files/dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
HEIGHTS = {"stat": 4, "timeseries": 8}


def text(dashboard):
    """The JSON file of a dashboard."""
    # No newline at the end: the chart would render an empty line of blanks.
    return json.dumps(document(dashboard), indent=1, ensure_ascii=False)


def document(dashboard):
    return {
        "id": None,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["overfill"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [
            {"type": "dashboards", "title": "Overfill", "tags": ["overfill"], "icon": "external link", "url": "", "tooltip": "",
             "asDropdown": False, "targetBlank": False, "includeVars": True, "keepTime": True},
        ],
        "annotations": {"list": []},
        "templating": {"list": [*releases(dashboard), *(variable(name, query) for name, query in dashboard.variables.items())]},
        "panels": list(grid(dashboard.rows)),
    }


def releases(dashboard):
    """Variables that choose the Prometheus and the release in it."""
    metric = "overfill_nodes" if dashboard.name == "cluster" else f'overfill_routers{{component="{dashboard.name}"}}'
    inner = metric.partition("{")[2].rstrip("}")
    known = metric.partition("{")[0] + "{" + ",".join(filter(None, ['namespace="$namespace"', inner])) + "}"
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0,
           "includeAll": False, "multi": False, "regex": "", "options": []}
    yield query_variable("namespace", f"label_values({metric}, namespace)")
    yield query_variable("release", f"label_values({known}, release)")


def variable(name, query):
    """A variable whose default is all values."""
    # `.*` also matches series without the label.
    return query_variable(name, query) | {"includeAll": True, "multi": True, "allValue": ".*",
                                          "current": {"text": ["All"], "value": ["$__all"]}}


def query_variable(name, query):
    return {"name": name, "label": name.capitalize(), "type": "query", "datasource": SOURCE,
            "query": {"query": query, "refId": name}, "refresh": 2, "sort": 1, "hide": 0, "includeAll": False, "multi": False,
            "regex": "", "options": []}


def grid(rows):
    """Panels with their places, and a heading above each row."""
    number, top = 0, 0
    for row in rows:
        number += 1
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [],
               "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1}}
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                top, left, height = top + height, 0, 0
            number += 1
            yield drawn(panel, number) | {"gridPos": {"x": left, "y": top, "w": panel.width, "h": HEIGHTS[panel.kind]}}
            left, height = left + panel.width, max(height, HEIGHTS[panel.kind])
        top += height


def drawn(panel, number):
    defaults = {"unit": panel.unit, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": query, "legendFormat": legend or "__auto", "range": True,
         "editorMode": "code"}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    options = {
        "stat": {"graphMode": "area", "colorMode": "value", "textMode": "auto", "justifyMode": "auto", "orientation": "auto",
                 "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}},
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                       "tooltip": {"mode": "multi", "sort": "desc"}},
    }[panel.kind]
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if panel.stacked else 5,
                              "showPoints": "never", "spanNulls": False, "stacking": stacking}
    return {"id": number, "type": panel.kind, "title": panel.title, "description": panel.about, "datasource": SOURCE,
            "targets": targets, "options": options, "fieldConfig": {"defaults": defaults, "overrides": []}}


def write():
    FOLDER.mkdir(exist_ok=True)
    for dashboard in panels.ALL:
        (FOLDER / f"{dashboard.name}.json").write_text(text(dashboard))


if __name__ == "__main__":
    write()
