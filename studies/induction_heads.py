"""Induction heads, and what repeated text costs without them.

Olsson et al. (2022), "In-context Learning and Induction Heads": some heads attend from a token to what followed it when it
last occurred (prefix matching, their section "Argument 1"), and where these are cut out the model no longer foresees repeated text.

Heads are chosen on other sequences than they are judged on. The control is as many heads drawn at random out of the others; the
previous-token head, which the induction heads read (the other half of the paper's circuit), is not among these but cut out by itself.

    python studies/induction_heads.py [--figure FILE]
"""

import random

import torch
from study import Study
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.plots import curves

HALF = 40  # random tokens, which are then repeated
HEADS = [
    (17, 3),
    (17, 4),
    (17, 5),
    (18, 6),
]  # (layer, head): found on this model before, and to be found again
DRAWS = 5

Heads = list[tuple[int, int]]


def repeated(model: StandardizedTransformer, seed: int, count: int = 4) -> Tensor:
    """Sequences of random tokens, each followed by itself: (prompt, 2 * HALF)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1000, model.vocab_size, (count, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def attention_back(model: StandardizedTransformer, ids: Tensor, distance: int) -> Tensor:
    """How much each head attends to the token so far back, from the second half: (layer, head)."""
    with model.trace(ids):
        patterns = torch.stack(model.attention_probabilities[:])  # (layer, prompt, head, query, key)
    query = torch.arange(HALF, 2 * HALF)
    return patterns[..., query, query - distance].mean(dim=(1, 3))


def losses(model: StandardizedTransformer, ids: Tensor, ablated: Heads) -> Tensor:
    """The loss at each position, in nats, with the mean put in the place of what some heads give: (position)."""
    with model.trace(ids):
        for layer in sorted({layer for layer, _ in ablated}):
            at = [head for where, head in ablated if where == layer]
            output = model.heads_output[layer]  # (prompt, seq, head, head_dim)
            output[:, :, at] = output[:, :, at].mean(dim=(0, 1), keepdim=True)
        logits = model.logits
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(0)


def heads(scores: Tensor, count: int) -> Heads:
    """Those with the highest scores."""
    return [divmod(int(i), scores.shape[1]) for i in scores.flatten().topk(count).indices]


@torch.no_grad()
def main() -> None:
    study = Study(__doc__)
    model = study.model()
    scores = attention_back(model, repeated(model, seed=1), HALF - 1)  # prefix matching
    best = heads(scores, 8)
    study.check("of L17H3 to L17H5 and L18H6, among the eight best heads", len({*best} & {*HEADS}), at_least=4)
    study.check("their least prefix matching score", min(scores[head] for head in HEADS), at_least=0.3)
    study.check("the median score of all heads", scores.median(), at_most=0.05)
    backward = attention_back(model, repeated(model, seed=1), 1)
    (previous,) = heads(backward, 1)
    study.check(f"previous-token attention of L{previous[0]}H{previous[1]}", backward[previous], at_least=0.7)

    ids = repeated(model, seed=2)
    every = heads(scores, scores.numel())
    others = [head for head in every if head not in (*best, previous)]
    draw = random.Random(0)
    whole, cut, without = (losses(model, ids, ablated) for ablated in ([], HEADS, [previous]))
    controls = torch.stack([losses(model, ids, draw.sample(others, len(HEADS))) for _ in range(DRAWS)])
    first, second = slice(HALF - 1), slice(HALF, None)  # the repetition's first token cannot be foreseen
    start = float(whole[second].mean())
    study.check("loss on the first half", whole[first].mean(), at_least=9)
    study.check("loss on the second half", start, at_most=6)
    rise = study.check("its rise without the four induction heads", cut[second].mean() - start, at_least=2.5)
    study.check("without the previous-token head alone", without[second].mean() - start, at_least=2.5)
    rises = controls[:, second].mean(1) - start
    study.check(f"without four random heads, mean of {DRAWS} draws", rises.mean(), at_most=rise / 5)
    study.check("the largest of these", rises.max(), at_most=rise / 2)
    first_rise = cut[first].mean() - whole[first].mean()
    study.check("rise of the first half's loss without the induction heads", first_rise, at_most=0.5)
    control = controls.mean(0)
    ys = {"whole model": whole, "without four random heads": control, "without four induction heads": cut}
    study.finish(
        curves(
            list(range(1, 2 * HALF)),
            {name: loss.tolist() for name, loss in ys.items()},
            title=f"Loss on {HALF} random tokens and their repetition",
            x_title="position of the token",
            y_title="loss (nats)",
        )
    )


if __name__ == "__main__":
    main()
