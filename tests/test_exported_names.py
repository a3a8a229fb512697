"""The public names are exactly these."""

from __future__ import annotations

import types

import pytest

import nnatomy
import nnatomy.cli
import nnatomy.core
import nnatomy.methods
import nnatomy.plans
import nnatomy.plots
import nnatomy.validation
from nnatomy.tracing import Traceable


def public(module: types.ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_top_level() -> None:
    """They are imported when they are used, all the same `dir` and `import *` know them."""
    names = {"ArchConfig", "StandardizedTransformer", "Traceable"}
    assert {*nnatomy.__all__} == names | {"__version__"}
    assert {*dir(nnatomy)} >= names | {"methods", "plots", "errors"}
    assert nnatomy.Traceable is Traceable
    with pytest.raises(AttributeError, match=r"^module 'nnatomy' has no attribute 'nothing'$"):
        nnatomy.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [nnatomy.methods, nnatomy.plots])
def test_a_star_brings_no_submodules(module: types.ModuleType) -> None:
    assert sorted(module.__all__) == sorted(public(module))


def test_core() -> None:
    names = {"Block", "Cache", "Collector", "ModuleView", "Slot", "Tap", "Trace", "Traceable"}
    assert public(nnatomy.core) == names


def test_methods() -> None:
    assert public(nnatomy.methods) == {
        "ActivationStore",
        "Activations",
        "HeadAblation",
        "HeadMap",
        "ImageLens",
        "LensStatistics",
        "LogitLens",
        "Patching",
        "PathPatching",
        "PicturePatching",
        "Prompt",
        "SteeringVector",
        "TargetPrompt",
        "TargetPromptBatch",
        "TunedLens",
        "ablate_direction",
        "activation_patching",
        "attribution_patching",
        "causal_tracing",
        "circuit_faithfulness",
        "collect_activations",
        "collect_last_token_activations_session",
        "collect_token_activations_batched",
        "compute_next_token_probs",
        "direct_logit_attribution",
        "edge_attribution",
        "get_first_tokens",
        "get_token_activations",
        "head_ablation",
        "head_scores",
        "image_lens",
        "integrated_gradients",
        "it_repeat_prompt",
        "kl_divergence",
        "lens_statistics",
        "log_probability",
        "logit_difference",
        "logit_lens",
        "next_token_probs_unsqueeze",
        "patch_object_attn_lens",
        "patchscope_generate",
        "patchscope_lens",
        "path_patching",
        "picture_patching",
        "probability",
        "repeat_prompt",
        "run_prompts",
    }


def test_plots_and_command_line() -> None:
    drawn = {"attention", "bars", "circuit", "curves", "heat_map", "over_picture", "parts", "save"}
    assert public(nnatomy.plots) == drawn | {"attention_view", "token_view"}
    assert public(nnatomy.cli) == {"main"}


def test_plans() -> None:
    assert public(nnatomy.plans) == {"Check", "Plan", "from_control_vector", "from_pyvene", "load_plan"}


def test_validation() -> None:
    assert public(nnatomy.validation) == {
        "Report",
        "Row",
        "looks_ahead",
        "unverified",
        "validate",
        "validate_shapes",
    }
