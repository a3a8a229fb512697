"""A process that serves the models in the folders that it is told of, each at an address of its own: for `on_a_server`."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import torch
import transformers
import uvicorn

from nnatomy import StandardizedTransformer
from nnatomy.serve.app import Server

APPLICATIONS: dict[str, Any] = {}


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Hand on what is for http://HOST:PORT/NUMBER/... to the model of that number."""
    _, number, *rest = scope["path"].split("/")
    path = "/" + "/".join(rest)
    await APPLICATIONS[number]({**scope, "path": path, "raw_path": path.encode(), "root_path": ""}, receive, send)


def load(told: dict[str, Any]) -> Server:
    kind = getattr(transformers, told["class"])
    options = {"attn_implementation": told["attention"], "dtype": getattr(torch, told["dtype"])}
    model = kind.from_pretrained(told["folder"], **options).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(told["folder"]) if told["tokenizer"] else None
    return Server({told["folder"]: StandardizedTransformer(model, tokenizer, validate=told["validate"])})


def main() -> None:
    port = int(sys.argv[1])
    config = uvicorn.Config(
        application,
        port=port,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=1 << 28,
        ws_per_message_deflate=False,
        lifespan="off",
    )
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            number = str(len(APPLICATIONS))
            APPLICATIONS[number] = load(json.loads(line)).application
            answer: dict[str, Any] = {"number": number}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
