"""Arguments of methods on pictures that are numpy's numbers, tensors, or of a wrong kind. Run by test_methods.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from image_families import FAMILIES
from refusals import refused

from nnatomy import StandardizedTransformer
from nnatomy.methods import image_lens, logit_difference, picture_patching


def main() -> None:
    hf, processor = FAMILIES["llava"]()
    model = StandardizedTransformer(hf, processor=processor)
    prompt = "<image> what is"
    picture, another = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    (photo,) = model.image_tokens(prompt, images=picture)
    clean, corrupted = (model.prepare(prompt, images=one) for one in (picture, another))
    metric = logit_difference("what", "is", model)

    def lens(**given: Any) -> Any:
        return image_lens(model, prompt, picture, **given)

    def patched(region: Any) -> Any:
        return picture_patching(
            model, clean, corrupted, image=photo, metric=metric, layers=[1], region=region, progress=False
        )

    plain = lens(words=["what", "is"])
    ids = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("what", "is")]
    for words in (torch.tensor(ids), np.array(ids), [np.int64(one) for one in ids]):
        found = lens(words=words, image=np.int64(0))
        assert found.words == ("what", "is")
        assert torch.equal(found.effect, plain.effect)
    values = torch.randn(2, 40)
    assert torch.equal(photo.arranged(values, axis=np.int64(1)), photo.arranged(values))  # type: ignore[arg-type]
    assert torch.equal(patched((np.int64(2), 2)).effect, patched((2, 2)).effect)

    refused(lambda: lens(image="0"), "image='0': the prompt has 1, 0 to 0.")
    refused(lambda: lens(image=1.0), "image=1.0: the prompt has 1")
    refused(lambda: lens(words=None), "words=None: give a list of them")
    refused(lambda: plain.plot("what", layers=2), "layers=2: give a list of their numbers.")
    refused(lambda: patched((2, 2)).plot(layers=1), "layers=1: give a list of their numbers.")
    refused(lambda: patched((2, 2.0)), "region=(2, 2.0): it is rows and columns of patches")


if __name__ == "__main__":
    main()
