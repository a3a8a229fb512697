"""Facts move from the subject to the last token.

Meng et al. (2022), "Locating and Editing Factual Associations in GPT": of all states, those that bring a fact back lie at
the subject's last token in the early layers and at the last token in the late ones; at the subject it is the MLPs' doing, at
the end the attention's. Here: patching between prompts that differ in the subject alone, and the paper's own causal tracing with
noise.

    python studies/facts_move.py [--figure FILE]
"""

import torch
from study import Study
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.methods import activation_patching, causal_tracing, logit_difference, probability
from nnatomy.plots import heat_map

CAPITALS = {"France": "Paris", "Germany": "Berlin", "Greece": "Athens", "Cuba": "Havana"}
FRAME = ["The", " capital", " of", " COUNTRY", " is", " the", " city", " of"]
SUBJECT, LAST = 3, 7  # positions in it
FACTS = [  # (subject, what follows it, answer): five that the model knows well
    ("The Eiffel Tower", " is located in the city of", " Paris"),
    ("The Louvre", " is located in the city of", " Paris"),
    ("Machu Picchu", " is located in the country of", " Peru"),
    ("The Great Pyramid of Giza", " is located in the country of", " Egypt"),
    ("The Sydney Opera House", " is located in the country of", " Australia"),
]
TRACED = range(0, 30, 3)  # layers


def swapped(model: StandardizedTransformer) -> Tensor:
    """What a state of the one prompt brings of its answer into the other, over pairs of countries: (layer, position)."""
    clean = list(CAPITALS)
    other = clean[1:] + clean[:1]
    prompts = {country: "".join(FRAME).replace("COUNTRY", country) for country in CAPITALS}
    metric = logit_difference(
        [f" {CAPITALS[country]}" for country in clean], [f" {CAPITALS[country]}" for country in other], model
    )
    found = activation_patching(
        model,
        clean=[prompts[country] for country in clean],
        corrupted=[prompts[country] for country in other],
        metric=metric,
        positions=list(range(SUBJECT, LAST + 1)),
        progress=False,
    )
    before = torch.zeros(model.num_layers, SUBJECT)  # where the prompts are the same
    return torch.cat([before, found.normalized.mean(0)], dim=1)


def traced(model: StandardizedTransformer, point: str, window: int) -> Tensor:
    """The probability that one clean state brings back, over FACTS: (layer of TRACED, subject's last token and last token)."""
    effects = []
    for subject, rest, answer in FACTS:
        at = len(model.tokenizer(subject)["input_ids"]) - 1
        found = causal_tracing(
            model,
            subject + rest,
            subject=subject,
            metric=probability(answer, model),
            point=point,
            window=window,
            layers=list(TRACED),
            positions=[at, -1],
            samples=4,
            progress=False,
        )
        effects.append(found.effect - found.corrupted)
    return torch.stack(effects).mean(0)


@torch.no_grad()
def main() -> None:
    study = Study(__doc__)
    model = study.model()
    moved = swapped(model)
    middle = moved[:, SUBJECT + 1 : LAST]
    crossing = int((moved[:, LAST] > moved[:, SUBJECT]).nonzero()[0])
    study.check("layers 0 to 7, patched at the subject", moved[:8, SUBJECT].mean(), at_least=0.8)
    study.check("layers 0 to 7, patched at the last token", moved[:8, LAST].mean(), at_most=0.2)
    study.check("layers 25 to 29, patched at the subject", moved[25:, SUBJECT].mean(), at_most=0.2)
    study.check("layers 25 to 29, patched at the last token", moved[25:, LAST].mean(), at_least=0.7)
    study.check("the largest effect at a token between", middle.max(), at_most=0.4)
    study.check("the first layer at which the last token has more of it", crossing, at_least=15, at_most=27)

    states, mlps, attentions = (
        traced(model, point, window)
        for point, window in (
            ("layers_output", 1),
            ("mlps_contribution", 10),
            ("attentions_contribution", 10),
        )
    )
    study.check("traced: a state of layers 0 to 9 at the subject's end", states[:4, 0].mean(), at_least=0.2)
    study.check("traced: at the last token", states[:4, 1].mean(), at_most=0.05)
    study.check("traced: a state of layers 24 and 27 at the subject's end", states[8:, 0].mean(), at_most=0.05)
    study.check("traced: at the last token", states[8:, 1].mean(), at_least=0.5)
    early = study.check("traced: ten MLPs at the subject's end, at best", mlps[:, 0].max(), at_least=0.2)
    study.check("traced: ten attentions there, at best", attentions[:, 0].max(), at_most=early / 3)
    late = study.check("traced: ten attentions at the last token, at best", attentions[:, 1].max(), at_least=0.3)
    study.check("traced: ten MLPs there, at best", mlps[:, 1].max(), at_most=late / 3)
    figure = heat_map(
        moved,
        rows=[str(i) for i in range(model.num_layers)],
        columns=FRAME,
        title="What a state brings of its capital into the other country's prompt",
        value_name="share",
        diverging=True,
    )
    study.finish(figure)


if __name__ == "__main__":
    main()
