"""Prompts with images, on thirteen families with their own processors: against the model's own call, plain hooks, and what a changed
image changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from image_families import FAMILIES, pil, tokenizer, with_ids
from media_checks import Asked, check_a_batch, check_a_trace, check_generating, check_what_is_assigned
from PIL import Image
from reference import hooked
from torch import Tensor, nn
from transformers import AriaProcessor

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, InputError, LayerIndexError, NotInThisModelError, OutsideTraceError
from nnatomy.standardized.media import image_token

# Of numpy, about the processors' own code.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

#: Where the vision encoder's layers and the projector are. None: no module's output is what enters the stream.
PARTS = {
    "llava": ("model.vision_tower.encoder.layers", "model.multi_modal_projector"),
    "vipllava": ("model.vision_tower.encoder.layers", "model.multi_modal_projector"),
    "llava_next": ("model.vision_tower.encoder.layers", None),  # a token that ends each row comes between
    "paligemma": ("model.vision_tower.encoder.layers", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower.encoder.layers", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual.blocks", "model.visual.merger"),
    "qwen2_5_vl": ("model.visual.blocks", "model.visual.merger"),
    "qwen3_vl": ("model.visual.blocks", "model.visual.merger"),
    "idefics3": ("model.vision_model.encoder.layers", "model.connector"),
    "internvl": ("model.vision_tower.encoder.layer", "model.multi_modal_projector"),
    "aya_vision": ("model.vision_tower.encoder.layers", "model.multi_modal_projector"),
    "glm4v": ("model.visual.blocks", "model.visual.merger"),
    "deepseek_vl": ("model.vision_model.encoder.layers", "model.aligner"),
}
#: Those that take no padding.
ALONE = frozenset(("paligemma",))
#: Those whose image is one picture, so that its tokens are a grid of patches.
GRIDS = {
    "llava": (4, 4),
    "vipllava": (4, 4),
    "paligemma": (4, 4),
    "gemma3": (2, 2),
    "qwen2_vl": (2, 3),
    "qwen2_5_vl": (2, 3),
    "qwen3_vl": (2, 3),
    "glm4v": (2, 3),
    "deepseek_vl": (4, 4),
}


def picture(seed: int = 0) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(params=FAMILIES, scope="module")
def loaded(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Any, StandardizedTransformer]:
    hf, processor = FAMILIES[request.param]()
    return request.param, hf, processor, StandardizedTransformer(hf, processor=processor)


def processed(processor: Any, texts: list[str], images: list[Any]) -> dict[str, Any]:
    made = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="left")
    return {name: value for name, value in made.items() if name != "labels"}


def asked_of(loaded: Any) -> Asked:
    name, hf, processor, model = loaded
    prompt = image_token(processor) + " what is this ?"
    inputs = processed(processor, [prompt], [picture()])
    names = ("vision_layers_output", "projector_output", "image_embeddings")
    return Asked(hf, model, prompt, inputs, {"images": picture()}, "pixel_values", *PARTS[name], names)


def test_a_trace_is_what_the_model_gives(loaded: Any) -> None:
    asked = asked_of(loaded)
    check_a_trace(asked)
    if asked.projector:
        with torch.no_grad(), asked.trace():
            given, entered = asked.model.projector_output, asked.model.image_embeddings
        assert torch.equal(given.reshape(entered.shape), entered)


def test_an_array_is_read_whichever_axis_its_colors_are_on(loaded: Any) -> None:
    """As the processor itself reads the picture, also where a side is as long as the colors are many."""
    _, _, processor, model = loaded
    prompt = image_token(processor) + " what is this ?"
    rows = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for pixels in (rows, rows[:3], rows[:, :3]):
        try:
            plain = processed(processor, [prompt], [Image.fromarray(pixels)])["pixel_values"]
        except ValueError:  # some take no picture that is so thin
            continue
        tensor = torch.from_numpy(pixels)
        given = {
            "array": pixels,
            "tensor, colors first": tensor.permute(2, 0, 1),
            **({"array, colors first": pixels.transpose(2, 0, 1)} if pixels.shape[1] != 3 else {}),
            **({"tensor": tensor} if pixels.shape[0] != 3 else {}),
        }
        for how, one in given.items():
            assert torch.equal(model.prepare(prompt, images=one)["pixel_values"], plain), how
            again = model.prepare(prompt, images=one.astype(np.float32) if isinstance(one, np.ndarray) else one.float())
            torch.testing.assert_close(again["pixel_values"], plain, rtol=0, atol=0.05, msg=how)


def test_a_black_picture_is_black_in_whatever_numbers(loaded: Any) -> None:
    """Of zeros alone it is one whether 1 or 255 is white."""
    model = loaded[3]
    prompt = image_token(loaded[2]) + " what is this ?"
    black = np.zeros((64, 96, 3), dtype=np.uint8)
    plain = model.prepare(prompt, images=Image.fromarray(black))["pixel_values"]
    for given in (black, black.astype(np.float32), torch.zeros(3, 64, 96)):
        torch.testing.assert_close(model.prepare(prompt, images=given)["pixel_values"], plain, rtol=0, atol=1e-5)


def test_whose_positions_they_are(loaded: Any) -> None:
    """What one image changes of what enters the stream is at its positions alone, in every prompt of the batch."""
    _, _, processor, model = loaded
    token = image_token(processor)
    prompts = [f"{token} what is this ?", f"the {token} left {token} right of this a user"]
    images = [picture(1), picture(2), picture(3)]
    if loaded[0] in ALONE:
        with pytest.raises(InputError, match="On this model padding is no way to one length"):
            model.trace(prompts, images=images)
        prompts[0] = prompts[0] + " a" * 19
    places = model.image_tokens(prompts, images=images)
    assert [(one.prompt, one.image) for one in places] == [(0, 0), (1, 0), (1, 1)]

    def entering(images: list[Any]) -> Tensor:
        with torch.no_grad(), model.trace(prompts, images=images):
            stream = model.layers_input[0]
        return stream

    before = entering(images)
    for index, place in enumerate(places):
        changed = [picture(9) if i == index else one for i, one in enumerate(images)]
        moved = (entering(changed) - before).abs().amax(-1) > 0
        elsewhere = moved.clone()
        elsewhere[place.prompt, place.positions] = False
        assert (
            moved[place.prompt, place.positions].float().mean() > 0.7
        )  # some end a row, and are the same for all images
        assert not elsewhere.any()


def test_a_batch_is_its_prompts_alone(loaded: Any) -> None:
    name, _, processor, model = loaded
    token = image_token(processor)
    if name not in ALONE:
        prompts = [f"{token} what ?", f"the left {token} right of this a user"]
        check_a_batch(model, prompts, "images", [picture(1), picture(2)])


def test_rows_and_columns(loaded: Any, request: pytest.FixtureRequest) -> None:
    """Where the vision encoder's attentions give nothing, a token is made of the pixels of its own patch alone."""
    name, hf, processor, model = loaded
    prompt = image_token(processor) + " what is this ?"
    (place,) = model.image_tokens(prompt, images=picture())
    if name not in GRIDS:
        with pytest.raises(NotInThisModelError, match="patch_grid of image 0 of prompt 0: .*(tiles|tell)"):
            place.patch_grid
        return
    rows, columns = place.patch_grid
    assert (rows, columns) == GRIDS[name]
    linears = [
        one
        for path, one in hf.get_submodule(PARTS[name][0]).named_modules()
        if "attn" in path and isinstance(one, nn.Linear)
    ]
    assert linears

    def entering(pixels: np.ndarray) -> Tensor:
        inputs = processed(processor, [prompt], [Image.fromarray(pixels)])
        return hooked(hf, lambda: hf(**inputs), {"stream": (model.layers[0].module, "input")})["stream"]

    # A picture that the processor neither scales nor crops.
    size = (rows * 32, columns * 32) if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v") else (16, 16)
    plain = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    kept = [one.weight.clone() for one in linears]
    request.addfinalizer(lambda: [one.weight.data.copy_(weight) for one, weight in zip(linears, kept, strict=True)])
    for one in linears:
        one.weight.data.zero_()
    before = entering(plain)
    for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)}:
        high, wide = size[0] // rows, size[1] // columns
        changed = plain.copy()
        changed[row * high : (row + 1) * high, column * wide : (column + 1) * wide] = (
            255 - changed[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        )
        moved = (entering(changed) - before).abs().amax(-1)[0]
        assert int(moved.argmax()) == place.position_of(row, column)
        moved[place.position_of(row, column)] = 0
        assert moved.max() < 1e-4
    with pytest.raises(IndexError, match=rf"{rows} rows and {columns} columns .* no \({rows}, 0\)"):
        place.position_of(rows, 0)


def test_what_is_assigned_goes_on(loaded: Any) -> None:
    asked = asked_of(loaded)
    model = asked.model

    def zeroed(module: nn.Module) -> Tensor:
        """The logits where that module's own forward gives zeros (a hook would come behind what the encoder records of a layer)."""

        def zero(*args: Any, **kwargs: Any) -> Any:
            output = type(module).forward(module, *args, **kwargs)
            return 0 * output if isinstance(output, Tensor) else (0 * output[0], *output[1:])

        module.forward = zero
        try:
            with torch.no_grad():
                return asked.hf(**asked.inputs).logits
        finally:
            del module.forward

    check_what_is_assigned(asked, zeroed)
    with pytest.raises(AssignmentError, match="image_embeddings is torch.float32 of shape"), asked.trace():
        model.image_embeddings = model.image_embeddings[:, :-1]
    with (
        pytest.raises(AssignmentError, match=r"image_embeddings .* torch.int64 .*: convert it with x.to"),
        asked.trace(),
    ):
        model.image_embeddings = model.image_embeddings.long()
    with pytest.raises(AssignmentError, match=r"vision_layers_output\[0\] .* torch.float64"), asked.trace():
        model.vision_layers_output[0] = model.vision_layers_output[0].double()


def test_generating(loaded: Any) -> None:
    check_generating(asked_of(loaded))


def test_a_scan_gives_the_shapes(loaded: Any) -> None:
    """Of Idefics3 how many images there are is a question to their pixels."""
    name, _, processor, model = loaded
    prompt = image_token(processor) + " what is this ?"
    if name == "idefics3":
        with (
            pytest.raises(InputError, match=r"depends on the values of tensors \(aten.nonzero.default\)"),
            model.scan(prompt, images=picture()),
        ):
            model.logits
        return
    with torch.no_grad(), model.trace(prompt, images=picture()):
        plain = model.vision_layers_output[1], model.image_embeddings, model.layers_output[1], model.logits
    with model.scan(prompt, images=picture()):
        vision = model.vision_layers_output[1]
    with model.scan(prompt, images=picture()):  # (which keeps no record of the model's arguments for later)
        seen = vision, model.image_embeddings, model.layers_output[1], model.logits
    assert [one.shape for one in seen] == [one.shape for one in plain]


# What does not go.


@pytest.fixture(scope="module")
def llava() -> StandardizedTransformer:
    hf, processor = FAMILIES["llava"]()
    return StandardizedTransformer(hf, processor=processor)


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% for p in m['content'] %}"
    "{{ '<image> ' if p['type'] == 'image' else p['text'] + ' ' }}{% endfor %}{% endfor %}"
)


def test_a_chat_with_its_images_in_it(llava: StandardizedTransformer) -> None:
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what is this ?"}]}
    ]
    with pytest.raises(InputError, match="LlavaProcessor has no chat template"):
        llava.trace(chat)
    llava.processor.chat_template = CHAT
    try:
        with torch.no_grad(), llava.trace(chat):
            logits = llava.logits
        with torch.no_grad(), llava.trace("user : <image> what is this ? ", images=picture()):
            assert torch.equal(llava.logits, logits)
        with pytest.raises(InputError, match="The chat has its images in it"):
            llava.trace(chat, images=picture())
    finally:
        llava.processor.chat_template = None


def test_the_parts_of_a_chat_with_its_images_in_it(llava: StandardizedTransformer) -> None:
    """As those of the text that the chat is, with its images beside it; of a prompt that is prepared nobody can tell."""
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what ?"}]}]
    llava.processor.chat_template = CHAT
    try:
        (found,) = llava.prompt_parts(chat)
        ids = llava.prepare(chat)["input_ids"][0]
    finally:
        llava.processor.chat_template = None
    assert torch.equal(found["image 0"], (ids == llava.config.image_token_id).nonzero().flatten())
    assert torch.equal(found["text"], (ids != llava.config.image_token_id).nonzero().flatten())
    prepared = llava.prepare("<image> what", images=picture())
    for ask in (llava.prompt_parts, llava.image_tokens):
        with pytest.raises(
            InputError, match=r"^pixel_values: whose positions .* is found from the text: give it, and images="
        ):
            ask(prepared)


def test_a_list_for_each_prompt_is_of_its_own_images(llava: StandardizedTransformer) -> None:
    prompts, images = ["<image> what", "<image> what <image> is"], [picture(1), picture(2), picture(3)]
    plain = llava.prepare(prompts, images=images)["pixel_values"]
    for lists in ([images[:1], images[1:]], [images[0], images[1:]]):
        assert torch.equal(llava.prepare(prompts, images=lists)["pixel_values"], plain)
    text = r"^images=\.\.\. is a list for each prompt, of \[2, 1\], and the prompts have \[1, 2\] places: give each its own"
    with pytest.raises(InputError, match=text):
        llava.prepare(prompts, images=[images[:2], images[2:]])
    with pytest.raises(InputError, match=r"of \[3\], and the prompts have \[1, 2\] places"):
        llava.prepare(prompts, images=[images])


def test_a_list_is_assigned_to_layers_of_the_tower(llava: StandardizedTransformer) -> None:
    def ask() -> Any:
        return llava.trace("<image> what", images=picture())

    with torch.no_grad(), ask():
        first, second = llava.vision_layers_output[:2]
    with torch.no_grad(), ask():
        llava.vision_layers_output[:2] = [0 * first, 2 * second]
        found = llava.logits
    with torch.no_grad(), ask():
        llava.vision_layers_output[1] = 2 * second
        assert torch.equal(llava.logits, found)
    with pytest.raises(AssignmentError, match=r"vision_layers_output\[:2\] is 2 layers; 1 were assigned\. Give"), ask():
        llava.vision_layers_output[:2] = [first]


def test_images_are_no_videos(llava: StandardizedTransformer) -> None:
    with pytest.raises(NotInThisModelError, match=r"^video_embeddings: the model reads no videos\.$"):
        with llava.trace("<image> what", images=picture()):
            llava.video_embeddings
    hf, processor = FAMILIES["qwen2_vl"]()
    model = StandardizedTransformer(hf, processor=processor)
    with torch.no_grad(), model.trace(image_token(processor) + " what", images=picture()):
        assert len(model.video_embeddings) == 0
    with torch.no_grad(), model.trace(image_token(processor) + " what", images=picture()):
        assert len(model.image_embeddings) == 6


def test_tokens_of_a_resampler_are_no_grid() -> None:
    """Each of Aria's reads all of the picture, though they are as many as a square has: a pixel changes every one."""
    hf = zoo.build_class(
        "AriaForConditionalGeneration",
        "aria",
        vision_config={"image_size": 980, "patch_size": 196},
        projector_patch_to_query_dict={25: 16},
    )
    words = tokenizer(image_token="<image>")
    processor = AriaProcessor(pil("aria", max_image_size=980), words, size_conversion={980: 16})
    with_ids(hf, processor, image_token_id="<image>", image_token_index="<image>")
    model = StandardizedTransformer(hf, processor=processor)
    (photo,) = model.image_tokens("<image> what", images=picture())
    assert len(photo.positions) == 16
    assert photo.picture is None
    with pytest.raises(
        NotInThisModelError, match=r"^patch_grid of image 0 of prompt 0: its tokens are those of a resampler"
    ):
        photo.patch_grid


def test_a_file_is_read_as_rgb_and_has_no_transparent_pixels(tmp_path: Path) -> None:
    hf, processor = FAMILIES["llava"]()
    model = StandardizedTransformer(hf, processor=processor)
    expected = model.prepare("<image> what", images=picture())["pixel_values"]
    opaque, clear = picture().convert("RGBA"), picture().convert("RGBA")
    clear.putpixel((3, 5), (1, 2, 3, 128))
    opaque.save(tmp_path / "opaque.png")
    clear.save(tmp_path / "clear.png")
    assert torch.equal(model.prepare("<image> what", images=tmp_path / "opaque.png")["pixel_values"], expected)
    with pytest.raises(
        InputError, match=r"Image 0: the file '.*clear.png' has transparent pixels, .* give that as RGB"
    ):
        model.prepare("<image> what", images=tmp_path / "clear.png")


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("what is this ?", lambda: picture(), "The prompts have 0 places for 1 image: '<image>' says in a text where"),
        ("<image> what", lambda: [picture(), picture()], "The prompts have 1 place for 2 images: "),
        ("<image> what", lambda: None, "The prompts have 1 place for 0 images: "),
        (
            "<image> what",
            lambda: picture().convert("RGBA"),
            r"Image 0 is of mode 'RGBA', .* give image.convert\('RGB'\)",
        ),
        ("<image> what", lambda: "nowhere.png", "Image 0: there is no file 'nowhere.png'"),
        ("<image> what", lambda: __file__, "Image 0: the file '.*test_images.py' is no image"),
        (
            "<image> what",
            lambda: np.zeros((16, 16), np.uint8),
            r"Image 0 is an array of shape \(16, 16\): give one of \(height",
        ),
        ("<image> what", lambda: 7, "Image 0 is an int: give a PIL image, an array, or a file's path"),
        (
            "<image> what",
            lambda: torch.zeros(16, 16),
            r"Image 0 is a tensor of shape \(16, 16\): give one of \(3, height, width\)",
        ),
        (
            "<image> what",
            lambda: np.zeros((0, 16, 3), np.uint8),
            r"Image 0 is an array of shape \(0, 16, 3\): give one of \(height",
        ),
        (
            "<image> what",
            lambda: torch.rand(3, 16, 16),
            r"Image 0 has values from .* to .*, and the model's processor divides by 255, .*: give bytes \(uint8\), .*255 \* image",
        ),
        (
            "<image> what",
            lambda: np.ones((16, 16, 3), bool),
            "Image 0 has values from 1 to 1, and the model's processor",
        ),
        (
            "<image> what",
            lambda: torch.full((3, 16, 16), torch.nan),
            r"Image 0 has values from nan to nan: give bytes \(uint8\), from 0 to 255",
        ),
        ("<image> what", lambda: torch.randn(3, 16, 16) * 300, r"Image 0 has values from -.* to .*: give bytes"),
        (
            "<image> what",
            lambda: np.zeros((16, 16, 3), complex),
            "Image 0 is of complex128, and a color has a real number",
        ),
        ("<image> what", lambda: np.zeros((16, 16, 3), object), "Image 0 is of object, and a color has a real number"),
        ([[5, 6]], lambda: picture(), "Images, videos and sound go with texts and chats, .* pixel_values=..."),
    ],
)
def test_what_is_wrong_is_said(llava: StandardizedTransformer, prompt: Any, images: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        llava.trace(prompt, images=images())


def test_models_without_a_processor(llava: StandardizedTransformer) -> None:
    model = StandardizedTransformer(llava.hf_model, llava.tokenizer)
    with pytest.raises(
        InputError, match=r"there is no processor to read them. Give one: StandardizedTransformer\(model, processor="
    ):
        model.trace("<image> what", images=picture())
    text = StandardizedTransformer("demo:gpt2")
    for argument, kind in (("images", "images"), ("videos", "videos"), ("audio", "sounds")):
        with pytest.raises(
            InputError, match=rf"^{argument}=\.\.\.: the model reads no {kind}, its forward takes none of .*, load"[:-6]
        ):
            text.trace("what", **{argument: picture()})
    with pytest.raises(InputError, match=r"^images=\.\.\.: the model reads no images"):
        text.trace([{"role": "user", "content": [{"type": "image", "image": picture()}]}])
    with pytest.raises(NotInThisModelError, match="GPT2LMHeadModel has no token that stands for a patch"):
        text.image_tokens("what", images=picture())
    with (
        pytest.raises(NotInThisModelError, match="vision_layers_output: the model has no vision encoder"),
        text.trace("what"),
    ):
        text.vision_layers_output[0]


def test_true_is_no_layer_of_the_tower(llava: StandardizedTransformer) -> None:
    with pytest.raises(LayerIndexError, match=r"vision_layers_output\[True\]: layers are counted, 0 to \d+\."):
        with llava.trace("<image> what", images=picture()):
            llava.vision_layers_output[True]


def test_an_argument_by_another_name_is_said(llava: StandardizedTransformer) -> None:
    for name, meant in (("image", "images"), ("video", "videos"), ("sound", "audio")):
        with pytest.raises(InputError, match=rf"^{name}=\.\.\.: it is called {meant}=\.\.\., one or a list\.$"):
            llava.trace("<image> what", **{name: picture()})


@pytest.mark.parametrize("name", ["image_embeddings", "projector_output", "vision_layers_output[1]"])
def test_outside_a_trace_the_name_asked_for_is_said(llava: StandardizedTransformer, name: str) -> None:
    for ask in (
        lambda: eval(f"model.{name}", {"model": llava}),
        lambda: exec(f"model.{name} = torch.zeros(1)", {"model": llava, "torch": torch}),
    ):
        with pytest.raises(OutsideTraceError, match=rf"^{re.escape(name)}: values exist only while the model runs"):
            ask()


def test_blocks_with_an_image_each(llava: StandardizedTransformer) -> None:
    prompts, images = ["<image> what ?", "the left <image> right of this a user"], [picture(1), picture(2)]
    alone = []
    with torch.no_grad():
        for prompt, image in zip(prompts, images, strict=True):
            with llava.trace(prompt, images=image):
                alone.append(llava.layers_output[2][0, -1])
        with llava.trace() as tracer:
            with tracer.invoke(prompts[0], images=images[0]):
                first = llava.layers_output[2][0, -1]
            with tracer.invoke(prompts[1], images=images[1]):
                second = llava.layers_output[2][0, -1]
    torch.testing.assert_close(torch.stack([first, second]), torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_a_processor_that_puts_the_image_before_the_text() -> None:
    hf, processor = FAMILIES["paligemma"]()
    model = StandardizedTransformer(hf, processor=processor)
    plain = model.prepare("what is this ?", images=picture())
    written = model.prepare("<image> what is this ?", images=picture())
    assert torch.equal(plain["input_ids"], written["input_ids"])
    assert torch.equal(plain["pixel_values"], written["pixel_values"])
