"""The methods, against hooks on the pipeline's modules and diffusers' own attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusion_pipelines import PIPELINES, loaded, quiet
from torch import Tensor

from nnatomy.diffusion import DiffusionTransformer, Direction, head_ablation, prompt_patching, word_maps
from nnatomy.diffusion.runs import check
from nnatomy.errors import InputError, NotInThisModelError

PROMPT = "a photo of a cat on the red table"
TEXT = {"max_sequence_length": 24}
SMALL = {"num_inference_steps": 2, "height": 16, "width": 16}
#: What PixArt's pipeline would do with a size and a prompt before it draws.
PLAIN = {"use_resolution_binning": False, "clean_caption": False}


def test_word_maps_are_sums_of_diffusers_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor without SDPA has the weights; the conditional half's are the second; the word's tokens are known here."""
    pipeline = quiet(PIPELINES["stable_diffusion"]())
    pipeline.unet.set_attn_processor(AttnProcessor())
    maps: list[Tensor] = []
    own = Attention.get_attention_scores

    def kept(self: Attention, query: Tensor, key: Tensor, mask: Any = None) -> Tensor:
        weights = own(self, query, key, mask)
        if key.shape[1] == 12:  # the text's tokens
            heads = weights.unflatten(0, (2, -1))[1].mean(0)  # (query, key)
            side = round(heads.shape[0] ** 0.5)
            word = heads[:, 5].unflatten(0, (side, side))  # <s> a photo of a cat
            maps.append(F.interpolate(word[None, None], size=(16, 16), mode="bilinear")[0, 0])
        return weights

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "get_attention_scores", kept)
        picture = pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **SMALL).images[0]
    expected = torch.stack(maps).unflatten(0, (2, -1)).mean(1)
    found = word_maps(loaded("stable_diffusion"), PROMPT, ["cat", "table"], seed=3, **SMALL)
    assert found.maps.shape == (2, 2, 16, 16)
    for step in range(2):
        torch.testing.assert_close(found.map("cat", step), expected[step], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.map("cat"), expected.mean(0), atol=1e-5, rtol=1e-4)
    assert picture.size == found.picture.size
    assert repr(found) == "<maps of cat, table: 2 steps, 16 x 16>"


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux"])
def test_word_maps_of_the_other_kinds(name: str) -> None:
    """Every word's map together, and that of the tokens that are no words, are all that goes to the text."""
    model = loaded(name)
    given = SMALL | TEXT | (PLAIN if name == "pixart" else {})
    found = word_maps(model, "two birds in the sky", ["birds", "sky"], layers=[1], **given)
    at = {"pixart": [1], "sd3": [2, 12 + 1], "flux": [1]}[name]  # "two birds": T5 has no token for the beginning
    with model.generate("two birds in the sky", generator=torch.Generator().manual_seed(0), **given) as tracer:
        for _ in tracer.iter[1]:
            if name == "pixart":
                pattern = model.conditional.cross_attention_probabilities[1][0].mean(0)
            else:
                whole = model.conditional.attention_probabilities[1][0].mean(0)
                text = model.text_tokens(1)
                picture = [i for i in range(len(whole)) if not text.start <= i < text.stop]
                pattern = whole[picture][:, text]
    expected = pattern[:, at].sum(-1)
    torch.testing.assert_close(found.map("birds", 1).flatten(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found.map("birds"), found.map("sky"))


@pytest.mark.parametrize(
    ("name", "prompt", "word", "at"),
    [
        ("cogview4", "two birds in the sky", "birds", 16 - len("<s> two birds in the sky </s>".split()) + 2),
        ("pixart", "A Photo of a Cat", "Cat", 4),
    ],
)
def test_word_maps_of_the_tokens_that_the_encoder_was_given(name: str, prompt: str, word: str, at: int) -> None:
    """CogView4's text is padded on its left to 16 tokens; PixArt's is written small."""
    model = loaded(name)
    given = SMALL | {"max_sequence_length": 24} | (PLAIN if name == "pixart" else {})
    found = word_maps(model, prompt, [word], layers=[1], **given)
    with model.generate(prompt, generator=torch.Generator().manual_seed(0), **given) as tracer:
        for _ in tracer.iter[1]:
            if name == "pixart":
                seen = model.conditional.cross_attention_probabilities[1][0].mean(0)[:, at]
            else:  # the text's 16 tokens come first
                seen = model.conditional.attention_probabilities[1][0].mean(0)[16:, at]
    torch.testing.assert_close(found.map(word, 1).flatten(), seen, atol=1e-6, rtol=1e-5)


def test_words_of_another_text_than_an_encoders_are_refused() -> None:
    for name, other in (("sd3", "prompt_3"), ("flux", "prompt_2")):
        text = r"words: text_encoder_\d was given other tokens than the prompt's, .*leave out prompt_2"
        with pytest.raises(InputError, match=text):
            word_maps(loaded(name), "two birds", ["birds"], **{other: "a big cat"}, **SMALL, **TEXT)


def test_word_maps_are_drawn_over_the_picture() -> None:
    found = word_maps(loaded("stable_diffusion"), PROMPT, ["cat"], **SMALL)
    figure = found.plot()
    kinds = [type(trace).__name__ for trace in figure.data]
    assert kinds == ["Image", "Image", "Heatmap"]
    heat = figure.data[2]
    assert heat.z.shape == (200, 200)
    assert 0 < heat.opacity < 1
    assert [one.text for one in figure.layout.annotations] == ["the picture", "cat"]
    assert figure.layout.title.text == f"{PROMPT} (all steps)"
    assert len(found.plot(step=1).data) == 3


def test_words_that_are_not_there_are_refused() -> None:
    model = loaded("stable_diffusion")
    with pytest.raises(InputError, match="'elephant' is no word of the prompt 'a photo of a cat"):
        word_maps(model, PROMPT, ["elephant"], **SMALL)
    with pytest.raises(InputError, match="'tree' stands behind the tokens"):
        word_maps(model, "a " * 20 + "tree", ["tree"], **SMALL)
    with pytest.raises(InputError, match="give one prompt"):
        word_maps(model, [PROMPT, PROMPT], **SMALL)
    with pytest.raises(InputError, match="give seed=0 for another noise"):
        word_maps(model, PROMPT, generator=torch.Generator(), **SMALL)
    with pytest.raises(InputError, match="layers: there is no 99"):
        word_maps(model, PROMPT, layers=[99], **SMALL)
    found = word_maps(model, PROMPT, ["cat"], **SMALL)
    with pytest.raises(InputError, match="there are maps of cat"):
        found.map("table")
    with pytest.raises(InputError, match="there are maps of the steps 0, 1"):
        found.map("cat", 5)


def latents(model: DiffusionTransformer, prompt: str, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.pipeline(prompt, generator=generator, output_type="latent", **SMALL, **kwargs).images


def test_patching_between_prompts_is_that_of_hooks() -> None:
    model = loaded("stable_diffusion")
    prompt, other = "a photo of a cat", "two birds in the sky"
    found = prompt_patching(model, prompt, other, name="layers_output", layers=[1, 3], **SMALL)
    ours, theirs = latents(model, prompt), latents(model, other)
    for column, layer in enumerate((1, 3)):
        block = model.layers[layer].module
        kept: list[Tensor] = []
        handle = block.register_forward_hook(lambda *args, kept=kept: kept.append(args[-1].clone()))
        latents(model, other)
        handle.remove()
        for step in range(2):
            calls: list[int] = []

            def put(_: Any, __: Any, output: Tensor, calls: Any = calls, step: int = step, kept: Any = kept) -> Any:
                calls.append(0)
                return torch.cat([output[:1], kept[step][1:]]) if len(calls) == step + 1 else None

            handle = block.register_forward_hook(put)
            patched = latents(model, prompt)
            handle.remove()
            way = (theirs - ours).flatten()
            expected = float((patched - ours).flatten() @ way / (way @ way))
            assert float(found.effect[step, column]) == pytest.approx(expected, abs=1e-5)
    assert len(found.plot().data) == 1


def test_everything_of_the_last_block_put_in_in_one_step_is_all_of_that_prompt() -> None:
    """One step, no guidance: what comes behind the last block is the other prompt's picture, so the value is 1."""
    model = loaded("pixart")
    given = {**SMALL, "num_inference_steps": 1, "guidance_scale": 1.0, **PLAIN}
    found = prompt_patching(model, "a photo of a cat", "two birds", layers=[1], **given)
    assert float(found.effect) == pytest.approx(1.0, abs=1e-4)


def test_patching_is_refused_where_it_means_nothing() -> None:
    model = loaded("stable_diffusion")
    with pytest.raises(InputError, match="their pictures are the same"):
        prompt_patching(model, "a cat", "a cat", layers=[0], steps=[0], **SMALL)
    with pytest.raises(InputError, match="it is a name of layers: layers_input"):
        prompt_patching(model, "a cat", "a dog", name="logits", **SMALL)
    with pytest.raises(InputError, match=r"steps: there is no 2; there are 0 to 1"):
        prompt_patching(model, "a cat", "a dog", layers=[0], steps=[2], **SMALL)
    with pytest.raises(InputError, match="no layer of this pipeline has it: the block has one stream"):
        prompt_patching(model, "a cat", "a dog", name="text_layers_output", **SMALL)
    with pytest.raises(InputError, match="a_method takes a DiffusionTransformer; got a StableDiffusionPipeline"):
        check(model.pipeline, "a_method", "a cat", {})


def test_a_direction_is_the_difference_of_means_and_steers() -> None:
    model = loaded("stable_diffusion")
    block = model.layers[2].module
    means = []
    for prompt in ("a photo of a cat", "two birds"):
        kept: list[Tensor] = []
        handle = block.register_forward_hook(lambda *args, kept=kept: kept.append(args[-1][1].mean(0)))
        latents(model, prompt)
        handle.remove()
        means.append(torch.stack(kept).mean(0))
    found = Direction.from_prompts(model, ["a photo of a cat"], ["two birds"], layers=[2], **SMALL)
    torch.testing.assert_close(found.directions[2], means[0] - means[1], atol=1e-5, rtol=1e-4)

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:1], output[1:] + 3.0 * found.directions[2]])

    handle = block.register_forward_hook(add)
    expected = latents(model, "a dog")
    handle.remove()
    edited = model.edit(lambda: found.apply(model, 3.0))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(edited("a dog", generator=generator, output_type="latent", **SMALL).images, expected)
    with (
        pytest.raises(InputError, match="it is of another model"),
        loaded("pixart").generate("a cat", **SMALL, **PLAIN),
    ):
        Direction({0: torch.ones(5)}, "image_layers_output").apply(loaded("pixart"))
    with pytest.raises(InputError, match="do not differ there"):
        Direction.from_prompts(model, ["a cat"], ["a cat"], layers=[0], **SMALL)


@pytest.mark.parametrize("name", ["heads_output", "cross_heads_output"])
def test_a_head_taken_out_is_zeros_before_the_projection(name: str) -> None:
    """The output projection reads the heads side by side: a hook puts zeros in the place of one, in both halves."""
    model = loaded("stable_diffusion")
    found = head_ablation(model, "a cat", name=name, layers=[1], steps=[1], **SMALL)
    whole = latents(model, "a cat")
    block = model.layers[1].module
    attention = block.attn1 if name == "heads_output" else block.attn2
    width = attention.to_out[0].in_features // attention.heads
    assert found.effect.shape == (1, attention.heads)
    for head in range(attention.heads):
        calls: list[int] = []

        def zero(_: Any, args: Any, head: int = head, calls: Any = calls) -> Any:
            calls.append(0)
            hidden = args[0].clone()
            hidden[..., head * width : (head + 1) * width] = 0
            return (hidden, *args[1:]) if len(calls) == 2 else None

        handle = attention.to_out[0].register_forward_pre_hook(zero)
        without = latents(model, "a cat")
        handle.remove()
        expected = float((without - whole).norm() / whole.norm())
        assert float(found.effect[0, head]) == pytest.approx(expected, rel=1e-4)
    assert float(found.effect.min()) > 0


def test_methods_on_classes() -> None:
    model = loaded("dit")
    found = prompt_patching(model, [3], [7], layers=[1], num_inference_steps=2)
    assert found.effect.shape == (2, 1)
    assert head_ablation(model, [3], layers=[0], num_inference_steps=1).effect.shape == (1, 4)
    with pytest.raises((InputError, NotInThisModelError), match="word_maps"):
        word_maps(model, [3])
