"""From a loaded Hugging Face model to its standard modules and dimensions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import Embedding, Module
from transformers import GenerationMixin

from nnatomy.arch_configs.config import ArchConfig
from nnatomy.arch_configs.example import has_decoder
from nnatomy.arch_configs.families import FAMILIES
from nnatomy.arch_configs.infer import LayerParts, find_ends, find_parts
from nnatomy.arch_configs.layer_list import find_layers
from nnatomy.arch_configs.short_pass import CannotInfer
from nnatomy.errors import UnknownArchitectureError

#: What a layer may lack, for a reason.
ABSENT = ("attention", "mlp", "layer", "input", "token_embeddings")


@dataclass(frozen=True)
class Anatomy:
    """The standard modules of one model. What is per layer has one entry a layer.

    Attributes:
        attentions, mlps: None where the layer has none, for the reason in `absent["attention"]` or `absent["mlp"]`.
        mixers: the token mixers, in the order in which they run, without the one cross-attention.
        kinds: what mixes tokens and reads other states, in words, in that order.
        cross_attentions: None where the layer has none, or several.
        ln_final: None where nothing but the unembedding's own transform follows the last layer.
        embed_tokens: the model itself or what embeds patches, where it takes no tokens.
        lm_head: None where the model gives no logits, or computes them without a module.
        gives_logits: whether it gives any.
        width: of what the last layer was seen to give; 0 if nobody has looked.
        heads: how many each attention was seen to have; 0 if nobody has looked, or they differ.
        inferred: whether any of it was found by looking at a forward pass.
    """

    embed_tokens: Module
    layers: tuple[Module, ...]
    attentions: tuple[Module | None, ...]
    mlps: tuple[Module | None, ...]
    mixers: tuple[tuple[Module, ...], ...]
    cross_attentions: tuple[Module | None, ...]
    kinds: tuple[str, ...]
    absent: dict[str, tuple[str, ...]]
    ln_final: Module | None
    lm_head: Module | None
    inferred: bool
    gives_logits: bool = True
    width: int = 0
    heads: int = 0

    @property
    def ran(self) -> tuple[Module, ...]:
        """The layers that have a stream on text alone: they run, once."""
        return tuple(layer for layer, why in zip(self.layers, self.absent["layer"], strict=True) if not why)


@dataclass(frozen=True)
class Dimensions:
    """Sizes, as the modules have them, or else the config of the layers (`text_config`); None where there are none, or several.

    Validation puts in what it has seen of the attentions and the logits (see `seen`).

    Attributes:
        head_dim: the size of one query or key head.
    """

    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    hidden_size: int
    vocab_size: int | None

    def seen(self, queries: set[Shape], keys: set[Shape], vocab_size: int | None) -> Dimensions:
        """The same, but where other sizes have been seen.

        Args:
            queries, keys: the shapes of (batch, head, seq, head_dim) that the attentions have been given.
        """
        heads, kv_heads = {shape[1] for shape in queries}, {shape[1] for shape in keys}
        # One for each query head may be fewer, repeated before the attention is given them.
        repeated = kv_heads == heads and self.num_kv_heads and all(n % self.num_kv_heads == 0 for n in heads)
        return replace(
            self,
            num_heads=_the_one(heads, self.num_heads),
            num_kv_heads=self.num_kv_heads if repeated else _the_one(kv_heads, self.num_kv_heads),
            head_dim=_the_one({shape[3] for shape in queries}, self.head_dim),
            vocab_size=vocab_size or self.vocab_size,
        )


#: Of a tensor.
Shape = tuple[int, ...]


def _the_one(seen: set[int], otherwise: int | None) -> int | None:
    """The one number that has been seen; None for several."""
    if not seen:
        return otherwise
    return seen.copy().pop() if len(seen) == 1 else None


def causal_lm(model: Module) -> Module:
    """The causal language model that `model` is or wraps (to add adapters, say): the outermost module that generates."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)


def resolve(model: Module, config: ArchConfig | None = None) -> Anatomy:
    """Find the standard modules of `model`.

    By the config given, or the one that names the model's class. What neither says is found by looking at two
    short forward passes (`infer`); whether it means what it should is for validation to say.

    Raises:
        UnknownArchitectureError: if the config given does not fit, or the structure does not show.
    """
    name = type(model).__name__
    if config is not None and (missing := _missing(model, config)):
        raise UnknownArchitectureError(
            f"The arch config does not fit {name}: it has no {', '.join(map(repr, missing))}. {_tree(model)}"
        )
    if config is None:
        config = next((family for family in FAMILIES if name in family.classes), ArchConfig())
        if _missing(model, config):  # not in all of its layers, say
            config = ArchConfig()
    given = None if config.layers is None else list(_module(model, config.layers).children())
    inferred = config.layers is None or config.self_attn is None or not (config.mlp or "mlp" in config.absent)
    embed_tokens, lm_head, gives_logits = _ends(model, config)
    if inferred:
        layers, ln_final, width, parts = _infer(model, given)
    else:
        assert given is not None
        layers, ln_final, width, parts = given, None, 0, [LayerParts() for _ in given]
    for i, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        if config.self_attn is not None:
            part.attention = _part(model, layer, config.self_attn, i)
            part.mixers, part.kinds = [part.attention], ["attention"]
            if "*" in config.self_attn:
                part.absent["input"] = (
                    f"no module is the layer, whose parts are in lists of their own: {config.layers} is what ends it"
                )
        elif "attention" in config.absent:
            part.attention, part.mixers = None, []
        if config.mlp is not None:
            part.mlp = _part(model, layer, config.mlp, i)
        elif "mlp" in config.absent:
            part.mlp = None
        part.absent |= config.absent
    heads = {part.heads for part in parts if part.attention is not None}
    crossing = tuple(_cross_attention(part) for part in parts)
    return Anatomy(
        embed_tokens=embed_tokens,
        layers=tuple(layers),
        attentions=tuple(part.attention for part in parts),
        mlps=tuple(part.mlp for part in parts),
        mixers=tuple(
            tuple(mixer for mixer in part.mixers if mixer is not other)
            for part, other in zip(parts, crossing, strict=True)
        ),
        cross_attentions=crossing,
        kinds=tuple(" + ".join(part.kinds) or "none" for part in parts),
        absent={what: tuple(part.absent.get(what, "") for part in parts) for what in ABSENT},
        ln_final=ln_final if config.ln_final is None else _module(model, config.ln_final),
        lm_head=lm_head,
        inferred=inferred,
        gives_logits=gives_logits,
        width=width,
        heads=heads.pop() if len(heads) == 1 else 0,
    )


def _cross_attention(part: LayerParts) -> Module | None:
    pairs = zip(part.mixers, part.kinds, strict=False)  # what is not known has a kind, and no mixers
    crossing = [mixer for mixer, kind in pairs if kind == "cross-attention"]
    return crossing[0] if len(crossing) == 1 else None


def _infer(model: Module, layers: list[Module] | None) -> tuple[list[Module], Module | None, int, list[LayerParts]]:
    try:
        layers, ln_final, width = find_layers(model, layers)
        return layers, ln_final, width, find_parts(model, layers)
    except CannotInfer as error:
        raise UnknownArchitectureError(_unknown(model, str(error))) from None
    except Exception as error:
        raise UnknownArchitectureError(_unknown(model, f"it cannot be run on token ids alone ({error})")) from error


def rows_of(embedding: Module) -> int:
    """How many tokens an embedding has a row for; 0 where that does not show."""
    rows = getattr(embedding, "num_embeddings", None)
    weight = getattr(embedding, "weight", None)
    if not rows and isinstance(weight, Tensor) and weight.ndim == 2:
        rows = weight.shape[0]
    return int(rows or 0)


def dimensions(config: Any, anatomy: Anatomy) -> Dimensions:
    """The sizes that the modules have, and those that a config names, under whatever name.

    The width is that of the stream, where the embedding or the unembedding has it too. (Else the stream is not plain, as with
    hyper-connections.)
    """

    def first(*names: str) -> Any:
        for name in names:
            try:
                value = getattr(config, name, None)
            except RuntimeError:  # it varies from layer to layer
                value = None
            if value:
                return value
        return None

    varying = len(set(first("num_attention_heads_per_layer") or ())) > 1
    num_heads = None if varying else first("num_attention_heads")
    num_kv_heads = first("num_key_value_heads", "num_kv_heads")
    if first("multi_query") and not first("new_decoder_architecture"):
        num_kv_heads = 1
    head_dim = first("qk_head_dim", "head_dim")
    hidden_size, vocab_size = first("hidden_size"), first("vocab_size")
    widths = {
        getattr(anatomy.embed_tokens, "embedding_dim", None),
        getattr(anatomy.lm_head, "in_features", None),
    }
    if anatomy.width and (not hidden_size or anatomy.width in widths):
        hidden_size = anatomy.width
    hidden_size = hidden_size or getattr(anatomy.embed_tokens, "embedding_dim", None)
    vocab_size = getattr(anatomy.lm_head, "out_features", None) or vocab_size or rows_of(anatomy.embed_tokens)
    if not hidden_size:
        raise UnknownArchitectureError(
            f"{type(config).__name__} has no hidden_size: this is no one transformer (but several, say)."
        )
    return Dimensions(
        num_heads=anatomy.heads or num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or (hidden_size // num_heads if num_heads else None),
        hidden_size=hidden_size,
        vocab_size=vocab_size or None,
    )


def _module(root: Module, path: str) -> Module:
    return root.get_submodule(path)


def _part(model: Module, layer: Module, name: str, i: int) -> Module:
    return _module(model, name.replace("*", str(i))) if "*" in name else _module(layer, name)


def _ends(model: Module, config: ArchConfig) -> tuple[Module, Module | None, bool]:
    """The token embedding, the unembedding, and whether there are logits.

    By the config, else by the model's own word, else as they show.

    (Of an encoder-decoder, and of an encoder that is part of one, that word is of the encoder's embedding, or of one that nobody
    calls.)
    """
    ends: list[Any] = []
    for path, getter in (
        (config.embed_tokens, "get_input_embeddings"),
        (config.lm_head, "get_output_embeddings"),
    ):
        try:
            if path is not None:
                ends.append(_module(model, path))
            elif getter == "get_input_embeddings" and has_decoder(model):
                ends.append(None)
            else:
                own = getattr(model, getter, lambda: None)()
                ends.append(None if getter == "get_input_embeddings" and _has_twin(model, own) else own)
        except NotImplementedError:  # Transformers does not know either
            ends.append(None)
    if isinstance(ends[1], Embedding):  # what an encoder says, that shares its embedding with the decoder's head
        ends[1] = None
    if not all(isinstance(end, Module) for end in ends):
        try:
            found = find_ends(model)
        except Exception as error:
            raise UnknownArchitectureError(
                f"{type(model).__name__} does not say which of its modules is the token embedding or the unembedding, and it "
                f"does not show ({error}). A causal language model is needed; if this is one, name the module in an "
                "ArchConfig (embed_tokens=..., lm_head=...)."
            ) from error
        ends = [end if isinstance(end, Module) else other for end, other in zip(ends, found, strict=False)]
        return ends[0], ends[1], ends[1] is not None or found[2]
    return ends[0], ends[1], True


def _has_twin(model: Module, own: Any) -> bool:
    """Whether another embedding has the weight of the one that the model names, so that either may be what is called."""
    others = [one for one in model.modules() if isinstance(one, Embedding) and one is not own]
    return any(one.weight is getattr(own, "weight", None) for one in others)


def _has(root: Module, path: str) -> bool:
    for name in path.split("."):
        child = root._modules.get(name)
        if child is None:
            return False
        root = child
    return True


def _missing(model: Module, config: ArchConfig) -> list[str]:
    """The paths of the config that the model does not have."""
    paths = [config.layers, config.ln_final, config.embed_tokens, config.lm_head]
    missing = [path for path in paths if path is not None and not _has(model, path)]
    if config.layers is not None and config.layers not in missing:
        for i, layer in enumerate(_module(model, config.layers).children()):
            for name in (config.self_attn, config.mlp):
                if name is not None and "*" in name:
                    path = name.replace("*", str(i))
                    missing += [] if _has(model, path) else [path]
                elif name is not None and not _has(layer, name):
                    missing.append(f"{config.layers}.{i}.{name}")
    return missing


def _tree(model: Module) -> str:
    lines = [
        f"  {path}: {type(module).__name__}"
        for path, module in model.named_modules()
        if path and path.count(".") < 5 and not any(part.isdigit() and part != "0" for part in path.split("."))
    ]
    return "Its modules (of lists, the first entry):\n" + "\n".join(lines[:60])


def _unknown(model: Module, why: str) -> str:
    return (
        f"Where the standard modules of {type(model).__name__} are does not show: {why}. Say so: "
        'StandardizedTransformer(model, arch_config=ArchConfig(layers="...", self_attn="...", mlp="...", '
        f'ln_final="...")). {_tree(model)}'
    )
