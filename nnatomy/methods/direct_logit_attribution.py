"""Direct logit attribution: a logit as the sum of what each part of the model adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method
from nnatomy.methods.frozen_norms import FrozenNorms
from nnatomy.methods.metrics import Answer, Answers
from nnatomy.methods.points import has
from nnatomy.methods.prompts import plain
from nnatomy.methods.result import Axis, Result, texts_of
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.activation_cache import ActivationCache
from nnatomy.standardized.positions import own_positions
from nnatomy.words import By


@dataclass(frozen=True, repr=False)
class LogitAttribution(Result):
    """A logit, or a difference of two, as a sum.

    Attributes:
        parts: the name of each part: "embeddings", "L3", "L3 attention", "L3H1", "L3 mlp", ..., and last "rest".
        effect: what each adds; their sum over the parts is `logits`.
        logits: the logit, or the difference.
        prompts: as texts.
        metric: of which tokens: "logit of ' Paris' less ' Rome'".
    """

    parts: tuple[str, ...]
    effect: Float[Tensor, "prompt part"]
    logits: Float[Tensor, " prompt"]
    prompts: tuple[str, ...] = ()
    metric: str = "logit"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """prompt, part."""
        return (Axis("prompt", range(len(self.logits))), Axis("part", self.parts))

    @property
    def title(self) -> str:
        """What it is of."""
        return f"Direct logit attribution, {self.metric}"

    @property
    def unit(self) -> str:
        """Of `effect`."""
        return "logits"

    def plot(self, title: str | None = None) -> Any:
        """Bars, the mean over the prompts."""
        from nnatomy.plots import parts

        return parts(self.effect.mean(0), labels=self.parts, title=self.heading(title), value_name="logit")


@method
def direct_logit_attribution(
    model: StandardizedTransformer,
    prompts: Any,
    *,
    answer: Answer,
    wrong: Answer | None = None,
    by: By = "component",
    position: int = -1,
) -> LogitAttribution:
    """What each part of the model adds to a logit, or to the difference of two, by the direct path alone.

    The last layer's stream h is a sum of parts: embeddings, and what each layer's token mixer and MLP add to it. With the
    scale of the final norm held fixed at what it is, a logit is linear in h but for soft caps, so that a part p adds
    d·p, where d is the logit's gradient with respect to h (Elhage et al. 2021, "A Mathematical Framework for Transformer
    Circuits", section "Zero-layer transformers" ff.; Wang et al. 2022, "Interpretability in the Wild", section 3). What a
    part does by way of later layers is not in it.

    Args:
        prompts: what `model.trace` takes; `Prompt`s too.
        answer: whose logit; a token's id, or a string that is one token. One for all prompts or one for each.
        wrong: a token whose logit is subtracted, in the same form.
        by: into what the stream is taken apart. "layer": what each layer changes, on every model that has a stream.
            "component": the token mixer, cross-attention and MLP of each layer, after all norms and multipliers. "head": of
            an attention, each head; what is no head's (a bias) is "L3 attention rest". A norm after the attention is held
            fixed too.
        position: at which of each prompt's own tokens: 0 is its first, -1 its last.

    Returns:
        The parts and what they add, on the CPU, in float32. "rest" is what no part adds: the biases of the final norm and
        the unembedding, and where logits are capped or the head is not linear, what its gradient does not explain.

    Raises:
        InputError: for an answer that is not one token, or a position that a prompt does not have.
        NotInThisModelError: where what a layer's parts add to the stream is not known; the text says why.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import direct_logit_attribution
        >>> model = StandardizedTransformer("demo:llama")
        >>> found = direct_logit_attribution(model, "The capital of France is", answer=" Paris", wrong=" Rome", by="layer")
        >>> found.parts[:2], found.effect.shape, bool(torch.isclose(found.effect.sum(), found.logits[0]))
        (('embeddings', 'L0'), torch.Size([1, 10]), True)
    """
    _check_by(by)
    if by == "head":
        model._shards.refuse_inner_gradients("direct_logit_attribution(by='head')")
    with torch.set_grad_enabled(by == "head"), FrozenNorms(), model.trace(plain(prompts), use_cache=False):
        first = model.layers_input[0]
        rows = torch.arange(len(first))
        own = own_positions(model, "direct_logit_attribution", first.shape[:2])
        columns, _ = own.columns(torch.full_like(rows, position), rows)
        parts = _parts(model, model, by)
        hidden = model.layers_output[-1]
    found = _attributed(model, parts, hidden, columns, answer, wrong)
    return replace(found, prompts=texts_of(model, prompts))


@method
def of_cache(
    cache: ActivationCache,
    answer: Answer,
    wrong: Answer | None = None,
    *,
    by: By = "component",
    position: int = -1,
) -> LogitAttribution:
    """See `ActivationCache.logit_attribution`."""
    _check_by(by)
    if (model := cache.model) is None:
        raise InputError("The cache was loaded without its model: ActivationCache.load(path, model).")
    if by == "head":
        if cache.inputs is None:
            raise InputError(
                "by='head' runs the model on the prompts once more, and this cache does not have them: call "
                "nnatomy.methods.direct_logit_attribution on the prompts. (run_with_cache keeps them, except beside a KV cache.)"
            )
        return direct_logit_attribution(model, cache.inputs, answer=answer, wrong=wrong, by=by, position=position)
    columns = cache.columns(position)
    for accessor in (model.layers_input, model.layers_output):
        accessor.module(0)  # raises where the model has none
    with torch.no_grad():
        parts = _parts(model, cache, by)
    hidden = cache.layers_output[model.num_layers - 1].to(model.device, model.steps_of.dtype)
    found = _attributed(model, parts, hidden, columns, answer, wrong)
    return replace(found, prompts=() if cache.inputs is None else texts_of(model, cache.inputs))


def _check_by(by: str) -> None:
    if by not in ("layer", "component", "head"):
        raise InputError(f"by={by!r}: take 'layer', 'component' or 'head'.")


def _parts(model: StandardizedTransformer, values: Any, by: str) -> list[_Part]:
    """The parts of the last layer's stream; their `values` by name and layer, in a trace or a cache."""
    first = values.layers_input[0]
    parts = [_Part("embeddings", first)]
    for i in range(model.num_layers):
        parts += _read_layer(model, values, i, by) if by != "layer" else ()
        if by == "layer":
            output = values.layers_output[i]
            parts.append(_Part(f"L{i}", output - first.to(output.device)))
            first = output
    return parts


def _attributed(
    model: StandardizedTransformer,
    parts: list[_Part],
    hidden: Float[Tensor, "batch seq hidden"],
    columns: Int[Tensor, " batch"],
    answer: Answer,
    wrong: Answer | None,
) -> LogitAttribution:
    """What each part adds at those columns, of which the last layer's stream is `hidden`."""
    rows = torch.arange(len(columns))
    direction, logits = _direction(model, _at(hidden, columns).detach(), answer, wrong)
    names: list[str] = []
    values: list[Tensor] = []
    for part in parts:
        along = torch.zeros_like(part.added)
        along[rows.to(along.device), columns.to(along.device)] = direction.to(along)
        direct = (part.added * along).detach().float().sum((1, 2))
        if part.heads is not None:
            (gradient,) = torch.autograd.grad(part.added, part.heads, along)
            by_head = (gradient * part.heads).detach().float().sum((1, 3))
            names += [f"{part.name.split()[0]}H{h}" for h in range(by_head.shape[-1])]
            values += by_head.unbind(-1)
            direct -= by_head.sum(-1)
        names.append(part.name if part.heads is None else f"{part.name} rest")
        values.append(direct)
    table = torch.stack([value.cpu() for value in values], -1)
    rest = logits - table.sum(-1)
    effect = torch.cat([table, rest[:, None]], -1)
    return LogitAttribution((*names, "rest"), effect, logits, metric=_metric(model, answer, wrong))


def _metric(model: StandardizedTransformer, answer: Answer, wrong: Answer | None) -> str:
    """ "logit of ' Paris'", "logit of ' Paris' less ' Rome'"; of many answers the first two."""
    right, other = (None if one is None else _named(model, one) for one in (answer, wrong))
    return f"logit of {right}" if other is None else f"logit of {right} less {other}"


def _named(model: StandardizedTransformer, answer: Answer) -> str:
    each: Any = answer.tolist() if hasattr(answer, "tolist") else answer
    several = [each] if isinstance(each, (int, str)) else list(each)
    known = model.tokenizer is not None
    texts = [repr(model.tokenizer.decode([one]) if known and not isinstance(one, str) else one) for one in several]
    return ", ".join(texts[:2]) + (f" ... of {len(texts)}" if len(texts) > 2 else "")


def _at(value: Tensor, columns: Tensor) -> Tensor:
    """Each prompt's value at its column."""
    return value[torch.arange(len(value), device=value.device), columns.to(value.device)]


class _Part(NamedTuple):
    name: str
    added: Float[Tensor, "batch seq hidden"]
    heads: Float[Tensor, "batch seq head dim"] | None = None


def _read_layer(model: StandardizedTransformer, values: Any, i: int, by: str) -> Iterator[_Part]:
    """What one layer adds to the stream, in the order in which it does."""
    mixes, has_mlp = has(model.mixers_contribution, i), has(model.mlps_contribution, i)
    kinds = model.layer_kinds[i].split(" + ")
    crosses = has(model.cross_attentions_contribution, i)
    if crosses:
        kinds.remove("cross-attention")
    if not mixes and not has_mlp:
        model.mixers_contribution.module(i)  # raises, with the reason
    if by == "head" and i in model.attention_layers:
        heads = model.heads_output[i].detach().requires_grad_()
        model.heads_output[i] = heads
        attention = values.attentions_contribution[i]
        yield _Part(f"L{i} attention", attention, heads)
        if kinds != ["attention"]:
            kinds.remove("attention")
            yield _Part(f"L{i} {' + '.join(kinds)}", values.mixers_contribution[i] - attention)
    elif mixes:
        yield _Part(f"L{i} {' + '.join(kinds)}", values.mixers_contribution[i])
    if crosses:
        yield _Part(f"L{i} cross-attention", values.cross_attentions_contribution[i])
    if has_mlp:
        yield _Part(f"L{i} mlp", values.mlps_contribution[i])


def _direction(
    model: StandardizedTransformer,
    hidden: Float[Tensor, "prompt hidden"],
    answer: Answer,
    wrong: Answer | None,
) -> tuple[Float[Tensor, "prompt hidden"], Float[Tensor, " prompt"]]:
    """The gradient of the logit, or of the difference, with the final norm's scale held fixed; and what it is."""
    with torch.enable_grad(), FrozenNorms():
        hidden = hidden.requires_grad_()
        logits = model.project_on_vocab(hidden).float()
        value = Answers(answer, model).of(logits, logits)
        if wrong is not None:
            value = value - Answers(wrong, model).of(logits, logits)
        (direction,) = torch.autograd.grad(value.sum(), hidden)
    return direction.float(), value.detach().cpu()
