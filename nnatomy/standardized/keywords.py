"""Which keyword arguments a model makes use of.

Almost every forward of Transformers takes `**kwargs` and hands them down, and what nobody takes by name on the way vanishes
without a word. So a keyword of the user's is looked for first: in the forwards of the model, of the modules that its
layers are in, of the layers and of their token mixers, and among what Transformers itself takes out of keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from torch.nn import Module
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from nnatomy.arch_configs import Anatomy, has_decoder
from nnatomy.arch_configs.cache_name import CACHE_NAMES
from nnatomy.errors import InputError
from nnatomy.standardized.elsewhere import KEYWORDS

#: What the decorators of forwards, the loss, and the attention functions take.
_OF_TRANSFORMERS = frozenset(("return_dict", "num_items_in_batch", "is_causal"))
#: What every prompt comes with, whether a model has a use for a mask, and has a cache, or not.
_OF_PROMPTS = frozenset(("input_ids", "attention_mask", "use_cache"))
#: What `generate` takes besides its config.
_OF_GENERATE = frozenset(("tokenizer", "assistant_tokenizer"))
#: What `generate` never hands on.
_NOT_OF_GENERATE = frozenset(("labels", "return_dict", "num_items_in_batch"))
#: What an encoder of images or videos reads.
PIXELS = frozenset(
    (
        "pixel_values",
        "pixel_values_images",
        "pixel_values_videos",
        "image_patches",
        "image_pixel_values",
        "flattened_patches",
    )
)
#: What an encoder of sound reads.
SOUND = frozenset(("input_features", "input_values", "audio_input_ids", "audio_input_features"))
#: What else people call the arguments that a processor reads.
_MEANT = {
    **dict.fromkeys(("image", "picture", "pictures"), "images"),
    "video": "videos",
    **dict.fromkeys(("sound", "sounds", "audios"), "audio"),
}
#: The names that a KV cache goes by.
_CACHES = frozenset(CACHE_NAMES)


class Keywords:
    """The keyword arguments that a model makes use of.

    Args:
        model: what is called.
        causal: the model in it that generates.
    """

    def __init__(self, model: Module, causal: Module, anatomy: Anatomy) -> None:
        self._model = model
        self._causal = causal
        self._anatomy = anatomy
        self._known = _named(model.forward)[0] | _OF_PROMPTS

    def check(self, given: Iterable[str], ours: Iterable[str] = (), generating: bool = False) -> None:
        """Raise InputError if the model makes no use of one of these.

        Args:
            ours: what the caller takes itself, to be named where it is near.
            generating: whether they go to `generate`, which hands on to the forward what is not for its own config.
        """
        given = set(given)
        for name in sorted(given.intersection(_MEANT)):
            # (A word in a forward's code is no argument of that name.)
            if _MEANT[name] in ours and name not in _named(self._model.forward, read=False)[0]:
                raise InputError(f"{name}=...: it is called {_MEANT[name]}=..., one or a list.")
        if generating:
            self._refuse(given, self.of_generate(), ours, "generate")
        elif not self._known.issuperset(given):
            self._known = self.of_forward()
            self._refuse(given, self._known, ours, "forward")

    def _refuse(self, given: set[str], taken: set[str], ours: Iterable[str], method: str) -> None:
        own = sorted(_named(self._causal.forward, read=False)[0])
        for name in sorted(given - taken):
            if name in KEYWORDS:
                raise InputError(f"{name}=... is TransformerLens's. In its place: {KEYWORDS[name]}.")
            near = get_close_matches(name, sorted(taken.union(ours)), 3)
            raise InputError(
                f"{name}=...: {type(self._model).__name__}.{method} makes no use of such an argument, and would pass it over "
                "without a word. "
                + (f"Did you mean {' or '.join(near)}?" if near else f"The forward takes {', '.join(own)}.")
            )

    def of_forward(self) -> set[str]:
        """Those of the model's forward, and of what it hands its keywords down to."""
        known, hands_down = set(_OF_PROMPTS), True
        for module in self._above_the_layers():
            names, more = _named(module.forward)
            known |= names.union(getattr(module, "special_peft_forward_args", ()))
            hands_down = hands_down and more
        if has_decoder(self._causal):
            model: Any = self._causal
            known |= _named(model.get_encoder().forward)[0]
            known |= {f"decoder_{name}" for name in _named(model.get_decoder().forward)[0]}
        if hands_down:
            inside = {*self._anatomy.layers, *(one for mixers in self._anatomy.mixers for one in mixers)}
            known = known.union(*(_named(module.forward, with_default=True)[0] for module in inside))
            known |= _OF_TRANSFORMERS
        for module in self._causal.modules():
            known |= {f"output_{kind}" for kind in getattr(module, "_can_record_outputs", None) or ()}
        config: Any = self._causal.config
        if "flash" in str(config.get_text_config(decoder=True)._attn_implementation):
            known |= FlashAttentionKwargs.__optional_keys__
        return known | _CACHES if known & _CACHES else known

    def of_generate(self) -> set[str]:
        """Those of the model's `generate`."""
        model: Any = self._causal
        wrapper: Any = self._model
        methods = [GenerationMixin.generate]
        methods += [one.generate for one in (wrapper, model) if hasattr(one, "generate")]
        if hasattr(model, "prepare_inputs_for_generation"):
            methods.append(model.prepare_inputs_for_generation)
        taken = self.of_forward() - _NOT_OF_GENERATE
        taken |= of_generation_config(model) | _OF_GENERATE
        return taken.union(*(_named(method, read=False)[0] for method in methods))

    def handed_on(self, given: Iterable[str]) -> set[str]:
        """Those of them that `generate` has to hand on to the forward: in the first step it has them."""
        if has_decoder(self._causal):
            return set()  # some are the encoder's
        names = self.of_forward() - of_generation_config(self._causal) - _CACHES - _OF_TRANSFORMERS - _OF_PROMPTS
        return names.intersection(given) - {"inputs_embeds"} - self._encoded(given)

    def _encoded(self, given: Iterable[str]) -> set[str]:
        """What `generate` itself gives to the encoder of images or videos, to hand on what comes of it in the place of that."""
        taken: set[str] = set()
        if "mm_encoder_outputs" in inspect.signature(self._causal.forward).parameters:
            for kind in ("image", "video"):
                encode = getattr(self._causal.base_model, f"get_{kind}_features", None)
                names = set() if encode is None else _named(encode, read=False)[0]
                taken |= names if names & PIXELS & set(given) else set()
        return taken

    def _above_the_layers(self) -> list[Module]:
        """The model, and the modules down to the one that runs its layers."""
        layers = self._anatomy.layers[:1]
        paths = [path for path, module in self._model.named_modules() if module in layers] or [""]
        names = paths[0].split(".")
        above = [self._model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        return [module for module in above if type(module).forward is not Module.forward]


def of_generation_config(model: Any) -> set[str]:
    """The names of what says how to generate."""
    configs = GenerationConfig(), getattr(model, "generation_config", None) or GenerationConfig()
    return {name for config in configs for name in vars(config) if name[0] != "_"}


def _named(function: Callable[..., Any], with_default: bool = False, read: bool = True) -> tuple[set[str], bool]:
    """The arguments that a function takes by name, or (`read`) may read from its keywords; and whether it has keywords."""
    parameters = list(inspect.signature(function).parameters.values())
    more = any(one.kind is one.VAR_KEYWORD for one in parameters)
    names = {
        one.name
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and not (with_default and one.default is one.empty)
    }
    code = getattr(inspect.unwrap(function), "__code__", None)
    if read and more and code is not None:
        names |= {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
    return names, more
