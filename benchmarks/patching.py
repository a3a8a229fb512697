"""Activation patching of the residual stream over layers and positions: nnatomy, one forward pass for each patch by plain hooks,
and with each peer that is installed.

    python benchmarks/patching.py [--json FILE] [--rounds N]

Random models of GPT-2's width, two prompts of 8 tokens. nnsight is measured in both ways to write it: a trace for each
patch, and one for each layer with its patches as rows. TransformerLens runs its own `generic_activation_patch`, over
a model given the same weights. The floor is what nobody can do without who runs each patch from its layer and position on: the
layers behind it, called by themselves. The rest is as in `tables.py`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from measuring import hooked, nnsight, transformer_lens
from tables import Task, main
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from words import make_tokenizer

from nnatomy import StandardizedTransformer
from nnatomy.methods import activation_patching, logit_difference

LENGTH = 8
METRIC = logit_difference(5, 9)


def task(layers: int) -> Task:
    """Each contender gives the effect: (layer, position)."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    hf = GPT2LMHeadModel(config).eval()
    clean, corrupted = torch.randint(1, 50_000, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    blocks = hf.transformer.h
    model = StandardizedTransformer(hf)

    def ours() -> Tensor:
        found = activation_patching(model, clean=clean, corrupted=corrupted, metric=METRIC, progress=False)
        assert found.shortcut
        return found.effect

    def hooks() -> Tensor:
        *kept, _ = hooked(list(blocks), lambda: hf(clean[None], use_cache=False))
        effect = torch.zeros(layers, LENGTH)
        for i, block in enumerate(blocks):
            for position in range(LENGTH):

                def put(_module: nn.Module, _args: Any, output: Tensor, i: int = i, position: int = position) -> Tensor:
                    output = output.clone()
                    output[:, position] = kept[i][:, position]
                    return output

                handle = block.register_forward_hook(put)
                effect[i, position] = METRIC(hf(corrupted[None], use_cache=False).logits[:, -1])[0]
                handle.remove()
        return effect

    def floor() -> None:
        hidden = torch.randn(LENGTH, LENGTH, config.n_embd)
        for i in range(layers):
            for block in blocks[i + 1 :]:
                block(hidden)

    contenders: dict[str, Any] = {"ours": ours, "hooks": hooks}
    if nnsight is not None:
        contenders |= with_nnsight(hf, clean, corrupted)
    if transformer_lens is not None:
        contenders["TransformerLens"] = with_transformer_lens(hf, clean, corrupted)
    targets = dict.fromkeys(("hooks", "nnsight", "TransformerLens"), 6.0)
    return Task(contenders, floor, targets)


def with_nnsight(hf: GPT2LMHeadModel, clean: Tensor, corrupted: Tensor) -> dict[str, Any]:
    """A trace for each patch, and one for each layer."""
    sight = nnsight.NNsight(copy.deepcopy(hf))  # a model of its own: it puts wrappers on the modules for good
    layers = sight.transformer.h

    def recorded() -> list[Tensor]:
        with sight.trace(clean[None], use_cache=False):
            kept = nnsight.save([])
            for layer in layers:
                kept.append(layer.output.clone())
        return kept

    def single() -> Tensor:
        kept = recorded()
        effect = torch.zeros(len(layers), LENGTH)
        for i in range(len(layers)):
            for position in range(LENGTH):
                with sight.trace(corrupted[None], use_cache=False):
                    layers[i].output[:, position] = kept[i][:, position]
                    logits = sight.output.logits[:, -1].save()
                effect[i, position] = METRIC(logits)[0]
        return effect

    def batched() -> Tensor:
        kept = recorded()
        rows = corrupted.expand(LENGTH, LENGTH)
        at = torch.eye(LENGTH, dtype=torch.bool)[:, :, None]
        effect = []
        for i in range(len(layers)):
            with sight.trace(rows, use_cache=False):
                layers[i].output = torch.where(at, kept[i], layers[i].output)
                logits = sight.output.logits[:, -1].save()
            effect.append(METRIC(logits))
        return torch.stack(effect)

    return {"nnsight": single, "nnsight, batched": batched}


def with_transformer_lens(hf: GPT2LMHeadModel, clean: Tensor, corrupted: Tensor) -> Any:
    """Its own sweep over layers and positions."""
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("gpt2", hf_model=copy.deepcopy(hf), tokenizer=make_tokenizer())
    patching.tqdm = partial(patching.tqdm, disable=True)

    def effect() -> Tensor:
        _, cache = bridge.run_with_cache(clean[None])
        return patching.generic_activation_patch(
            bridge,
            corrupted[None],
            cache,
            lambda logits: METRIC(logits[:, -1])[0],
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="resid_post",
            index_axis_names=("layer", "pos"),
        )

    return effect


if __name__ == "__main__":
    main(__doc__, {f"{layers} x {LENGTH}": partial(task, layers) for layers in (12, 6)}, rounds=7)
