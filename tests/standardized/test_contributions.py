"""What a block adds to the stream: against plain hooks where the model's own forward says which, and by its algebra everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import releases
import torch
import zoo
from torch import Tensor, nn
from torch.nn import Linear

from nnatomy import StandardizedTransformer
from nnatomy.arch_configs import resolve
from nnatomy.errors import (
    AssignmentError,
    NotInThisModelError,
    NotReachedError,
)
from nnatomy.standardized import contributions

NAMES = ("attentions_contribution", "mixers_contribution", "layers_mid", "mlps_contribution")
PARTS = ("mixers_contribution", "mlps_contribution")


class Part(NamedTuple):
    """A contribution as the forward of the layer has it: output of `path`, times `scale`, less what `path` was given to add.

    `less`: modules of the layer whose outputs are in it too; "" is the layer's input.
    """

    path: str
    scale: Callable[[Any], float] = lambda _: 1.0
    less: tuple[str, ...] = ()


class Reference(NamedTuple):
    """Of each layer of a model, read off its forward. `mid`: the module that reads it."""

    layers: str
    mixer: Part | tuple[Part, ...]
    mlp: Part | None
    mid: str | None
    changes: dict[str, Any] = {}  # noqa: RUF012


def _residual(config: Any) -> float:
    return float(config.residual_multiplier)


def _depth(config: Any) -> float:
    return float(config.scale_depth / config.num_hidden_layers**0.5)


_LLAMA = Reference("model.layers", Part("self_attn"), Part("mlp"), "post_attention_layernorm")
_GPT2 = Reference("transformer.h", Part("attn"), Part("mlp"), "ln_2")
_GEMMA2 = Reference(
    "model.layers",
    Part("post_attention_layernorm"),
    Part("post_feedforward_layernorm"),
    "pre_feedforward_layernorm",
)
_NEOX = Reference("gpt_neox.layers", Part("attention"), Part("mlp"), None)
REFERENCES: dict[str, Reference] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo2": _GEMMA2._replace(mid="mlp"),
    "afmoe": _GEMMA2._replace(mlp=Part("post_mlp_layernorm"), mid="pre_mlp_layernorm"),
    "glm4": Reference(
        "model.layers",
        Part("post_self_attn_layernorm"),
        Part("post_mlp_layernorm"),
        "post_attention_layernorm",
    ),
    "granite": _LLAMA._replace(mixer=Part("self_attn", _residual), mlp=Part("mlp", _residual)),
    "hyperclovax": _LLAMA._replace(mixer=Part("post_norm1", _residual), mlp=Part("post_norm2", _residual)),
    "minicpm3": _LLAMA._replace(mixer=Part("self_attn", _depth), mlp=Part("mlp", _depth)),
    "bloom": Reference(
        "transformer.h",
        Part("self_attention", less=("",)),
        Part("mlp", less=("self_attention",)),
        "post_attention_layernorm",
    ),
    "mpt": Reference("transformer.blocks", Part("attn"), Part("ffn", less=("", "attn")), "norm_2"),
    "gpt_neox": _NEOX,
    "gpt_neox sequential": _NEOX._replace(mid="post_attention_layernorm", changes={"use_parallel_residual": False}),
    "gptj": _GPT2._replace(mid=None),
    "cohere": _LLAMA._replace(mid=None),
    "phi": _LLAMA._replace(mid=None),
    "falcon": Reference("transformer.h", Part("self_attention"), Part("mlp"), None),
    "falcon sequential": Reference(
        "transformer.h",
        Part("self_attention"),
        Part("mlp"),
        "post_attention_layernorm",
        {"parallel_attn": False, "new_decoder_architecture": False},
    ),
    "opt": Reference("model.decoder.layers", Part("self_attn"), Part("fc2"), "final_layer_norm"),
    "falcon_h1": Reference(
        "model.layers",
        (
            Part("self_attn", lambda config: float(config.attention_out_multiplier)),
            Part("mamba", lambda config: float(config.ssm_out_multiplier)),
        ),
        Part("feed_forward"),
        "pre_ff_layernorm",
    ),
    "jamba": Reference("model.layers", Part("self_attn|mamba"), Part("feed_forward"), "pre_ff_layernorm"),
    "lfm2": Reference("model.layers", Part("self_attn|conv"), Part("feed_forward"), "ffn_norm"),
    "qwen3_next": _LLAMA._replace(mixer=Part("self_attn|linear_attn")),
    "mamba": Reference("backbone.layers", Part("mixer"), None, None),
}


@functools.cache
def loaded(name: str) -> StandardizedTransformer:
    changes = REFERENCES[name].changes
    return StandardizedTransformer(zoo.build(name.split()[0], **changes)) if changes else zoo.loaded(name)


@pytest.fixture(params=REFERENCES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def layers(model: StandardizedTransformer, name: str) -> list[nn.Module]:
    return list(model.hf_model.get_submodule(REFERENCES[name].layers))


def module(layer: nn.Module, paths: str) -> nn.Module:
    """The first of these that the layer has (falcon_h1's feed_forward, jamba's self_attn or mamba)."""
    return next(getattr(layer, path) for path in paths.split("|") if getattr(layer, path, None) is not None)


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def plain(model: StandardizedTransformer, name: str, ids: Tensor) -> list[dict[str, Tensor]]:
    """Of each layer: its input, its output, and what the reference says, by plain hooks."""
    reference, config = REFERENCES[name], model.hf_model.config
    outputs: dict[nn.Module, Tensor] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def hook(one: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outputs[one] = first(output).clone()  # as it is now: Falcon changes one in place

    def pre_hook(one: nn.Module, args: Any, kwargs: Any) -> None:
        if args or "hidden_states" in kwargs:
            inputs[one] = (args[0] if args else kwargs["hidden_states"]).clone()

    handles = []
    for one in model.hf_model.modules():
        handles.append(one.register_forward_hook(hook, with_kwargs=True))
        handles.append(one.register_forward_pre_hook(pre_hook, with_kwargs=True))
    with torch.no_grad():
        model.hf_model(ids)
    for handle in handles:
        handle.remove()

    def value(layer: nn.Module, part: Part) -> Tensor:
        given = outputs[module(layer, part.path)].view_as(inputs[layer]) * part.scale(config)
        for path in part.less:
            given = given - (outputs[module(layer, path)] if path else inputs[layer])
        return given

    found = []
    for layer in layers(model, name):
        one = {"layers_input": inputs[layer], "layers_output": outputs[layer]}
        mixers = (reference.mixer,) if isinstance(reference.mixer, Part) else reference.mixer
        one["mixers_contribution"] = sum((value(layer, part) for part in mixers[1:]), value(layer, mixers[0]))
        if getattr(layer, "self_attn", None) is not None or name in ("gpt2", "bloom"):
            one["attentions_contribution"] = value(layer, mixers[0])
        if reference.mlp is not None:
            one["mlps_contribution"] = value(layer, reference.mlp)
        if reference.mid is not None:
            one["layers_mid"] = inputs[module(layer, reference.mid)].view_as(inputs[layer])
        found.append(one)
    return found


def near(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def has(model: StandardizedTransformer, accessor: str, i: int) -> bool:
    try:
        getattr(model, accessor).module(i)
    except NotInThisModelError:
        return False
    return True


def read(model: StandardizedTransformer, ids: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
    """All that each layer has of these names, and its input and output; and the logits."""
    found: list[dict[str, Tensor]] = []
    with torch.no_grad(), model.trace(ids):
        for i in range(model.num_layers):
            one = {}
            for accessor in ("layers_input", *NAMES, "layers_output"):
                if has(model, accessor, i):
                    one[accessor] = getattr(model, accessor)[i]
            found.append(one)
        logits = model.logits
    return found, logits


def test_each_is_what_the_layers_own_forward_adds(name: str) -> None:
    model = loaded(name)
    ids = zoo.ids(model.hf_model)
    found, logits = read(model, ids)
    with torch.no_grad():
        assert torch.equal(logits, model.hf_model(ids).logits)
    references = plain(model, name, ids)
    for i, (one, reference) in enumerate(zip(found, references, strict=True)):
        assert reference.keys() - one.keys() == set()
        assert ("layers_mid" in one) == (REFERENCES[name].mid is not None)
        assert ("mlps_contribution" in one) == (REFERENCES[name].mlp is not None)
        for what, value in reference.items():
            assert near(one[what], value), (i, what)


def writable(name: str) -> list[tuple[str, Part]]:
    """The contributions that are one module's output, up to a scale and a residual."""
    reference = REFERENCES[name]
    mixers = (reference.mixer,) if isinstance(reference.mixer, Part) else reference.mixer
    what = "mixers_contribution" if len(mixers) == 1 else "attentions_contribution"
    return [(what, mixers[0]), *([("mlps_contribution", reference.mlp)] if reference.mlp else [])]


def test_assigning_one_is_what_a_hook_on_the_module_that_gives_it_does(name: str) -> None:
    model, i = loaded(name), 1
    ids, config = zoo.ids(model.hf_model), model.hf_model.config
    layer = layers(model, name)[i]
    for what, part in writable(name):
        with torch.no_grad(), model.trace(ids):
            old = getattr(model, what)[i]
            new = old.flip(-1) * 2 - 0.3
            getattr(model, what)[i] = new
            output, logits = model.layers_output[i], model.logits
        shift = (new - old) / part.scale(config)

        def hook(_module: nn.Module, _args: Any, given: Any, shift: Tensor = shift) -> Any:
            edited = first(given) + shift.view_as(first(given))
            return edited if isinstance(given, Tensor) else (edited, *given[1:])

        outputs: list[Tensor] = []
        handles = [
            module(layer, part.path).register_forward_hook(hook),
            layer.register_forward_hook(lambda _m, _a, given: outputs.append(first(given))),  # noqa: B023
        ]
        with torch.no_grad():
            expected = model.hf_model(ids).logits
            for handle in handles:
                handle.remove()
            assert not near(logits, model.hf_model(ids).logits, 1e-3)
        assert near(output, outputs[0], 1e-5), what
        assert near(logits, expected, 1e-4), what


def test_gradients_are_those_of_the_module_that_gives_it(name: str) -> None:
    model, i = loaded(name), 1
    ids, config = zoo.ids(model.hf_model), model.hf_model.config
    layer = layers(model, name)[i]
    for what, part in writable(name):
        with model.trace(ids):
            value = getattr(model, what)[i]
            value.retain_grad()
            model.logits.square().sum().backward()
        assert value.grad is not None
        kept: list[Tensor] = []

        def hook(_module: nn.Module, _args: Any, given: Any, kept: list[Tensor] = kept) -> Any:
            # A copy goes on, as Falcon changes what its MLP gives in place.
            kept.append(first(given))
            first(given).retain_grad()
            copy = first(given).clone()
            return copy if isinstance(given, Tensor) else (copy, *given[1:])

        handle = module(layer, part.path).register_forward_hook(hook)
        model.hf_model(ids).logits.square().sum().backward()
        handle.remove()
        assert kept[0].grad is not None
        assert near(value.grad * part.scale(config), kept[0].grad.view_as(value), 1e-4), what


@pytest.mark.parametrize("name", [name for name, one in REFERENCES.items() if one.mid])
def test_assigning_the_stream_between_moves_all_that_follows(name: str) -> None:
    model, i = loaded(name), 2
    ids = zoo.ids(model.hf_model)
    shift = torch.linspace(-1, 1, model.hidden_size)
    with torch.no_grad(), model.trace(ids):
        mid = model.layers_mid[i]
        model.layers_mid[i] = mid + shift
        mlp, output, logits = model.mlps_contribution[i], model.layers_output[i], model.logits
    with (
        torch.no_grad(),
        model.trace(ids),
    ):  # the same sum, by its other part, which is held against hooks above
        mixed = model.mixers_contribution[i]
        model.mixers_contribution[i] = mixed + shift
        expected = model.logits
    assert near(mid + shift + mlp, output)
    assert near(logits, expected, 1e-4)


#: Why nothing of a type adds up: what its layers do to the stream. (All other types have every part that there is.)
REFUSED: dict[str, tuple[str, ...]] = {
    "the stream is normalised": (
        *("bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert", "data2vec-text"),
        *("electra", "ernie", "git", "marian", "minimax", "mvp", "openai-gpt", "plbart", "prophetnet"),
        *("dory", "rembert", "roberta", "roc_bert", "roformer", "trocr", "xlm-roberta", "xlnet", "xmod"),
    ),
    "the stream is scaled": (
        *("beam", "doge", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "zaya"),
    ),
    "its input is no stream of": ("deepseek_v4", "gemma3n_text", "hy_v4", "qwen4_exp", "qwen4_exp_text"),
    "its output does not come of its input by additions": ("inkling2_loop_text",),
    "in several places": ("cpmant", "longcat_flash"),
    "it is gone through several times": ("hrm_text",),
    "the stream is two": ("reformer",),
    "no module is the layer": ("xlm",),
}
#: The layers of these that say instead that they are gone through several times.
LOOPS = {"dory": (1, 2), "inkling2_loop_text": (1, 2)}
#: Types in which that is so of some layers.
PARTLY = {
    "blt": "layers_input or layers_output is refused here",
    "inkling2_text": "its output does not come of its input by additions",
    "mllama": "it does not run on text alone",
    "rwkv": "the stream is normalised",
}


def reason(model: StandardizedTransformer, accessor: str, i: int) -> str:
    with pytest.raises(NotInThisModelError) as raised:
        getattr(model, accessor).module(i)
    return str(raised.value)


@pytest.mark.parametrize("model_type", [name for name in zoo.TYPES if name not in zoo.REASONS])
def test_input_and_contributions_are_the_output(model_type: str) -> None:
    model = zoo.loaded(model_type)
    ids = zoo.ids(model.hf_model)
    why = next((why for why, types in REFUSED.items() if model_type in types), None)
    if why is not None:
        for i in range(model.num_layers):
            said = "it is gone through several times" if i in LOOPS.get(model_type, ()) else why
            assert all(said in reason(model, accessor, i) for accessor in NAMES)
        return
    found, logits = read(model, ids)
    with torch.no_grad():
        assert torch.equal(logits, model.hf_model(ids).logits)
    refused = [i for i, one in enumerate(found) if not one.keys() & set(PARTS)]
    assert bool(refused) == (model_type in PARTLY)
    for i in refused:
        halved = model_type == "rwkv" and i == 1  # is not the next layer's input
        why = "layers_input or layers_output is refused here" if halved else PARTLY[model_type]
        assert why in reason(model, "mixers_contribution", i)
    for i, one in enumerate(found):
        if i in refused:
            continue
        parts = [one[part] for part in PARTS if part in one]
        total = sum(parts, one["layers_input"].double())
        rounding = 4 * torch.finfo(torch.float32).eps * max(float(part.abs().max()) for part in [*parts, total])
        assert float((total - one["layers_output"]).abs().max()) <= rounding, i
        for part in PARTS:  # what is not there is not there: the sum is whole without it
            assert part in one or any(
                words in reason(model, part, i)
                for words in ("it has no MLP", "adds nothing of", "several modules share its work")
            )
        if "layers_mid" in one:
            mid = one["layers_input"] + one["mixers_contribution"]
            assert float((mid - one["layers_mid"]).abs().max()) <= rounding, i
    check_taking_out(model, ids, found, refused)


def check_taking_out(
    model: StandardizedTransformer, ids: Tensor, clean: list[dict[str, Tensor]], refused: list[int]
) -> None:
    """The last layer's output moves by minus what is taken out of its last summand; and the mixer's out of the middle."""
    i = max(i for i in range(model.num_layers) if i not in refused)
    for part, then in (("mlps_contribution", "layers_output"), ("mixers_contribution", "layers_mid")):
        if part in clean[i] and then in clean[i]:
            with torch.no_grad(), model.trace(ids):
                getattr(model, part)[i] = torch.zeros_like(clean[i][part])
                moved = getattr(model, then)[i]
            assert near(moved, clean[i][then] - clean[i][part], 1e-5)


def test_the_types_named_here_are_types() -> None:
    named = [*PARTLY, *(name for types in REFUSED.values() for name in types)]
    assert releases.missing(named, zoo.TYPES) == set()
    assert len(named) == len(set(named))


# The names as names.


def test_slices_negative_layers_and_assignment_to_several() -> None:
    model = loaded("gemma2")
    ids = zoo.ids(model.hf_model)
    found, _ = read(model, ids)
    with torch.no_grad(), model.trace(ids):
        several = model.mlps_contribution[1:3]
        last = model.mlps_contribution[-1]
    assert [torch.equal(one, found[i]["mlps_contribution"]) for i, one in enumerate(several, 1)] == [True] * 2
    assert torch.equal(last, found[-1]["mlps_contribution"])
    with torch.no_grad(), model.trace(ids):
        model.mlps_contribution[:] = [torch.zeros_like(one["mlps_contribution"]) for one in found]
        output = model.layers_output[-1]
    with torch.no_grad(), model.trace(ids):
        for i in range(model.num_layers):
            post_norm = model.layers[i].post_feedforward_layernorm
            post_norm.output = 0 * post_norm.output
        expected = model.layers_output[-1]
    assert torch.equal(output, expected)
    with model.trace(ids), pytest.raises(AssignmentError, match="shape"):
        model.mlps_contribution[0] = torch.zeros(2, 9, 1)


def test_a_refusal_says_why() -> None:
    assert "layers_mid[1]: this layer has none: its token mixer and its MLP read the same stream" in reason(
        loaded("cohere"), "layers_mid", 1
    )
    normed = zoo.build("bloom", apply_residual_connection_post_layernorm=True)
    assert "the stream is normalised" in reason(StandardizedTransformer(normed), "mlps_contribution", 1)
    assert "token mixer is mamba" in reason(loaded("jamba"), "attentions_contribution", 0)
    assert "it has no MLP" in reason(loaded("mamba"), "mlps_contribution", 0)
    assert "it has several token mixers (mamba + attention)" in reason(loaded("falcon_h1"), "mixers_output", 0)


def test_what_mixes_tokens_gives_its_output_whatever_it_is() -> None:
    model = loaded("jamba")
    assert model.layer_kinds == ("mamba", "attention") * 2
    ids = zoo.ids(model.hf_model)
    with torch.no_grad(), model.trace(ids):
        outputs = model.mixers_output[:]
    with torch.no_grad(), model.trace(ids):
        expected = [
            model.layers[0].mamba.output,
            model.layers[1].self_attn.output[0],
            model.layers[2].mamba.output,
            model.layers[3].self_attn.output[0],
        ]
    assert all(torch.equal(one, first(other)) for one, other in zip(outputs, expected, strict=True))
    with torch.no_grad(), model.trace(ids):
        model.mixers_output[2] = torch.zeros_like(outputs[2])
        assert not model.mixers_contribution[2].any()


def test_asking_too_late_says_what_to_do() -> None:
    model = loaded("gpt2")
    with model.trace(zoo.ids(model.hf_model)):
        _ = model.mlps_output[1]
        with pytest.raises(NotReachedError, match="ask for it before what comes later in the layer"):
            _ = model.attentions_contribution[1]


def test_asked_for_in_a_layer_that_is_already_at_work() -> None:
    model = loaded("opt")
    ids = zoo.ids(model.hf_model)
    found, _ = read(model, ids)
    with torch.no_grad(), model.trace(ids):
        _ = model.layers[1].fc1.output
        late = model.mlps_contribution[1]
    assert torch.equal(late, found[1]["mlps_contribution"])


def test_what_the_model_adds_to_in_place_stays_what_it_was_read_as() -> None:
    model = StandardizedTransformer(zoo.build("falcon"))
    ids = zoo.ids(model.hf_model)
    reference = plain(model, "falcon", ids)[1]["mlps_contribution"]
    for each in (model, StandardizedTransformer(model.hf_model, validate=False)):
        with torch.no_grad(), each.trace(ids, early_stop=False):
            value = each.mlps_contribution[1]
        assert torch.equal(value, reference)
        new = torch.ones_like(value)
        with torch.no_grad(), each.trace(ids, early_stop=False):
            each.mlps_contribution[1] = new
        assert torch.equal(new, torch.ones_like(value))


def test_in_each_step_of_a_generation() -> None:
    model = loaded("granite")
    ids = zoo.ids(model.hf_model, batch=1)
    with model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            before = model.layers_input[1]
            sums = before + model.mixers_contribution[1] + model.mlps_contribution[1]
            assert near(sums, model.layers_output[1])


def test_each_block_has_its_own_rows() -> None:
    for name in ("bloom", "opt"):
        model = loaded(name)
        ids = zoo.ids(model.hf_model)
        with torch.no_grad(), model.trace(ids[:1, :5]):
            alone = model.mlps_contribution[1]
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(ids[0, :5]):
                mine = model.mlps_contribution[1]
                model.mlps_contribution[1] = 0 * mine
                output, mid = model.layers_output[1], None
            with tracer.invoke(ids[1]):
                theirs = model.mlps_contribution[1]
        assert near(mine, alone, 1e-4), name
        assert theirs.any()
        with torch.no_grad(), model.trace(ids[:1, :5]):
            mid = model.layers_mid[1]
        assert near(output, mid, 1e-4)


def test_a_module_is_attached_there_and_also_where_nothing_else_is_watched() -> None:
    """A run in which nobody can ask anything has gates on the watched modules alone; Bloom adds inside of others."""
    model = loaded("bloom")
    zero = Linear(model.hidden_size, model.hidden_size)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    spliced = model.attach("mlps_contribution[1]", zero, name="zero")
    ids = zoo.ids(model.hf_model)
    with torch.no_grad():
        logits = spliced(ids).logits
        with model.trace(ids):
            model.mlps_contribution[1] = 0 * model.mlps_contribution[1]
            expected = model.logits
        assert torch.equal(logits, expected)
        assert not torch.equal(logits, model.hf_model(ids).logits)


def test_a_layer_that_is_skipped_adds_nothing() -> None:
    model = loaded("gpt2")
    with model.trace(zoo.ids(model.hf_model)):
        model.skip_layer(1)
        with pytest.raises(NotReachedError):
            _ = model.mlps_contribution[1]


def test_without_validation_they_are_found_when_first_asked_for() -> None:
    hf = zoo.build("bloom")
    found, _ = read(loaded("bloom"), zoo.ids(hf))
    model = StandardizedTransformer(hf, validate=False)
    with torch.no_grad(), model.trace(zoo.ids(hf)):
        assert torch.equal(model.layers_input[1], found[1]["layers_input"])  # the model is at work already
        assert torch.equal(model.attentions_contribution[1], found[1]["attentions_contribution"])
    model = StandardizedTransformer(hf, validate=False)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(zoo.ids(hf)[0]):
            one = model.layers_mid[2]
        with tracer.invoke(zoo.ids(hf)[1]):
            other = model.layers_mid[2]
    assert near(torch.cat((one, other)), found[2]["layers_mid"], 1e-5)
    bert = StandardizedTransformer(zoo.build("bert"), validate=False)
    assert "the stream is normalised" in reason(bert, "layers_mid", 0)


def test_in_half_precision() -> None:
    model = StandardizedTransformer(zoo.build("granite").to(torch.bfloat16))
    found, _ = read(model, zoo.ids(model.hf_model))
    for one in found:
        mid = one["layers_input"] + one["mixers_contribution"]
        assert torch.equal(mid, one["layers_mid"])
        assert torch.equal(mid + one["mlps_contribution"], one["layers_output"])


def test_after_an_edit_of_the_pattern_in_the_same_layer() -> None:
    model = loaded("bloom")
    ids = zoo.ids(model.hf_model)
    with torch.no_grad(), model.trace(ids):
        model.attention_probabilities[1] = 0 * model.attention_probabilities[1]
        added, mid, output = model.attentions_contribution[1], model.layers_mid[1], model.mixers_output[1]
    assert near(added, layers(model, "bloom")[1].self_attention.dense.bias.detach().expand_as(added))
    assert torch.equal(mid, output)
    assert near(mid - added, plain(model, "bloom", ids)[1]["layers_input"], 1e-5)


# The proof at load.


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[contributions.LayerSums], None]) -> Any:
    """A model of which something else than what was found is shown."""
    found = contributions._Layer.sums

    def sums(self: Any) -> contributions.LayerSums:
        one = found(self)
        change(one)
        return one

    monkeypatch.setattr(contributions._Layer, "sums", sums)
    return StandardizedTransformer(zoo.build("llama"))


def _other_operand(sums: contributions.LayerSums, name: str) -> None:
    for shown in sums.shown.values():
        shown[:] = [(one, 1 - place if one == name else place) for one, place in shown]  # type: ignore[operator]


def _rename(sums: contributions.LayerSums, **names: str) -> None:
    for shown in sums.shown.values():
        shown[:] = [(names.get(one, one), place) for one, place in shown]
    sums.values.update({new: sums.values[old] for old, new in names.items()})


def _elsewhere(sums: contributions.LayerSums) -> None:
    """As in a model whose forward goes another way than it did."""
    for where in list(sums.shown):
        sums.shown[where[0], where[1] * 2] = sums.shown.pop(where)


@pytest.mark.parametrize(
    ("change", "names", "why"),
    [
        (lambda sums: _other_operand(sums, "mlps_contribution"), NAMES, "another value when it is read"),
        (lambda sums: _other_operand(sums, "mixers_contribution"), NAMES, "another value when it is read"),
        (
            lambda sums: sums.values.update(mlps_contribution=sums.values["layers_mid"]),
            NAMES,
            "not the output, as read",
        ),
        (
            lambda sums: sums.values.update(mixers_contribution=sums.values["mixers_contribution"] * 1.001),
            NAMES,
            "not the output, as read",
        ),
        (
            lambda sums: sums.values.update(layers_mid=sums.values["layers_mid"] * 1.001),
            ("layers_mid",),
            "not the input and what the token mixer adds, as read",
        ),
        (
            lambda sums: _rename(
                sums, mixers_contribution="mlps_contribution", mlps_contribution="mixers_contribution"
            ),
            ("layers_mid",),
            "not the input and what the token mixer adds",
        ),
        (_elsewhere, NAMES, "does not show again where it was found"),
    ],
)
def test_what_does_not_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Any, names: tuple[str, ...], why: str
) -> None:
    model = broken(monkeypatch, change)
    for name in names:
        assert why in reason(model, name, 1)


@pytest.mark.parametrize(
    ("name", "model_type", "last", "positions"),
    [
        ("LlamaForCausalLM", "llama", "model.layers.3", [12, 12, 12, 16]),
        ("T5ForConditionalGeneration", "t5", "decoder.block.3", [12] * 4),
        ("BertForMaskedLM", "bert", "bert.encoder.layer.3", [12, 12, 12, 16]),
    ],
)
def test_validation_is_four_passes_of_sixteen_tokens(
    name: str, model_type: str, last: str, positions: list[int]
) -> None:
    hf = zoo.build_class(name, model_type)
    sizes: list[int] = []
    handle = hf.get_submodule(last).register_forward_hook(
        lambda _module, args, _output: sizes.append(args[0].shape[:2].numel())
    )
    resolve(hf)  # where the modules are is seen before
    before = len(sizes)
    sizes.clear()
    StandardizedTransformer(hf)
    handle.remove()
    assert sizes[before:] == positions


def test_an_encoder_is_given_sixteen_tokens_at_most() -> None:
    hf = zoo.build_class("T5ForConditionalGeneration", "t5")
    sizes: list[int] = []
    hf.encoder.block[0].register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[:2].numel()))
    StandardizedTransformer(hf)
    assert max(sizes) == 16


def test_what_is_found_is_not_kept() -> None:
    model = StandardizedTransformer(zoo.build("llama"))
    assert model._sums.layers is not None
    assert not any(sums.values for sums in model._sums.layers.values())
