"""What the logit lens says of every position of a text, without room for layer x position x vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.methods.arguments import method
from nnatomy.methods.logit_lens import Lens
from nnatomy.methods.metrics import Spelling, token_ids
from nnatomy.methods.prompts import get_first_tokens, plain, token_texts
from nnatomy.methods.result import Axis, Result, headed
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import ids_of, positions_from_end

_PLOTTED = ("probability", "kl", "entropy", "target_probability", "target_rank")


@dataclass(frozen=True, repr=False)
class LensStatistics(Result):
    """By prompt, layer and position; the last position is each prompt's last token. On the CPU.

    Where a shorter prompt has no token, numbers are NaN, and ranks and token ids -1.

    Attributes:
        kl: how far the layer is from the end: the divergence KL(model's own distribution || the layer's), in nats.
        entropy: of the layer's distribution, in nats.
        target_tokens: the target at each position.
        target_probability: its probability.
        target_rank: how many tokens are more probable than it.
        top_tokens: the most probable tokens, the first first.
        top_probabilities: their probabilities.
        tokens: the prompts' own tokens, as texts.
        texts: the text of each token id in `top_tokens` and `target_tokens`.
    """

    kl: Float[Tensor, "prompt layer position"]
    entropy: Float[Tensor, "prompt layer position"]
    target_tokens: Int[Tensor, "prompt position"]
    target_probability: Float[Tensor, "prompt layer position"]
    target_rank: Int[Tensor, "prompt layer position"]
    top_tokens: Int[Tensor, "prompt layer position k"]
    top_probabilities: Float[Tensor, "prompt layer position k"]
    tokens: list[list[str]]
    texts: dict[int, str]

    quantity = "target probability"

    @property
    def effect(self) -> Float[Tensor, "prompt layer position"]:
        """`target_probability`."""
        return self.target_probability

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt, layer, position."""
        prompts, layers, positions = map(range, self.target_probability.shape)
        texts = self.tokens[0] if len(self.tokens) == 1 and len(self.tokens[0]) == len(positions) else None
        return (Axis("prompt", prompts), Axis("layer", layers), Axis("position", positions, texts))

    @property
    def title(self) -> str:
        """What it is."""
        return "Lens statistics, target probability"

    @property
    def prompts(self) -> tuple[str, ...]:
        """Their tokens, joined."""
        return tuple("".join(one) for one in self.tokens)

    def plot(
        self,
        value: str = "probability",
        prompt: int = 0,
    ) -> Any:
        """A heat map (a plotly Figure) over layers and positions, with each cell's most probable token in it.

        Args:
            value: what the colour shows: "probability" (that of the token in the cell), "kl", "entropy", "target_probability" or
                "target_rank".
            prompt: which prompt.

        Raises:
            InputError: if there is no such value or prompt.
        """
        from nnatomy.plots import heat_map

        if value not in _PLOTTED:
            raise InputError(f"value={value!r}: it is one of {', '.join(map(repr, _PLOTTED))}.")
        if not -len(self.tokens) <= prompt < len(self.tokens):
            raise InputError(f"prompt={prompt}: there are {len(self.tokens)}, from 0 on.")
        count = len(self.tokens[prompt])
        values = self.top_probabilities[..., 0] if value == "probability" else getattr(self, value)
        values = values[prompt, :, -count:].float()
        tokens = self.top_tokens[prompt, :, -count:]
        probabilities = self.top_probabilities[prompt, :, -count:]
        hover = [
            [
                "\n".join(f"{self.texts[i]!r} {p:.3f}" for i, p in zip(*cell, strict=True))
                for cell in zip(*row, strict=True)
            ]
            for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)
        ]
        return heat_map(
            values,
            rows=[str(layer) for layer in range(len(values))],
            columns=self.tokens[prompt],
            title=headed(f"Lens statistics, {value.replace('_', ' ')}", self._prompts_of(prompt)),
            texts=[[self.texts[i] for i in row] for row in tokens[..., 0].tolist()],
            hover=hover,
            value_name=value.replace("_", " "),
        )


@method
@torch.no_grad()
def lens_statistics(
    model: StandardizedTransformer,
    prompts: Any,
    *,
    targets: str | int | Sequence[str | int] | None = None,
    next_tokens: bool = False,
    top_k: int = 5,
    chunk_size: int = 1024,
    lens: Lens | None = None,
) -> LensStatistics:
    """The logit lens (nostalgebraist 2020) at every position, reduced to a few numbers a position.

    The head is applied to a few positions at a time, so that logits of `chunk_size` rows are all that is ever there.

    Args:
        prompts: what `model.trace` takes, or `Prompt`s. Of an encoder-decoder the positions are those that the decoder reads.
        targets: the token that is followed: an id or a text (of which the first token counts), one for all
            prompts or one each. By default what the model itself finds most probable at each position.
        next_tokens: follow the token that comes next in the prompt; at the last position, there is none.
        top_k: how many of the most probable tokens are kept.
        chunk_size: how many rows (a layer at a position) go through the head at once; at least all layers of one position.
        lens: what each layer's stream goes through before the head, such as a `TunedLens`.

    Raises:
        InputError: if there are not as many targets as prompts, both `targets` and `next_tokens` are given, or the prompts
            are embeddings.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import lens_statistics
        >>> model = StandardizedTransformer("demo:llama")
        >>> found = lens_statistics(model, "The capital of France is", targets=" Paris")
        >>> found.kl.shape, int(found.target_rank[0, -1, -1]), found.texts[int(found.top_tokens[0, -1, -1, 0])]
        (torch.Size([1, 8, 5]), 0, ' Paris')
    """
    inputs = model.prepare(plain(prompts))
    ids = ids_of(inputs)
    if ids is None:
        raise InputError("lens_statistics names the tokens of its prompts: give texts or token ids, not inputs_embeds.")
    if top_k > model.vocab_size:
        raise InputError(f"top_k={top_k}: the model has {model.vocab_size} tokens.")
    where = positions_from_end(inputs, "all")
    ids = ids.cpu()
    length = max(map(len, where))
    given, spellings = _targets(model, targets, next_tokens, ids, where)
    with model.trace(**inputs, use_cache=False):
        stream = model.layers_output[:]
    layers, device = len(stream), model.device

    def empty(filling: int | float, *shape: int) -> Tensor:
        return torch.full((len(where), *shape), filling)

    kl, entropy, probability = (empty(torch.nan, layers, length) for _ in range(3))
    rank, target_tokens = empty(-1, layers, length), empty(-1, length)
    top_tokens, top_probabilities = (empty(filling, layers, length, top_k) for filling in (-1, torch.nan))
    for prompt, positions in enumerate(where):
        # A prompt's positions here count from the end of the longest prompt, there from the end of the batch.
        for start in range(0, len(positions), max(1, chunk_size // layers)):
            chunk = slice(start, start + max(1, chunk_size // layers))
            there = positions[chunk]
            here = torch.arange(length - len(positions), length)[chunk]
            hidden = torch.stack([h[prompt, there].to(device) for h in stream], dim=1)
            logits = model.project_on_vocab(hidden if lens is None else lens(hidden)).float().transpose(0, 1)
            if (spelling := spellings[prompt]) is not None and start + len(there) == len(positions):
                spelling.compare(logits[-1, -1:])
            log_probs = logits.log_softmax(-1)
            probs = log_probs.exp()
            last, last_probs = log_probs[-1], probs[-1]
            target = logits[-1].argmax(-1).cpu() if given is None else given[prompt][chunk]
            index = target.clamp(min=0).to(logits.device).expand(layers, -1)[..., None]
            none = target < 0
            difference = torch.where(last_probs > 0, last_probs * (last - log_probs), 0)
            kl[prompt, :, here] = difference.sum(-1).cpu()
            entropy[prompt, :, here] = torch.special.entr(probs).sum(-1).cpu()
            target_tokens[prompt, here] = target
            probability[prompt, :, here] = probs.gather(-1, index)[..., 0].cpu().masked_fill(none, torch.nan)
            above = (logits > logits.gather(-1, index)).sum(-1).cpu()
            rank[prompt, :, here] = above.masked_fill(none, -1)
            best = probs.topk(top_k, dim=-1)
            top_tokens[prompt, :, here] = best.indices.cpu()
            top_probabilities[prompt, :, here] = best.values.cpu()
    named = torch.cat([top_tokens.flatten(), target_tokens.flatten()]).unique()
    known = named[named >= 0].tolist()
    return LensStatistics(
        kl,
        entropy,
        target_tokens,
        probability,
        rank,
        top_tokens,
        top_probabilities,
        [token_texts(model, ids[i, positions]) for i, positions in enumerate(where)],
        dict(zip(known, token_texts(model, known), strict=True)),
    )


def _targets(
    model: StandardizedTransformer,
    targets: str | int | Sequence[str | int] | None,
    next_tokens: bool,
    ids: Int[Tensor, "prompt seq"],
    where: list[Tensor],
) -> tuple[list[Tensor] | None, list[Spelling | None]]:
    """The target at each position of each prompt, -1 where there is none; None for the model's own. And how they are spelled."""
    as_they_are: list[Spelling | None] = [None] * len(where)
    if next_tokens:
        if targets is not None:
            raise InputError("Give targets or next_tokens=True, not both.")
        return [torch.cat([ids[i, one[1:]], torch.tensor([-1])]) for i, one in enumerate(where)], as_they_are
    if targets is None:
        return None, as_they_are
    each: list[Any] = [targets] * len(where) if isinstance(targets, (str, int)) else list(targets)
    if len(each) != len(where):
        raise InputError(
            f"{counted(len(where), 'prompt')} and {counted(len(each), 'target')}: give one for all, or one each."
        )
    tokens = [get_first_tokens(one, model, True)[0] if isinstance(one, str) else one for one in each]
    tokens = token_ids(list(tokens), model).tolist()
    spellings = [
        Spelling.of(one, token, model) if isinstance(one, str) else None
        for one, token in zip(each, tokens, strict=True)
    ]
    return [torch.full((len(one),), token) for one, token in zip(where, tokens, strict=True)], spellings
