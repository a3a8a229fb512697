"""Induction heads, and what repeated text costs without them.

Olsson et al. (2022), "In-context Learning and Induction Heads": some heads attend from a token to what followed it when it
last occurred (prefix matching, their section "Argument 1"), and where these are cut out the model no longer foresees repeated text.

Heads are chosen on other sequences than they are judged on. The control is as many heads drawn at random out of the others.

    python studies/induction_heads.py [--figure FILE]
"""

import random

import torch
from study import Study
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.plots import curves

HALF = 30  # random tokens, which are then repeated
HEADS = [(17, 3), (17, 4), (17, 5), (18, 6)]  # (layer, head): found on this model before, and to be found again
DRAWS = 5

Heads = list[tuple[int, int]]


def repeated(model: StandardizedTransformer, seed: int, count: int = 4) -> Tensor:
    """Sequences of random tokens, each followed by itself: (prompt, 2 * HALF)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(1000, model.vocab_size, (count, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def prefix_matching(model: StandardizedTransformer, ids: Tensor) -> Tensor:
    """How much each head attends to the token behind the earlier occurrence: (layer, head)."""
    with model.trace(ids):
        patterns = torch.stack(model.attention_probabilities[:])  # (layer, prompt, head, query, key)
    query = torch.arange(HALF, 2 * HALF)
    return patterns[..., query, query - HALF + 1].mean(dim=(1, 3))


def losses(model: StandardizedTransformer, ids: Tensor, ablated: Heads) -> Tensor:
    """The loss at each position, in nats, with the mean put in the place of what some heads give: (position)."""
    with model.trace(ids):
        for layer in sorted({layer for layer, _ in ablated}):
            heads = [head for where, head in ablated if where == layer]
            output = model.heads_output[layer]  # (prompt, seq, head, head_dim)
            output[:, :, heads] = output[:, :, heads].mean(dim=(0, 1), keepdim=True)
        logits = model.logits
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(0)


def gap(loss: Tensor) -> float:
    """The mean loss on the repetition, whose first token cannot be foreseen."""
    return float(loss[HALF:].mean())


@torch.no_grad()
def main() -> None:
    study = Study(__doc__)
    model = study.model()
    scores = prefix_matching(model, repeated(model, seed=1))
    best = [divmod(int(i), model.num_heads) for i in scores.flatten().topk(len(HEADS) + 1).indices]
    study.check(
        "of L17H3 to L17H5 and L18H6, among the five best heads", len(set(best) & set(HEADS)), at_least=4
    )
    study.check("the least prefix matching score of these four", min(scores[head] for head in HEADS), at_least=0.4)
    study.check("the median score of all heads", scores.median(), at_most=0.05)

    ids = repeated(model, seed=2)
    others = [(i, h) for i in range(model.num_layers) for h in range(model.num_heads) if (i, h) not in best]
    draw = random.Random(0)
    whole = losses(model, ids, [])
    cut = losses(model, ids, HEADS)
    controls = [losses(model, ids, draw.sample(others, len(HEADS))) for _ in range(DRAWS)]
    control = torch.stack(controls).mean(0)
    study.check("loss on the first half, whole model", whole[: HALF - 1].mean(), at_least=9)
    study.check("loss on the second half, whole model", gap(whole), at_most=4)
    rise = study.check("rise without the four induction heads", gap(cut) - gap(whole), at_least=3)
    most = max(gap(one) - gap(whole) for one in controls)
    study.check(f"the largest rise without four random heads, of {DRAWS} draws", most, at_most=rise / 2)
    study.check(
        "change of the first half's loss without the induction heads",
        abs(cut[: HALF - 1].mean() - whole[: HALF - 1].mean()),
        at_most=1,
    )
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
