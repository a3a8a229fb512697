"""Prompts with sound, on six families with their own processors and on Whisper: against the model's own call, plain hooks, and what a
changed sound changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from audio_families import FAMILIES, RATE, sound, whisper
from media_checks import Asked, check_a_batch, check_a_trace, check_generating, check_what_is_assigned
from reference import hooked
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import InputError, NotInThisModelError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

#: Where the encoder's layers and the projector are. None: no module's output is what enters the stream.
PARTS = {
    "qwen2_audio": ("model.audio_tower.layers", "model.multi_modal_projector"),
    "audioflamingo3": ("model.audio_tower.layers", "model.multi_modal_projector"),
    "musicflamingo": ("model.audio_tower.layers", "model.multi_modal_projector"),
    "glmasr": ("model.audio_tower.layers", "model.multi_modal_projector"),
    "qwen2_5_omni": ("model.audio_tower.layers", "model.audio_tower.proj"),
    "gemma4": ("model.audio_tower.layers", "model.embed_audio"),
}


@pytest.fixture(params=FAMILIES, scope="module")
def loaded(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Any, StandardizedTransformer]:
    hf, processor = FAMILIES[request.param]()
    return request.param, hf, processor, StandardizedTransformer(hf, processor=processor)


def processed(processor: Any, text: str, audio: Any) -> dict[str, Any]:
    made = processor(text=[text], audio=[audio], sampling_rate=RATE, return_tensors="pt", text_kwargs={"padding": True})
    return {name: value for name, value in made.items() if name != "labels"}


def asked_of(loaded: Any) -> Asked:
    name, hf, processor, model = loaded
    prompt = processor.audio_token + " what is this ?"
    inputs = processed(processor, prompt, sound())
    names = ("audio_layers_output", "audio_projector_output", "audio_embeddings")
    return Asked(hf, model, prompt, inputs, {"audio": sound()}, "input_features", *PARTS[name], names)


def test_a_trace_is_what_the_model_gives(loaded: Any) -> None:
    check_a_trace(asked_of(loaded))


def test_whose_positions_they_are(loaded: Any) -> None:
    """What one sound changes of what enters the stream is at its positions alone, in every prompt of the batch."""
    _, _, processor, model = loaded
    token = processor.audio_token
    prompts = [f"{token} what is this ?", f"the left right {token} of this a user"]
    sounds = [sound(1), sound(2, frames=64)]
    places = model.audio_tokens(prompts, audio=sounds)
    assert [(one.prompt, one.sound) for one in places] == [(0, 0), (1, 0)]
    assert len(places[0].positions) > 1.5 * len(places[1].positions)

    def entering(sounds: list[Any]) -> Tensor:
        with torch.no_grad(), model.trace(prompts, audio=sounds):
            stream = model.layers_input[0]
        return stream

    before = entering(sounds)
    for index, place in enumerate(places):
        changed = [sound(9, frames=(128, 64)[i]) if i == index else one for i, one in enumerate(sounds)]
        moved = (entering(changed) - before).abs().amax(-1) > 0
        elsewhere = moved.clone()
        elsewhere[place.prompt, place.positions] = False
        assert moved[place.prompt, place.positions].all()
        assert not elsewhere.any()


def test_a_batch_is_its_prompts_alone(loaded: Any) -> None:
    _, _, processor, model = loaded
    token = processor.audio_token
    prompts = [f"{token} what ?", f"the left {token} right of this a user"]
    check_a_batch(model, prompts, "audio", [sound(1), sound(2, frames=64)])


def test_what_is_assigned_goes_on(loaded: Any) -> None:
    asked = asked_of(loaded)

    def zeroed(module: nn.Module) -> Tensor:
        def zero(_: Any, __: Any, output: Any) -> Any:
            return 0 * output if isinstance(output, Tensor) else (0 * output[0], *output[1:])

        handle = module.register_forward_hook(zero)
        try:
            with torch.no_grad():
                return asked.hf(**asked.inputs).logits
        finally:
            handle.remove()

    for layer in asked.hf.get_submodule(asked.layers):
        assert not torch.equal(zeroed(layer), asked.hf(**asked.inputs).logits)
    check_what_is_assigned(asked, zeroed)


def test_generating(loaded: Any) -> None:
    check_generating(asked_of(loaded))


def test_an_image_and_a_sound_in_one_prompt() -> None:
    hf, processor = FAMILIES["qwen2_5_omni"]()
    model = StandardizedTransformer(hf, processor=processor)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    prompt = "<|AUDIO|> what <|IMAGE|> is <|AUDIO|> this ?"
    media: dict[str, Any] = {"images": picture, "audio": [sound(1), sound(2, frames=64)]}
    ids = model.prepare(prompt, **media)["input_ids"][0].tolist()
    heard = model.audio_tokens(prompt, **media)
    (seen,) = model.image_tokens(prompt, **media)
    assert [len(one.positions) for one in heard] == [32, 16]
    assert {ids[i] for one in heard for i in one.positions} == {model.config.audio_token_id}
    assert {ids[i] for i in seen.positions} == {model.config.image_token_id}
    assert heard[0].positions.max() < seen.positions.min() < seen.positions.max() < heard[1].positions.min()
    with torch.no_grad(), model.trace(prompt, **media):
        waves, patches = model.audio_layers_output[0], model.vision_layers_output[0]
        sounds, images = model.audio_embeddings, model.image_embeddings
    assert len(waves) == 64 + 32
    assert len(sounds) == 48
    assert len(images) == len(seen.positions)
    assert patches.shape[-1] == hf.config.vision_config.hidden_size


# Whisper: the encoder's own positions.


@pytest.fixture(scope="module")
def listener() -> StandardizedTransformer:
    hf, processor = whisper()
    return StandardizedTransformer(hf, processor=processor)


def test_an_encoder_of_sound(listener: StandardizedTransformer) -> None:
    hf, processor = listener.hf_model, listener.processor
    inputs = processor(audio=sound(), sampling_rate=RATE, return_tensors="pt")
    start = torch.tensor([[7, 8, 9]])
    encoder = hf.model.encoder.layers[1]
    with torch.no_grad():
        plain = hf(**inputs, decoder_input_ids=start).logits
        seen = hooked(hf, lambda: hf(**inputs, decoder_input_ids=start), {"encoder": (encoder, "output")})
        with listener.trace(audio=sound(), decoder_input_ids=start):
            states = listener.encoder_layers_output[1]
            pattern = listener.cross_attention_probabilities[0]
            logits = listener.logits
        both = processor(audio=[sound(1), sound(2, frames=64)], sampling_rate=RATE, return_tensors="pt")
        with listener.trace(audio=[sound(1), sound(2, frames=64)], decoder_input_ids=start.expand(2, -1)):
            batch = listener.logits
        assert torch.equal(batch, hf(**both, decoder_input_ids=start.expand(2, -1)).logits)
        tokens = hf.generate(**inputs, max_new_tokens=3, do_sample=False)
        with listener.generate(audio=sound(), max_new_tokens=3, do_sample=False) as tracer:
            assert torch.equal(tracer.result, tokens)
    assert torch.equal(states, seen["encoder"])
    assert torch.equal(logits, plain)
    assert pattern.shape == (1, 4, 3, 100)
    with pytest.raises(NotInThisModelError, match="has no token that stands for some time of a sound"):
        listener.audio_tokens("what", audio=sound())


# What does not go.


@pytest.mark.parametrize(
    ("prompt", "audio", "says"),
    [
        (
            "what is this ?",
            sound(),
            r"The prompts have 0 places for 1 sound: '<\|AUDIO\|>' says in a text where a sound goes",
        ),
        ("<|AUDIO|> what", [sound(), sound()], "The prompts have 1 place for 2 sounds: "),
        ("<|AUDIO|> what", None, "The prompts have 1 place for 0 sounds: "),
        (
            "<|AUDIO|> what",
            (sound(), 44_100),
            "Sound 0 has 44100 samples a second, and the model reads 16000: resample it",
        ),
        ("<|AUDIO|> what", {"array": sound(), "sampling_rate": 8_000}, "Sound 0 has 8000 samples a second"),
        (
            "<|AUDIO|> what",
            np.zeros((2, 100), np.float32),
            r"Sound 0 is of shape \(2, 100\): give \(sample\), of one channel",
        ),
        (
            "<|AUDIO|> what",
            np.zeros(400, np.int16),
            "Sound 0 has samples of int16: give floating-point numbers from -1 to 1: samples / 32768",
        ),
        (
            "<|AUDIO|> what",
            torch.zeros(400, dtype=torch.complex64),
            r"Sound 0 has samples of complex64: give floating-point numbers from -1 to 1\.",
        ),
        ("<|AUDIO|> what", np.full(400, np.nan, np.float32), "Sound 0 has samples that are NaN or infinite"),
        ("<|AUDIO|> what", "nowhere.wav", "Sound 0: there is no file 'nowhere.wav'"),
        (None, sound(), "audio without a prompt: .* says in a text where a sound goes"),
        ([[5, 6]], sound(), "Images, videos and sound go with texts and chats, .* input_features=..."),
    ],
)
def test_what_is_wrong_is_said(listens: StandardizedTransformer, prompt: Any, audio: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        listens.trace(prompt, audio=audio)


@pytest.fixture(scope="module")
def listens() -> StandardizedTransformer:
    hf, processor = FAMILIES["qwen2_audio"]()
    return StandardizedTransformer(hf, processor=processor)


def test_a_sound_as_data_sets_have_it(listens: StandardizedTransformer) -> None:
    prompt = "<|AUDIO|> what"
    plain = listens.prepare(prompt, audio=sound())["input_features"]
    for given in ({"array": sound(), "sampling_rate": RATE}, (sound(), RATE), sound().tolist(), torch.tensor(sound())):
        assert torch.equal(listens.prepare(prompt, audio=given)["input_features"], plain)


def test_what_the_model_or_its_processor_does_not_read(listens: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match=r"^images=\.\.\.: the model reads no images, its forward takes none of"):
        listens.trace("what", images=np.zeros((8, 8, 3), np.uint8))
    text = StandardizedTransformer("demo:gpt2")
    text.processor = listens.processor
    with pytest.raises(InputError, match=r"^audio=\.\.\.: the model reads no sounds, its forward takes none of"):
        text.trace("<|AUDIO|> what", audio=sound())
    with pytest.raises(InputError, match="The model reads no text but input_features: .* decoder_input_ids"):
        hf, processor = whisper()
        StandardizedTransformer(hf, processor=processor).trace("what", audio=sound())


def test_a_file_that_nothing_here_reads(listens: StandardizedTransformer, tmp_path: Any) -> None:
    path = tmp_path / "noise.wav"
    path.write_bytes(b"no sound")
    with pytest.raises(
        InputError, match=r"Sound 0: .*noise.wav' could not be read: .* Give its samples, an array at 16000"
    ):
        listens.trace("<|AUDIO|> what", audio=path)
