"""What `logit_lens` gives: a tensor that knows its prompts, layers and positions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nnatomy.errors import InputError, MissingPackageError, counted
from nnatomy.methods.arguments import whole
from nnatomy.methods.result import Axis, Result

#: So many tokens of each place have their texts in a file.
_NAMED = 10
_QUANTITIES = {"probs": "probability", "logits": "logit", "log_probs": "log probability"}


class LogitLens(Result, Tensor):
    """A tensor of (prompt, layer, vocab) or (prompt, layer, position, vocab), or of one prompt (layer, position, vocab).

    It is used as one: what is computed of it is a plain tensor.

    Attributes:
        output: "probs", "logits" or "log_probs".
        prompts: as texts.
        tokens: by prompt, the text of the token at each position that was asked for.
        by_prompt: whether its first axis is `prompt`.
        names: texts of tokens by their ids, where there is no tokenizer (of a file, or a result of a server).
        tokenizer: gives a token's text, if there is one.
    """

    output: str
    prompts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    by_prompt: bool
    names: dict[int, str]
    tokenizer: Any

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls, values: Tensor, output: str, prompts: tuple[str, ...], tokens: tuple[tuple[str, ...], ...], **more: Any
    ) -> LogitLens:
        """Of a tensor with those axes."""
        local = getattr(values, "local", None)  # a tensor that is at a server is fetched
        found = (values if local is None else local()).as_subclass(cls)
        found.output, found.prompts, found.tokens = output, prompts, tokens
        found.by_prompt, found.names = more.get("by_prompt", True), more.get("names", {})
        found.tokenizer = more.get("tokenizer")
        return found

    def _numbers(self) -> Tensor:
        return self.detach().as_subclass(Tensor)

    def _with(self, values: Tensor) -> LogitLens:
        more = {"by_prompt": self.by_prompt, "names": self.names, "tokenizer": self.tokenizer}
        return self.of(values, self.output, self.prompts, self.tokens, **more)

    def __copy__(self) -> LogitLens:
        return self._with(self._numbers())

    def __deepcopy__(self, memo: dict[int, Any]) -> LogitLens:
        memo[id(self)] = self._with(self._numbers().clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:  # a pickle has the texts of a file, and no tokenizer
        return LogitLens._of_state, (self._state(),)

    @property
    def _has_positions(self) -> bool:
        return self.ndim == 3 + self.by_prompt

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt (but of one prompt by itself), layer, position (but of one alone), vocab."""
        sizes = list(self.shape)
        each = [Axis("prompt", range(sizes.pop(0)))] if self.by_prompt else []
        each.append(Axis("layer", range(sizes.pop(0))))
        if self._has_positions:
            texts = self.tokens[0] if len(self.tokens) == 1 and len(self.tokens[0]) == sizes[0] else None
            each.append(Axis("position", range(sizes.pop(0)), texts))
        return (*each, Axis("vocab", range(sizes.pop())))

    @property
    def title(self) -> str:
        """What it is."""
        return f"Logit lens, {_QUANTITIES[self.output]}"

    @property
    def unit(self) -> str:
        """Of the numbers."""
        return {"probs": "", "logits": "logits", "log_probs": "nats"}[self.output]

    def _places(self, prompt: int, position: int) -> Tensor:
        """One prompt's (layer, vocab) at a position."""
        values, count = self._numbers(), len(self) if self.by_prompt else 1
        if not -count <= prompt < count:
            raise InputError(f"prompt={prompt}: it is of {counted(count, 'prompt')}, 0 to {count - 1}.")
        values = values[prompt] if self.by_prompt else values
        if not self._has_positions:
            return values
        if not -values.shape[1] <= position < values.shape[1]:
            raise InputError(f"position={position}: there are {values.shape[1]}, 0 to {values.shape[1] - 1}.")
        return values[:, position]

    def top(self, k: int = 10, *, layer: int = -1, prompt: int = 0, position: int = -1) -> list[tuple[str, float]]:
        """The `k` tokens with the largest numbers after a layer: [(" Paris", 0.97), ...].

        Args:
            layer: its number; by default the last, which is the model's own prediction.
            prompt, position: the place of these on their axes.

        Raises:
            InputError: for a place that there is not.
        """
        whole(1)("k", k)
        rows = self._places(prompt, position)
        if not -len(rows) <= layer < len(rows):
            raise InputError(f"layer={layer}: the layers are 0 to {len(rows) - 1}.")
        best = rows[layer].float().topk(min(k, rows.shape[-1]))
        return [(self.text(i), x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def text(self, token: int) -> str:
        """The text of a token: its number, where nothing says it."""
        if self.tokenizer is not None:
            return str(self.tokenizer.decode([token]))
        return self.names.get(token, str(token))

    def to_dataframe(self, k: int = 10) -> Any:
        """A pandas table with the `k` tokens with the largest numbers of each place, in rows.

        Raises MissingPackageError if pandas is not installed.
        """
        whole(1)("k", k)
        try:
            import pandas
        except ImportError:
            raise MissingPackageError('Tables are made with pandas: pip install "nnatomy[tables]".') from None
        best = self._numbers().float().topk(min(k, self.shape[-1]))
        axes = self.axes[:-1]
        rows = []
        for at in product(*[range(len(axis.labels)) for axis in axes]):
            place = {axis.name: i for axis, i in zip(axes, at, strict=True)}
            for rank, (token, x) in enumerate(zip(best.indices[at].tolist(), best.values[at].tolist(), strict=True)):
                rows.append({**place, "rank": rank, "token_id": token, "token": self.text(token), "effect": x})
        return pandas.DataFrame(rows)

    def plot(self, prompt: int | None = None) -> Any:
        """A heat map, as a plotly figure: each layer's most probable token, of each prompt, or at each position of one.

        Args:
            prompt: which prompt; where there is one position of each, all by default, and else the first.
        """
        from nnatomy.plots import heat_map

        values = self._numbers()
        if self._has_positions:
            count = len(values) if self.by_prompt else 1
            if not -count <= (prompt or 0) < count:
                raise InputError(f"prompt={prompt}: it is of {counted(count, 'prompt')}, 0 to {count - 1}.")
            values = values[prompt or 0] if self.by_prompt else values
            columns, column_title = list(self.tokens[prompt or 0]), "position"
            which_prompt: int | None = prompt or 0
        else:
            which = range(len(values)) if prompt is None else [prompt]
            which_prompt = prompt
            values = torch.stack([self._places(one, -1) for one in which], 1)
            columns, column_title = [self.prompts[one] for one in which], "prompt"
        best = values.float().max(-1)
        return heat_map(
            best.values,
            rows=[str(layer) for layer in range(len(values))],
            columns=columns or [""] * values.shape[1],
            title=self.heading(which=which_prompt),
            column_title=column_title,
            texts=[[self.text(i) for i in row] for row in best.indices.tolist()],
            value_name=_QUANTITIES[self.output],
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if not hasattr(self, "output"):  # of a copy that torch made
            return repr(self._numbers())
        axes = ", ".join(f"{axis.name} {len(axis.labels)}" for axis in self.axes)
        lines = [f"{self.title}: ({axes})"]
        lines += [f"  {prompt[:60]!r}" for prompt in self.prompts[:1]]
        if len(self.prompts) > 1:
            lines.append(f"  ... of {len(self.prompts)} prompts")
        layers = self._places(0, -1).shape[0] if self.numel() else 0
        step = max(1, layers // 12)
        for layer in [*range(0, layers - 1, step), layers - 1] if layers else []:
            words = ", ".join(f"{text!r} {x:.3g}" for text, x in self.top(3, layer=layer))
            lines.append(f"  L{layer}: {words}")
        return "\n".join(lines)

    # Files.

    def _state(self) -> dict[str, Any]:
        values = self._numbers()
        best = values.float().topk(min(_NAMED, values.shape[-1])).indices.unique().tolist() if values.numel() else []
        names = {token: self.text(token) for token in best}
        return {
            "effect": values,
            "output": self.output,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "by_prompt": self.by_prompt,
            "names": names,
        }

    @classmethod
    def _of_state(cls, state: Mapping[str, Any]) -> LogitLens:
        if state.keys() != {"effect", "output", "prompts", "tokens", "by_prompt", "names"}:
            raise ValueError(f"it has {sorted(state)}")
        if state["output"] not in _QUANTITIES or not isinstance(state["effect"], Tensor):
            raise ValueError("it is no logit lens")
        more = {"by_prompt": bool(state["by_prompt"]), "names": dict(state["names"])}
        return cls.of(state["effect"], state["output"], tuple(state["prompts"]), tuple(state["tokens"]), **more)
