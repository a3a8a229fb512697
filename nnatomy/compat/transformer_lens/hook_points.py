"""Hook names, what stands for each under standard names, and the places where hooks hang."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from nnatomy.errors import InputError, a_kind
from nnatomy.standardized.elsewhere import HOOKS

#: Those that have no layer, and what is attached to where a hook is on.
WHOLE = {"hook_embed": "embed_tokens", "hook_pos_embed": "", "ln_final.hook_normalized": "ln_final"}
#: Those that are computed from a value and a weight: a cache has them, and no hook can change them.
COMPUTED = {"mlp.hook_pre": ("mlps_input", "mlps"), "attn.hook_result": ("heads_output", "attentions")}
#: Those of a rotary embedding, and what they are where there is none.
TURNED = {"attn.hook_rot_q": "attn.hook_q", "attn.hook_rot_k": "attn.hook_k"}
#: (batch, head, position, head_dim) here, (batch, position, head, head_dim) there.
SWAPPED = ("queries", "keys", "values")
#: Names of TransformerLens that are no hooks here, by their last part, and why.
NOT_HERE = {
    "hook_scale": "what a norm divides by is in the norm's own code",
    "hook_pre_linear": "it is mlps_input[i] @ W_in[i] + b_in[i] in a trace of the model inside",
    "hook_tokens": "it is input_ids",
    "hook_attn_in": "ln1.hook_normalized is what the attention is given",
    "hook_mlp_in": "ln2.hook_normalized is what the MLP is given",
    **dict.fromkeys(("hook_q_input", "hook_k_input", "hook_v_input"), "queries, keys and values are changed apart"),
}
_SHORT = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", **dict.fromkeys(("b", "block", "blocks"), "")}

Hook = Callable[..., Any]


class Hung(NamedTuple):
    """A hook where it hangs: its function, whether `reset_hooks` leaves it, and in which `hooks(...)` it was put on."""

    hook: Hook
    is_permanent: bool
    context_level: int


@dataclass(eq=False)
class HookPoint:
    """One hook name of a model: what hangs there. A hook function is told of it: its second argument, `hook`.

    Attributes:
        name: the hook name, with the layer.
        ctx: for what one call leaves for the next.
        fwd_hooks, bwd_hooks: what hangs there, in the order in which it is called.
    """

    name: str = ""
    ctx: dict[str, Any] = field(default_factory=dict)
    fwd_hooks: list[Hung] = field(default_factory=list)
    bwd_hooks: list[Hung] = field(default_factory=list)

    def layer(self) -> int:
        """Of a name that has one."""
        return int(self.name.split(".")[1])

    def add_hook(
        self, hook: Hook, dir: str = "fwd", is_permanent: bool = False, level: int = 0, prepend: bool = False
    ) -> None:
        """Hang a function up: the last that is called, or with `prepend` the first. A "bwd" one is told the value's gradient."""
        if dir not in ("fwd", "bwd"):
            raise InputError(f"dir={dir!r}: it is 'fwd' or 'bwd'.")
        hooks = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        hooks.insert(0 if prepend else len(hooks), Hung(hook, is_permanent, level))

    def add_perma_hook(self, hook: Hook, dir: str = "fwd") -> None:
        """Hang a function up that `reset_hooks` leaves."""
        self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(self, dir: str = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Take hooks off: those of one direction or "both", of one level or all (None)."""
        for one, hooks in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks)):
            if dir in (one, "both"):
                hooks[:] = [
                    hung
                    for hung in hooks
                    if (hung.is_permanent and not including_permanent) or level not in (None, hung.context_level)
                ]

    def has_hooks(self, dir: str = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether something hangs there: of one direction or "both", of one level or any (None)."""
        hung = [*self.fwd_hooks * (dir != "bwd"), *self.bwd_hooks * (dir != "fwd")]
        return any((including_permanent or not one.is_permanent) and level in (None, one.context_level) for one in hung)

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx = {}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The hook name of a short one: ("resid_post", 5), ("q", 5), ("normalized", 5, "ln1"), "embed"; "q5" is ("q", 5).

    Example:
        >>> get_act_name("resid_post", 5), get_act_name("pattern", 5), get_act_name("post", 0)
        ('blocks.5.hook_resid_post', 'blocks.5.attn.hook_pattern', 'blocks.0.mlp.hook_post')
    """
    if "hook_" in name:
        return name
    if layer is None and (parts := re.fullmatch(r"([a-z_]+)(\d+)([a-z]\w*)?", name)):
        name, layer, layer_type = parts[1], parts[2], parts[3] or layer_type
    short = f"hook_{_SHORT.get(name, name)}"
    if layer_type is not None:
        part = f"{_PARTS.get(layer_type, layer_type)}.{short}".lstrip(".")
    else:
        part = next((known for known in (*HOOKS, *COMPUTED) if known.split(".")[-1] == short), short)
    if layer is None and short in ("hook_normalized", "hook_scale"):
        return f"ln_final.{short}"
    return part if layer is None else f"blocks.{layer}.{part}"


class Hooked(Module):
    """The hooks of one name, as a module that is attached there."""

    def __init__(self, point: HookPoint, swapped: bool) -> None:
        super().__init__()
        self.point, self.swapped = point, swapped
        self.forwards, self.backwards = [*point.fwd_hooks], [*point.bwd_hooks]

    def forward(self, value: Tensor) -> Tensor:
        own = value.transpose(1, 2).clone() if self.swapped else value.clone()
        for hung in self.forwards:
            found = hung.hook(own, hook=self.point)
            own = own if found is None else self._checked(hung.hook, found, own)
        if own.requires_grad:
            for hung in self.backwards:
                own.register_hook(lambda gradient, hook=hung.hook: _first(hook(gradient, hook=self.point)))
        return own.transpose(1, 2) if self.swapped else own

    def _checked(self, hook: Hook, found: Any, value: Tensor) -> Tensor:
        """What a hook returned, if it can stand for the value."""
        if isinstance(found, Tensor) and found.shape == value.shape and found.is_floating_point():
            return found
        what = f"{found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else a_kind(found)
        code = getattr(hook, "__code__", None)
        where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        raise InputError(
            f"{self.point.name}: its value is {value.dtype} of {tuple(value.shape)}; the hook "
            f"{getattr(hook, '__name__', hook)}{where} returned {what}. Return all of the value, changed, or change it in "
            "place and return nothing."
        )


def _first(given: Any) -> Any:
    """The gradient of what a backward hook gives: itself, one in a tuple, or nothing."""
    return given[0] if isinstance(given, tuple) else given
