"""Schemas of values that values.yaml refers to by name (`@schema "name"`), above all of entries of lists."""

STRING = {"type": "string"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
OBJECT_NAME = {"type": "string", "pattern": "^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", "maxLength": 253}
SERVED = {"type": "string", "pattern": "^[^,\\s]+$", "maxLength": 200}
PATH = {"type": "string", "pattern": "^[^/].*$"}
QUANTITY = {"type": ["string", "number"], "pattern": "^[0-9.]+([eE][0-9]+|m|k|[KMGTPE]i?)?$"}
FREE = {"type": "object", "additionalProperties": True}
STRINGS = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}


def described(schema, description):
    return {**schema, "description": description}


def record(properties, required=(), **more):
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def list_of(item, **more):
    return {"type": "array", "items": item, **more}


def quantities():
    return {"type": "object", "additionalProperties": {**QUANTITY, "type": ["string", "number", "null"]}}


RESOURCES = record(
    {
        "requests": described(quantities(), "What a container is promised."),
        "limits": described(quantities(), "What a container may use at most."),
    }
)

HUB = record(
    {
        "full": described(STRING, "Hub id of the full model."),
        "decode": described(STRING, "Hub id of the decode model. Default: the full model."),
        "existingClaim": described(OBJECT_NAME, "Claim to download into. Default: the chart makes one."),
        "size": described(QUANTITY, "Size of the claim that the chart makes."),
        "storageClassName": described(STRING, "Its storage class. Default: the cluster's."),
        "accessModes": described(
            list_of({"enum": ["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"]}, minItems=1),
            "Its access modes. Default: ReadWriteMany. ReadWriteOnce suffices on one machine.",
        ),
        "keep": described({"type": "boolean"}, "Keep the claim when the release is uninstalled. Default: true."),
        "endpoint": described({"type": "string", "pattern": "^https?://.+$"}, "URL of the hub or of a mirror."),
        "tokenSecret": described(
            record({"name": OBJECT_NAME, "key": STRING}, ["name"]),
            "Secret with a token of the hub. Default key: token.",
        ),
        "backoffLimit": described({"type": "integer", "minimum": 0}, "Attempts of the download. Default: 10."),
        "resources": described(RESOURCES, "Requests and limits of the download."),
        "nodeSelector": described(STRINGS, "Labels of the machines that the download may run on."),
        "tolerations": described(list_of(FREE), "Taints that the download tolerates."),
        "extraEnv": described(
            list_of({**FREE, "required": ["name"]}), "Extra environment variables, for example HTTPS_PROXY."
        ),
    },
    ["full"],
    anyOf=[{"required": ["size"]}, {"required": ["existingClaim"]}],
)

SOURCE = record(
    {
        "builtin": described({"enum": ["demo"]}, "The demo pair, which is part of the images."),
        "pvc": described(
            record({"claimName": OBJECT_NAME, "subPath": PATH}, ["claimName"]), "A claim that holds both models."
        ),
        "hostPath": described(
            record({"path": {"type": "string", "pattern": "^/.+$"}}, ["path"]),
            "A folder of each machine. The *restricted* and *baseline* Pod Security Standards forbid it.",
        ),
        "image": described(
            record({"reference": STRING, "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]}}, ["reference"]),
            "An OCI image with both models, mounted as a volume. Kubernetes 1.31 or newer with the feature ImageVolume.",
        ),
        "hub": described(HUB, "Models of the hub. One Job downloads them into one claim, and nodes wait for it."),
    },
    minProperties=1,
    maxProperties=1,
)

MODEL = record(
    {
        "name": described(SERVED, "Name of the pair. Pools refer to it, and clients ask for it."),
        "fullName": described(SERVED, "Name under which the full model appears. Default: the name and `-full`."),
        "source": described(SOURCE, "Where both models are. Exactly one kind."),
        "fullPath": described(
            PATH, "Path of the full model in the source: a folder or a .gguf file. Default: the source."
        ),
        "decodePath": described(PATH, "Path of the decode model in the source. Default: the source."),
    },
    ["name", "source"],
)

CLAIM = record(
    {
        "name": described(NAME, "Name of the claim in the pod."),
        "spec": described(
            FREE,
            "`spec` of a ResourceClaim, in the API version of the cluster (`v1` from Kubernetes 1.34). The chart makes a template of it.",
        ),
        "resourceClaimName": described(OBJECT_NAME, "An existing ResourceClaim, shared by all pods."),
        "resourceClaimTemplateName": described(OBJECT_NAME, "An existing ResourceClaimTemplate."),
    },
    ["name"],
    oneOf=[{"required": [key]} for key in ("spec", "resourceClaimName", "resourceClaimTemplateName")],
)

API_KEY = record(
    {
        "name": described({"type": "string", "minLength": 1}, "Name of the tenant."),
        "key": described({"type": "string", "minLength": 16}, "The key."),
        "weight": described({"type": "number", "exclusiveMinimum": 0}, "Share of the capacity, relative to others."),
        "maxRequests": described({"type": "integer", "minimum": 1}, "Requests at a time."),
        "requestsPerMinute": described({"type": "integer", "minimum": 1}, "Requests per minute."),
    },
    ["name", "key"],
)

HOST = record(
    {
        "host": described(STRING, "Host name. Default: all."),
        "paths": described(
            list_of(
                record({"path": STRING, "pathType": {"enum": ["Prefix", "Exact", "ImplementationSpecific"]}}, ["path"])
            ),
            "Paths. Default: /.",
        ),
    }
)

ISSUER = record(
    {
        "name": described(STRING, "Name of the issuer."),
        "kind": described(STRING, "Default: Issuer."),
        "group": described(STRING, "Default: cert-manager.io."),
    }
)

# Name in `@schema "name"`: schema.
NAMED = {
    "strings": STRINGS,
    "free": FREE,
    "objects": list_of(FREE),
    "named": list_of({**FREE, "required": ["name"]}),
    "env": list_of({**FREE, "required": ["name"]}),
    "resources": RESOURCES,
    "quantity": QUANTITY,
    "tag": {"type": "string", "pattern": "^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$"},
    "digest": {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"},
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "intOrPercent": {"type": ["integer", "string"], "minimum": 0, "pattern": "^[0-9]+%$"},
    "issuerRef": ISSUER,
    "parentRefs": list_of({**FREE, "required": ["name"]}),
    "ingressHosts": list_of(HOST),
    "ingressTls": list_of(record({"hosts": list_of(STRING), "secretName": OBJECT_NAME})),
    "apiKeys": list_of(API_KEY),
    "resourceClaims": list_of(CLAIM),
    "models": list_of(MODEL),
}

# Settings of `nodes` that mean nothing to a decode node.
PREFILL_ONLY = ("maxBatchTokens", "stepTargetSeconds")


def pool(settings, role):
    """Schema of a pool: all settings of `nodes`, and what only a pool has."""
    properties = {
        "name": described(NAME, "Name of the pool, part of its objects' names."),
        "model": described(SERVED, "Name of an entry of `models`."),
    }
    if role == "decode":
        properties["servedName"] = described(SERVED, "Name for clients. Default: the model's. For several variants.")
        properties["modelPath"] = described(
            PATH, "Path of the decode model in the source. Default: the model's decodePath."
        )
        properties["variants"] = described(
            list_of(record({"servedName": SERVED, "modelPath": PATH}, ["servedName", "modelPath"])),
            "Further decode models that each node of the pool serves over the same KV. Each has a `servedName` and a `modelPath`.",
        )
    return record({**properties, **of_role(settings, role)}, ["name", "model"])


def of_role(settings, role):
    return {key: value for key, value in settings.items() if role == "prefill" or key not in PREFILL_ONLY}


# Entries of lists that README.md describes in tables of their own: value, schema.
TABLES = [
    ("models[]", MODEL),
    ("models[].source", SOURCE),
    ("models[].source.hub", HUB),
    ("nodes.resourceClaims[]", CLAIM),
    ("router.apiKeys.keys[]", API_KEY),
    ("ingress.http.hosts[]", HOST),
]
