"""A model that is changed after its names were found: what goes on being right, and what is refused until it is looked at again."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from architectures import CONFIGS, PLACES, build, prompt_ids, randomize
from reference import edited, hooked, reads_what_hooks_see
from torch import nn
from torch.nn.utils import parametrizations
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from nnatomy import StandardizedTransformer
from nnatomy.errors import LayerIndexError, ModelChangedError, UsageError
from nnatomy.methods import logit_lens

# peft 0.21 asks transformers 5.23 whether gradient checkpointing is on by its old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LORA: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "r": 4,
    "init_lora_weights": False,
    "target_modules": "all-linear",
}


def layers_of(hf: Any) -> Any:
    return next(hf.get_submodule(path) for path, *_ in PLACES.values() if _has(hf, path))


def _has(hf: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in hf.named_modules())


def resize(hf: Any) -> None:
    hf.resize_token_embeddings(CONFIGS["llama"]["vocab_size"] + 21, mean_resizing=False)
    randomize(hf)


def new_embedding(hf: Any) -> None:
    old = hf.get_input_embeddings()
    new = nn.Embedding(old.num_embeddings, old.embedding_dim)
    hf.set_input_embeddings(new)
    randomize(hf)


def new_head(hf: Any) -> None:
    hf.set_output_embeddings(nn.Linear(hf.get_output_embeddings().in_features, 101, bias=False))
    hf.config.vocab_size = 101  # some reshape their logits by it
    randomize(hf)


def scaled_head(hf: Any) -> None:
    """A norm of another kind before the head: the head is a sequence of modules now."""
    old = hf.get_output_embeddings()
    hf.set_output_embeddings(nn.Sequential(nn.LayerNorm(old.in_features), old))


def replaced_layer(hf: Any) -> None:
    layers_of(hf)[2] = copy.deepcopy(layers_of(hf)[1])
    _renumber(hf)


def replaced_attention(hf: Any) -> None:
    name = next(names[1] for names in PLACES.values() if _has(hf, f"{names[0]}.1.{names[1]}"))
    layer = layers_of(hf)[1]
    setattr(layer, name, copy.deepcopy(getattr(layer, name)))


def deleted_layer(hf: Any) -> None:
    del layers_of(hf)[1]
    _renumber(hf)


def appended_layer(hf: Any) -> None:
    layers_of(hf).append(copy.deepcopy(layers_of(hf)[1]))
    _renumber(hf)


def shorter_list(hf: Any) -> None:
    path = next(path for path, *_ in PLACES.values() if _has(hf, path))
    parent, _, name = path.rpartition(".")
    setattr(hf.get_submodule(parent), name, nn.ModuleList(list(layers_of(hf))[:2]))
    _renumber(hf)


def swapped_layers(hf: Any) -> None:
    layers = layers_of(hf)
    layers[0], layers[1] = layers[1], layers[0]


def _renumber(hf: Any) -> None:
    """What whoever moves layers has to do: each has its own place in the KV cache, and the config counts them."""
    for i, layer in enumerate(layers_of(hf)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    for config in (hf.config, hf.config.get_text_config()):
        for name in ("num_hidden_layers", "n_layer"):
            if hasattr(config, name):
                setattr(config, name, len(layers_of(hf)))
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i % 2] for i in range(len(layers_of(hf)))]


def with_adapters(hf: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), hf)


def spectral_norm(hf: Any) -> None:
    parametrizations.spectral_norm(hf.get_output_embeddings())


def own_forward(hf: Any) -> None:
    """What kernels of other libraries do."""
    mlp = layers_of(hf)[1]
    old = mlp.forward
    mlp.forward = lambda *args, **kwargs: old(*args, **kwargs)


def to_eager(hf: Any) -> None:
    hf.set_attn_implementation("eager" if hf.config._attn_implementation == "sdpa" else "sdpa")


def half(hf: Any) -> None:
    hf.to(torch.bfloat16)


CHANGES: tuple[Callable[[Any], None], ...] = (
    resize,
    new_embedding,
    new_head,
    scaled_head,
    replaced_layer,
    replaced_attention,
    deleted_layer,
    appended_layer,
    shorter_list,
    swapped_layers,
    with_adapters,
    spectral_norm,
    own_forward,
    to_eager,
    half,
)


def as_it_is(hf: Any, model: Any) -> None:
    """Everything that the view says is what plain hooks and the model's own output say."""
    ids, layers = prompt_ids(), layers_of(hf)
    close = {"rtol": 5e-2, "atol": 5e-2} if hf.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    points = {(f"layers_{side}", i): (layer, side) for i, layer in enumerate(layers) for side in ("input", "output")}
    expected, plain = reads_what_hooks_see(model, ids, points)
    with torch.no_grad():
        torch.testing.assert_close(model.project_on_vocab(expected["layers_output", len(layers) - 1]), plain, **close)
        lens = logit_lens(model, ids)
        torch.testing.assert_close(lens[:, -1].float(), plain[:, -1].float().softmax(-1), **close)
        doubled = edited(lambda: hf(ids).logits, layers[1], "output", lambda hidden: 2 * hidden)
        with model.trace(ids):
            model.layers_output[1] = 2 * model.layers_output[1]
            assert torch.equal(model.logits, doubled)
        for name in ("attention_probabilities", "mlps_contribution", "neurons"):
            with model.trace(ids):
                getattr(model, name)[1]
                assert torch.equal(model.logits, plain)
    assert model.num_layers == len(layers) == len(model.layers) == lens.shape[1]
    assert model.vocab_size == plain.shape[-1]
    assert model.embed_tokens.module is hf.get_input_embeddings()
    assert model.lm_head.module is hf.get_output_embeddings()
    most = model.embed_tokens.module.weight.shape[0] - 1
    assert model.prepare([most])["input_ids"].item() == most


USES: dict[str, Callable[[Any], Any]] = {
    "trace": lambda model: model.trace(prompt_ids()),
    "trace of blocks": lambda model: model.trace(),
    "generate": lambda model: model.generate(prompt_ids(), max_new_tokens=2),
    "scan": lambda model: model.scan(prompt_ids()),
    "call": lambda model: model(prompt_ids()),
    "prepare": lambda model: model.prepare(prompt_ids()),
    "project_on_vocab": lambda model: model.project_on_vocab(torch.zeros(1, 32)),
    "logit_lens": lambda model: logit_lens(model, prompt_ids()),
    **{
        name: lambda model, name=name: getattr(model, name)
        for name in (
            *(
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "hidden_size",
                "vocab_size",
                "causal",
                "layers",
            ),
            *("layer_kinds", "attention_layers", "takes_padding", "ln_final", "lm_head", "embed_tokens"),
        )
    },
    "attentions": lambda model: model.attentions[0],
    "mlps": lambda model: model.mlps[0],
}


#: Where the head is more than a norm and a matrix, the layers of other names, and no module an MLP.
OTHERS = {
    "gpt2": (new_head, replaced_layer, with_adapters),
    "gemma2": (new_head, resize),
    "cohere": (new_head, half),
    "opt": (new_head, new_embedding, deleted_layer),
}
BOTH = [
    *(("llama", change) for change in CHANGES),
    *((model_type, change) for model_type, some in OTHERS.items() for change in some),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(("model_type", "change"), BOTH, ids=lambda one: getattr(one, "__name__", one))
def test_a_change_is_noticed_and_looked_at_again(model_type: str, change: Callable[[Any], None]) -> None:
    hf = build(model_type)
    model = StandardizedTransformer(hf)
    views = [model, model.edit(lambda: None), model.attach("layers_output[1]", nn.Identity(), name="same")]
    change(hf)
    for view in views:
        for use in USES.values() if view is model else [USES["trace"], USES["layer_kinds"]]:
            with pytest.raises(ModelChangedError, match=r"has changed since .* model\.refresh\(\), or Standardized"):
                use(view)
    for view in views:
        assert view.refresh() is view
    as_it_is(hf, model)
    with torch.no_grad(), views[2].trace(prompt_ids()) as tracer:
        inside = views[2].same.output
        assert torch.equal(inside, model.layers_output[1])
        assert torch.equal(tracer.result.logits, hf(prompt_ids()).logits)


def trained(hf: Any) -> None:
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.1)


def other_parameters(hf: Any) -> None:
    hf.get_output_embeddings().weight = nn.Parameter(2 * hf.get_output_embeddings().weight.detach())


def tied(hf: Any) -> None:
    hf.get_output_embeddings().weight = hf.get_input_embeddings().weight


def as_for_training(hf: Any) -> None:
    hf.config.use_cache = False
    hf.config.pad_token_id = 3
    hf.train()
    name = "activation_checkpointing_enable"  # in older releases of Transformers by another name
    getattr(hf, name if hasattr(hf, name) else "gradient_checkpointing_enable")()
    hf.requires_grad_(False)
    hf.eval()


@pytest.mark.parametrize(
    "change",
    [trained, other_parameters, tied, as_for_training],
    ids=lambda one: getattr(one, "__name__", one),
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "cohere"])
def test_other_weights_are_no_change(model_type: str, change: Callable[[Any], None]) -> None:
    hf = build(model_type)
    model = StandardizedTransformer(hf)
    change(hf)
    as_it_is(hf, model)


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("granite", {"logits_scaling": 1.0}, "logits_scaling"),
        ("cohere", {"logit_scale": 1.0}, "logit_scale"),
    ],
)
def test_a_field_that_the_head_relies_on(model_type: str, changes: dict[str, Any], field: str) -> None:
    """At load the head is a norm and a matrix; then it is not."""
    hf: Any = build(model_type, **changes)
    model = StandardizedTransformer(hf)
    assert model._head.short
    holder = hf if hasattr(hf, field) else hf.config  # Cohere's model has taken it from its config
    before = getattr(holder, field)
    setattr(holder, field, 2.5)
    told = rf"{type(holder).__name__}\.{field} is 2\.5, and was {before}\. Have it"
    with pytest.raises(ModelChangedError, match=told):
        model.project_on_vocab(torch.zeros(1, model.config.hidden_size))
    setattr(holder, field, before)
    as_it_is(hf, model)
    setattr(holder, field, 2.5)
    as_it_is(hf, model.refresh())
    assert not model._head.short


def test_an_adapter_merged_unloaded_switched_and_added() -> None:
    """Against the wrapper's own output; what changes no module goes on."""
    wrapped = peft.get_peft_model(
        build("llama"), peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "down_proj", "lm_head"]})
    )
    wrapped.add_adapter("other", peft.LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    wrapped.eval()
    model, ids = StandardizedTransformer(wrapped), prompt_ids()

    def is_right() -> None:
        layers = wrapped.get_submodule("base_model.model.model.layers")
        with torch.no_grad():
            plain = wrapped(ids).logits
            points = {i: (layer, "output") for i, layer in enumerate(layers)}
            expected = hooked(wrapped, lambda: wrapped(ids), points)
            with model.trace(ids):
                assert all(torch.equal(model.layers_output[i], value) for i, value in expected.items())
                assert torch.equal(model.logits, plain)
            torch.testing.assert_close(model.project_on_vocab(expected[2]), plain, rtol=1e-4, atol=1e-4)
            silent = edited(lambda: wrapped(ids).logits, layers[1].mlp, "output", torch.zeros_like)
            with model.trace(ids):
                model.neurons[1] = 0 * model.neurons[1]
                torch.testing.assert_close(model.logits, silent, rtol=1e-4, atol=1e-4)

    is_right()
    wrapped.set_adapter("other")
    is_right()
    wrapped.set_adapter("default")
    with wrapped.disable_adapter():
        is_right()
    wrapped.merge_adapter()
    is_right()
    wrapped.unmerge_adapter()
    is_right()
    wrapped.add_weighted_adapter(["default"], [0.5], "mix")
    wrapped.set_adapter("mix")
    with pytest.raises(ModelChangedError, match=r"lora_A\.mix is new"):
        model.trace(ids)
    model.refresh()
    is_right()
    wrapped.merge_and_unload()
    with pytest.raises(ModelChangedError, match=r"layers\.0\.self_attn\.q_proj is a Linear, no Linear"):
        model.trace(ids)
    model.refresh()
    is_right()


def test_what_has_changed_is_said() -> None:
    hf = build("llama")
    model = StandardizedTransformer(hf)
    layer = hf.model.layers[2]
    hf.model.layers[2] = copy.deepcopy(layer)
    with pytest.raises(ModelChangedError) as raised:
        model.trace(prompt_ids())
    assert str(raised.value) == (
        "The model has changed since its names were found and checked: model.layers.2 is another LlamaDecoderLayer; "
        "model.layers.2.self_attn is another LlamaAttention; model.layers.2.self_attn.q_proj is another Linear, and 10 more. "
        "Have it looked at again: model.refresh(), or StandardizedTransformer(model.hf_model, model.tokenizer)."
    )
    hf.model.layers[2] = layer  # it is again what it was
    with model.trace(prompt_ids()):
        pass
    hf.half()
    with pytest.raises(
        ModelChangedError, match=r"checked: model\.embed_tokens\.weight is a Parameter of torch\.float16"
    ):
        model.trace(prompt_ids())


def test_refreshing() -> None:
    hf = build("llama")
    model = StandardizedTransformer(hf)
    attached = model.attach("layers_output[2]", nn.Identity(), name="last")
    copied = copy.deepcopy(model)
    with model.trace(prompt_ids()):
        with pytest.raises(UsageError, match=r"refresh\(\) is called outside of traces"):
            model.refresh()
    shorter_list(hf)
    with pytest.raises(LayerIndexError, match=r"layers_output\[2\]: the model has 2 layers"):
        attached.refresh()
    with pytest.raises(ModelChangedError):  # it is as it was
        attached.trace(prompt_ids())
    edits: list[str] = []
    edited_view = model.edit(lambda: edits.append("made"))
    edited_view.refresh()
    edited_view(prompt_ids())
    assert edits == ["made"]
    model.refresh()
    with (
        torch.no_grad(),
        edited_view.trace(prompt_ids()),
    ):  # the names of all views are those of a trace of any
        assert torch.equal(model.layers_output[1], edited_view.ln_final.input)
    with copied.trace(prompt_ids()):  # of a copy of the model, which nobody has changed
        assert copied.num_layers == 3
    late = copy.deepcopy(attached)
    with pytest.raises(ModelChangedError):
        late.trace(prompt_ids())


def test_what_looking_costs() -> None:
    """Some 25 µs on GPT-2, whose shortest trace takes milliseconds."""
    model = StandardizedTransformer(
        GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=4, vocab_size=50)).eval(), validate=False
    )
    assert model.num_layers == 12

    def quickest(call: Callable[[], Any], times: int) -> float:
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(taken)

    def trace() -> None:
        with torch.no_grad(), model.trace([[3] * 8]):
            model.logits

    trace()
    assert quickest(model._facts.changed, 200) < 0.01 * quickest(trace, 20)


class Keeps(LlamaForCausalLM):
    """Keeps things of each call on itself, as models do: Qwen2-VL's older releases their positions."""

    keeps = False

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if self.keeps:
            self.seen, self.loss = attention_mask, torch.zeros(3)
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


def test_what_a_forward_keeps_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = Keeps(build("llama").config)
    hf.seen, hf.loss = None, 0.0
    model = StandardizedTransformer(hf)
    monkeypatch.setattr(Keeps, "keeps", True)
    for _ in range(2):
        model([[5, 6, 7]])
        with model.trace([[5, 6, 7]]):
            assert model.logits.shape[:2] == (1, 3)
    hf.loss = 1.0
    with pytest.raises(ModelChangedError, match=r"Keeps.loss is 1.0, and was 0.0"):
        model.trace([[5, 6, 7]])
