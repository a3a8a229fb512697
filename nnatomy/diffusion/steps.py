"""The names of a step that belong to no layer: latents, timestep, noise prediction; of all of it, or of one half of guidance."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor
from torch.nn import Module

from nnatomy.core.open_blocks import OpenBlocks
from nnatomy.core.points import Slot
from nnatomy.diffusion.accessors import Accessor
from nnatomy.diffusion.anatomy import TEXT, argument, names_of, timestep_argument
from nnatomy.diffusion.halves import Half, Halves, given_to, put_rows
from nnatomy.diffusion.names import OF_LAYERS, OF_STEPS
from nnatomy.diffusion.recording import tensor_of, with_tensor
from nnatomy.diffusion.stage import Whole
from nnatomy.errors import AssignmentError, NoSuchModuleError, NotInThisModelError, NotReachedError
from nnatomy.standardized.accessors import check_fits


class StepNames:
    """What has the names of a step."""

    layers_input: Accessor
    layers_output: Accessor
    image_layers_input: Accessor
    image_layers_output: Accessor
    text_layers_input: Accessor
    text_layers_output: Accessor
    queries: Accessor
    keys: Accessor
    values: Accessor
    attention_probabilities: Accessor
    heads_output: Accessor
    cross_keys: Accessor
    cross_values: Accessor
    cross_attention_probabilities: Accessor
    cross_heads_output: Accessor
    modulation: Accessor
    text_modulation: Accessor

    denoiser: Module
    halves: Halves
    _half: Half | None = None
    _blocks: OpenBlocks
    _refused: dict[str, str]

    @property
    def steps(self) -> int:
        """How many steps this generation takes. It waits for nothing: ask in the loop over them."""
        steps = given_to(self._blocks.current("steps").run).stage.steps
        if steps is None:
            raise NotReachedError(
                "steps: how many there are is not known before the pipeline has set its timesteps: ask in the loop over them, "
                "behind a value of the denoiser's."
            )
        return int(steps)

    @property
    def latents(self) -> Any:
        """The noisy latents that the step begins with. Assigned, denoiser and scheduler go on with the others."""
        return self._latents().value

    @latents.setter
    def latents(self, value: Tensor) -> None:
        self._refuse_half("latents")
        slot = self._latents()
        check_fits("latents", slot.value, value)
        slot.value = value

    def _latents(self) -> Slot:
        self._check("latents")
        block = self._blocks.current("latents")
        slot = block.reach(self._whole.begin, "output", "latents")
        if slot.value is None:
            raise NotReachedError(
                "latents: the pipeline draws those of the first step inside its __call__, and shows none: ask for them from step 1 "
                "on, or read in step 0 what the denoiser is given, its `.input`."
            )
        return slot

    @property
    def timestep(self) -> Any:
        """The timestep as the denoiser is given it."""
        return self._timestep()[0]

    @timestep.setter
    def timestep(self, value: Tensor) -> None:
        own, slot, rows, is_shared = self._timestep()
        if is_shared:
            self._refuse_half("timestep")
        check_fits("timestep", own, value)
        get, put = argument(names_of(self.denoiser), timestep_argument(self.denoiser))
        slot.value = put(slot.value, put_rows(get(slot.value), rows, value))

    def _refuse_half(self, name: str) -> None:
        """Raise AssignmentError where a half's is the other's, too."""
        if self._half is not None:
            raise AssignmentError(
                f"{self._half}.{name} is the other half's, too, and would change both: assign model.{name}."
            )

    def _timestep(self) -> tuple[Any, Slot, slice, bool]:
        """The timestep, where it is, its rows, and whether it is one for both halves."""
        self._check("timestep")
        slot, images = self._at_denoiser("timestep", "input")
        names = names_of(self.denoiser)
        value, sample = (argument(names, name)[0](slot.value) for name in (timestep_argument(self.denoiser), names[0]))
        rows = self.halves.rows(self._half, "timestep", len(sample), images)
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1:
            return value, slot, slice(None), self.halves.how == "rows" and len(sample) != images
        return value[rows], slot, rows, False

    @property
    def text_given(self) -> Tensor:
        """What the denoiser is given of the text: (batch, token, hidden). To change it, assign `model.unet.inputs`.

        Raises:
            NotInThisModelError: if it is given none by that name.
        """
        slot, images = self._at_denoiser("text_given", "input")
        args, kwargs = slot.value
        arguments = {**dict(zip(names_of(self.denoiser), args, strict=False)), **kwargs}
        value = arguments.get(TEXT)
        if not isinstance(value, Tensor):
            raise NotInThisModelError(f"text_given: the denoiser is given no {TEXT}.")
        return value[self.halves.rows(self._half, "text_given", len(value), images)]

    @property
    def noise_prediction(self) -> Tensor:
        """What the scheduler is given: the prediction after guidance. Of a half: what the denoiser gives for it."""
        return self._prediction()[0]

    @noise_prediction.setter
    def noise_prediction(self, value: Tensor) -> None:
        own, slot, rows = self._prediction()
        check_fits("noise_prediction", own, value)
        if self._half is None:
            args, kwargs = slot.value
            slot.value = args, {**kwargs, "model_output": value}
        else:
            slot.value = with_tensor(slot.value, put_rows(tensor_of(slot.value), rows, value))

    def _prediction(self) -> tuple[Tensor, Slot, slice]:
        self._check("noise_prediction")
        if self._half is None:
            slot = self._blocks.current("noise_prediction").reach(self._whole.scheduler, "input", "noise_prediction")
            return slot.value[1]["model_output"], slot, slice(None)
        slot, images = self._at_denoiser("noise_prediction", "output")
        whole = tensor_of(slot.value)
        rows = self.halves.rows(self._half, "noise_prediction", len(whole), images)
        return whole[rows], slot, rows

    def _at_denoiser(self, name: str, kind: str) -> tuple[Slot, int]:
        block = self._blocks.current(name)
        given = given_to(block.run)
        if self._half is None:
            given.whole = name
        said = f"{self._half}.{name}" if self._half else name
        return block.reach(self.denoiser, kind, said, self.halves.call(self._half)), given.images

    def text_tokens(self, layer: int) -> slice:
        """In a trace, which positions of the joint attention's pattern on that layer are the text's: of its queries, and its keys.

        All others are the picture's.

        Raises:
            LayerIndexError, NotInThisModelError: where text and picture are not attended to jointly.
            InputError: where the halves are calls with texts of different lengths: `model.conditional.text_tokens(i)`.
        """
        raise NotImplementedError

    def _text_tokens(self, layer: int, half: Half | None) -> slice:
        raise NotImplementedError

    def _check(self, name: str) -> None:
        if name in self._refused:
            raise NotInThisModelError(f"{name}: {self._refused[name]}.")

    @property
    def _whole(self) -> Whole:
        raise NotImplementedError


class HalfView(StepNames):
    """One half of guidance: `model.conditional.layers_output[i]`. Every name, of that half's rows or call alone."""

    def __init__(self, of: StepNames, half: Half) -> None:
        self._of = of
        self._half = half
        self._blocks, self.denoiser, self.halves, self._refused = of._blocks, of.denoiser, of.halves, of._refused
        for name in OF_LAYERS:
            setattr(self, name, getattr(of, name).of_half(half, self.halves))

    def text_tokens(self, layer: int) -> slice:
        """As of the model, in that half's call."""
        return self._of._text_tokens(layer, self._half)

    @property
    def _whole(self) -> Whole:
        return self._of._whole

    def __getattr__(self, name: str) -> Any:
        """Raises NoSuchModuleError: a half has the standard names alone."""
        raise self._no_such(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AssignmentError for a name that is one for each layer; NoSuchModuleError for none."""
        if isinstance(self.__dict__.get(name), Accessor):
            name = f"{self._half}.{name}"
            raise AssignmentError(f"{name} is one for each layer: assign {name}[i] = ..., or {name}[:] = [one, ...].")
        if not (name.startswith("_") or name in (*OF_LAYERS, "denoiser", "halves") or hasattr(type(self), name)):
            raise self._no_such(name)
        super().__setattr__(name, value)

    def _no_such(self, name: str) -> NoSuchModuleError:
        near = difflib.get_close_matches(name, (*OF_STEPS, *OF_LAYERS), n=2)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        return NoSuchModuleError(
            f"A half of guidance has no {name!r}.{hint} It has the standard names: {', '.join((*OF_STEPS, *OF_LAYERS))}."
        )

    def __repr__(self) -> str:
        return f"<the {self._half} half of guidance>"
