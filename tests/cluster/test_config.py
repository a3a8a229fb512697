"""The files: Ray Serve's config and KubeRay's manifest are what the builders make, and what Ray and Kubernetes take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from nnatomy.cli import main
from nnatomy.cluster.config import Cluster, as_yaml, ray_service, routes, serve_config
from nnatomy.cluster.front import together
from nnatomy.errors import InputError

DOCS = Path(__file__).parents[2] / "docs" / "cluster"
#: What the files of the docs are of.
EXAMPLE = Cluster(
    models=("Qwen/Qwen3-8B", "demo:llama"),
    replicas=(1, 4),
    host="0.0.0.0",
    port=8000,
    key_file="/etc/nnatomy/keys",
    gpus=1,
    cpus=4,
    load={"dtype": "bfloat16", "device": "cuda"},
)


def of_ray(config: dict[str, Any]) -> Any:
    """As Ray reads it, which warns about its own code when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema

        return ServeDeploySchema.model_validate(config)


def test_the_config_of_the_docs_is_the_builders() -> None:
    text = (DOCS / "serve.yaml").read_text()
    assert text == as_yaml(serve_config(EXAMPLE))
    assert yaml.safe_load(text) == serve_config(EXAMPLE)
    read = of_ray(yaml.safe_load(text))
    assert [one.route_prefix for one in read.applications] == ["/Qwen-Qwen3-8B", "/demo:llama", "/"]
    (model,) = read.applications[0].deployments
    assert (model.autoscaling_config["min_replicas"], model.autoscaling_config["max_replicas"]) == (1, 4)
    assert model.ray_actor_options.num_gpus == 1


def test_the_manifest_of_the_docs_is_the_builders() -> None:
    text = (DOCS / "rayservice.yaml").read_text()
    made = ray_service(EXAMPLE, image="REGISTRY/nnatomy:1", workers=8, memory="64Gi", secret="nnatomy-keys")
    assert text == as_yaml(made)
    read = yaml.safe_load(text)
    assert (read["apiVersion"], read["kind"]) == ("ray.io/v1", "RayService")
    assert yaml.safe_load(read["spec"]["serveConfigV2"]) == serve_config(EXAMPLE)
    for group in (
        read["spec"]["rayClusterConfig"]["headGroupSpec"],
        *read["spec"]["rayClusterConfig"]["workerGroupSpecs"],
    ):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        assert container["volumeMounts"][0]["mountPath"] == "/etc/nnatomy"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert read["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 8


def test_the_command_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    given = ["serve", "demo:llama", "demo:gpt2", "--ray", "--replicas", "2", "--max-tokens", "100"]
    assert main([*given, "--write-config", str(file)]) == 0
    read = yaml.safe_load(file.read_text())
    of_ray(read)
    assert [one["args"].get("limits") for one in read["applications"]] == [{"tokens": 100}, {"tokens": 100}, None]
    assert read["applications"][0]["deployments"][0]["num_replicas"] == 2
    assert main(["serve", "demo:gpt2", "--replicas", "2"]) == 2
    assert "are for --ray" in capsys.readouterr().err
    assert main([*given, "--host", "0.0.0.0", "--write-config", str(file)]) == 2
    assert "clients have to have a key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"models": ()}, "needs a model"),
        ({"models": ("a",), "replicas": 0}, "give 1 at least"),
        ({"models": ("a",), "replicas": (3, 2)}, "give 1 at least"),
        ({"models": ("a/b", "a-b")}, "called by the same address"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Cluster(**given)


def test_addresses() -> None:
    assert routes(["demo:gpt2", "/models/a b", "org/Model-1.5"]) == {
        "demo:gpt2": "/demo:gpt2",
        "/models/a b": "/models-a-b",
        "org/Model-1.5": "/org-Model-1.5",
    }


def test_what_replicas_tell_together() -> None:
    runs = {"running": 1, "kept": 2, "bytes": 3}
    one = {"name": "a", "sessions": 1, "waiting": 2, "frames": 3, "seconds": 0.5, "held_bytes": 4, "runs": runs}
    one |= {"hash": "x", "hash_now": "x"}
    told = [{"replica": "2"}, {"replica": "1"}]
    found = together([one, {**one, "hash_now": "changed"}], told)
    assert found["replicas"] == ["1", "2"]
    assert (found["sessions"], found["seconds"], found["runs"]) == (2, 1.0, {"running": 2, "kept": 4, "bytes": 6})
    assert found["hash_now"] == "changed"
