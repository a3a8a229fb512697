"""Where the modules are: the parts of each layer, and the ends of the model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from nnatomy.arch_configs import has_decoder, text_config
from nnatomy.validation.near import is_same
from nnatomy.validation.passes import Passes
from nnatomy.validation.reading import Reading


def check_parts(passes: Passes) -> None:
    """Attention, mixers and MLP are parts of their layer, and what has matrices in it is one of these."""
    anatomy, expect = passes.model._anatomy, passes.expect
    parts = {"attentions_output": anatomy.attentions, "mlps_output": anatomy.mlps}
    for i, layer in enumerate(anatomy.layers):
        for name, modules in parts.items():
            module = modules[i]
            if module is not None:
                kind = type(module).__name__
                inside = anatomy.absent["input"][i] or module in set(layer.modules())
                expect(bool(inside), name, i, f"{kind} is no part of the layer")
                expect(_has_matrix(module), name, i, f"{kind} has no matrix")
        if anatomy.mlps[i] is not None and not anatomy.inferred:
            named = {
                *anatomy.mixers[i],
                anatomy.cross_attentions[i],
                anatomy.attentions[i],
                anatomy.mlps[i],
            } - {None}
            inside = {one for part in named for one in part.modules()}
            beside = [
                path
                for path, module in layer.named_modules()
                if module not in inside and any(p.ndim > 1 for p in module.parameters(recurse=False))
            ]
            what = f"{', '.join(beside)} of the layer is in no mixer and no MLP"
            expect(not beside, "mlps_output", i, what)


def check_ends(passes: Passes, reading: Reading) -> None:
    """The names that belong to no layer: what they take and give."""
    model, seen, expect = passes.model, reading.seen, passes.expect
    anatomy = model._anatomy
    embed, head, norm = anatomy.embed_tokens, anatomy.lm_head, anatomy.ln_final
    config = text_config(model.steps_of)
    counts = {n for n in (getattr(config, name, None) for name in ("num_hidden_layers", "num_layers")) if n}
    what = f"{model.num_layers} of the config's {max(counts, default=0)} are gone through"
    expect(not counts or model.num_layers in counts, "layers", None, what)
    given = [arg for value in seen.of(embed, "input") for arg in tree_leaves(value)]
    ids = passes.inputs.get("decoder_input_ids", passes.inputs.get("input_ids"))
    if ids is not None:
        reads = any(isinstance(arg, Tensor) and is_same(arg.to(ids), ids) for arg in given)
        expect(reads, "token_embeddings", None, f"{type(embed).__name__} is not given the tokens' ids")
    if has_decoder(model.steps_of):
        calls = len(seen.of(embed, "input"))
        expect(calls == 1, "token_embeddings", None, f"{type(embed).__name__} is called {calls} times")
    if head is not None:
        widths = [value.shape[-1] for value in seen.of(head, "output") if isinstance(value, Tensor)]
        tokens = reading.logits.shape[-1]
        what = f"{type(head).__name__} does not give a number for each of {tokens} tokens"
        expect(any(width >= tokens for width in widths), "lm_head", None, what)
    last = model.layers_output.modules[-1]
    if norm is not None and last is not None and len(seen.of(last, "output")) == 1:
        gives = model.layers_output.get(seen.only(last, "output"))
        read = [arg for value in seen.of(norm, "input") for arg in tree_leaves(value)]
        right = any(isinstance(arg, Tensor) and is_same(arg, gives) for arg in read)
        expect(right, "ln_final", None, f"{type(norm).__name__} does not read layers_output[-1]")


def _has_matrix(module: Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())
