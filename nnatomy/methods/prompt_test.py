"""What `model.test_prompt` gives: how probable each token of an answer is behind a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError, counted
from nnatomy.methods.arguments import whole
from nnatomy.methods.result import Axis, Result


@dataclass(frozen=True, repr=False)
class PromptTest(Result):
    """The answer's tokens, each behind those before it. Its text is the table that `test_prompt` prints.

    Attributes:
        answers: the text of each token of the answer.
        effect: its probability.
        ranks: 1 where no token is more probable.
        top_tokens: by token of the answer, the texts of the most probable ones, the first first.
        top_probabilities: their probabilities.
        tokens: the prompt's tokens, as texts.
        shown: how many of the most probable tokens the table names.
        prompts: the prompt.
    """

    answers: tuple[str, ...]
    effect: Float[Tensor, " answer"]
    ranks: Int[Tensor, " answer"]
    top_tokens: tuple[tuple[str, ...], ...]
    top_probabilities: Float[Tensor, "answer k"]
    tokens: tuple[str, ...]
    shown: int
    prompts: tuple[str, ...] = ()

    quantity = "probability"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """answer: its tokens."""
        return (Axis("answer", self.answers),)

    @property
    def title(self) -> str:
        """What the numbers are."""
        return "Probability of the answer"

    def top(self, k: int = 10, *, answer: int = 0) -> list[tuple[str, float]]:
        """The `k` most probable tokens: [(" Paris", 0.99), ...].

        Args:
            answer: behind how many tokens of the answer; by default behind the prompt itself. -1 is the place of the last.

        Raises:
            InputError: for more tokens than are kept, or a place that there is not.
        """
        whole(1)("k", k)
        kept, count = self.top_probabilities.shape[1], len(self.answers)
        if k > kept:
            raise InputError(
                f"k={k}: the {kept} most probable tokens are kept: test_prompt(..., top={k}) keeps as many."
            )
        if not -count <= answer < count:
            raise InputError(f"answer={answer}: the answer has {counted(count, 'token')}, 0 to {count - 1}.")
        return list(zip(self.top_tokens[answer][:k], self.top_probabilities[answer, :k].tolist(), strict=True))

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each token of the answer: "answer", its "rank", and its probability, "effect"."""
        found = super().to_dataframe()
        found.insert(1, "rank", self.ranks.tolist())
        return found

    def plot(self, title: str | None = None) -> Any:
        """Bars (a plotly figure), one for each token of the answer."""
        from nnatomy.plots import bars

        return bars(self.effect, labels=self.answers, title=self.heading(title), value_name="probability")

    def __repr__(self) -> str:
        lines = [("answer", "rank", "probability", "most probable")]
        for place, (text, p, rank) in enumerate(zip(self.answers, self.effect, self.ranks, strict=True)):
            best = ", ".join(f"{one!r} {q:.1%}" for one, q in self.top(self.shown, answer=place))
            lines.append((repr(text), str(int(rank)), f"{float(p):.1%}", best))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(text.ljust(to) for text, to in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([f"{counted(len(self.tokens), 'token')}: {' '.join(map(repr, self.tokens))}", *table])
