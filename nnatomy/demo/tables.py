"""The results as plain text."""

from __future__ import annotations

from nnatomy.demo.analysis import Lens, Patching, Results, Steering


def show_token(token: str) -> str:
    """A token so that its spaces and line breaks can be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def results_table(results: Results) -> str:
    """Everything found on one model."""
    parts = [f"=== {results.name}  ({results.summary})"]
    parts += [lens_table(one) for one in results.lenses]
    parts += [patching_table(results.patching), steering_table(results.steering)]
    return "\n\n".join(parts)


def lens_table(lens: Lens) -> str:
    """The most probable next tokens after the last token of the prompt, layer by layer."""
    lines = [f"Logit lens: {lens.prompt!r} …", f"  {'layer':>5}  most probable next tokens"]
    for layer, row in enumerate(lens.last):
        tokens = "  ".join(f"{show_token(token):<14}{prob:6.1%}" for token, prob in row)
        lines.append(f"  {layer:>5}  {tokens}")
    return "\n".join(lines)


def patching_table(patching: Patching) -> str:
    """The effect of every patch, and one of them in words."""
    heads = [show_token(a) if a == b else f"{show_token(a)}→{show_token(b)}" for a, b in patching.tokens]
    widths = [max(8, len(head) + 2) for head in heads]
    lines = [
        f"Activation patching: the stream of {patching.clean!r} put into {patching.corrupted!r}",
        f"  effect on logit({show_token(patching.answer)}) - logit({show_token(patching.wrong)}): "
        "0 as without the patch, 1 as in the clean run",
        "  layer" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True)),
    ]
    for layer, row in enumerate(patching.effect.tolist()):
        cells = "".join(f"{value:>{width}.2f}" for value, width in zip(row, widths, strict=True))
        lines.append(f"  {layer:>5}{cells}")
    return "\n".join([*lines, f"  {patching_sentence(patching)}"])


def patching_sentence(patching: Patching) -> str:
    """The single patch that is reported, in words."""
    layer, position = patching.best
    (before, p_before), (after, p_after) = patching.before, patching.after
    return (
        f"The stream after layer {layer} at {show_token(patching.tokens[position][0])!r} alone turns the "
        f"answer from {show_token(before)!r} ({p_before:.1%}) into {show_token(after)!r} ({p_after:.1%})."
    )


def steering_table(steering: Steering) -> str:
    """The probabilities of the two tokens, and the most probable one, by factor."""
    one, two = (show_token(token) for token in steering.tokens)
    lines = [
        f"Steering: {steering.prompt!r}, at its last token, after layer {steering.layer}",
        f"  vector: mean of {steering.source}",
        f"  {'factor':>6}{one:>12}{two:>12}   most probable",
    ]
    for factor, probs, (token, prob) in zip(steering.factors, steering.probs.tolist(), steering.top, strict=True):
        lines.append(f"  {factor:>6.2f}{probs[0]:>12.1%}{probs[1]:>12.1%}   {show_token(token)} ({prob:.1%})")
    return "\n".join(lines)
