"""A value of each setting that differs from its default, and the values with which it matters."""

import json

import schema_parts as parts

HUB = 'models=[{"name":"demo","source":{"hub":{"full":"a/b","size":"1Gi"}}}]'
KEDA = "nodes.autoscaling.enabled=true,monitoring.prometheus.serverAddress=http://p:9090"
HPA = "nodes.autoscaling.enabled=true,nodes.autoscaling.kind=hpa,monitoring.rules.enabled=true"
ETCD = "discovery.mode=etcd"
EXTERNAL = "discovery.mode=externalEtcd,discovery.externalEtcd.urls[0]=http://e:2379,discovery.externalEtcd.passwordSecretName=p"
DASHBOARDS = "monitoring.dashboards.enabled=true"

# Beginning of a path: values that switch its feature on. The longest beginning counts.
CONTEXT = {
    "nodes.autoscaling": KEDA,
    "nodes.autoscaling.kind": KEDA + ",monitoring.rules.enabled=true",
    "nodes.autoscaling.externalMetricName": HPA,
    "nodes.gpu.resource": "nodes.gpu.count=1,nodes.device=cuda:0",
    "nodes.gpu.count": "nodes.device=cuda:0",
    "nodes.rdma": "nodes.rdma.count=1",
    "nodes.rdma.count": "",
    "nodes.sharedMemory.sizeLimit": "nodes.sharedMemory.enabled=true",
    "nodes.otherRole.topologyKey": "nodes.otherRole.placement=together",
    "router.autoscaling": "router.autoscaling.enabled=true",
    "router.service.loadBalancer": "router.service.type=LoadBalancer",
    "router.apiKeys.existingSecret": "tests.apiKeySecret.name=t",
    "router.apiKeys.existingSecretKey": "router.apiKeys.existingSecret=s,tests.apiKeySecret.name=t",
    "router.serveTls.mode": "router.serveTls.secretName=s,router.serveTls.certManager.issuerRef.name=i",
    "router.serveTls": "router.serveTls.mode=secret,router.serveTls.secretName=s",
    "router.serveTls.certManager": "router.serveTls.mode=certManager,router.serveTls.certManager.issuerRef.name=i",
    "ingress.http": "ingress.http.enabled=true,ingress.http.hosts[0].host=h",
    "ingress.grpc": "ingress.grpc.enabled=true,ingress.grpc.hosts[0].host=h",
    "gateway.httpRoute": "gateway.httpRoute.enabled=true,gateway.httpRoute.parentRefs[0].name=g",
    "gateway.grpcRoute": "gateway.grpcRoute.enabled=true,gateway.grpcRoute.parentRefs[0].name=g",
    "discovery.etcdPrefix": ETCD,
    "discovery.etcdLeaseSeconds": ETCD,
    "discovery.mode": "discovery.externalEtcd.urls[0]=http://e:2379",
    "discovery.etcd": ETCD,
    "discovery.etcd.image.tag": ETCD + ",discovery.etcd.image.digest=",
    "discovery.externalEtcd": EXTERNAL,
    "discovery.externalEtcd.passwordSecret": EXTERNAL + ",discovery.externalEtcd.user=u",
    "discovery.externalEtcd.clientCertificate": EXTERNAL + ",discovery.externalEtcd.tlsSecretName=s",
    "tls.mode": "tls.secretName=s",
    "tls": "tls.mode=secret,tls.secretName=s",
    "tls.certManager": "tls.mode=certManager",
    "networkPolicy.otlpTo": "telemetry.otlpEndpoint=http://o:4317",
    "networkPolicy.externalEtcdTo": EXTERNAL,
    "networkPolicy.hub": HUB,
    "telemetry": "telemetry.otlpEndpoint=http://o:4317",
    "monitoring.prometheus": KEDA,
    "monitoring.prometheus.clusterAuthentication": KEDA + ",monitoring.prometheus.authenticationRef=a",
    "monitoring.podMonitor": "monitoring.podMonitor.enabled=true",
    "monitoring.serviceMonitor": "monitoring.serviceMonitor.enabled=true",
    "monitoring.rules": "monitoring.rules.enabled=true",
    "monitoring.dashboards": DASHBOARDS,
    "tests.apiKeySecret": "router.apiKeys.existingSecret=s,tests.apiKeySecret.name=t",
}

# Values where the schema allows more than it makes sense to try.
CHOICE = {
    "nodes.weights": "int8",
    "nodes.device": "cuda:0",
    "nodes.kvDtype": "bf16",
    "nodes.kvTransport": "tcp",
    "nodes.otherRole.placement": "together",
    "nodes.strategy.maxUnavailable": 1,
    "nodes.autoscaling.kind": "hpa",
    "nodes.autoscaling.fallbackReplicas": 1,
    "nodes.autoscaling.minReplicas": 2,
    "nodes.autoscaling.scaleDownStabilizationSeconds": 999,
    "nodes.terminationGracePeriodSeconds": 9999,
    "router.terminationGracePeriodSeconds": 9999,
    "router.service.type": "NodePort",
    "router.serveTls.mode": "secret",
    "router.autoscaling.minReplicas": 3,
    "discovery.mode": "externalEtcd",
    "discovery.etcd.replicas": 3,
    "tls.mode": "secret",
    "tls.certManager.duration": "24h",
    "telemetry.samplerRatio": 0.5,
    "telemetry.otlpEndpoint": "http://other:4317",
    "monitoring.prometheus.serverAddress": "http://other:9090",
    "monitoring.prometheus.triggerMetadata": {"authModes": "bearer"},
    "nodes.autoscaling.behavior": {"scaleDown": {"selectPolicy": "Min"}},
    "nodes.affinity": {"nodeAffinity": {}},
    "router.affinity": {"nodeAffinity": {}},
    "discovery.etcd.affinity": {"nodeAffinity": {}},
    "nodes.podSecurityContext": {"runAsUser": 7},
    "router.podSecurityContext": {"runAsUser": 7},
    "nodes.securityContext": {"privileged": False},
    "router.securityContext": {"privileged": False},
    "nodes.extraPodSpec": {"hostname": "h"},
    "router.extraPodSpec": {"hostname": "h"},
    "nodes.rdma.resource": "rdma/other",
    "network.listenHost": "[::]",
    "models": [{"name": "demo", "source": {"pvc": {"claimName": "c"}}}],
    "prefill.pools": [{"name": "other", "model": "demo"}],
    "decode.pools": [{"name": "other", "model": "demo"}],
    "prefill.defaults": {"kvPoolTokens": 32},
    "decode.defaults": {"kvPoolTokens": 32},
    "nodes.resourceClaims": [{"name": "a", "resourceClaimName": "b"}],
    "router.allowedOrigins": ["https://example.com"],
    "router.mode": ["demo=exact"],
    "router.toolCallParser": ["demo=hermes"],
    "router.reasoningParser": ["qwen3"],
    "router.apiKeys.keys": [{"name": "a", "key": "0123456789abcdef0"}],
    "global.imagePullSecrets": ["s"],
    "image.pullSecrets": ["s"],
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}],
    "discovery.externalEtcd.urls": ["http://other:2379"],
    "networkPolicy.dnsPorts": [1053],
    "networkPolicy.hubPorts": [3128],
    "tests.maxTokens": 3,
}


def context(path):
    """Arguments that switch a value's feature on. `--set` would win over a later `--set-json`, so all are of one kind."""
    found = [key for key in CONTEXT if path.startswith(key)]
    given = CONTEXT[max(found, key=len)] if found else ""
    if given == HUB:
        return ["--set-json", HUB]
    arguments = []
    for pair in given.split(",") if given else []:
        key, text = pair.split("=", 1)
        if key != path or text != "true":
            arguments += ["--set-json", f"{key}={text if text in ('true', '1') else json.dumps(text)}"]
    return arguments


def other(path, schema, default):
    """A valid value that differs from the default."""
    if path in CHOICE:
        return CHOICE[path]
    for each in schema.get("allOf", []):
        name = each["$ref"].rsplit("/", 1)[1]
        schema = {**schema, **parts.NAMED[name]}
    if "enum" in schema:
        return next(each for each in schema["enum"] if each and each != default)
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(default, bool):
        return not default
    if "integer" in kinds or "number" in kinds:
        if isinstance(default, str) or schema is parts.QUANTITY:
            return "7Gi"
        return max((default or 0) + 1, schema.get("minimum", 1)) if "exclusiveMaximum" not in schema else default / 2
    if "string" in kinds:
        pattern = schema.get("pattern", "")
        if "sha256" in pattern:
            return "sha256:" + "1" * 64
        return {"^[0-9]+(ms|s|m)$": "7s"}.get(pattern, "7Gi" if "KMGTPE" in pattern else "other")
    if "array" in kinds:
        item = schema.get("items", {})
        if item.get("type") == "string":
            return ["10.0.0.0/8"]
        if "secretName" in item.get("properties", {}):
            return [{"secretName": "other"}]
        named = {"name": "other", "value": "x"}
        return [
            named
            if "name" in item.get("required", [])
            else {"host": "other"}
            if "host" in item.get("properties", {})
            else {"key": "other"}
        ]
    # An issuer is a record; all else is free.
    return (
        {"kind": "ClusterIssuer", "name": "other"}
        if "group" in schema.get("properties", {})
        else {"limits": {"cpu": "7"}}
        if schema.get("properties")
        else {"other": "x"}
    )
