"""What is run on Ray Serve, as its config file has it: plain data, from the same builders that `nnatomy serve --ray` uses."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnatomy.errors import InputError
from nnatomy.serve.keys import Keys, check_address
from nnatomy.serve.limits import Limits

#: The application at `/`, which tells clients where their model is.
FRONT = "nnatomy"
#: What a replica answers beside its sessions, at once: what it tells of itself, and that it is full.
_TOLD = 8


@dataclass(frozen=True)
class Cluster:
    """What is to run.

    Attributes:
        models: their names, each as `nnatomy serve` takes it.
        replicas: of each model; or (least, most), between which Ray chooses by the number of sessions.
        host, port: where each node listens.
        key_file: that of the keys, at the same place on each node.
        limits: those that are not the default.
        queue: how many requests wait at each node, where all replicas have as many as they take. A replica that has all its
            sessions answers, and refuses one more, so that the queue is short. Past it Ray refuses by itself: 503 to HTTP, and 500
            to a WebSocket, as it has no other answer to that.
        retry_after: how many seconds these are told to wait.
        drain: how many seconds the sessions of a replica that is to end have still.
        cpus, gpus: of a replica.
        load: how models are loaded: dtype, device, device_map, offload_folder, trust_remote_code.
    """

    models: Sequence[str]
    replicas: int | tuple[int, int] = 1
    host: str = "127.0.0.1"
    port: int = 8765
    key_file: str | None = None
    limits: Mapping[str, float | int] = field(default_factory=dict)
    queue: int = 1000
    retry_after: int = 10
    drain: float | int = 60
    cpus: float | int = 1
    gpus: float | int = 0
    load: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("A server needs a model.")
        least, most = self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)
        if not 1 <= least <= most:
            raise InputError(f"There are {least} to {most} replicas to be: give 1 at least, and not fewer at most.")
        names = routes(self.models)
        if len(set(names.values())) < len(self.models):
            raise InputError(f"{', '.join(self.models)}: some are called by the same address.")

    @property
    def sessions(self) -> int:
        """Of one replica, at once."""
        return int(self.limits.get("sessions", Limits.sessions))


def routes(models: Sequence[str]) -> dict[str, str]:
    """Where each model is: the path that its addresses begin with."""
    return {name: f"/{re.sub(r'[^A-Za-z0-9.:_-]+', '-', name).strip('-.')}" for name in models}


def check(address: str, key_file: str | None) -> Keys:
    """The keys that clients need. Raises InputError if others can reach that address and none are asked for."""
    keys = Keys() if key_file is None else Keys.read(Path(key_file))
    check_address(address, keys)
    return keys


def serve_config(cluster: Cluster) -> dict[str, Any]:
    """The config of Ray Serve (`serve deploy FILE`): an application for each model, and one in front of them."""
    shared: dict[str, Any] = {"host": cluster.host, "key_file": cluster.key_file}
    ongoing = cluster.sessions + _TOLD
    asked: dict[str, Any] = {"max_ongoing_requests": ongoing, "max_queued_requests": cluster.queue}
    asked["backpressure_config"] = {"status_code": 503, "retry_after_s": cluster.retry_after}
    asked["graceful_shutdown_timeout_s"] = cluster.drain
    if isinstance(cluster.replicas, tuple):
        least, most = cluster.replicas
        # Half of the sessions that a replica can have, so that there is room while another one loads its weights.
        target = max(1, cluster.sessions // 2)
        scale = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
        asked["autoscaling_config"] = scale
    else:
        asked["num_replicas"] = cluster.replicas
    asked["ray_actor_options"] = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus}
    paths = routes(cluster.models)
    applications = [
        {
            "name": path[1:],
            "route_prefix": path,
            "import_path": "nnatomy.cluster.serving:model",
            "args": dict[str, Any](model=name, load=dict(cluster.load), limits=dict(cluster.limits), **shared),
            "deployments": [{"name": "Model", **asked}],
        }
        for name, path in paths.items()
    ]
    front = {
        "name": FRONT,
        "route_prefix": "/",
        "import_path": "nnatomy.cluster.serving:front",
        "args": {"models": paths, **shared},
    }
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": cluster.host, "port": cluster.port},
        "applications": [*applications, front],
    }


def ray_service(
    cluster: Cluster,
    *,
    image: str,
    name: str = "nnatomy",
    workers: int = 2,
    memory: str = "8Gi",
    secret: str | None = None,
) -> dict[str, Any]:
    """A manifest for KubeRay (`kubectl apply -f FILE`): the config of Ray Serve, and the nodes to run it on.

    Args:
        image: one with nnatomy[cluster] and the models, or a way to them.
        workers: how many nodes beside the head.
        memory: of each.
        secret: the Kubernetes secret that has the key file under the name `keys`.
    """
    cpus = max(1, int(-(-cluster.cpus // 1)))
    most = cluster.replicas[1] if isinstance(cluster.replicas, tuple) else cluster.replicas
    limits = {"cpu": str(cpus * max(1, -(-most * len(cluster.models) // workers))), "memory": memory}
    if cluster.gpus:
        limits["nvidia.com/gpu"] = str(int(-(-cluster.gpus // 1)))
    mounts = {"volumeMounts": [{"name": "keys", "mountPath": "/etc/nnatomy", "readOnly": True}]} if secret else {}
    volumes = {"volumes": [{"name": "keys", "secret": {"secretName": secret}}]} if secret else {}
    environment = [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]

    def node(kind: str, ports: dict[str, int], size: dict[str, str]) -> dict[str, Any]:
        container = {
            "name": kind,
            "image": image,
            "env": environment,
            "ports": [{"name": one, "containerPort": number} for one, number in ports.items()],
            "resources": {"limits": size, "requests": size},
            **mounts,
        }
        return {"spec": {"containers": [container], **volumes}}

    ports = {"serve": cluster.port}
    head = {"gcs": 6379, "dashboard": 8265, "client": 10001, **ports}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            "serveConfigV2": as_yaml(serve_config(cluster)),
            "rayClusterConfig": {
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": node("ray-head", head, {"cpu": "2", "memory": "8Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "models",
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": workers,
                        "rayStartParams": {},
                        "template": node("ray-worker", ports, limits),
                    }
                ],
            },
        },
    }


def as_yaml(config: Mapping[str, Any]) -> str:
    """The text of a file."""
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Texts of several lines as such, and each part written out."""

        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return str(yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, width=120))
