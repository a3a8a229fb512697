"""What a naming config says: where the standard modules of one family of architectures are."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ArchConfig:
    """Where the standard modules are in one family of Hugging Face models.

    Paths are from the model down, names are from one layer down. `embed_tokens` and `lm_head` are
    what the model's own `get_input_embeddings()` and `get_output_embeddings()` give, unless a path
    is set here. What else is not set is found by looking at a forward pass.

    Attributes:
        layers: the path of the list of layers.
        self_attn: the name of the attention in a layer; with a `*` for the layer's number, its path from the model, for
            layers that are spread over lists (`transformer.attentions.*`). `layers` is then the list of what ends each.
        mlp: the name of the MLP in a layer, or its path.
        ln_final: the path of the norm before the unembedding.
        embed_tokens: the path of the token embedding.
        lm_head: the path of the unembedding.
        absent: for what is not there ("attention", "mlp", "layer": its input and output, "token_embeddings"), why, or what
            there is instead.
        classes: the Hugging Face classes that are known to follow this config.

    Example:
        >>> from nnatomy import ArchConfig
        >>> mine = ArchConfig(layers="decoder.blocks", self_attn="attn", mlp="ffn", ln_final="decoder.norm")

        `StandardizedTransformer(model, arch_config=mine)` then finds these modules, and checks them.
    """

    layers: str | None = None
    self_attn: str | None = None
    mlp: str | None = None
    ln_final: str | None = None
    embed_tokens: str | None = None
    lm_head: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
