"""Ray itself, which is imported when it is used: that takes seconds, and nobody else needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nnatomy.errors import MissingPackageError

#: Of the shared memory of a cluster of this process's own, in bytes: what passes through it is small.
_STORE = 512 << 20


def load_ray() -> Any:
    """The package. It tells nobody that it is used. Raises MissingPackageError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError("This needs Ray: pip install 'nnatomy[cluster]'.") from error
    return ray


def load_serve() -> Any:
    """Ray Serve. Raises MissingPackageError."""
    load_ray()
    try:
        from ray import serve
    except ImportError as error:
        raise MissingPackageError("This needs Ray Serve: pip install 'nnatomy[cluster]'.") from error
    return serve


@contextmanager
def cluster(cpus: float | int = 0) -> Iterator[Any]:
    """Ray, connected to the cluster at RAY_ADDRESS; without one, to a cluster in processes of this machine, for this long.

    Args:
        cpus: a cluster made here has so many at least, by its own count.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    made = {}
    if address == "local":
        # Ray's agents end when all else is gone, after they have sought the head for so many seconds (by default a minute and more).
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
        # Ray kills a proxy that has not come up in so many seconds (by default 5, which a busy machine needs for its imports alone).
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        count = max(int(-(-cpus // 1)), os.cpu_count() or 1)
        made = {
            "num_cpus": count,
            "object_store_memory": _STORE,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **made)
    try:
        yield ray
    finally:
        ray.shutdown()
