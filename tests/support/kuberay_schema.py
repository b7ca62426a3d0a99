"""What the KubeRay files may say: the fields that they use, and no others, with their types.

Written by hand. The files were checked once against the whole CRDs of KubeRay
1.5.1 and 1.7.0 with unknown fields refused, and so was every field below, by name and type.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _fields(required: str = "", /, **properties: Schema) -> Schema:
    """A mapping with these keys alone."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT: Schema = {"type": "string", "minLength": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(Mi|Gi)?$"},
}
_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}

_CONTAINER = _fields(
    "name image resources securityContext",
    name=_TEXT,
    image=_TEXT,
    resources=_fields("limits requests", limits=_QUANTITIES, requests=_QUANTITIES),
    securityContext=_fields(
        allowPrivilegeEscalation=_FLAG, capabilities=_fields(drop=_list(_TEXT))
    ),
    volumeMounts=_list(_fields("name mountPath", name=_TEXT, mountPath=_TEXT)),
)
_POD_SECURITY = _fields(
    runAsNonRoot=_FLAG,
    runAsUser=_COUNT,
    runAsGroup=_COUNT,
    fsGroup=_COUNT,
    seccompProfile=_fields("type", type={"enum": ["RuntimeDefault", "Unconfined", "Localhost"]}),
)
_VOLUME = _fields(
    "name",
    name=_TEXT,
    emptyDir=_fields(medium={"enum": ["", "Memory"]}, sizeLimit=_TEXT),
    persistentVolumeClaim=_fields("claimName", claimName=_TEXT),
)
_POD = _fields(
    "spec",
    spec=_fields(
        "containers",
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
        terminationGracePeriodSeconds=_COUNT,
        securityContext=_POD_SECURITY,
        containers=_list(_CONTAINER),
        volumes=_list(_VOLUME),
    ),
)
_CLUSTER = _fields(
    "headGroupSpec",
    rayVersion=_TEXT,
    authOptions=_fields(mode={"enum": ["disabled", "token"]}),
    headGroupSpec=_fields(
        "template", serviceType={"enum": ["ClusterIP"]}, rayStartParams=_TEXTS, template=_POD
    ),
    workerGroupSpecs=_list(
        _fields(
            "groupName maxReplicas minReplicas template",
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            rayStartParams=_TEXTS,
            template=_POD,
        )
    ),
)
_JOB = _fields(
    "entrypoint rayClusterSpec",
    entrypoint=_TEXT,
    backoffLimit=_COUNT,
    activeDeadlineSeconds=_COUNT,
    shutdownAfterJobFinishes=_FLAG,
    ttlSecondsAfterFinished=_COUNT,
    submitterPodTemplate=_POD,
    rayClusterSpec=_CLUSTER,
)
SPECS = {"RayCluster": _CLUSTER, "RayJob": _JOB}


def resource(kind: str) -> Schema:
    """The schema of a whole file of this kind."""
    return _fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_fields("name", name=_TEXT),
        spec=SPECS[kind],
    )
