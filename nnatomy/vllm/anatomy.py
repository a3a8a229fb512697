"""What the parts of the engine's model are, found by structure and by what one pass shows.

What the engine computes itself (attention over its paged cache, a mixture of experts, the head) is in classes of its own, which tell
what they are; layers are what a list of modules holds around them. No name of an attribute is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.nn import Module, ModuleList

from nnatomy.errors import UnknownArchitectureError
from nnatomy.vllm.recording import Recorder

#: Why the inside of an attention is not to be had where the engine runs classes of Transformers.
AS_A_FUNCTION = (
    "the engine runs this model on the classes of Transformers, and calls its own attention as a function, "
    "where nothing is seen"
)


@dataclass
class Layer:
    """One layer of the model.

    Attributes:
        attention: the module of the layer that its attention is in; None if it has none, or several.
        inner: the engine's own attention in it, which is given queries, keys and values.
        mlp: the module that is the MLP.
        experts: the engine's mixture of experts in that.
        why: by part, why there is none.
    """

    module: Module
    attention: Module | None
    inner: Any
    mlp: Module | None
    experts: Any
    why: dict[str, str]


@dataclass
class Anatomy:
    """The parts of a model.

    Attributes:
        embed_tokens: the token embedding; None if it is not called with the tokens' ids within the model.
        ln_final: the norm that reads what the last layer gives.
        head: what makes logits of what the model gives: the engine's own class for it.
    """

    layers: list[Layer]
    embed_tokens: Module | None
    ln_final: Module | None
    head: Module | None


def attentions_in(module: Module) -> list[Any]:
    """The engine's own attentions, and other layers with a state."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return [one for one in module.modules() if isinstance(one, AttentionLayerBase)]


def has_matrix(module: Module) -> bool:
    """Whether it has a linear map of the engine's, whose weights may be packed in a form of their own."""
    from vllm.model_executor.layers.linear import LinearBase

    return any(isinstance(one, LinearBase) for one in module.modules())


def layers_of(model: Module, recorder: Recorder, width: int) -> list[Module]:
    """The list of modules that holds the engine's attentions, one or more in each; or one whose modules hand on the stream.

    Raises:
        UnknownArchitectureError: if there is none.
    """
    lists = [list(one) for one in model.modules() if isinstance(one, ModuleList)]
    holding = [[child for child in one if attentions_in(child) and child in recorder.calls] for one in lists]
    if not any(holding):  # the engine runs the classes of Transformers, and calls its attentions as functions
        holding = [
            [
                child
                for child in one
                if recorder.streams(child, "input", width) and recorder.streams(child, "output", width)
            ]
            for one in lists
        ]
    if not any(holding):
        raise UnknownArchitectureError(
            f"{type(model).__name__}: no list of modules holds the engine's attentions, so that nobody can tell what its layers are. "
            "Its modules can be read under their own names: nnatomy.Traceable, or the model in Transformers."
        )
    return max(holding, key=len)


def anatomy_of(model: Module, recorder: Recorder, width: int) -> Anatomy:
    """The parts of a model, of which one pass has been recorded."""
    layers = [_layer(module, recorder, width) for module in layers_of(model, recorder, width)]
    return Anatomy(layers, _embedding(recorder), _ln_final(layers, recorder, width), _head(model))


def _layer(module: Module, recorder: Recorder, width: int) -> Layer:
    why: dict[str, str] = {}
    found = attentions_in(module)
    inner = found[0] if len(found) == 1 else None
    attention = None
    if inner is None:
        why["attention"] = f"it has {len(found)} token mixers of the engine's" if found else AS_A_FUNCTION
    else:
        around = [one for one in _around(module, inner) if recorder.streams(one, "output", width)]
        attention = around[0] if around else None
        if attention is None:
            why["attention"] = "no module around the engine's attention gives (tokens, hidden)"
        if not _is_of_heads(inner):
            why["inner"] = f"the engine's {type(inner).__name__} is not given queries, keys and values of heads"
    mlps = [
        child
        for child in module.children()
        if not attentions_in(child)
        and has_matrix(child)
        and recorder.streams(child, "input", width)
        and recorder.streams(child, "output", width)
    ]
    mlp = mlps[0] if len(mlps) == 1 else None
    if mlp is None:
        why["mlp"] = "no module is the MLP" if not mlps else f"{len(mlps)} modules are, none is all of the MLP"
    experts = _experts(mlp)
    return Layer(module, attention, inner, mlp, experts, why)


def _around(layer: Module, inner: Module) -> list[Module]:
    """The modules of a layer that another one is in, the outermost first."""
    return [one for one in layer.modules() if one is not layer and one is not inner and inner in set(one.modules())]


def _is_of_heads(inner: Any) -> bool:
    sizes = (getattr(inner, name, None) for name in ("num_heads", "num_kv_heads", "head_size", "head_size_v"))
    return all(isinstance(size, int) for size in sizes) and not hasattr(inner, "kv_lora_rank")


def _experts(mlp: Module | None) -> Any:
    if mlp is None:
        return None
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    return next((one for one in mlp.modules() if isinstance(one, MoERunnerInterface)), None)


def _embedding(recorder: Recorder) -> Module | None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    called = [one for one in recorder.order if isinstance(one, VocabParallelEmbedding) and recorder.calls[one] == 1]
    return called[0] if called and recorder.streams(called[0], "output", called[0].embedding_dim) else None


def _ln_final(layers: list[Layer], recorder: Recorder, width: int) -> Module | None:
    inside = {one for layer in layers for one in layer.module.modules()}
    last = max(recorder.order.index(layer.module) for layer in layers if layer.module in recorder.calls)
    behind = [one for one in recorder.order[last:] if one not in inside and not list(one.children())]
    return next((one for one in behind if recorder.streams(one, "output", width)), None)


def _head(model: Module) -> Module | None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = [one for one in model.modules() if isinstance(one, LogitsProcessor)]
    return found[0] if len(found) == 1 else None
