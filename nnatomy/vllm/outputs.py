"""What a generation of an engine elsewhere gives: the fields of vLLM's own `RequestOutput` that are data. (A client has no vLLM.)"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """Of one token that was probable: see `vllm.logprobs.Logprob`."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """What has been written behind a prompt: see `vllm.CompletionOutput`."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt, and what has been written behind it: see `vllm.RequestOutput`."""

    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool


def to_bytes(outputs: list[Any]) -> bytes:
    """vLLM's own outputs, as data."""
    return json.dumps([_told(one) for one in outputs]).encode()


def from_bytes(data: bytes) -> list[RequestOutput]:
    """What `to_bytes` was given."""
    return [_made(one) for one in json.loads(bytes(data))]


def _told(output: Any) -> dict[str, Any]:
    completions = [
        {
            **{
                key: getattr(one, key)
                for key in ("index", "text", "cumulative_logprob", "finish_reason", "stop_reason")
            },
            "token_ids": list(one.token_ids),
            "logprobs": _told_logprobs(one.logprobs),
        }
        for one in output.outputs
    ]
    return {
        **{key: getattr(output, key) for key in ("request_id", "prompt_token_ids", "finished")},
        "prompt_logprobs": _told_logprobs(output.prompt_logprobs),
        "outputs": completions,
    }


def _told_logprobs(found: Any) -> Any:
    if found is None:
        return None
    return [
        None if at is None else {token: [one.logprob, one.rank, one.decoded_token] for token, one in at.items()}
        for at in found
    ]


def _made(told: dict[str, Any]) -> RequestOutput:
    completions = [CompletionOutput(**{**one, "logprobs": _made_logprobs(one["logprobs"])}) for one in told["outputs"]]
    return RequestOutput(**{**told, "prompt_logprobs": _made_logprobs(told["prompt_logprobs"]), "outputs": completions})


def _made_logprobs(told: Any) -> Any:
    if told is None:
        return None
    return [None if at is None else {int(token): Logprob(*one) for token, one in at.items()} for at in told]
