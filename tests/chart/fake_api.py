"""An API server that holds Deployments, for templates that look them up. Of other kinds it knows only the names."""

import contextlib
import http.server
import json
import threading

KINDS = {
    "v1": ["Service", "ServiceAccount", "Pod", "ConfigMap", "Secret"],
    "apps/v1": ["Deployment", "StatefulSet"],
    "autoscaling/v2": ["HorizontalPodAutoscaler"],
    "keda.sh/v1alpha1": ["ScaledObject"],
    "monitoring.coreos.com/v1": ["PrometheusRule"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "policy/v1": ["PodDisruptionBudget"],
}


def plural(kind):
    return kind.lower().replace("policy", "policie") + "s"


def discovery():
    """Path: what the API server says about its kinds there."""
    answers = {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.2"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
    }
    groups = []
    for version, kinds in KINDS.items():
        answers["/api/v1" if version == "v1" else f"/apis/{version}"] = {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": version,
            "resources": [
                {
                    "name": plural(kind),
                    "singularName": kind.lower(),
                    "kind": kind,
                    "namespaced": True,
                    "verbs": ["get", "list", "create", "patch"],
                }
                for kind in kinds
            ],
        }
        if version != "v1":
            group, number = version.split("/")
            entry = {"groupVersion": version, "version": number}
            groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
    answers["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return answers


@contextlib.contextmanager
def serve(deployments, folder):
    """Serves Deployments, by name. Gives the path of a kubeconfig."""
    known = discovery()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.split("?")[0]
            name = path.rsplit("/", 1)[-1]
            body = known.get(path)
            if "/deployments/" in path:
                body = deployments.get(name)
            code = 200 if body else 404
            data = json.dumps(
                body or {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            ).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    try:
        yield kubeconfig
    finally:
        server.shutdown()


def fields(*names):
    """`fieldsV1` of `managedFields` with fields of `spec`."""
    return {"f:spec": {f"f:{name}": {} for name in names}}


def deployment(name, replicas, managed, annotations=()):
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": "overfill",
            # What Helm looks for before it takes an object for its own.
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {
                "meta.helm.sh/release-name": "overfill",
                "meta.helm.sh/release-namespace": "overfill",
                **dict(annotations),
            },
            "managedFields": managed,
        },
        "spec": {"replicas": replicas},
    }


def manager(name, operation, *names, subresource=None):
    entry = {"manager": name, "operation": operation, "apiVersion": "apps/v1", "fieldsV1": fields(*names)}
    return {**entry, "subresource": subresource} if subresource else entry
