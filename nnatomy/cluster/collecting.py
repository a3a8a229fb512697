"""Collecting activations by many workers: actors of Ray Data, each with the model, which write shards into the same folder.

A worker writes a shard whole, and beside it a note that says what it is. Who collects puts the shards into the index in their order,
and takes their notes away. So a worker that is killed loses the shard that it was at, which Ray has another one do; and who collects
may be killed at any moment: the same call, by whatever engine, finds the shards of the index, and by Ray those with a note, too.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from nnatomy.cluster.package import cluster, load_ray
from nnatomy.errors import InputError, NnatomyError, RemoteError
from nnatomy.methods.activation_store import StoreWriter, described, shard_bytes, write_whole
from nnatomy.methods.points import accessor_of
from nnatomy.methods.reading import Reader, Selection
from nnatomy.methods.tokens import Tokens
from nnatomy.standardized import StandardizedTransformer

#: How often a shard is tried again whose worker has died: it may be the shard that kills them.
_TRIES = 3
#: How the files end that workers write at.
_PART = ".worker"


def collect(
    writer: StoreWriter, windows: Iterable[list[Selection]], reader: Reader, workers: int, done: Callable[[int], Any]
) -> None:
    """Write the shards that are not there yet.

    Args:
        windows: the prompts of each shard.
        done: is told how many more prompts are.

    Raises:
        InputError: for a model with edits, which are of this process.
        RemoteError: if a worker cannot do its part; what has been done stays.
    """
    if reader.model.edits:
        raise InputError(
            "The model has edits, which are of this process: collect without engine='ray', or without them."
        )
    notes = Notes(writer)
    left = []
    for number, window in enumerate(windows):
        if writer.has_next(contents_of(window)):
            done(len(window))
        elif (note := notes.read(number, contents_of(window))) is not None:
            notes.found[number] = note
            done(len(window))
        else:
            left.append({"number": number, "prompts": json.dumps([_plain(one) for one in window])})
    notes.put()
    if not left:
        return
    writer.folder.mkdir(parents=True, exist_ok=True)
    try:
        with cluster(workers):
            for number, note, count in _shards(left, _Told(writer, reader, notes.settings), workers):
                notes.found[number] = note
                notes.put()
                done(count)
    except WorkerError as error:
        raise _told(error.reason, writer) from None
    for part in writer.folder.glob(f"*{_PART}"):  # of those that were killed
        part.unlink(missing_ok=True)


def contents_of(window: Iterable[Selection]) -> list[tuple[list[int], list[int]]]:
    """What a shard is of, as the index tells it."""
    return [(one.tokens.key, one.positions) for one in window]


class WorkerError(Exception):
    """What Ray has raised."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


class Notes:
    """What workers have written beside their shards, until the index has it.

    Attributes:
        found: what is not in the index yet, by the shard's number.
        settings: a hash of what is collected, of which model: a note of other settings is none.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self.found: dict[int, dict[str, Any]] = {}
        self.settings = sha256(json.dumps(writer.index["settings"], sort_keys=True).encode()).hexdigest()

    def read(self, number: int, contents: Any) -> dict[str, Any] | None:
        """That of a shard which is there whole, and of these contents."""
        path = note_of(self._writer.folder, number)
        try:
            note = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        same = note.pop("settings", None) == self.settings and note == described(number, contents)
        return note if same and (self._writer.folder / note["file"]).exists() else None

    def put(self) -> None:
        """Put those into the index whose turn it is."""
        ready: list[dict[str, Any]] = []
        first = len(self._writer.index["shards"])
        while (number := first + len(ready)) in self.found:
            ready.append(self.found.pop(number))
        if ready:
            self._writer.note(ready)
            for i in range(len(ready)):
                note_of(self._writer.folder, first + i).unlink(missing_ok=True)


def note_of(folder: Path, number: int) -> Path:
    """Where the note of a shard is."""
    return folder / f"{number:06}.json"


class _Told:
    """What a worker needs to know: the model, without the names' views of it, and what is wanted."""

    def __init__(self, writer: StoreWriter, reader: Reader, settings: str) -> None:
        saved = io.BytesIO()
        torch.save((reader.model.hf_model, reader.model.tokenizer), saved)
        self.model, self.settings, self.folder = (
            load_ray().put(saved.getvalue()),
            settings,
            str(writer.folder.absolute()),
        )
        self.arch_config = reader.model._options[1]
        self.cuda = reader.model.device.type == "cuda"
        self.wanted = [(accessor.name, list(layers)) for accessor, layers in reader.wanted]
        self.batch_size, self.dtype, self.device = reader.batch_size, reader.dtype, str(reader.device)
        self.threads, self.one_row_each = torch.get_num_threads(), writer.index["one row each"]
        self.precision = torch.get_float32_matmul_precision()


class Worker:
    """Reads shards of prompts, and writes them: called by Ray Data, in a process of its own."""

    def __init__(self, told: Any) -> None:
        torch.set_num_threads(told.threads)
        torch.set_float32_matmul_precision(told.precision)
        saved = io.BytesIO(load_ray().get(told.model))
        # What the process that collects has saved: its own model, no file of somebody else's.
        hf_model, tokenizer = torch.load(saved, map_location="cuda" if told.cuda else "cpu", weights_only=False)
        model = StandardizedTransformer(hf_model, tokenizer, arch_config=told.arch_config, validate=False)
        wanted = [(accessor_of(model, name), layers) for name, layers in told.wanted]
        self._reader = Reader(model, wanted, told.batch_size, told.dtype, told.device)
        self._told, self._folder = told, Path(told.folder)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"number": [], "note": [], "count": []}
        for number, prompts in zip(batch["number"], batch["prompts"], strict=True):
            window = [Selection(Tokens(*one[:3]), one[3]) for one in json.loads(str(prompts))]
            note = described(int(number), contents_of(window))
            # One that Ray takes for dead may write still, beside the one that has its shard now: each has a file of its own.
            ending = f"{secrets.token_hex(4)}{_PART}"
            write_whole(self._folder / note["file"], shard_bytes(self._reader.read(window, lambda _: None)), ending)
            whole = json.dumps({**note, "settings": self._told.settings}).encode()
            write_whole(note_of(self._folder, int(number)), whole, ending)
            found["number"].append(int(number))
            found["note"].append(json.dumps(note))
            found["count"].append(len(window))
        return found


def _shards(left: list[dict[str, Any]], told: Any, workers: int) -> Iterator[tuple[int, dict[str, Any], int]]:
    import ray.data as data

    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    with data.DataContext.current(context):
        rows = data.from_items(left, override_num_blocks=len(left)).map_batches(
            Worker,
            fn_constructor_args=[told],
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(workers, len(left)), max_tasks_in_flight_per_actor=2),
            num_cpus=1,
            num_gpus=1 if told.cuda else 0,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": _TRIES},
        )
        try:
            for row in rows.iter_rows():
                yield int(row["number"]), json.loads(row["note"]), int(row["count"])
        except Exception as error:  # noqa: BLE001 - what a worker has raised is of any kind
            raise WorkerError(error) from None


def _told(error: BaseException, writer: StoreWriter) -> BaseException:
    """What a worker has raised, as it would have been raised here."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.errno is not None:
            return writer.failed(each, each.filename or "a shard")
        if isinstance(each, NnatomyError):
            return each
        each = getattr(each, "cause", None) or each.__cause__
    return RemoteError(f"A worker could not do its part; the same call goes on from what is done. {error}")


def _plain(one: Selection) -> list[Any]:
    return [one.tokens.ids, one.tokens.decoder, one.tokens.of_encoder, one.positions]
