"""`nnterp.nnsight_utils`: functions that read and write a layer's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy import methods
from nnatomy.compat.nnsight.language import LanguageModel as LanguageModel
from nnatomy.compat.nnterp.remote import refuse_remote
from nnatomy.compat.nnterp.rename_utils import RenameConfig
from nnatomy.compat.nnterp.standardized_transformer import StandardizedTransformer

GetModuleOutput = Callable[[Any, int], Any]


def get_embed_tokens(model: Any) -> Any:
    """The token embedding."""
    return model.embed_tokens


def get_layers(model: Any) -> Any:
    """The layers."""
    return model.layers


def get_num_layers(nn_model: Any) -> int:
    """How many layers there are."""
    return len(get_layers(nn_model))


def get_layer(nn_model: Any, layer: int) -> Any:
    """One layer."""
    return get_layers(nn_model)[layer]


def get_layer_input(nn_model: Any, layer: int) -> Tensor:
    """The residual stream before a layer."""
    return nn_model.layers_input[layer]


def get_layer_output(nn_model: Any, layer: int) -> Tensor:
    """The residual stream after a layer."""
    return nn_model.layers_output[layer]


def get_attention(nn_model: Any, layer: int) -> Any:
    """A layer's attention module."""
    return get_layer(nn_model, layer).self_attn


def get_attention_output(nn_model: Any, layer: int) -> Tensor:
    """What a layer's attention module gives."""
    return nn_model.attentions_output[layer]


def get_mlp(nn_model: Any, layer: int) -> Any:
    """A layer's MLP module."""
    return get_layer(nn_model, layer).mlp


def get_mlp_output(nn_model: Any, layer: int) -> Tensor:
    """What a layer's MLP module gives."""
    return nn_model.mlps_output[layer]


def get_logits(nn_model: Any) -> Tensor:
    """The model's logits."""
    return nn_model.logits


def get_unembed_norm(nn_model: Any) -> Any:
    """The norm before the unembedding."""
    return nn_model.ln_final


def get_unembed(nn_model: Any) -> Any:
    """The unembedding."""
    return nn_model.lm_head


def project_on_vocab(nn_model: Any, h: Tensor) -> Tensor:
    """The logits of a hidden state, through all of the model's head."""
    return nn_model.project_on_vocab(h)


def get_next_token_probs(nn_model: Any) -> Tensor:
    """The probabilities of the next token, after each prompt's last."""
    return nn_model.next_token_probs


def set_layer_output(nn_model: Any, layer: int, tensor: Tensor) -> None:
    """Go on with that after a layer."""
    nn_model.layers_output[layer] = tensor


class ModuleAccessor:
    """The modules of a Hugging Face model under the standard names.

    Args:
        model: the Hugging Face model.
        rename_config, rename: aliases.
    """

    def __init__(self, model: Any, rename_config: RenameConfig | None = None, rename: Any = None) -> None:
        self.nn_model = StandardizedTransformer(model, check_renaming=False, rename_config=rename_config, rename=rename)

    def __getattr__(self, name: str) -> Module:
        try:
            module: Module = self.nn_model.at(name).module
        except AttributeError:
            if name.startswith("_") or not hasattr(self.nn_model, name):
                raise
            raise AttributeError(f"Attribute {name} is not a module") from None
        return module

    def get_embed_tokens(self) -> Module:
        """The token embedding."""
        return self.nn_model.embed_tokens.module

    def get_layers(self) -> Module:
        """What holds the layers."""
        return self.layers

    def get_mlp(self, layer: int) -> Module:
        """A layer's MLP."""
        return self.nn_model.mlps[layer].module

    def get_attention(self, layer: int) -> Module:
        """A layer's attention."""
        return self.nn_model.attentions[layer].module

    def get_unembed_norm(self) -> Module:
        """The norm before the unembedding."""
        return self.nn_model.ln_final.module

    def get_unembed(self) -> Module:
        """The unembedding."""
        return self.nn_model.lm_head.module


def get_token_activations(
    nn_model: Any,
    prompts: Any = None,
    layers: Any = None,
    get_activations: GetModuleOutput | None = None,
    remote: Any = False,
    idx: int | None = None,
    tracer: Any = None,
) -> Tensor:
    """`nnatomy.methods.get_token_activations`: (layer, prompt, hidden), on the CPU."""
    refuse_remote("get_token_activations", remote)
    return methods.get_token_activations(
        nn_model, prompts, layers=layers, get_activations=get_activations, idx=idx, tracer=tracer
    )


def collect_token_activations_batched(
    nn_model: Any,
    prompts: Any,
    batch_size: int,
    layers: Any = None,
    get_activations: GetModuleOutput | None = None,
    remote: Any = False,
    idx: int | None = None,
    tqdm: Any = None,
    use_session: bool = True,  # noqa: ARG001
) -> Tensor:
    """`nnatomy.methods.collect_token_activations_batched`."""
    refuse_remote("collect_token_activations_batched", remote)
    return methods.collect_token_activations_batched(
        nn_model, prompts, batch_size=batch_size, layers=layers, get_activations=get_activations, idx=idx, tqdm=tqdm
    )


def collect_last_token_activations_session(
    nn_model: Any,
    prompts: Any,
    batch_size: int,
    layers: Any = None,
    get_activations: GetModuleOutput | None = None,
    remote: Any = False,
    idx: int | None = None,
) -> Tensor:
    """The same, under nnterp's other name."""
    return collect_token_activations_batched(nn_model, prompts, batch_size, layers, get_activations, remote, idx)


def compute_next_token_probs(nn_model: Any, prompt: Any, remote: Any = False) -> Tensor:
    """`nnatomy.methods.compute_next_token_probs`: (prompt, vocab), on the CPU."""
    refuse_remote("compute_next_token_probs", remote)
    return methods.compute_next_token_probs(nn_model, prompt)
