"""What is wrong is refused at the user's line, with what was found and how to mend it; what cannot be proven is refused at load."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionImg2ImgPipeline, UNet2DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusion_pipelines import ALL, arguments, loaded, quiet
from PIL import Image
from torch.nn import Module

from nnatomy.diffusion import DiffusionTransformer, word_maps
from nnatomy.errors import (
    AssignmentError,
    InputError,
    LoadError,
    NoSuchModuleError,
    NotInThisModelError,
    NotReachedError,
    OutsideTraceError,
    UnknownArchitectureError,
    UsageError,
)
from nnatomy.methods import logit_lens

SD = "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("prompt", "kwargs", "text"),
    [
        (
            None,
            {},
            rf'^{SD} was given no prompt, and draws nothing without: model.generate\("a photo of a cat", num_inference',
        ),
        (5, {}, r"^prompt=5: it is a text, or a list of texts, one for each picture\.$"),
        ([], {}, r"^prompt=\[\]: it is a text, or a list of texts"),
        ("a cat", {"num_inference_steps": 0}, r"^num_inference_steps=0: it is a whole number, 1 or more\.$"),
        ("a cat", {"num_inference_steps": "4"}, r"^num_inference_steps='4': it is a whole number"),
        ("a cat", {"num_images_per_prompt": 2.5}, r"^num_images_per_prompt=2\.5: it is a whole number, 1 or more\.$"),
        (
            "a cat",
            {"num_inference_step": 4},
            rf"^num_inference_step=4: {SD} takes no such argument. Did you mean num_inference_steps",
        ),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_it_runs(prompt: Any, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        loaded("stable_diffusion").generate(prompt, **kwargs)
    lines = [frame.filename for frame in traceback.extract_tb(caught.tb)]
    assert lines[0] == __file__


def test_classes_are_a_list() -> None:
    with pytest.raises(
        InputError, match=r"^class_labels=7: a list of the numbers of classes, one for each picture: \[207\]\.$"
    ):
        loaded("dit").generate(7)
    with pytest.raises(InputError, match=r"^DiTPipeline was given no class_labels.*model.generate\(\[207\]"):
        loaded("dit").generate()


def test_a_picture_of_a_wrong_mode_is_refused() -> None:
    pipeline = ALL["stable_diffusion"]()
    parts = {**pipeline.components, "requires_safety_checker": False}
    model = DiffusionTransformer(quiet(StableDiffusionImg2ImgPipeline(**parts)), validate=False)
    with pytest.raises(
        InputError, match=r"^image is a picture of mode 'CMYK', and the pipeline takes 'RGB': convert it, image=image."
    ):
        model.generate("a cat", image=Image.new("CMYK", (16, 16)), num_inference_steps=2)
    with model.generate("a cat", image=Image.new("RGB", (16, 16)), num_inference_steps=4, strength=0.5) as tracer:
        seen = [model.layers_output[0].shape for _ in tracer.iter[:]]
        assert tracer.result.images[0].size == (16, 16)
    assert len(seen) == 2


def test_a_step_that_does_not_come_is_refused() -> None:
    model = loaded("stable_diffusion")
    text = r"^tracer.iter: step 7 was asked for, and this generation has 3 steps \(0 to 2\): ask for one of these"
    with pytest.raises(NotReachedError, match=text), model.generate(**arguments(model)) as tracer:
        for _ in tracer.iter[7]:
            pass
    with pytest.raises(NotReachedError, match=text), model.generate(**arguments(model)) as tracer:
        for _ in tracer.iter[[1, 7]]:
            model.noise_prediction
    with pytest.raises(UsageError, match="steps are counted from 0"), model.generate(**arguments(model)) as tracer:
        for _ in tracer.iter[-1]:
            pass
    with model.generate(**arguments(model)) as tracer:
        assert list(tracer.iter[1:99]) == [1, 2]


def test_a_scheduler_that_is_not_there_is_refused() -> None:
    pipeline = ALL["stable_diffusion"]()
    scheduler, pipeline.scheduler = pipeline.scheduler, None
    text = r"^StableDiffusionPipeline has no scheduler, .*pipeline.scheduler = diffusers.DDIMScheduler\(\)"
    with pytest.raises(InputError, match=text):
        DiffusionTransformer(pipeline)
    pipeline.scheduler = scheduler
    model = DiffusionTransformer(quiet(pipeline), validate=False)
    pipeline.scheduler = None
    with pytest.raises(InputError, match=text):
        model.generate("a cat")


def test_a_scheduler_of_another_kind_is_refused() -> None:
    pipeline = ALL["stable_diffusion"]()
    pipeline.scheduler = type("Steps", (), {"step": lambda self, x: x, "config": {}})()
    with pytest.raises(UnknownArchitectureError, match=r"its Steps has no step\(model_output, timestep, sample\)\.$"):
        DiffusionTransformer(pipeline)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^UNet2DConditionModel is no pipeline of diffusers.*nnatomy.Traceable\(module\)"
    ):
        DiffusionTransformer(loaded("stable_diffusion").denoiser)
    with pytest.raises(LoadError, match=r"^The pipeline '/nowhere' could not be loaded"):
        DiffusionTransformer("/nowhere")
    with pytest.raises(
        InputError, match=r"^revision: arguments of from_pretrained, but the pipeline is already loaded\.$"
    ):
        DiffusionTransformer(ALL["dit"](), revision="main")


def test_a_pipeline_that_is_not_supported_is_refused() -> None:
    unet = UNet2DModel(
        8,
        3,
        3,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(InputError, match=r"^DDPMPipeline is not supported: it draws from no prompt.*docs/diffusion.md"):
        DiffusionTransformer(quiet(DDPMPipeline(unet, DDPMScheduler())))
    pipeline = ALL["wan"]()
    pipeline.register_modules(transformer_2=pipeline.transformer)
    with pytest.raises(
        UnknownArchitectureError, match=r"^WanPipeline is not supported: a pipeline has one denoiser.*transformer_2"
    ):
        DiffusionTransformer(pipeline)


def test_names_that_are_none_and_values_outside_of_a_trace() -> None:
    model = loaded("stable_diffusion")
    with pytest.raises(OutsideTraceError):
        model.layers_output[0]
    with pytest.raises(UsageError, match=r"with model.generate\(prompt, num_inference_steps=4\)"):
        model.trace("a cat")
    with model.generate(**arguments(model)):
        with pytest.raises(NoSuchModuleError, match="Did you mean 'layers_output'"):
            model.layer_output
        with pytest.raises(NoSuchModuleError, match="The standard names are steps, latents"):
            model.latent = torch.zeros(1)
    with (
        pytest.raises(IndexError, match=r"layers_output\[99\]: the denoiser has 7 layers, 0 to 6\."),
        model.generate(**arguments(model)),
    ):
        model.layers_output[99]


def test_the_first_latents_of_a_pipeline_that_draws_them_inside_its_call() -> None:
    model = loaded("dit")
    with pytest.raises(NotReachedError, match="ask for them from step 1 on"), model.generate(**arguments(model)):
        model.latents


# What is not proven.


def test_a_registry_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the two outputs exchanged the next block is given the one as the other."""
    wrong = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    wrong._cls = FluxTransformerBlock
    TransformerBlockRegistry._register()
    monkeypatch.setitem(TransformerBlockRegistry._registry, FluxTransformerBlock, wrong)
    model = DiffusionTransformer(quiet(ALL["flux"]()))
    for name in ("image_layers_output", "text_layers_output"):
        row = model.validation[name, 0]
        assert (row.status, row.detail) == ("refused", "the next block is not given it as that")
    with (
        pytest.raises(NotInThisModelError, match="the next block is not given it as that"),
        model.generate(**arguments(model)),
    ):
        model.conditional.image_layers_output[0]
    assert model.validation["image_layers_output", 2].status == "verified"


def test_guidance_by_another_formula_has_no_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = quiet(ALL["stable_diffusion"]())
    monkeypatch.setattr(type(pipeline), "__call__", _rescaled(type(pipeline).__call__))
    model = DiffusionTransformer(pipeline)
    row = model.validation["conditional", None]
    assert row.status == "refused"
    assert re.match(r"the scheduler is not given u \+ s \(c - u\), off by ", row.detail)
    with (
        pytest.raises(NotInThisModelError, match=r"conditional.layers_output\[0\]: there are 2 rows for 1 pictures"),
        model.generate(**arguments(model)),
    ):
        model.conditional.layers_output[0]
    with model.generate(**arguments(model)):
        assert len(model.layers_output[0]) == 2


def _rescaled(call: Any) -> Any:
    import functools

    @functools.wraps(call)
    def rescaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **{**kwargs, "guidance_rescale": 0.7})

    return rescaled


def test_a_value_that_nothing_reads_is_refused() -> None:
    """Heads whose output projection is zero: whatever they give, it changes nothing."""
    pipeline = quiet(ALL["dit"]())
    block = pipeline.transformer.transformer_blocks[1]
    torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    model = DiffusionTransformer(pipeline)
    assert model.validation["heads_output", 1].detail == "zeros in its place change nothing"
    assert model.validation["heads_output", 0].status == "verified"


def test_a_block_with_a_memory_is_refused() -> None:
    pipeline = quiet(ALL["dit"]())
    block = pipeline.transformer.transformer_blocks[0]

    class Counts(Module):
        calls = 0

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            return hidden * (1 + self.calls)

    block.ff = Counts()
    with pytest.raises(UnknownArchitectureError, match="gives another picture for the same generator"):
        DiffusionTransformer(pipeline)


def test_an_attention_without_a_softmax_has_no_queries() -> None:
    """Sana's is linear: what is multiplied first in it are its values and keys."""
    model = loaded("sana")
    for name in ("queries", "keys"):
        assert model.validation[name, 0].detail.startswith("it has no softmax that shows")
    assert model.validation["cross_keys", 0].status == "verified"


def test_a_pipeline_that_goes_on_after_its_last_timestep_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("stable_diffusion")
    given = arguments(model)
    from nnatomy.diffusion.stage import Stage

    monkeypatch.setattr(Stage, "_count_steps", lambda self, first: 2)
    with pytest.raises(Exception, match="goes on after the last of the 2 timesteps"), model.generate(**given) as tracer:
        tracer.result


def test_without_validation_nothing_is_said_to_be_proven() -> None:
    model = DiffusionTransformer(quiet(ALL["dit"]()), validate=False)
    assert model.validation.counts["verified"] == 0
    assert model.validation["layers_output", 0].status == "unverified"
    with model.generate(**arguments(model)):
        assert model.layers_output[0].isfinite().all()


def test_a_method_of_language_models_says_where_those_of_pipelines_are() -> None:
    with pytest.raises(
        InputError, match="model is a DiffusionTransformer: .* nnatomy.diffusion has methods for pipelines"
    ):
        logit_lens(loaded("dit"), "a prompt")


def test_a_half_has_the_standard_names_alone() -> None:
    model = loaded("stable_diffusion")
    with model.generate(**arguments(model)):
        with pytest.raises(
            NoSuchModuleError, match=r"A half of guidance has no 'layer_output'\. Did you mean 'layers_output'"
        ):
            model.conditional.layer_output
        with pytest.raises(
            NoSuchModuleError, match=r"has no 'latent'\. Did you mean 'latents'\? It has the standard names: "
        ):
            model.conditional.latent = torch.zeros(1)
        with pytest.raises(
            AssignmentError, match=r"^conditional\.layers_output is one for each layer: assign conditional\."
        ):
            model.conditional.layers_output = torch.zeros(1)  # type: ignore[assignment]
        text = r"^conditional\.layers_output\[0:2\] is 2 layers; an int was assigned\. Give a list of one tensor for each\."
        with pytest.raises(AssignmentError, match=text):
            model.conditional.layers_output[0:2] = 5
    assert not hasattr(model.conditional, "_repr_html_")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"words": []}, r"^words: give at least one of the prompt 'a cat'"),
        ({"layers": []}, r"^layers=\[\]: give at least one, such as \[0, 1\]"),
        ({"layers": [True]}, r"^layers=\[True\]: give their numbers, such as \[0, 1\]"),
    ],
)
def test_what_methods_are_given_that_is_nothing(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        word_maps(loaded("stable_diffusion"), "a cat", **given, num_inference_steps=1, height=16, width=16)


def test_methods_arguments_of_wrong_kinds() -> None:
    """In a process of its own, as in the tests' the runtime checks of types come first."""
    script = Path(__file__).with_name("wrong_kinds.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
