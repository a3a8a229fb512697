"""What type checkers are to refuse: a line with `# wrong` is an error of each of them, and no other is. (It is not run.)"""

from __future__ import annotations

import torch
from torch.nn import Linear

from nnatomy import StandardizedTransformer
from nnatomy.methods import activation_patching, direct_logit_attribution, head_ablation, logit_difference


def users() -> None:
    model = StandardizedTransformer("demo:gpt2")
    vector = torch.ones(model.hidden_size)
    metric = logit_difference(" Paris", " Tokyo", model)

    with model.trace("The capital of France is") as tracer:
        model.layers_output(3)  # wrong
        model.layers_output["3"]  # wrong
        model.layers_output[3] = 0  # wrong
        model.layers_output[2] = [vector]  # wrong
        model.layers_output = vector  # wrong
        model.layers_output[3].nothing()  # wrong
        model.layers_output[:2].mean()  # wrong
        model.steer(2)  # wrong
        model.read(3)  # wrong
        tracer.nothing()  # wrong

    model.edit(3)  # wrong
    model.edit().trace("Japan is in")  # wrong
    model.attach("layers_output[2]", Linear(96, 96), how="added")  # wrong
    model.attach("layers_output[2]", Linear(96, 96), "add")  # wrong
    model.composition_scores(0, 1, by="queries")  # wrong
    model.W_Q["3"]  # wrong
    model.num_layers.nothing()  # wrong
    model.run_with_cache("Japan is in", layers=1.5)  # wrong
    model.trace("Japan is in", early_stop="no")  # wrong
    StandardizedTransformer("demo:gpt2", validate="shape")  # wrong
    StandardizedTransformer("demo:gpt2", validate="shapes")
    activation_patching(model, clean="a", corrupted="b", metric=metric, mode="denoise")  # wrong
    activation_patching(model, clean="a", corrupted="b", metric=metric, point="heads")  # wrong
    activation_patching(model, clean="a", corrupted="b", metric=metric, heads="all")  # wrong
    head_ablation(model, "Japan is in", metric=metric, how="average")  # wrong
    direct_logit_attribution(model, "Japan is in", answer=" Asia", by="heads")  # wrong
