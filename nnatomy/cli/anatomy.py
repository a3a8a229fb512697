"""`nnatomy anatomy`: the model's modules, with the standard names beside the model's own."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from nnatomy.cli.load import load
from nnatomy.cli.report import Report, ranges
from nnatomy.standardized import StandardizedTransformer

Names = dict[Module, list[str]]


@dataclass
class Node:
    """A module, or several that are alike under one roof (the layers, experts).

    Attributes:
        name: the model's own, "0-5" for several.
        standard: its standard names, with `[i]` for the number of its layer.
        shapes: of its own parameters.
    """

    name: str
    kind: str
    standard: list[str]
    shapes: dict[str, list[int]]
    children: list[Node] = field(default_factory=list)

    def alike(self) -> Any:
        """Equal for modules that differ in their names alone."""
        return (
            self.kind,
            self.standard,
            self.shapes,
            [(child.name, child.alike()) for child in self.children],
        )

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"children": [child.data() for child in self.children]}


def anatomy(options: argparse.Namespace) -> Report:
    """Load the model and look at its modules."""
    model = load(options)
    names = standard_names(model)
    paths = {module: path for path, module in model.hf_model.named_modules()}
    tree = node("", model.hf_model, {module: _unnumbered(found) for module, found in names.items()})
    data = {
        "model": options.model,
        "class": tree.kind,
        "dtype": str(model.hf_model.dtype).removeprefix("torch."),
        "device": str(model.device),
        **vars(model.dimensions),
        "layer_kinds": list(model.layer_kinds),
        "names": {name: paths[module] for module, found in names.items() for name in found},
        "tree": tree.data(),
    }
    return Report(data, lambda _: _drawn(tree, model))


def standard_names(model: StandardizedTransformer) -> Names:
    """The standard names of each module that has one."""
    parts, names = model._anatomy, defaultdict(list)
    names[parts.embed_tokens].append("embed_tokens")
    for i, layer in enumerate(parts.layers):
        names[layer].append(f"layers[{i}]")
        for name, module in (("self_attn", parts.attentions[i]), ("mlp", parts.mlps[i])):
            if module is not None:
                names[module].append(f"layers[{i}].{name}")
        crossing = parts.cross_attentions[i]
        kinds = parts.kinds[i].split(" + ")
        if crossing is not None:
            kinds.remove("cross-attention")
            names[crossing].append(f"cross_attentions[{i}]")
        for kind, module in zip(kinds, parts.mixers[i], strict=False):
            if module is not parts.attentions[i]:
                names[module].append(f"layers[{i}] mixer ({kind})")
    if parts.ln_final is not None:
        names[parts.ln_final].append("ln_final")
    if parts.lm_head is not None:
        names[parts.lm_head].append("lm_head")
    return names


def _unnumbered(names: list[str]) -> list[str]:
    return list(
        dict.fromkeys(name.split("[")[0] + "[i]" + name.split("]")[1] if "[" in name else name for name in names)
    )


def node(name: str, module: Module, names: Names) -> Node:
    """The module and all in it; numbered children that are alike are one."""
    shapes = {key: list(value.shape) for key, value in module.named_parameters(recurse=False)}
    made = Node(name, type(module).__name__, names.get(module, []), shapes)
    alike: list[tuple[Node, list[int]]] = []
    for child_name, child in module.named_children():
        one = node(child_name, child, names)
        if not child_name.isdecimal():
            made.children.append(one)
            continue
        same = next((numbers for first, numbers in alike if first.alike() == one.alike()), None)
        if same is None:
            alike.append((one, same := []))
            made.children.append(one)
        same.append(int(child_name))
    for first, numbers in alike:
        first.name = ranges(numbers)
    return made


def _drawn(root: Node, model: StandardizedTransformer) -> Any:
    from rich.text import Text
    from rich.tree import Tree

    def line(one: Node) -> Text:
        shapes = ", ".join("x".join(map(str, shape)) for shape in one.shapes.values())
        text = Text.assemble((one.name, "bold"), "  " if one.name else "", (f"{one.kind}  {shapes}".rstrip(), "dim"))
        return text.append("  = " + ", ".join(one.standard), style="green") if one.standard else text

    def grow(branch: Tree, one: Node) -> Tree:
        for child in one.children:
            grow(branch.add(line(child)), child)
        return branch

    sizes = f"{model.num_layers} layers, hidden {model.hidden_size}, vocab {model.dimensions.vocab_size or 'none'}"
    heads = model.dimensions.num_heads
    return grow(Tree(line(root).append(f"  {sizes}" + (f", {heads} heads" if heads else ""), style="not dim")), root)
