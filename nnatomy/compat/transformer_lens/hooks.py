"""Which hook names a `HookedTransformer` has, and the hooks that hang there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from nnatomy.compat.transformer_lens.hook_points import COMPUTED, NOT_HERE, TURNED, WHOLE, Hook, HookPoint
from nnatomy.errors import InputError, NotInThisModelError
from nnatomy.standardized.elsewhere import HOOKS

#: A hook name, or whether a name is meant; and the function.
Hooks = Iterable[tuple[str | Callable[[str], bool], Hook]]


class HasHooks:
    """What a HookedTransformer says of hook names, and does with hooks."""

    model: Any
    cfg: Any
    hook_dict: dict[str, HookPoint]
    _positions: Any
    _is_turned: bool
    _why: str
    _level: int

    def _place(self, name: str) -> tuple[str, int | None]:
        """The standard name and the layer of a hook name.

        Raises:
            InputError: for a name that there is not.
            NotInThisModelError: for one that this model does not have.
        """
        found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name)
        assert found is not None
        layer, short = None if found[1] is None else int(found[1]), found[2]
        known = short in HOOKS or short in COMPUTED
        if not known or (layer is None) != (short in WHOLE) or (layer or 0) >= self.cfg.n_layers:
            raise InputError(
                f"{name!r} is no hook name here{self._instead(layer, short)}. A model of {self.cfg.n_layers} layers has "
                f"{', '.join(WHOLE)}, and blocks.LAYER. with "
                f"{', '.join(one for one in (*HOOKS, *COMPUTED) if one not in WHOLE)}."
            )
        if short == "hook_pos_embed" and self._positions is None:
            raise NotInThisModelError(
                f"{name}: no module of this model gives rows that are added to the token embeddings."
            )
        if (short in TURNED) != self._is_turned and short in (*TURNED, *TURNED.values()):
            other = {**TURNED, **{plain: turned for turned, plain in TURNED.items()}}[short]
            raise NotInThisModelError(
                f"{name}: this model {self._why}; what its attention function gets is {name.replace(short, other)}."
            )
        return HOOKS[short] if short in HOOKS else COMPUTED[short][0], layer

    def _instead(self, layer: int | None, short: str) -> str:
        """Why that is no hook name, where one can tell."""
        known, last = [*HOOKS, *COMPUTED], short.split(".")[-1]
        if last in NOT_HERE:
            return f": {NOT_HERE[last]}"
        if layer is not None and layer >= self.cfg.n_layers:
            return f": layers are 0 to {self.cfg.n_layers - 1}"
        if short in WHOLE:
            return f": {short} has no layer"
        near = [one for one in known if one.split(".")[-1] in (last, f"hook_{last}")] or get_close_matches(
            short, known, 1
        )
        begins = "" if not near or near[0] in WHOLE else f"blocks.{'LAYER' if layer is None else layer}."
        return f" (did you mean {begins}{near[0]}?)" if near else ""

    def _names(self) -> list[str]:
        names = [
            short if short in WHOLE else f"blocks.{i}.{short}" for i in range(self.cfg.n_layers) for short in HOOKS
        ]
        return [name for name in dict.fromkeys(names) if self._has(name)]

    def _has(self, name: str) -> bool:
        try:
            standard, layer = self._place(name)
            accessor = getattr(self.model, standard) if layer is not None else None
            if layer is not None and (short := name.split(".", 2)[-1]) in COMPUTED:
                _ = self.model.W_out[layer] if short == "mlp.hook_pre" else self.model.W_O[layer]
                _ = self.model.W_in[layer] if short == "mlp.hook_pre" else None
            _ = self.model.ln_final if name == "ln_final.hook_normalized" else None
        except NotInThisModelError:
            return False
        return accessor is None or accessor.modules[layer] is not None

    @contextmanager
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[Any]:
        """Within, those hooks are on."""
        self._level += 1
        try:
            self._put_on(fwd_hooks, bwd_hooks)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, level=self._level)
            self._level -= 1

    def _put_on(self, fwd_hooks: Any, bwd_hooks: Any) -> None:
        for given, direction in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
            for one in given:
                if not isinstance(one, (tuple, list)) or len(one) != 2 or not callable(one[1]):
                    raise InputError(
                        f"{direction}_hooks are pairs of a hook name and a function, [(name, hook), ...]; found {one!r}."
                    )
                self.add_hook(one[0], one[1], direction)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: Hook,
        dir: str = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Put a hook on, until `reset_hooks`. A "bwd" one is told the gradient of the value.

        Args:
            is_permanent: `reset_hooks` leaves it.
            prepend: it is called before those that are on.
        """
        names = [name] if isinstance(name, str) else [one for one in self.hook_dict if name(one)]
        for one in names:
            self._place(one)
            if one not in self.hook_dict:
                raise InputError(
                    f"{one} is computed from a value and a weight, so that a hook cannot change it: change "
                    f"{'hook_z' if one.endswith('hook_result') else 'ln2.hook_normalized or mlp.hook_post'}. A cache has it."
                )
        for one in names:
            self.hook_dict[one].add_hook(hook, dir, is_permanent, self._level if level is None else level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: Hook, dir: str = "fwd") -> None:
        """Put a hook on that `reset_hooks` leaves."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks off: all, those of one direction, or of one level of `hooks(...)`."""
        for point in self.hook_dict.values():
            point.remove_hooks(direction, including_permanent, level)
            if clear_contexts:
                point.clear_context()

    def remove_all_hook_fns(
        self, direction: str = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Take hooks off, and leave contexts."""
        self.reset_hooks(False, direction, including_permanent, level)

    def hook_points(self) -> Any:
        """All hook points."""
        return self.hook_dict.values()
