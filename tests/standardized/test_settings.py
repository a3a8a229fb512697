"""Models as users set them up: many threads at once, offloaded, compiled, checkpointed, tied, frozen."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, prompt_ids, shared
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.core import gates
from nnatomy.errors import AssignmentError, InputError, NotReachedError, ValidationError

IDS = prompt_ids(2, 6)


@contextmanager
def hooked(*edits: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Plain forward hooks that put `edit(hidden)` in the place of the hidden states a module gives."""

    def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda _m, _a, out: edit(out) if isinstance(out, Tensor) else (edit(out[0]), *out[1:])

    handles = [module.register_forward_hook(hook(edit)) for module, edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def close(one: Tensor, other: Tensor) -> bool:
    assert one.shape == other.shape
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1))


# Many threads on one model. Each kind with nnatomy, and with plain hooks; `k` makes each trace's edit its own.


def vector(k: int) -> Tensor:
    return torch.linspace(-1, 1, 32) * (k + 1)


def ids(k: int) -> Tensor:
    return prompt_ids(2, 6, seed=k)


def rows(out: Tensor, row: int, new: Tensor) -> Tensor:
    out = out.clone()
    out[row] = new
    return out


def steered(model: Any, k: int) -> list[Tensor]:
    with model.trace(ids(k)):
        model.steer([0, 2], vector(k), token_positions=-1)
        return [model.logits]


def steered_by_hooks(model: Any, k: int) -> list[Tensor]:
    def steer(out: Tensor) -> Tensor:
        out = out.clone()
        out[:, -1] += vector(k)
        return out

    layers = model.layers
    with hooked((layers[0].module, steer), (layers[2].module, steer)):
        return [model.hf_model(ids(k)).logits]


def assigned(model: Any, k: int) -> list[Tensor]:
    with model.trace(ids(k)):
        model.attentions_output[1] = model.attentions_output[1] * k
        hidden = model.layers_output[1]
        model.attention_probabilities[2]
        model.mlps_output[2] = model.mlps_output[2] + vector(k)
        return [hidden, model.logits]


def assigned_by_hooks(model: Any, k: int) -> list[Tensor]:
    seen: list[Tensor] = []
    with hooked(
        (model.layers[1].self_attn.module, lambda out: out * k),
        (model.layers[1].module, lambda out: (seen.append(out), out)[1]),
        (model.layers[2].mlp.module, lambda out: out + vector(k)),
    ):
        logits = model.hf_model(ids(k)).logits
    return [*seen, logits]


def lasting(model: Any, k: int) -> list[Tensor]:
    edited = model.edit(lambda: model.steer(1, vector(k)))
    with edited.trace(ids(k)):
        first = edited.logits
    return [first, edited(ids(k)).logits]


def lasting_by_hooks(model: Any, k: int) -> list[Tensor]:
    with hooked((model.layers[1].module, lambda out: out + vector(k))):
        return [model.hf_model(ids(k)).logits] * 2


def in_blocks(model: Any, k: int) -> list[Tensor]:
    with model.trace() as tracer:
        with tracer.invoke(ids(k)[0]):
            model.layers_output[1] = given * 2  # noqa: F821
            first = model.logits
        with tracer.invoke(ids(k)[1]):
            given = model.layers_output[1]  # noqa: F841
            model.steer(2, vector(k))
            second = model.logits
    return [torch.cat([first, second])]


def in_blocks_by_hooks(model: Any, k: int) -> list[Tensor]:
    with hooked(
        (model.layers[1].module, lambda out: rows(out, 0, out[1] * 2)),
        (model.layers[2].module, lambda out: rows(out, 1, out[1] + vector(k))),
    ):
        return [model.hf_model(ids(k)).logits]


def in_steps(model: Any, k: int) -> list[Tensor]:
    with model.generate(ids(k), max_new_tokens=4, do_sample=False) as tracer:
        logits = []
        for step in tracer.iter[:]:
            model.steer(1, vector(k) * step)
            logits.append(model.logits)
        return [*logits, tracer.result]


def in_steps_by_hooks(model: Any, k: int) -> list[Tensor]:
    logits: list[Tensor] = []
    handle = model.hf_model.register_forward_hook(lambda _m, _a, out: logits.append(out.logits))
    try:
        with hooked((model.layers[1].module, lambda out: out + vector(k) * len(logits))):
            tokens = model.hf_model.generate(
                ids(k),
                attention_mask=torch.ones_like(ids(k)),
                max_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
            )
    finally:
        handle.remove()
    return [*logits, tokens]


KINDS: list[tuple[Callable[..., list[Tensor]], Callable[..., list[Tensor]]]] = [
    (steered, steered_by_hooks),
    (assigned, assigned_by_hooks),
    (lasting, lasting_by_hooks),
    (in_blocks, in_blocks_by_hooks),
    (in_steps, in_steps_by_hooks),
]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_ten_threads_on_one_model_each_with_edits_of_its_own(model_type: str) -> None:
    model = StandardizedTransformer(shared(model_type))
    with torch.no_grad():
        expected = [KINDS[k % 5][1](model, k) for k in range(200)]
    # transformers leaves hooks of its own on a model once asked for its hidden states.
    hooks = {module: [*module._forward_hooks] for module in model.hf_model.modules()}
    start, wrong, errors = threading.Barrier(10), [], []

    def right(answer: list[Tensor], k: int) -> bool:
        return len(answer) == len(expected[k]) and all(map(close, answer, expected[k]))

    def work(thread: int) -> None:
        start.wait()
        try:
            for round_ in range(20):
                k = 10 * round_ + (thread + round_) % 10  # so that each thread does every kind
                with torch.no_grad():
                    if not right(KINDS[k % 5][0](model, k), k):
                        wrong.append(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert not wrong
    # The answers are apart by more than the comparison allows.
    assert not any(right(expected[other], k) for k in range(20) for other in range(k % 5, 20, 5) if other != k)
    assert not gates.runs
    assert not model._blocks._by_thread
    for module in model.hf_model.modules():
        assert "_call_impl" not in module.__dict__
        assert [*module._forward_hooks] == hooks[module]


# Offloaded.


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A model whose weights accelerate's hooks bring from the CPU or the disk, and the same one whole."""
    from accelerate import cpu_offload, disk_offload

    hf = copy.deepcopy(shared("llama"))
    if request.param == "cpu":
        cpu_offload(hf, execution_device=torch.device("cpu"))
    else:
        disk_offload(hf, tmp_path, execution_device=torch.device("cpu"))
    assert hf.model.layers[1].mlp.up_proj.weight.is_meta
    return StandardizedTransformer(hf), StandardizedTransformer(shared("llama"))


def test_offloaded_weights_by_name(offloaded: tuple[Any, Any]) -> None:
    mapped, whole = offloaded
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "W_in", "W_gate", "W_out", "b_out"):
        assert torch.equal(getattr(mapped, name)[1], getattr(whole, name)[1])
    assert torch.equal(mapped.W_E, whole.W_E)
    assert torch.equal(mapped.W_U, whole.W_U)
    assert torch.equal(mapped.W_Q.folded(1), whole.W_Q.folded(1))
    assert mapped.hf_model.model.layers[1].self_attn.q_proj.weight.is_meta


#: Older releases of Transformers warn of ids that are not where the model is, "on meta" where it is offloaded.
ids_elsewhere = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")


@ids_elsewhere
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_offloaded_weights_change_no_answer(offloaded: tuple[Any, Any], kind: int) -> None:
    mapped, whole = offloaded
    traced, by_hooks = KINDS[kind]
    with torch.no_grad():
        for k in (3, 4):
            answer, expected = traced(mapped, k), by_hooks(whole, k)
            assert len(answer) == len(expected)
            assert all(map(close, answer, expected))
    assert mapped.hf_model.model.layers[1].mlp.up_proj.weight.is_meta


@ids_elsewhere
def test_blocks_and_steps_together_on_offloaded_weights(offloaded: tuple[Any, Any]) -> None:
    answers = []
    for model in offloaded:
        with torch.no_grad(), model.generate(max_new_tokens=3) as tracer:
            with tracer.invoke([3, 4, 5]):
                for _ in tracer.iter[:]:
                    model.steer(1, vector(2))
                one = tracer.result
            with tracer.invoke([6, 7]):
                hidden = [model.layers_output[2] for _ in tracer.iter[:]]
                two = tracer.result
        answers.append([one, two, *hidden])
    assert len(answers[0]) == 5
    assert all(map(torch.equal, *answers))


def test_weights_are_offloaded_again_where_a_trace_stops_early(offloaded: tuple[Any, Any]) -> None:
    mapped, whole = offloaded
    with torch.no_grad():
        with mapped.trace(IDS):
            inside = mapped.model.layers[1].mlp.up_proj.output
        weights = [(name, p.is_meta) for name, p in mapped.hf_model.named_parameters()]
        with whole.trace(IDS):
            assert torch.equal(inside, whole.model.layers[1].mlp.up_proj.output)
        assert torch.equal(mapped(IDS).logits, whole(IDS).logits)
    assert weights
    assert all(is_meta for _, is_meta in weights), [name for name, is_meta in weights if not is_meta]


# Compiled.


def test_a_compiled_submodule_is_seen_from_outside() -> None:
    hf = build("llama")
    plain = StandardizedTransformer(shared("llama"))
    mlp = hf.model.layers[1].mlp
    hf.model.layers[1].mlp = torch.compile(mlp, backend="eager")
    model = StandardizedTransformer(hf)
    with torch.no_grad():
        for kind, by_hooks in KINDS:
            assert all(map(close, kind(model, 3), by_hooks(plain, 3)))
        with pytest.raises(NotReachedError, match=r"up_proj.output cannot be reached: .* compiled \(torch.compile\)"):
            with model.trace(IDS):
                model["model.layers.1.mlp._orig_mod.up_proj"].output
    torch._dynamo.reset()


def test_a_module_compiled_in_place_says_so() -> None:
    hf = build("llama")
    hf.model.layers[1].mlp.compile(backend="eager")
    with pytest.raises(ValidationError, match=r"mlps_input\[1\]: fires 0 times .*what is compiled \(torch.compile\)"):
        StandardizedTransformer(hf)
    model = StandardizedTransformer(hf, validate=False)
    with torch.no_grad():
        with model.trace(IDS):
            hidden, logits = model.layers_output[1], model.logits
        with hooked((hf.model.layers[1], lambda out: torch.testing.assert_close(out, hidden) or out)):
            assert close(hf(IDS).logits, logits)
        with pytest.raises(NotReachedError, match=r"mlps_output\[1\] cannot be reached: .* compiled \(torch.compile\)"):
            with model.trace(IDS):
                model.mlps_output[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_model_is_refused_with_what_to_do(how: str) -> None:
    hf = build("llama")
    if how == "in place":
        hf.compile(backend="eager")
        compiled = hf
    else:
        compiled = torch.compile(hf, backend="eager")
    with pytest.raises(
        InputError, match="is compiled .* nothing inside of it can be seen. Give the model as it was before"
    ):
        StandardizedTransformer(compiled)


def test_a_model_may_be_compiled_beside() -> None:
    hf = build("llama")
    model = StandardizedTransformer(hf)
    compiled = torch.compile(hf, backend="eager")
    with torch.no_grad():
        expected = hf(IDS).logits
        assert close(compiled(IDS).logits, expected)
        for kind, by_hooks in KINDS:
            assert all(map(close, kind(model, 3), by_hooks(model, 3)))
        assert close(compiled(IDS).logits, expected)
    torch._dynamo.reset()


# Gradients: checkpointed, tied and frozen weights.


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(close(some[name], others[name]) for name in some)


def switch_checkpointing(hf: nn.Module, how: str, *options: Any) -> None:
    """`how` is "enable" or "disable"; older releases call it gradient checkpointing."""
    kind = "activation" if hasattr(hf, "activation_checkpointing_enable") else "gradient"
    getattr(hf, f"{kind}_checkpointing_{how}")(*options)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_gradient_checkpointing(blocks: bool, reentrant: bool) -> None:
    """Reading inside, and edits outside of what is computed again: the gradients are those of hooks without it."""
    hf, plain = build("llama"), build("llama")
    hf.train()
    switch_checkpointing(hf, "enable", {"use_reentrant": reentrant})
    model = StandardizedTransformer(hf, validate=False)
    with hooked((plain.model.embed_tokens, lambda out: out * 0.5)):
        expected = gradients(plain, plain(IDS).logits.sin().sum())
    inside = []
    with hooked((plain.model.layers[1].mlp, lambda out: (inside.append(out), out)[1])):
        with hooked((plain.model.embed_tokens, lambda out: out * 0.5)):
            plain(IDS)
    if blocks:
        with model.trace(use_cache=False) as tracer:
            with tracer.invoke(IDS[:1]):
                model.token_embeddings = model.token_embeddings * 0.5
                one, first = model.mlps_output[1], model.logits
            with tracer.invoke(IDS[1:]):
                model.token_embeddings = model.token_embeddings * 0.5
                two, second = model.mlps_output[1], model.logits
        mlp, logits = torch.cat([one, two]), torch.cat([first, second])
    else:
        with model.trace(IDS, use_cache=False):
            model.token_embeddings = model.token_embeddings * 0.5
            mlp, logits = model.mlps_output[1], model.logits
    assert close(mlp, inside[0])
    assert same(gradients(hf, logits.sin().sum()), expected)
    assert len(expected) > 20


@pytest.mark.parametrize("blocks", [False, True])
def test_an_edit_inside_a_checkpointed_layer_is_refused(blocks: bool) -> None:
    hf = build("llama").train()
    switch_checkpointing(hf, "enable")
    model = StandardizedTransformer(hf, validate=False)

    def edit() -> None:
        model.mlps_output[1] = model.mlps_output[1] * 0.5
        model.logits

    with pytest.raises(AssignmentError, match="under gradient checkpointing.*activation_checkpointing_disable"):
        with model.trace(**({} if blocks else {"prompts": IDS}), use_cache=False) as tracer:
            if blocks:
                tracer.invoke(IDS[:1], edit)
                tracer.invoke(IDS[1:], lambda: model.logits)
            else:
                edit()
    switch_checkpointing(hf, "disable")
    with model.trace(IDS):
        edit()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_tied_weights_get_the_gradients_of_both_uses(model_type: str) -> None:
    hf, plain = (build(model_type, tie_word_embeddings=True) for _ in range(2))
    assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    model, other = StandardizedTransformer(hf), StandardizedTransformer(plain)
    with hooked((other.layers[1].module, lambda out: out + vector(1))):
        logits = plain(IDS).logits
        expected = gradients(plain, logits.sin().sum())
    with model.trace(IDS):
        model.steer(1, vector(1))
        traced = model.logits
    assert close(traced, logits)
    assert same(gradients(hf, traced.sin().sum()), expected)
    assert len(expected) == len(dict(hf.named_parameters()))
    with torch.no_grad():  # a training step, and the tie still holds
        for parameter in hf.parameters():
            parameter -= 0.1 * parameter.grad
    assert hf.get_input_embeddings().weight is hf.get_output_embeddings().weight


@pytest.mark.parametrize("way", ["requires_grad_", "steered by what has a gradient", "lasting edit"])
def test_frozen_weights_and_gradients_of_activations(way: str) -> None:
    hf = copy.deepcopy(shared("llama")).requires_grad_(False)
    model = StandardizedTransformer(hf)
    added = vector(0).requires_grad_()
    held: list[Tensor] = []

    def hook(out: Tensor) -> Tensor:
        held.append(out.requires_grad_() if way == "requires_grad_" else out + added)
        return held[-1]

    leaf = added if way != "requires_grad_" else None
    with hooked((hf.model.layers[1], hook)):
        loss = hf(IDS).logits.sin().sum()
    expected = torch.autograd.grad(loss, [held[0], *([] if leaf is None else [leaf])])

    def ask(view: Any) -> tuple[Tensor, Tensor]:
        if way == "requires_grad_":
            hidden = view.layers_output[1].requires_grad_()
        elif way == "lasting edit":
            hidden = view.layers_output[1]
        else:
            view.layers_output[1] = view.layers_output[1] + added
            hidden = view.layers_output[1]
        return hidden, view.logits.sin().sum()

    view = model.edit(lambda: model.steer(1, added)) if way == "lasting edit" else model
    with view.trace(IDS):
        hidden, traced = ask(view)
    got = torch.autograd.grad(traced, [hidden, *([] if leaf is None else [leaf])])
    assert all(map(close, got, expected))
    assert all(float(grad.abs().max()) > 0 for grad in expected)
    assert all(not p.requires_grad and p.grad is None for p in hf.parameters())

    with view.trace() as tracer:  # in blocks, each over its own rows
        blocks = [tracer.invoke(IDS[:1], lambda: ask(view)), tracer.invoke(IDS[1:], lambda: ask(view))]
    loss = sum(block.value[1] for block in blocks)
    if way == "requires_grad_":
        got = torch.autograd.grad(loss, [block.value[0] for block in blocks])
        assert close(torch.cat(got), expected[0])
    else:
        assert close(torch.autograd.grad(loss, added)[0], expected[1])


@pytest.mark.parametrize("lengths", [(6, 6), (6, 4)])
@pytest.mark.parametrize("ask", ["retain_grad", "register_hook"])
def test_a_blocks_own_rows_get_their_gradient(ask: str, lengths: tuple[int, int]) -> None:
    model = StandardizedTransformer(shared("llama"))
    hooked_gradients: dict[int, Tensor] = {}

    def block(i: int) -> tuple[Tensor, Tensor]:
        hidden = model.layers_output[1]
        if ask == "retain_grad":
            hidden.retain_grad()
        else:
            hidden.register_hook(lambda gradient: hooked_gradients.__setitem__(i, gradient))
        return hidden, model.logits.sin().sum()

    prompts = [IDS[i : i + 1, :length] for i, length in enumerate(lengths)]
    with model.trace() as tracer:
        blocks = [tracer.invoke(prompt, lambda i=i: block(i)) for i, prompt in enumerate(prompts)]
    sum(each.value[1] for each in blocks).backward()
    for i, (each, prompt) in enumerate(zip(blocks, prompts, strict=True)):
        held: list[Tensor] = []
        with hooked((model.layers[1].module, lambda out, held=held: (held.append(out), out)[1])):
            (expected,) = torch.autograd.grad(model.hf_model(prompt).logits.sin().sum(), held)
        got = each.value[0].grad if ask == "retain_grad" else hooked_gradients[i]
        assert close(got, expected)
    model.hf_model.zero_grad()
