"""Attention sinks and massive activations.

Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks": behind the first layers, heads give much of their
attention to the first token, whatever it says; a window of recent tokens works only if it keeps the first ones. Sun et al. (2024),
"Massive Activations in Large Language Models": a few values of the stream, at the first token, are thousands of times as large as
the median; set to zero they break the model, set to their mean over texts they do not.

    python studies/attention_sinks.py [--figure FILE]
"""

from collections.abc import Callable

import torch
from study import TEXTS, Study
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.plots import curves

LENGTH, WINDOW = 44, 12  # tokens
LATER = 12  # the layers from here on


def loss(logits: Tensor, ids: Tensor, start: int = 1) -> float:
    """The mean loss, in nats, of the tokens behind position `start`."""
    nll = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return float(nll[:, start:].mean())


def with_state(
    model: StandardizedTransformer, ids: Tensor, layer: int, change: Callable[[Tensor], None]
) -> tuple[float, float]:
    """The loss, and the attention to the first token in later layers, after a change of one layer's output."""
    with model.trace(ids):
        change(model.layers_output[layer])
        patterns = [model.attention_probabilities[i] for i in range(layer + 1, model.num_layers)]
        logits = model.logits
    return loss(logits, ids), float(torch.stack(patterns)[..., 1:, 0].mean())


def with_window(model: StandardizedTransformer, ids: Tensor, keep_first: bool) -> float:
    """The loss where each query sees the last WINDOW keys alone, or the first key in the place of the oldest of them."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    hidden = query - key >= (WINDOW - keep_first)
    if keep_first:
        hidden[:, 0] = False
    with model.trace(ids):
        for i in range(model.num_layers):
            model.attention_scores[i] = model.attention_scores[i].masked_fill(hidden, -1e9)
        logits = model.logits
    return loss(logits, ids, start=WINDOW)


@torch.no_grad()
def main() -> None:
    study = Study(__doc__)
    model = study.model()
    ids = torch.stack([model.prepare(text)["input_ids"][0, :LENGTH] for text in TEXTS])
    patterns, stream = [], []
    with model.trace(ids):
        for i in range(model.num_layers):
            patterns.append(model.attention_probabilities[i][:, :, 1:].mean((0, 1, 2)))  # (key)
            stream.append(model.layers_output[i])
        logits = model.logits
    whole = loss(logits, ids)
    share = torch.stack(patterns)  # (layer, key)
    study.check(f"attention to the first token, layers {LATER} on", share[LATER:, 0].mean(), at_least=0.4)
    study.check("to the second token", share[LATER:, 1].mean(), at_most=0.1)

    sizes = torch.stack(stream).abs()  # (layer, prompt, seq, hidden)
    median = sizes.flatten(1).median(-1).values
    largest = sizes[:, :, 0].amax((1, 2))
    others = sizes[:, :, 1:].amax((1, 2, 3))
    massive = sizes > torch.clamp(1000 * median, min=100)[:, None, None, None]  # the paper's definition, section 2
    birth = int(massive.flatten(1).any(-1).nonzero()[0])
    places = massive[birth].nonzero()[:, 1:].unique(dim=0)  # (seq, hidden)
    study.check("the largest value of layer 20, in medians", largest[20] / median[20], at_least=1000)
    study.check("the first layer with massive values", birth, at_most=LATER)
    study.check("massive values in that layer, in each text", massive[birth].sum() / len(ids), at_least=1, at_most=4)
    study.check("of these, not at the first token", (places[:, 0] != 0).sum(), at_most=0)

    at = places[:, 1]
    mean = stream[birth][:, 0, at].mean(0)

    def put(position: int, value: Tensor | float) -> Callable[[Tensor], None]:
        def change(hidden: Tensor) -> None:
            hidden[:, position, at] = value

        return change

    study.check("loss of the whole model", whole, at_most=4)
    zeroed, sink = with_state(model, ids, birth, put(0, 0.0))
    study.check("rise with these values at zero", zeroed - whole, at_least=3)
    study.check("with them at their mean", with_state(model, ids, birth, put(0, mean))[0] - whole, at_most=0.1)
    study.check(
        "with the same entries of token 20 at zero",
        with_state(model, ids, birth, put(20, 0.0))[0] - whole,
        at_most=1,
    )
    study.check("attention to the first token with these values at zero", sink)
    full = loss(logits, ids, start=WINDOW)
    recent = study.check(f"rise with a window of {WINDOW} tokens", with_window(model, ids, False) - full, at_least=1)
    study.check(
        f"with the first token and {WINDOW - 1} recent ones",
        with_window(model, ids, True) - full,
        at_most=recent / 3,
    )
    ys = {"first token, largest": largest, "other tokens, largest": others, "median": median}
    figure = curves(
        list(range(model.num_layers)),
        {name: values.tolist() for name, values in ys.items()},
        title="Sizes of the values of the stream, after each layer",
        x_title="layer",
        y_title="absolute value",
    )
    study.finish(figure.update_yaxes(type="log"))


if __name__ == "__main__":
    main()
