"""Interpretability methods, as functions over any `StandardizedTransformer`."""

from nnatomy.methods.ablation import ablate_direction
from nnatomy.methods.activation_patching import Patching, activation_patching
from nnatomy.methods.activation_store import ActivationStore
from nnatomy.methods.activations import Activations
from nnatomy.methods.attribution_patching import attribution_patching
from nnatomy.methods.causal_tracing import causal_tracing
from nnatomy.methods.circuit_faithfulness import circuit_faithfulness
from nnatomy.methods.collecting import collect_activations
from nnatomy.methods.direct_logit_attribution import direct_logit_attribution
from nnatomy.methods.edge_attribution import edge_attribution
from nnatomy.methods.heads import HeadAblation, HeadMap, head_ablation, head_scores
from nnatomy.methods.image_lens import ImageLens, image_lens
from nnatomy.methods.integrated_gradients import integrated_gradients
from nnatomy.methods.lens_result import LogitLens
from nnatomy.methods.lens_statistics import LensStatistics, lens_statistics
from nnatomy.methods.logit_lens import logit_lens
from nnatomy.methods.metrics import kl_divergence, log_probability, logit_difference, probability
from nnatomy.methods.patchscopes import patch_object_attn_lens, patchscope_generate, patchscope_lens
from nnatomy.methods.path_patching import PathPatching, path_patching
from nnatomy.methods.picture_patching import PicturePatching, picture_patching
from nnatomy.methods.prompts import (
    Prompt,
    compute_next_token_probs,
    get_first_tokens,
    next_token_probs_unsqueeze,
    run_prompts,
)
from nnatomy.methods.steering import SteeringVector
from nnatomy.methods.target_prompts import TargetPrompt, TargetPromptBatch, it_repeat_prompt, repeat_prompt
from nnatomy.methods.token_activations import (
    collect_last_token_activations_session,
    collect_token_activations_batched,
    get_token_activations,
)
from nnatomy.methods.tuned_lens import TunedLens

__all__ = [
    "ActivationStore",
    "Activations",
    "HeadAblation",
    "HeadMap",
    "LensStatistics",
    "LogitLens",
    "Patching",
    "PathPatching",
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
    "ImageLens",
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
    "PicturePatching",
    "picture_patching",
    "probability",
    "repeat_prompt",
    "run_prompts",
]
