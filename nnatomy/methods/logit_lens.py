"""The logit lens: what the model would predict, were each layer its last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nnatomy.errors import InputError
from nnatomy.methods.arguments import method
from nnatomy.methods.by_length import Part, by_length
from nnatomy.methods.lens_result import LogitLens
from nnatomy.methods.packed_rows import NotPackedError, packed
from nnatomy.methods.patched_runs import NOT_THERE, is_close
from nnatomy.methods.prompts import plain, token_texts
from nnatomy.methods.result import texts_of
from nnatomy.names import Name
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.accessors import read_together
from nnatomy.standardized.positions import ids_of, positions_from_end

Lens = Callable[[Float[Tensor, "*rows layer hidden"]], Float[Tensor, "*rows layer hidden"]]
Values = Float[Tensor, "prompt layer *position vocab"] | list[Float[Tensor, "layer position vocab"]]

#: From logits to what is asked for, written to the place for it.
_OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "probs": lambda logits, place: torch.softmax(logits, -1, out=place),
    "logits": lambda logits, place: place.copy_(logits),
    "log_probs": lambda logits, place: torch.log_softmax(logits, -1, out=place),
}
#: How many logits there are at once, for which the head is read once: 160 MB in float32.
_LOGITS = 40_000_000

_log = logging.getLogger(__name__)


@method
@torch.no_grad()
def logit_lens(
    model: StandardizedTransformer,
    prompts: Any,
    *,
    positions: Literal["last", "all"] | int | Sequence[int] = "last",
    output: Literal["probs", "logits", "log_probs"] = "probs",
    return_inv_logits: bool = False,
    lens: Lens | None = None,
    batch_size: int | None = None,
) -> Values | tuple[Values, Values]:
    """The next-token probabilities read off after each layer.

    The logit lens of nostalgebraist ("interpreting GPT: the logit lens", 2020): the residual stream
    after a layer goes through the model's own head (final norm, unembedding, and whatever caps and scales
    the model has), so that the last layer's row is the model's prediction. All layers of a batch are
    one product with the unembedding. For a whole text, `lens_statistics` needs no room for the vocabulary.

    Args:
        prompts: what `model.trace` takes, or `Prompt`s.
        positions: "last"; one number or several, counted in each prompt (0 is its first token, -1 its last);
            or "all".
        output: probabilities, logits, or logarithms of probabilities.
        return_inv_logits: give also the same of the negated state: the final norm's output with its sign changed, through
            all that follows it in the model's head (so caps and scales apply, and a bias keeps its sign). It shows what
            the state speaks against.
        lens: what each layer's stream goes through before the head, such as a `TunedLens`.
        batch_size: how many prompts, of similar length, run at once; by default such that they have 1024 tokens at
            most, 40 of them padding. Short ones of many lengths then share rows, on a model that keeps them apart.

    Returns:
        (prompt, layer, vocab) for one position, (prompt, layer, position, vocab) for several, and for "all" a list with
        (layer, position, vocab) for each prompt, without padding; on the CPU. With `return_inv_logits` two of these. Each is
        a `LogitLens`: a tensor, with `plot`, `top`, `to_dataframe`, `save` and a text that shows the best tokens of each layer.

    Raises:
        InputError: if a prompt has no such position.
        NotInThisModelError: if the head cannot be applied, or has no norm whose output could be negated.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import logit_lens
        >>> model = StandardizedTransformer("demo:llama")
        >>> probs = logit_lens(model, ["The capital of France is", "The capital of Japan is"])
        >>> probs.shape[:2], [model.tokenizer.decode(i) for i in probs[:, -1].argmax(-1)]
        (torch.Size([2, 8]), [' Paris', ' Tokyo'])
    """
    convert = _OUTPUTS.get(output)
    if convert is None:
        raise InputError(f"output={output!r}: it is one of {', '.join(map(repr, _OUTPUTS))}.")
    inputs = {**model.prepare(plain(prompts)), "use_cache": False}
    where = positions_from_end(inputs, positions)
    hidden = _states(model, inputs, where, batch_size)
    heads: list[Callable[[Tensor], Tensor]] = [model.project_on_vocab]
    if return_inv_logits:
        heads.append(partial(inverse_logits, model))
    found = [_through(lens, head, convert, hidden, _LOGITS // model.vocab_size) for head in heads]
    ids, texts = ids_of(inputs), texts_of(model, prompts)
    tokens = [token_texts(model, [] if ids is None else ids[i, at]) for i, at in enumerate(where)]
    texts = texts if len(texts) == len(where) else tuple("".join(one) for one in tokens)
    first, *second = (
        _of_prompts(_by_prompt(values, positions, list(map(len, where))), output, texts, tokens, model.tokenizer)
        for values in found
    )
    return (first, second[0]) if second else first


def _of_prompts(
    values: Any, output: str, prompts: tuple[str, ...], tokens: list[list[str]], tokenizer: Any
) -> Any:  # (lists: of unlike lengths)
    """Results that know what they are of."""
    if isinstance(values, Tensor):
        return LogitLens.of(values, output, prompts, tuple(map(tuple, tokens)), tokenizer=tokenizer)
    return [
        LogitLens.of(one, output, (prompt,), (tuple(of),), tokenizer=tokenizer, by_prompt=False)
        for one, prompt, of in zip(values, prompts, tokens, strict=True)
    ]


def _states(
    model: StandardizedTransformer, inputs: dict[str, Any], where: list[Tensor], size: int | None
) -> Float[Tensor, "token layer hidden"]:
    """The residual stream at these positions of each prompt, counted from the end, after each layer."""
    if size is None:
        try:
            return _together(model, packed(model, inputs), where)
        except (NotPackedError, *NOT_THERE) as error:
            _log.info("Prompts in rows of their own: %s", error)
    return _together(model, by_length(inputs, size), where)


def _together(model: StandardizedTransformer, parts: Iterable[Part], where: list[Tensor]) -> Tensor:
    found: dict[int, Tensor] = {}
    for prompts, inputs, numbers, ends in parts:
        rows = torch.cat([torch.full_like(where[i], row) for i, row in zip(prompts, numbers, strict=True)])
        columns = torch.cat([where[i] + end for i, end in zip(prompts, ends, strict=True)])
        keep = partial(_at, rows=rows, columns=columns, device=model.device)
        with model.trace(**inputs):
            (stream,) = read_together([(model.layers_output, range(model.num_layers))], keep)
        each = torch.stack(stream, dim=1).split([len(where[i]) for i in prompts])
        for i, values in zip(prompts, each, strict=True):
            if i not in found:
                found[i] = values
            elif not all(map(is_close, values.unbind(1), found[i].unbind(1))):
                raise NotPackedError("the model mixes prompts that share a row")
    return torch.cat([found[i] for i in range(len(where))])


def _at(hidden: Tensor, _: Name, rows: Tensor, columns: Tensor, device: torch.device) -> Tensor:
    return hidden[rows, columns].to(device)


def _through(
    lens: Lens | None,
    head: Callable[[Tensor], Tensor],
    convert: Callable[[Tensor, Tensor], Tensor],
    hidden: Float[Tensor, "token layer hidden"],
    size: int,
) -> Float[Tensor, "token layer vocab"]:
    """The head's output, `size` rows at a time. On the CPU those of one time stay where they are computed."""
    found, start = torch.empty(0), 0
    for part in hidden.split(max(1, size // hidden.shape[1])):
        logits = head(part if lens is None else lens(part))
        if start == 0:
            fits = len(part) == len(hidden) and logits.device == found.device
            found = logits if fits else torch.empty((len(hidden), *logits.shape[1:]), dtype=logits.dtype)
        place = found[start : start + len(part)]
        if logits.device == place.device:
            convert(logits, place)
        else:
            place.copy_(convert(logits, torch.empty_like(logits)))
        start += len(part)
        del logits
    return found


def _by_prompt(
    values: Float[Tensor, "token layer vocab"], positions: str | int | Sequence[int], lengths: list[int]
) -> Values:
    if isinstance(positions, str) and positions == "all":
        return [one.transpose(0, 1) for one in values.split(lengths)]
    if isinstance(positions, (str, int)):
        return values
    return values.unflatten(0, (len(lengths), len(positions))).transpose(1, 2)


def inverse_logits(
    model: StandardizedTransformer, hidden: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows vocab"]:
    """`project_on_vocab` with the final norm's output negated: the model's own forward, all layers skipped."""
    model = model.without_edits()  # they have been made in what is projected
    ln_final = model.ln_final
    rows = hidden.reshape(-1, 1, hidden.shape[-1])
    with model.trace([[0]] * len(rows), use_cache=False):  # any token
        model.skip_layers(0, -1, skip_with=rows)
        ln_final.output = -ln_final.output
        logits = model.logits
    return logits.reshape(*hidden.shape[:-1], -1)
