"""Collecting by workers of Ray: the store of one process, bit for bit, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster_processes import kill, left_of, started_by

from nnatomy.cluster.collecting import Notes, _told, note_of
from nnatomy.errors import InputError, RemoteError
from nnatomy.methods import collect_activations
from nnatomy.methods.activation_store import StoreWriter, described

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("collecting_by_ray.py")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        "KILLED_ONCE": str(folder.with_name("killed")),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    with folder.with_name("log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *options], env=environment, stderr=log, text=True
        )


def test_workers_and_the_process_that_collects_are_killed(tmp_path: Path) -> None:
    """A worker in the middle of a write, whose shard another one does; then all, and what was done is not done again."""
    folder = tmp_path / "store"
    process = start(folder, "slow")
    began = time.monotonic()
    try:
        while not (folder / "000004.safetensors").exists() or len(done := list(folder.glob("*.safetensors"))) < 8:
            assert process.poll() is None, folder.with_name("log").read_text()
            assert time.monotonic() - began < 240, folder.with_name("log").read_text()
            time.sleep(0.05)
        assert folder.with_name("killed").exists()
        all_of_them = started_by(process.pid)
        kill(process.pid)
        process.wait(10)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    done = sorted(folder.glob("*.safetensors"))
    assert len(done) < 20
    known = {one.name for one in done if one.name in (folder / "index.json").read_text()}
    known |= {one.name for one in done if note_of(folder, int(one.stem)).exists()}
    assert len(known) >= 7  # all but those whose worker was killed between the two files
    written = {name: (folder / name).stat().st_mtime_ns for name in known}
    again = start(folder)
    left: dict[int, str] = {}
    while again.poll() is None:
        assert time.monotonic() - began < 480
        left |= started_by(again.pid)
        time.sleep(0.2)
    assert again.returncode == 0, folder.with_name("log").read_text()
    assert not left_of(all_of_them | left, 120)
    assert {name: (folder / name).stat().st_mtime_ns for name in known} == written
    whole = folder.with_name("store-whole")
    names = sorted(one.name for one in whole.iterdir())
    assert sorted(one.name for one in folder.iterdir()) == names
    assert len(names) == 21
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


# Without Ray.


def writer(folder: Path, **settings: Any) -> StoreWriter:
    return StoreWriter(folder, {"dtype": "None", **settings}, one_row_each=False)


def test_notes_of_shards(tmp_path: Path) -> None:
    """One counts if it is of the same settings and prompts, and its shard is there; the index has them in their order."""
    contents = [([1, 2], [0]), ([3], [0])]
    notes = Notes(writer(tmp_path))
    for number in (0, 1):
        note_of(tmp_path, number).write_text(json.dumps({**described(number, contents), "settings": notes.settings}))
    assert notes.read(1, contents) is None  # no shard
    (tmp_path / "000001.safetensors").touch()
    assert notes.read(1, [([1, 2], [1]), ([3], [0])]) is None
    assert Notes(writer(tmp_path, other=1)).read(1, contents) is None
    found = notes.read(1, contents)
    assert found == described(1, contents)
    notes.found[1] = found
    notes.put()
    assert not (tmp_path / "index.json").exists()
    notes.found[0] = described(0, contents)
    notes.put()
    index = json.loads((tmp_path / "index.json").read_text())
    assert [one["file"] for one in index["shards"]] == ["000000.safetensors", "000001.safetensors"]
    assert not list(tmp_path.glob("00000?.json"))
    note_of(tmp_path, 2).write_text("{half")
    assert notes.read(2, contents) is None


def test_what_a_worker_raises(tmp_path: Path) -> None:
    full = RuntimeError("of Ray")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device", "000003.safetensors")
    told = _told(full, writer(tmp_path))
    assert isinstance(told, OSError)
    assert "No space left on device, writing 000003.safetensors. The activations of the first 0 prompts" in str(told)
    assert isinstance(_told(RuntimeError("an actor died"), writer(tmp_path)), RemoteError)


def test_what_is_asked_for(tmp_path: Path) -> None:
    from nnatomy import StandardizedTransformer

    model = StandardizedTransformer("demo:gpt2")
    with pytest.raises(InputError, match="for a folder"):
        collect_activations(model, ["a"], engine="ray")  # type: ignore[call-overload]
    edited = model.edit(lambda: None)
    with pytest.raises(InputError, match="edits, which are of this process"):
        collect_activations(edited, ["a"], engine="ray", folder=tmp_path, progress=False)
