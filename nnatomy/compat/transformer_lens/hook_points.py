"""Hook names, what stands for each under standard names, and the places where hooks hang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from nnatomy.errors import InputError
from nnatomy.standardized.elsewhere import HOOKS

#: Those that have no layer, and what is attached to where a hook is on.
WHOLE = {"hook_embed": "embed_tokens", "hook_pos_embed": "", "ln_final.hook_normalized": "ln_final"}
#: Those that are computed from a value and a weight: a cache has them, and no hook can change them.
COMPUTED = {"mlp.hook_pre": ("mlps_input", "mlps"), "attn.hook_result": ("heads_output", "attentions")}
#: Those of a rotary embedding, and what they are where there is none.
TURNED = {"attn.hook_rot_q": "attn.hook_q", "attn.hook_rot_k": "attn.hook_k"}
#: (batch, head, position, head_dim) here, (batch, position, head, head_dim) there.
SWAPPED = ("queries", "keys", "values")
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
    """The hook name of a short one: ("resid_post", 5), ("q", 5), ("pattern", 5), ("normalized", 5, "ln1"), "embed".

    Example:
        >>> get_act_name("resid_post", 5), get_act_name("pattern", 5), get_act_name("post", 0)
        ('blocks.5.hook_resid_post', 'blocks.5.attn.hook_pattern', 'blocks.0.mlp.hook_post')
    """
    if "hook_" in name:
        return name
    short = f"hook_{_SHORT.get(name, name)}"
    if layer_type is not None:
        part = f"{ {'a': 'attn', 'm': 'mlp', 'b': ''}.get(layer_type, layer_type) }.{short}".lstrip(".")
    else:
        part = next((known for known in (*HOOKS, *COMPUTED) if known.split(".")[-1] == short), short)
    if layer is None and part == "ln1.hook_normalized":
        return "ln_final.hook_normalized"
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
            own = own if found is None else found
        if own.requires_grad:
            for hung in self.backwards:
                own.register_hook(lambda gradient, hook=hung.hook: _first(hook(gradient, hook=self.point)))
        return own.transpose(1, 2) if self.swapped else own


def _first(given: Any) -> Any:
    """The gradient of what a backward hook gives: itself, one in a tuple, or nothing."""
    return given[0] if isinstance(given, tuple) else given
