"""Models nobody wrote a config for: unlike any in transformers, with names nobody could guess."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import edited, hooked
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nnatomy import ArchConfig, StandardizedTransformer
from nnatomy.errors import NotInThisModelError, UnknownArchitectureError

WIDTH, VOCAB = 24, 61


class OddConfig(PreTrainedConfig):
    model_type = "odd"
    hidden_size = WIDTH
    num_attention_heads = 3
    vocab_size = VOCAB


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)


class Gaze(nn.Module):
    """An attention whose projections are one matrix, by einsum."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return self.out(torch.einsum("bhqk,bkhd->bqhd", causal(scores).softmax(-1), v).flatten(-2))


class Smear(nn.Module):
    """Mixes tokens without attention: a causal convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(nn.functional.pad(x.mT, (2, 0))).mT


class Think(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 40), nn.SiLU(), nn.Linear(40, WIDTH))


class Storey(nn.Module):
    """Sequential, with the norm after the addition within reach, and a tuple for a result."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.scale_a = nn.LayerNorm(WIDTH)
        self.look = mixer
        self.scale_b = nn.LayerNorm(WIDTH)
        self.ponder = Think()

    def forward(self, stream: Tensor, extra: Any = None) -> Any:
        stream = stream + 0.5 * self.look(self.scale_a(stream))
        return stream + self.ponder(self.scale_b(stream)), extra


class Side(nn.Module):
    """Parallel: the MLP reads what the attention reads; a tensor for a result."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.both = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "b": Think(), "a": mixer})

    def forward(self, stream: Tensor, extra: Any = None) -> Any:
        x = self.both["norm"](stream)
        return stream + self.both["b"](x) + self.both["a"](x)


class Tower(nn.Module):
    def __init__(self, storeys: list[nn.Module]) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(32, WIDTH)
        self.storeys = nn.ModuleList(storeys)
        self.roof = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for storey in self.storeys:
            hidden = storey(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.roof(hidden)


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig

    def __init__(self, config: OddConfig, storeys: list[nn.Module], factor: float = 1.0) -> None:
        super().__init__(config)
        self.tower = Tower(storeys)
        self.speak = nn.Linear(WIDTH, VOCAB, bias=False)
        self.factor = factor

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.tanh(self.factor * self.speak(self.tower(input_ids))))


def odd(kind: str) -> OddForCausalLM:
    torch.manual_seed(0)
    storeys = {
        "sequential": lambda: [Storey(Gaze()) for _ in range(3)],
        "parallel": lambda: [Side(Gaze()) for _ in range(3)],
        "hybrid": lambda: [Storey(Smear()), Side(Gaze()), Side(Smear()), Storey(Gaze())],
    }[kind]()
    model = OddForCausalLM(OddConfig(), storeys, factor=0.7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


IDS = torch.tensor([[5, 9, 30, 2, 44, 17], [8, 1, 1, 60, 3, 12]])


@pytest.mark.parametrize("kind", ["sequential", "parallel", "hybrid"])
def test_its_modules_are_found_and_proved(kind: str) -> None:
    hf = odd(kind)
    model = StandardizedTransformer(hf)
    assert model.layers[0].module is hf.tower.storeys[0]
    assert (model.ln_final.module, model.embed_tokens.module) == (hf.tower.roof, hf.tower.words)
    assert model.lm_head.module is hf.speak
    assert not model._head.short
    points: dict[Any, tuple[nn.Module, str]] = {}
    for i, storey in enumerate(hf.tower.storeys):
        mixer = storey.look if isinstance(storey, Storey) else storey.both["a"]
        mlp = storey.ponder if isinstance(storey, Storey) else storey.both["b"]
        points["layers_output", i] = storey, "output"
        points["mlps_output", i] = mlp, "output"
        if isinstance(mixer, Gaze):
            points["attentions_input", i] = mixer, "input"
            points["attentions_output", i] = mixer, "output"
            assert model.layer_kinds[i] == "attention"
        else:
            assert model.layer_kinds[i] == "convolution"
            with pytest.raises(NotInThisModelError, match=r"its token mixer is (look|both.a) \(convolution\)"):
                model.attentions[i]
    expected = hooked(hf, lambda: hf(IDS), points)
    with torch.no_grad():
        plain = hf(IDS).logits
        for (name, i), value in expected.items():
            with model.trace(IDS):
                assert torch.equal(getattr(model, name)[i], value), (name, i)
                if name == "attentions_input":
                    pattern = model.attention_probabilities[i]
                assert torch.equal(model.logits, plain)
        with model.trace(IDS):
            hidden = model.layers_output[-1]
        torch.testing.assert_close(model.project_on_vocab(hidden), plain)
        module, side = points["mlps_output", 1]
        with model.trace(IDS):
            model.mlps_output[1] = 0 * model.mlps_output[1]
            assert torch.equal(model.logits, edited(lambda: hf(IDS).logits, module, side, torch.zeros_like))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 3, 6))
    assert model.attention_layers == tuple(i for name, i in points if name == "attentions_input")


def test_custom_code_is_loaded_and_inferred(tmp_path: Path) -> None:
    """A folder with its own modelling code, as a hub repository has."""
    code = Path(__file__).read_text()
    classes = code[code.index("WIDTH, VOCAB") : code.index("def odd(")]
    classes = classes.replace("storeys: list[nn.Module], factor: float = 1.0", "factor: float = 0.7").replace(
        "self.tower = Tower(storeys)",
        "self.tower = Tower([Storey(Gaze()) for _ in range(3)])\n        self.post_init()",
    )
    head = """
        from typing import Any
        import torch
        from torch import Tensor, nn
        from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput
    """
    (tmp_path / "modeling_odd.py").write_text(textwrap.dedent(head) + classes)
    hf = odd("sequential")
    hf.config.auto_map = {
        "AutoConfig": "modeling_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    hf.config.architectures = ["OddForCausalLM"]
    hf.save_pretrained(tmp_path)
    model = StandardizedTransformer(tmp_path, trust_remote_code=True)
    with torch.no_grad(), model.trace(IDS):
        hidden = model.layers_output[1]
        logits = model.logits
    with torch.no_grad():
        assert torch.equal(logits, hf(IDS).logits)
    assert hidden.shape == (2, 6, WIDTH)


def test_a_part_may_be_named_and_the_rest_inferred() -> None:
    hf = odd("sequential")
    model = StandardizedTransformer(hf, arch_config=ArchConfig(layers="tower.storeys", mlp="ponder"))
    assert model.mlps[2].module is hf.tower.storeys[2].ponder
    assert model.attentions[2].module is hf.tower.storeys[2].look
    with pytest.raises(UnknownArchitectureError, match=r"it has no 'tower.storeys.0.nope'"):
        StandardizedTransformer(hf, arch_config=ArchConfig(layers="tower.storeys", mlp="nope"))


def test_what_shows_no_layers_is_refused() -> None:
    hf = odd("sequential")

    class Loop(nn.Module):
        """One layer, gone through three times."""

        def __init__(self, storey: nn.Module) -> None:
            super().__init__()
            self.storey = storey

        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            for _ in range(3):
                x = self.storey(x)[0]
            return x

    hf.tower.storeys = nn.ModuleList([Loop(Storey(Gaze()))])
    with pytest.raises(UnknownArchitectureError, match="no list of modules hands hidden states from one to the"):
        StandardizedTransformer(hf)
