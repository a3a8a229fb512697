"""The logit lens against the tuned lens.

Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens": translated by an affine map trained for
each layer, the states say what the model will say far better than as they are (nostalgebraist's logit lens), in every layer, and
the better the later the layer.

The model writes the texts that the lens is trained on; both are compared on texts that people have written. The first token is
left out: it holds the massive activations of `attention_sinks.py`. The training is short: some hundred tokens.

    python studies/lenses.py [--figure FILE]
"""

from study import TEXTS, Study
from torch import Tensor
from torch.optim import Adam, Optimizer

from nnatomy import StandardizedTransformer
from nnatomy.methods import TunedLens, lens_statistics
from nnatomy.plots import curves

BEGINNINGS = (
    "The history of", "In the kitchen", "Once upon a time", "The theory of", "To learn a language", "The river", "Most animals",
    "A good teacher", "The city was", "Scientists have found", "She said that", "In mathematics", "The weather in",
    "Many people think", "The first step", "Doctors say that",
)  # fmt: skip
TOKENS, STEPS, BATCH = 18, 10, 3
LETTERS = 110  # of each text that the lenses are compared on


def written(model: StandardizedTransformer) -> list[str]:
    """Two texts that the model goes on with from each beginning, sampled."""
    tokens = model.generate([*BEGINNINGS] * 2, max_new_tokens=TOKENS, do_sample=True).run()
    return model.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def optimizer(parameters: list[Tensor]) -> Optimizer:
    """Adam; a translation may move further in a step than each entry of its matrix."""
    weight, bias = parameters
    return Adam([{"params": [weight], "lr": 1e-3}, {"params": [bias], "lr": 0.05}])


def divergence(model: StandardizedTransformer, lens: TunedLens | None = None) -> Tensor:
    """KL(model || lens) by layer in nats, without the first token."""
    return lens_statistics(model, [text[:LETTERS] for text in TEXTS], lens=lens).kl[:, :, 1:].nanmean(dim=(0, 2))


def main() -> None:
    study = Study(__doc__)
    model = study.model()
    logit = divergence(model)
    lens = TunedLens.train(model, written(model), steps=STEPS, batch_size=BATCH, optimizer=optimizer)
    tuned = divergence(model, lens)
    early = slice(model.num_layers - 1)  # the last layer is the model's own prediction in both
    study.check("KL of the logit lens, mean over layers but the last", logit[early].mean())
    study.check("KL of the tuned lens, as a share of that", tuned[early].mean() / logit[early].mean(), at_most=0.7)
    study.check("layers at which the tuned lens is nearer, of 29", (tuned < logit)[early].sum(), at_least=24)
    study.check("KL of both at the last layer", (tuned[-1] + logit[-1]).abs(), at_most=1e-4)
    for layer in (5, 15, 25):
        study.check(f"logit lens at layer {layer}", logit[layer])
        study.check(f"tuned lens at layer {layer}", tuned[layer], at_most=float(logit[layer]))
    study.finish(
        curves(
            list(range(model.num_layers)),
            {"logit lens": logit.tolist(), "tuned lens": tuned.tolist()},
            title="How far each layer's prediction is from the model's",
            x_title="layer",
            y_title="KL (nats)",
        )
    )


if __name__ == "__main__":
    main()
