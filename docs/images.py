"""Draws docs/images.png: what heads of a tiny random model attend to, over the picture that it sees.

Run it in the repository: `PYTHONPATH=tests python docs/images.py`. Attention of random weights means nothing; where it is drawn does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
import zoo
from image_families import pil, tokenizer, with_ids
from PIL import Image, ImageDraw

from nnatomy import StandardizedTransformer
from nnatomy.plots import over_picture, save

SIDE, PATCH = 96, 12


def scene() -> Image.Image:
    """A sun over a hill, wider than what the model sees."""
    sky = np.linspace((90, 150, 220), (250, 210, 160), SIDE)[:, None].repeat(SIDE * 3 // 2, 1)
    picture = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((84, 14, 108, 38), fill=(250, 230, 90))
    draw.polygon(((0, 96), (0, 70), (60, 48), (144, 78), (144, 96)), fill=(60, 120, 70))
    return picture


def main() -> None:
    """Write the picture."""
    hf = zoo.build_class(
        "LlavaForConditionalGeneration", "llava", vision_config={"image_size": SIDE, "patch_size": PATCH}
    )
    processor = transformers.LlavaProcessor(
        pil("clip", size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model = StandardizedTransformer(
        *with_ids(hf, processor, image_token_id="<image>", image_token_index="<image>")[:1], processor=processor
    )
    prompt = "user : <image> what is this ?"
    (photo,) = model.image_tokens(prompt, images=scene())
    with torch.no_grad(), model.trace(prompt, images=scene()):
        patterns = [model.attention_probabilities[i][0, :, -1] for i in (0, 2)]
    seen = {
        f"L{i}H{head}": photo.arranged(one)
        for i, layer in zip((0, 2), patterns, strict=True)
        for head, one in enumerate(layer)
    }
    assert photo.picture is not None
    figure = over_picture(
        photo.picture,
        dict([*seen.items()][:7]),
        title=f"From the last position of {prompt!r}",
        value_name="probability",
    )
    save(figure, Path(__file__).with_name("images.png"))


if __name__ == "__main__":
    main()
