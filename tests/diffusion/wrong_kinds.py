"""Arguments of methods on pipelines that are of a wrong kind, and numbers of numpy and torch. Run by test_refused.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffusion_pipelines import loaded
from refusals import refused

from nnatomy.diffusion import Direction, head_ablation, word_maps


def main() -> None:
    model = loaded("stable_diffusion")
    SMALL: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16}

    def edited(factor: Any) -> Any:
        seed = torch.Generator().manual_seed(0)
        made = model.edit(lambda: direction.apply(model, factor))
        return made("a cat", generator=seed, output_type="latent", **SMALL).images

    direction = Direction({0: torch.ones(16)}, "layers_output")
    for factor in (np.float32(2), torch.tensor(2.0)):
        assert torch.equal(edited(factor), edited(2))
    for factor in ("2", True, torch.ones(2)):
        refused(lambda factor=factor: edited(factor), f"factor={factor!r}: it is a finite number.")
    maps: Any = word_maps
    refused(lambda: maps(model, "a cat", 5, **SMALL), "words=5: give a list of words of the prompt.")
    refused(lambda: maps(model, "a cat", [5], **SMALL), "words=[5]: give a list of words of the prompt.")
    for seed in ("a", 1.5, None):
        refused(
            lambda seed=seed: head_ablation(model, "a cat", seed=seed, **SMALL), f"seed={seed!r}: it is a whole number."
        )


if __name__ == "__main__":
    main()
