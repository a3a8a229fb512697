"""Attached modules: spliced, with an error term, added, read; against plain hooks."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, hooks, net, no_leaks, x
from torch import Tensor, nn

from nnatomy import StandardizedTransformer
from nnatomy.errors import AssignmentError, NoSuchModuleError, UsageError
from nnatomy.tracing import Traceable


def sae(width: int = 4, features: int = 16) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(width, features), nn.ReLU(), nn.Linear(features, width))


def test_its_output_goes_on_in_the_place_of_the_value() -> None:
    model, module = net(), sae()
    view = Traceable(model)
    plain = model(x())
    with hooks((model.layers[1], "output", lambda out: (module(out[0]), out[1]))):
        expected = model(x())
    with no_leaks(model, module):
        spliced = view.attach("layers.1.output", module, name="sae")
        assert torch.equal(spliced(x()), expected)
        with spliced.trace(x()) as tracer:
            given = spliced.sae.input
            features = spliced.sae[1].output
            here = spliced.layers[1].output[0]  # what the module left
            after = spliced.layers[2].input
            assert torch.equal(tracer.result, expected)
        assert torch.equal(view(x()), plain)
        assert torch.equal(spliced.without_edits()(x()), plain)
    assert torch.equal(features, module[:2](given))
    assert torch.equal(here, module(given))
    assert here is after
    assert repr(spliced.edits) == "(<sae: Sequential at layers.1.output, how='replace'>,)"
    assert "sae" in dir(spliced)


def test_with_the_error_term_the_value_stays_until_a_feature_is_edited() -> None:
    model, module = net(), sae()
    spliced = Traceable(model).attach("embed.output", module, how="error")
    assert torch.allclose(spliced(x()), model(x()), atol=1e-6)

    def ablated(hidden: Tensor) -> Tensor:
        features = module[:2](hidden)
        features[:, 3] = 0
        return module[2](features) + (hidden - module(hidden)).detach()

    with hooks((model.embed, "output", ablated)):
        expected = model(x())
    assert not torch.allclose(expected, model(x()), atol=1e-3)
    with no_leaks(model, module), spliced.trace(x()) as tracer:
        spliced.sequential[1].output[:, 3] = 0
        assert torch.allclose(tracer.result, expected, atol=1e-6)


def test_gradients_reach_its_parameters_past_the_error_term() -> None:
    model, module = net().requires_grad_(False), sae()
    spliced = Traceable(model).attach("layers.1.input", module, how="error")
    spliced(x()).sum().backward()
    ours = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()

    def by_hook(value):
        (hidden,), kwargs = value
        return (module(hidden) + (hidden - module(hidden)).detach(),), kwargs

    with hooks((model.layers[1], "input", by_hook)):
        model(x()).sum().backward()
    for mine, parameter in zip(ours, module.parameters(), strict=True):
        assert torch.equal(mine, parameter.grad)


class Lora(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.down = nn.Linear(inside, 2, bias=False)
        self.up = nn.Linear(2, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def with_lora(model: Net, lora: Lora, x: Tensor) -> Tensor:
    given: list[Tensor] = []
    linear = model.layers[1].mlp[0]
    entries = (
        (linear, "input", lambda value: given.append(value[0][0])),
        (linear, "output", lambda out: out + lora(given.pop())),
    )
    with hooks(*entries):
        return model(x)


def test_an_adapter_is_trained_through_a_trace() -> None:
    model, lora, reference = net().requires_grad_(False), Lora(4, 8), Lora(4, 8)
    adapted = Traceable(model).attach("layers.1.mlp.0.output", lora, how="add", takes="layers.1.mlp.0.input")
    target = torch.ones(2, 3)
    ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (lora, reference))
    losses = []
    for _ in range(5):
        with adapted.trace(x()) as tracer:
            inner = adapted.lora.down.output
            loss = (tracer.result - target).square().sum()
        assert inner.shape == (2, 2)
        expected = (with_lora(model, reference, x()) - target).square().sum()
        assert torch.equal(loss, expected)
        for optimizer, one in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            one.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(lora.up.weight, reference.up.weight)


def test_a_probe_reads_and_changes_nothing() -> None:
    model, probe = net(), nn.Linear(4, 1)
    probed = Traceable(model).attach("layers.0.output", probe, how="read", name="probe")
    with probed.trace(x()) as tracer:
        guess = probed.probe.output
        hidden = probed.layers[0].output[0]
        assert torch.equal(tracer.result, model(x()))
    assert torch.equal(guess, probe(hidden))


def test_several_stack_and_edits_come_after() -> None:
    model, one, two = net(), sae(), nn.Tanh()
    view = Traceable(model).attach(Traceable(model).embed, one).attach("embed.output", two)
    edited = view.edit(lambda: setattr(view.embed, "output", 3 * view.embed.output))
    with hooks((model.embed, "output", lambda out: 3 * two(one(out)))):
        expected = model(x())
    assert torch.equal(edited(x()), expected)
    assert not torch.equal(view(x()), expected)
    with pytest.raises(UsageError, match=r"attach first, model.attach\(...\).edit\(...\)"):
        edited.attach("embed.output", nn.Tanh())


def test_one_module_at_two_points_has_two_calls() -> None:
    model, module = net(), sae()
    view = Traceable(model).attach("layers.0.output", module, name="a").attach("layers.1.output", module, name="b")
    with view.trace(x()):
        first, second = view.a[1].output, view.a.calls[1].output
    with hooks(*((model.layers[i], "output", lambda out: (module(out[0]), out[1])) for i in range(2))):
        seen: list[Tensor] = []
        with hooks((module, "output", seen.append)):
            model(x())
    assert torch.equal(module[2](first), seen[0])
    assert torch.equal(second, seen[1])


def test_its_own_dtype() -> None:
    model, module = net().double(), sae()
    spliced = Traceable(model).attach("embed.output", module)
    with hooks((model.embed, "output", lambda out: module(out.float()).double())):
        expected = model(x().double())
    assert torch.equal(spliced(x().double()), expected)


def test_at_the_models_own_input_and_output() -> None:
    model, before, after = net(), nn.Linear(2, 2), nn.Linear(3, 3)
    spliced = Traceable(model).attach(".input", before, name="before").attach(".output", after, name="after")
    steps = []
    with spliced.trace_call(lambda x: [model(x), model(-x)], x()) as tracer:
        for _ in tracer.iter[:]:
            steps.append((spliced.embed.input, spliced.after.input, spliced.after.output))
        results = tracer.result
    for value, result, step in zip((x(), -x()), results, steps, strict=True):
        assert torch.equal(result, after(model(before(value))))
        assert torch.equal(step[0], before(value))
        assert torch.equal(step[1], model(before(value)))
        assert torch.equal(step[2], result)


def test_bad_points_names_and_outputs() -> None:
    model = net()
    view = Traceable(model)
    with pytest.raises(UsageError, match=r"'layers.1' is no point: give a path and .input or .output"):
        view.attach("layers.1", nn.Tanh())
    with pytest.raises(NoSuchModuleError, match="Did you mean 'layers'"):
        view.attach("layer.1.output", nn.Tanh())
    with pytest.raises(UsageError, match=r"name='embed'.*something of that name"):
        view.attach("layers.1.output", nn.Tanh(), name="embed")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        view.attach("embed.output", nn.Linear(9, 4))(x())
    (note,) = raised.value.__notes__
    assert (
        note == "That is in <linear: Linear at embed.output, how='replace'>, which was given a tensor of shape (2, 4)."
    )
    with pytest.raises(UsageError, match="how='splice': it is 'replace'"):
        view.attach("layers.1.output", nn.Tanh(), how="splice")
    with (
        no_leaks(model),
        pytest.raises(AssignmentError, match=r"shape \(2, 4\); what the module returned is of shape \(2, 9\)"),
    ):
        view.attach("embed.output", nn.Linear(4, 9))(x())
    with pytest.raises(UsageError, match=r"comes to embed.output before layers.1.input"):
        view.attach("embed.output", nn.Tanh(), takes="layers.1.input")(x())


def test_standard_names_every_step_and_several_prompts() -> None:
    model = StandardizedTransformer("demo:llama")
    module = sae(model.hidden_size, 64)
    spliced = model.attach("layers_output[2]", module, name="sae")
    prompts = ["The capital of France is", "Japan is in"]
    with torch.no_grad():
        with hooks((model.layers[2].module, "output", lambda out: module(out))):
            expected = [model(prompt).logits for prompt in prompts]
            tokens = model.generate(prompts[0], max_new_tokens=4).run()
        assert torch.equal(spliced(prompts[0]).logits, expected[0])
        with spliced.generate(prompts[0], max_new_tokens=4) as tracer:
            widths = [spliced.sae[1].output.shape[1] for _ in tracer.iter[:]]
            assert torch.equal(tracer.result, tokens)
        assert widths == [5, 1, 1, 1]
        with spliced.trace() as tracer:
            with tracer.invoke(prompts[0]):
                features = spliced.sae[1].output
                one = spliced.logits
            with tracer.invoke(prompts[1]):
                two = spliced.logits
    assert features.shape == (1, 5, 64)
    assert torch.allclose(one, expected[0], atol=1e-4)
    assert torch.allclose(two, expected[1], atol=1e-4)


def test_sessions_group_traces() -> None:
    model = net()
    view = Traceable(model)
    with view.session():
        with view.trace(x()):
            hidden = view.embed.output
        with view.trace(-x()) as tracer:
            view.embed.output = hidden
            assert torch.equal(tracer.result, model(x()))


def test_what_it_takes_is_of_the_same_step() -> None:
    class InTurn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor, step: int) -> Tensor:
            if step == 0:
                self.a(x)
            return self.b(x) if step == 1 else x

    root = InTurn()
    view = Traceable(root).attach("b.output", nn.Identity(), takes="a.output")
    with pytest.raises(UsageError, match=r"comes to b\.output before a\.output"):
        view.trace_call(lambda: [root(torch.full((1, 1), step + 1.0), step) for step in range(2)]).run()


def test_the_error_term_has_the_dropout_of_what_it_is_the_error_of() -> None:
    root = net()
    spliced = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train()
    view = Traceable(root).attach("embed.output", spliced, how="error")
    with view.trace(x()):
        value = view.embed.output
    assert torch.allclose(value, root.embed(x()), atol=1e-5)


def test_a_module_with_parameters_of_two_dtypes() -> None:
    """What it is given keeps its dtype, if that is one of theirs, whichever comes first."""

    class Thresholded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.threshold = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) - self.threshold

    model, module = net(), Thresholded()
    view = Traceable(model)
    with view.attach("embed.output", module, name="sae").trace(x()):
        taken = view.layers[0].input
    assert torch.equal(taken, module(model.embed(x())).tanh())
    module.linear.double()
    text = r"several dtypes \(torch.bfloat16, torch.float64\), and embed.output is torch.float32"
    with pytest.raises(UsageError, match=text):
        view.attach("embed.output", module, name="sae")(x())
