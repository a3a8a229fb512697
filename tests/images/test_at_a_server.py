"""Prompts with images on a model at a server: refused, with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_families import FAMILIES
from remote_server import Process

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotRemoteError
from nnatomy.methods import image_lens, logit_difference, picture_patching

PROMPT = "<image> what is this ?"
REFUSED = r"^pixel_values=\.\.\. of a remote model: a server runs forward passes of tokens, .* Load the model here, .* inputs_embeds="


def picture(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandardizedTransformer, Any]]:
    """A model here, and the same at a server."""
    hf, processor = FAMILIES["llava"]()
    folder: Path = tmp_path_factory.mktemp("llava")
    hf.save_pretrained(folder)  # type: ignore[operator]
    processor.tokenizer.save_pretrained(folder)
    server = Process(str(folder))
    try:
        remote: Any = StandardizedTransformer(folder, server=server.address)
        remote.processor = processor
        yield StandardizedTransformer(hf, processor=processor), remote
    finally:
        server.stop()


def test_what_reads_an_image_is_refused(both: Any) -> None:
    _, remote = both
    (photo,) = remote.image_tokens(PROMPT, images=picture(1))
    clean, corrupted = (remote.prepare(PROMPT, images=picture(seed)) for seed in (1, 2))
    metric = logit_difference("what", "is", remote)

    def read() -> None:
        with remote.trace(PROMPT, images=picture(1)):
            remote.image_embeddings

    for ask in (
        read,
        lambda: image_lens(remote, PROMPT, picture(1)),
        lambda: picture_patching(remote, clean, corrupted, image=photo, metric=metric, region=(2, 2), layers=[0]),
    ):
        with pytest.raises(NotRemoteError, match=REFUSED):
            ask()
    for name in ("image_lens", "picture_patching"):
        with pytest.raises(
            NotRemoteError, match=f"'{name}' is not run at a server: .* with a model that is loaded here"
        ):
            remote.server.run(name, prompt=PROMPT, images=[])


def test_what_an_image_has_become_in_the_stream_is_given(both: Any) -> None:
    """What the refusal names: an image read here goes on there."""
    local, remote = both
    with torch.no_grad():
        with local.trace(PROMPT, images=picture(1)):
            stream = local.layers_input[0]
            logits = local.logits
        with remote.trace(inputs_embeds=stream):
            there = remote.logits
    assert torch.equal(there.local(), logits)
