"""The applications on Ray Serve, started from here and ended with this process."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from nnatomy.cluster.config import Cluster, check, serve_config
from nnatomy.cluster.package import cluster as ray_cluster
from nnatomy.cluster.package import load_serve
from nnatomy.cluster.serving import front_deployment, model_deployment
from nnatomy.errors import LoadError

_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def run(cluster: Cluster) -> None:
    """Serve until interrupted or ended: what `serve deploy` does with the config, and the end of it with this process.

    Without RAY_ADDRESS it is a cluster of this machine alone, which ends too. Once it answers, its address is written to the
    standard error.

    Raises:
        InputError: for an address that others can reach, where no key is asked for.
        LoadError: if a model does not load.
    """
    check(cluster.host, cluster.key_file)
    serve, config = load_serve(), serve_config(cluster)
    least = cluster.replicas[0] if isinstance(cluster.replicas, tuple) else cluster.replicas
    with ray_cluster(cluster.cpus * least * len(cluster.models)):
        try:
            options = config["http_options"]
            serve.start(proxy_location=config["proxy_location"], http_options=options, logging_config=_QUIET)
            try:
                serve.run_many([_target(serve, one) for one in config["applications"]])
            except RuntimeError as error:
                raise LoadError(f"The cluster has not come up: {error}") from error
            told = f"{', '.join(cluster.models)} at http://{cluster.host}:{cluster.port}, by Ray Serve"
            sys.stderr.write(f"nnatomy: {told}\n")
            over = threading.Event()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: over.set())
            over.wait()
        finally:
            serve.shutdown()


def _target(serve: Any, told: dict[str, Any]) -> Any:
    make = model_deployment if told["import_path"].endswith(":model") else front_deployment
    made = make(told["args"])
    for options in told.get("deployments", ()):
        made = made.options(**options)
    return serve.RunTarget(
        made.bind(told["args"]), name=told["name"], route_prefix=told["route_prefix"], logging_config=_QUIET
    )
