"""Prompts with videos, on seven families with their own processors: against the model's own call, plain hooks, and what a changed
video changes.

`make videos` installs torchvision, which the processors need for videos, in a folder beside the environment, and runs this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import hooked
from torch import Tensor, nn
from video_families import FAMILIES, video

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

#: Where the vision encoder's layers are.
LAYERS = {
    "qwen2_vl": "model.visual.blocks",
    "qwen2_5_vl": "model.visual.blocks",
    "qwen3_vl": "model.visual.blocks",
    "glm4v": "model.visual.blocks",
    "llava_onevision": "model.vision_tower.encoder.layers",
    "llava_next_video": "model.vision_tower.encoder.layers",
    "internvl": "model.vision_tower.encoder.layer",
}
#: (frames, rows, columns) of the tokens, where the processor says them; two frames of four are read together.
GRIDS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), (2, 2, 3))

#: Those whose processors stack all videos, which have to be of one length.
STACKED = frozenset(("llava_onevision", "llava_next_video", "internvl"))


@pytest.fixture(params=FAMILIES, scope="module")
def loaded(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Any, StandardizedTransformer]:
    hf, processor = FAMILIES[request.param]()
    return request.param, hf, processor, StandardizedTransformer(hf, processor=processor)


def place(name: str, processor: Any) -> str:
    """GLM's templates put a token before a video and one behind, by which its positions are told from an image's."""
    token = str(processor.video_token)
    return f"<|begin_of_video|>{token}<|end_of_video|>" if name == "glm4v" else token


def processed(processor: Any, texts: list[str], videos: list[Any]) -> dict[str, Any]:
    made = processor(text=texts, videos=videos, return_tensors="pt", padding=True, padding_side="left")
    return dict(made)


def test_a_trace_is_what_the_model_gives(loaded: Any) -> None:
    name, hf, processor, model = loaded
    prompt = place(name, processor) + " what is this ?"
    inputs = processed(processor, [prompt], [video()])
    layers = hf.get_submodule(LAYERS[name])
    points: dict[Any, Any] = {i: (layer, "output") for i, layer in enumerate(layers)}
    points |= {"stream": (model.layers[0].module, "input"), "last": (model.layers[-1].module, "output")}
    pixels = next(one for one in inputs if one.startswith("pixel_values"))
    with torch.no_grad():
        plain = hf(**inputs).logits
        other = hf(**{**inputs, pixels: -inputs[pixels]}).logits
        seen = hooked(hf, lambda: hf(**inputs), points)
        with model.trace(prompt, videos=video()) as tracer:
            vision = model.vision_layers_output[:]
            entered = model.video_embeddings
            stream, last, logits = model.layers_input[0], model.layers_output[-1], model.logits
            tracer.result
    assert not torch.allclose(plain, other, atol=1e-3), "the video does not matter"
    assert torch.equal(logits, plain)
    assert torch.equal(stream, seen["stream"])
    assert torch.equal(last, seen["last"])
    assert len(vision) == len(layers)
    assert all(torch.equal(value, seen[i]) for i, value in enumerate(vision))
    (tokens,) = model.video_tokens(prompt, videos=video())
    assert len(entered) == len(tokens.positions)


def test_whose_positions_they_are(loaded: Any) -> None:
    name, _, processor, model = loaded
    token = place(name, processor)
    prompts = [f"{token} what is this ?", f"the {token} left {token} right of this a user"]
    videos = [video(1), video(2), video(3, frames=6)]
    if name in STACKED:
        with pytest.raises(InputError, match="cannot read these prompts with videos: Unable to convert output"):
            model.trace(prompts, videos=videos)
        videos[2] = video(3)
    places = model.video_tokens(prompts, videos=videos)
    assert [(one.prompt, one.video) for one in places] == [(0, 0), (1, 0), (1, 1)]

    def entering(videos: list[Any]) -> Tensor:
        with torch.no_grad(), model.trace(prompts, videos=videos):
            stream = model.layers_input[0]
        return stream

    before = entering(videos)
    for index, one in enumerate(places):
        changed = [video(9, frames=len(each)) if i == index else each for i, each in enumerate(videos)]
        moved = (entering(changed) - before).abs().amax(-1) > 0
        elsewhere = moved.clone()
        elsewhere[one.prompt, one.positions] = False
        assert moved[one.prompt, one.positions].float().mean() > 0.7  # (a token that ends each video is one for all)
        assert not elsewhere.any()


def test_frames_rows_and_columns(loaded: Any, request: pytest.FixtureRequest) -> None:
    """Where the vision encoder's attentions give nothing, a token is made of the pixels of its own patch of its frames alone."""
    name, hf, processor, model = loaded
    prompt = place(name, processor) + " what is this ?"
    (clip,) = model.video_tokens(prompt, videos=video())
    if name not in GRIDS:
        with pytest.raises(NotInThisModelError, match="patch_grid of video 0 of prompt 0: its processor does not say"):
            clip.patch_grid
        return
    frames, rows, columns = clip.patch_grid
    assert (frames, rows, columns) == GRIDS[name]
    linears = [
        one
        for path, one in hf.get_submodule(LAYERS[name]).named_modules()
        if "attn" in path and isinstance(one, nn.Linear)
    ]
    kept = [one.weight.clone() for one in linears]
    request.addfinalizer(lambda: [one.weight.data.copy_(weight) for one, weight in zip(linears, kept, strict=True)])
    for one in linears:
        one.weight.data.zero_()

    def entering(pixels: np.ndarray) -> Tensor:
        inputs = processed(processor, [prompt], [pixels])
        return hooked(hf, lambda: hf(**inputs), {"stream": (model.layers[0].module, "input")})["stream"]

    plain = video()
    before = entering(plain)
    for frame, row, column in {(0, 0, 0), (0, rows - 1, 0), (1, 0, columns - 1), (1, rows - 1, columns - 1)}:
        changed = plain.copy()
        part = changed[2 * frame : 2 * frame + 2, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        part[:] = 255 - part
        moved = (entering(changed) - before).abs().amax(-1)[0]
        at = clip.position_of(frame, row, column)
        assert int(moved.argmax()) == at
        moved[at] = 0
        assert moved.max() < 1e-4
    with pytest.raises(IndexError, match=r"2 frames of 2 rows and 3 columns of patches: there is no \(2, 0, 0\)"):
        clip.position_of(2, 0, 0)


def test_what_is_assigned_goes_on(loaded: Any) -> None:
    name, hf, processor, model = loaded
    prompt = place(name, processor) + " what is this ?"
    with torch.no_grad():
        with model.trace(prompt, videos=video()):
            before = model.video_embeddings
            plain_stream = model.layers_input[0]
        (clip,) = model.video_tokens(prompt, videos=video())
        with model.trace(prompt, videos=video()):
            new = torch.randn_like(model.video_embeddings)
            model.video_embeddings = new
            stream = model.layers_input[0]
    scale = plain_stream[0, clip.positions] / before
    torch.testing.assert_close(stream[0, clip.positions], new * scale, rtol=1e-3, atol=1e-3)


def test_generating(loaded: Any) -> None:
    name, hf, processor, model = loaded
    prompt = place(name, processor) + " what is this ?"
    inputs = processed(processor, [prompt], [video()])
    with torch.no_grad():
        plain = hf.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=3)
        with model.generate(prompt, videos=video(), max_new_tokens=3, do_sample=False) as tracer:
            counts = [len(model.video_embeddings) for _ in tracer.iter[:]]
            tokens = tracer.result
    assert torch.equal(tokens, plain)
    (clip,) = model.video_tokens(prompt, videos=video())
    assert counts == [len(clip.positions), 0, 0]


def test_an_image_and_a_video_in_one_prompt() -> None:
    hf, processor = FAMILIES["qwen2_vl"]()
    model = StandardizedTransformer(hf, processor=processor)
    prompt = "<|video_pad|> what <|image_pad|> is this ?"
    media: dict[str, Any] = {"images": video()[0], "videos": video(1)}
    (clip,) = model.video_tokens(prompt, **media)
    (photo,) = model.image_tokens(prompt, **media)
    assert clip.positions.max() < photo.positions.min()
    with torch.no_grad(), model.trace(prompt, **media):
        seen, still = model.video_embeddings, model.image_embeddings
    with torch.no_grad(), model.trace("<|video_pad|> what", videos=video(1)):
        torch.testing.assert_close(model.video_embeddings, seen, rtol=1e-4, atol=1e-4)
    assert len(still) == len(photo.positions)
    both = "vision_layers_output.0.: the prompt has images and videos, and the vision encoder reads them in a call each"
    with pytest.raises(NotInThisModelError, match=both), model.trace(prompt, **media):
        model.vision_layers_output[0]
    with pytest.raises(NotInThisModelError, match=both), model.generate(prompt, max_new_tokens=2, **media):
        model.vision_layers_output[0]


@pytest.mark.parametrize(
    ("prompt", "videos", "says"),
    [
        (
            "what ?",
            video(),
            r"The prompts have 0 places for 1 video: '<\|video_pad\|>' says in a text where a video goes",
        ),
        ("<|video_pad|> what", [video(), video()], "The prompts have 1 place for 2 videos: "),
        (
            "<|video_pad|> what",
            video()[0],
            r"Video 0 is of shape \(64, 96, 3\): give an array of \(frame, height, width, 3\)",
        ),
        ("<|video_pad|> what", "nowhere.mp4", "Video 0: there is no file 'nowhere.mp4'"),
        ("<|video_pad|> what", [video()[0], video()[1, :32]], "Video 0 has frames of several shapes"),
    ],
)
def test_what_is_wrong_is_said(prompt: str, videos: Any, says: str) -> None:
    hf, processor = FAMILIES["qwen2_vl"]()
    with pytest.raises(InputError, match=says):
        StandardizedTransformer(hf, processor=processor).trace(prompt, videos=videos)


def test_frames_as_a_list() -> None:
    from PIL import Image

    hf, processor = FAMILIES["qwen2_vl"]()
    model = StandardizedTransformer(hf, processor=processor)
    plain = model.prepare("<|video_pad|> what", videos=video())["pixel_values_videos"]
    for frames in ([*video()], [Image.fromarray(one) for one in video()], [[*video()]]):
        assert torch.equal(model.prepare("<|video_pad|> what", videos=frames)["pixel_values_videos"], plain)
