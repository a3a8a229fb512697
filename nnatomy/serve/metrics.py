"""The status as text for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats."""

from __future__ import annotations

from typing import Any

#: By name: its type, what it is, and its key in the status of a model.
_OF_MODELS = {
    "nnatomy_sessions": ("gauge", "Sessions that are open.", "sessions"),
    "nnatomy_waiting_frames": ("gauge", "Frames that wait for their turn, or are carried out.", "waiting"),
    "nnatomy_frames_total": ("counter", "Frames that have been carried out.", "frames"),
    "nnatomy_compute_seconds_total": ("counter", "Seconds of computing.", "seconds"),
    "nnatomy_held_bytes": ("gauge", "Bytes of the tensors that sessions hold.", "held_bytes"),
}
#: The same of sessions, which admins are told.
_OF_SESSIONS = {
    "nnatomy_session_compute_seconds": ("gauge", "Seconds of computing of an open session.", "computed"),
    "nnatomy_session_held_bytes": ("gauge", "Bytes of the tensors of an open session.", "held_bytes"),
    "nnatomy_session_idle_seconds": ("gauge", "Seconds since the last frame of an open session.", "idle"),
}


def metrics(status: dict[str, Any]) -> str:
    """The text, of what a status tells."""
    lines = []
    for name, (kind, what, key) in _OF_MODELS.items():
        lines += _metric(name, kind, what, [({"model": one["name"]}, one[key]) for one in status["models"]])
    refused = [({"kind": kind}, count) for kind, count in sorted(status["refused"].items())]
    lines += _metric("nnatomy_refused_total", "counter", "Clients and commands that have been refused.", refused)
    for name, (kind, what, key) in _OF_SESSIONS.items() if "open" in status else ():
        each = [({label: one[label] for label in ("model", "number", "key")}, one[key]) for one in status["open"]]
        lines += _metric(name, kind, what, each)
    return "".join(f"{line}\n" for line in lines)


def _metric(name: str, kind: str, what: str, values: list[tuple[dict[str, Any], float]]) -> list[str]:
    lines = [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
    for labels, value in values:
        written = ",".join(f'{label}="{_escaped(str(one))}"' for label, one in labels.items())
        lines.append(f"{name}{{{written}}} {value}")
    return lines


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
