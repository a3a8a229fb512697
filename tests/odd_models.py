"""Models with code of their own, each odd in a way: what no model of Transformers does, and a model of somebody's does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, ModelOutput

WIDTH, VOCAB, HEADS, LAYERS = 24, 61, 3, 3


class NamelessConfig(PreTrainedConfig):
    """Says nothing that anybody else would call so."""

    model_type = "nameless"
    glyphs = VOCAB
    breadth = WIDTH
    storeys = LAYERS


class Attention(nn.Module):
    """Of three heads, whose keys are shared by all; what it gives is arranged by `give`."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any] = lambda out, _: out, width: int = WIDTH) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width // HEADS)
        self.v = nn.Linear(width, width // HEADS)
        self.o = nn.Linear(width, width)
        self.give = give

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        if own_mask is not None:
            later = later | ~own_mask[:, None, None]
        pattern = self.weigh(scores.masked_fill(later, -1e9))
        return self.give(self.o((pattern @ v).transpose(1, 2).flatten(-2)), pattern)

    def weigh(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class HandMade(Attention):
    def weigh(self, scores: Tensor) -> Tensor:
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)


class Sdpa(Attention):
    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.give(self.o(out.transpose(1, 2).flatten(-2)), out)


class Mlp(nn.Sequential):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.Linear(width, 40), nn.SiLU(), nn.Linear(40, width))


class Block(nn.Module):
    def __init__(self, attention: nn.Module | None = None, give: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.look, self.think = attention or Attention(), Mlp()
        self.give = give

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        x = x + tensor_in(self.look(self.n1(x), own_mask))
        return self.give(x + self.think(self.n2(x)))


def tensor_in(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        if isinstance(value, dict):
            value = value.get("out", value.get("states"))
        else:
            value = value[0] if isinstance(value, tuple) else value.states
    return value


class Odd(PreTrainedModel, GenerationMixin):
    """Without any oddity but its config's: each class below has one more."""

    config_class = NamelessConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config or NamelessConfig())
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Embedding(32, WIDTH)
        self.build()
        self.last = nn.LayerNorm(WIDTH)
        self.speak: nn.Module | None = nn.Linear(WIDTH, VOCAB, bias=False)

    def build(self) -> None:
        self.tower = nn.ModuleList(Block() for _ in range(LAYERS))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module | None:
        return self.speak

    def layers(self) -> list[nn.Module]:
        return list(self.tower)

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        for layer in self.layers():
            x = tensor_in(layer(x, own_mask))
        return x

    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.shape[1]) if positions is None else positions)

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.speak is not None
        return self.speak(self.last(hidden))

    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        own_mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.run(self.embed(input_ids, position_ids), own_mask)
        return CausalLMOutput(logits=self.logits(hidden))


class OneTuples(Odd):
    """The one of a user's: blocks return one-tuples, attentions dicts, the mask is the model's own."""

    def build(self) -> None:
        give = lambda out, pattern: {"out": out, "weights": pattern}  # noqa: E731
        self.tower = nn.ModuleList(Block(Attention(give), lambda x: (x,)) for _ in range(LAYERS))


class InADict(Odd):
    """Layers in a dict, by names, called by keywords, the mask first."""

    class Layer(Block):
        def forward(self, *, own_mask: Tensor | None, stream: Tensor) -> Any:
            return super().forward(stream, own_mask)

    def build(self) -> None:
        self.tower = nn.ModuleDict({name: self.Layer(Sdpa()) for name in ("ground", "first", "second")})

    def layers(self) -> list[nn.Module]:
        return list(self.tower.values())

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        for layer in self.layers():
            x = layer(own_mask=own_mask, stream=x)
        return x


class ByName(Odd):
    """Layers are attributes of the model."""

    def build(self) -> None:
        self.block_a1, self.block_a2, self.block_a3 = (Block() for _ in range(3))

    def layers(self) -> list[nn.Module]:
        return [self.block_a1, self.block_a2, self.block_a3]


class Headless(Odd):
    """The head is a product with the embedding's transpose, no module."""

    def __init__(self) -> None:
        super().__init__()
        self.speak = None

    def logits(self, hidden: Tensor) -> Tensor:
        return 0.7 * self.last(hidden) @ self.words.weight.T


class ByHand(Odd):
    """An attention without a softmax."""

    def build(self) -> None:
        self.tower = nn.ModuleList(Block(HandMade()) for _ in range(LAYERS))


class PostNorm(Odd):
    """The stream is scaled, and normed after each addition."""

    class Layer(Block):
        def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
            x = self.n1(0.8 * x + self.look(x, own_mask))
            return self.n2(0.8 * x + self.think(x))

    def build(self) -> None:
        self.tower = nn.ModuleList(self.Layer() for _ in range(LAYERS))


@dataclass
class Given:
    note: str
    states: Tensor


class Dataclasses(Odd):
    """Blocks and attentions return a dataclass, whose first field is no tensor."""

    def build(self) -> None:
        self.tower = nn.ModuleList(
            Block(Attention(lambda out, _: Given("attention", out)), lambda x: Given("block", x)) for _ in range(LAYERS)
        )


@dataclass
class BlockOutput(ModelOutput):
    extra: Any = None
    states: Any = None


class ModelOutputs(Odd):
    """Blocks return a ModelOutput with a number for each head before the stream."""

    def build(self) -> None:
        give = lambda x: BlockOutput(extra=torch.ones(HEADS, 1), states=x)  # noqa: E731
        self.tower = nn.ModuleList(Block(give=give) for _ in range(LAYERS))


class Dicts(Odd):
    """Blocks return dicts, attentions tuples with their weights first."""

    def build(self) -> None:
        self.tower = nn.ModuleList(Block(give=lambda x: {"note": 1, "states": x}) for _ in range(LAYERS))


class Pair(NamedTuple):
    states: Tensor
    note: str


class NamedTuples(Odd):
    """Blocks return named tuples, attentions lists."""

    def build(self) -> None:
        self.tower = nn.ModuleList(Block(give=lambda x: Pair(x, "block")) for _ in range(LAYERS))


class SeqFirst(Odd):
    """The stream is (seq, batch, hidden)."""

    class Layer(Block):
        def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
            return super().forward(x.transpose(0, 1), own_mask).transpose(0, 1)

    def build(self) -> None:
        self.tower = nn.ModuleList(self.Layer() for _ in range(LAYERS))

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        return super().run(x.transpose(0, 1), own_mask).transpose(0, 1)


class TwoStacks(Odd):
    """A second list of layers goes on where the first ends."""

    def build(self) -> None:
        self.lower = nn.ModuleList(Block() for _ in range(2))
        self.upper = nn.ModuleList(Block(Sdpa()) for _ in range(3))

    def layers(self) -> list[nn.Module]:
        return [*self.lower, *self.upper]


class Siblings(Odd):
    """Two lists of layers beside each other, whose streams are added at the end."""

    def build(self) -> None:
        self.tower = nn.ModuleList(Block() for _ in range(3))
        self.other = nn.ModuleList(Block() for _ in range(2))

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        y = x.flip(-1)
        for layer in self.other:
            y = layer(y, own_mask)
        return super().run(x, own_mask) + y


class Backwards(Odd):
    """The list is gone through from its end."""

    def layers(self) -> list[nn.Module]:
        return list(reversed(self.tower))


class OneState(Odd):
    """Layers are given a dict, write into it and return it."""

    class Layer(Block):
        def forward(self, state: dict[str, Any]) -> Any:
            state["states"] = super().forward(state["states"], state["mask"])
            return state

    def build(self) -> None:
        self.tower = nn.ModuleList(self.Layer() for _ in range(LAYERS))

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        state = {"mask": own_mask, "states": x}
        for layer in self.layers():
            state = layer(state)
        return tensor_in(state)


class Skips(Odd):
    """Every second layer is given what an earlier one gave, too."""

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        first = self.tower[0](x, own_mask)
        second = self.tower[1](first, own_mask)
        return self.tower[2](second + 0.5 * x, own_mask)


class AddedOutside(Odd):
    """Layers give what is to be added to the stream."""

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        for layer in self.layers():
            x = x + 0.5 * layer(x, own_mask)
        return x


class OneForAll(Odd):
    """One layer, in three places of the list."""

    def build(self) -> None:
        layer = Block()
        self.tower = nn.ModuleList([layer, layer, layer])


class LastAlone(Odd):
    """Gives the last position's logits, without an axis of positions."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        own_mask = None if attention_mask is None else attention_mask.bool()
        return CausalLMOutput(logits=self.logits(self.run(self.embed(input_ids, None), own_mask)[:, -1]))


class Classes(Odd):
    """Says of each position what it is: of five classes."""

    def __init__(self) -> None:
        super().__init__()
        self.speak = None
        self.score = nn.Linear(WIDTH, 5)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.score(self.last(hidden))


class FewerOut(Odd):
    """Reads tokens that it never says."""

    def __init__(self) -> None:
        super().__init__()
        self.speak = nn.Linear(WIDTH, VOCAB - 9, bias=False)


class Lengths(Odd):
    """Its mask is how long each prompt is, and there is no other."""

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None, **kwargs: Any) -> Any:
        own_mask = None if lengths is None else torch.arange(input_ids.shape[1]) < lengths[:, None]
        return CausalLMOutput(logits=self.logits(self.run(self.embed(input_ids, None), own_mask)))


class NeedsLengths(Odd):
    """It has to be told how long each prompt is."""

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Any:
        own_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return CausalLMOutput(logits=self.logits(self.run(self.embed(input_ids, None), own_mask)))


class NoMask(Odd):
    """No mask at all, and logits that are a tensor."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.logits(self.run(self.embed(input_ids, None), None))


class LogitsAndLoss(Odd):
    """A tuple of logits and a loss, as small teaching models have it."""

    def forward(self, idx: Tensor, targets: Any = None) -> Any:
        return self.logits(self.run(self.embed(idx, None), None)), None


class LogitsAndLossByIds(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, targets: Any = None) -> Any:
        own_mask = None if attention_mask is None else attention_mask.bool()
        return self.logits(self.run(self.embed(input_ids, None), own_mask)), None


class LogitsInADict(Odd):
    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
        own_mask = None if attention_mask is None else attention_mask.bool()
        return {"loss": None, "logits": self.logits(self.run(self.embed(input_ids, None), own_mask))}


class NestedConfig(PreTrainedConfig):
    model_type = "nested"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = SimpleNamespace(d=WIDTH, v=VOCAB, n=LAYERS)


class Nested(Odd):
    """What its config says is in an object within."""

    config_class = NestedConfig

    def __init__(self) -> None:
        super().__init__(NestedConfig())


class LyingConfig(PreTrainedConfig):
    model_type = "lying"
    vocab_size = VOCAB - 7
    hidden_size = 2 * WIDTH
    num_attention_heads = 2 * HEADS
    num_key_value_heads = 2 * HEADS
    head_dim = 5


class Lying(Odd):
    """Its config is of another model."""

    config_class = LyingConfig

    def __init__(self) -> None:
        super().__init__(LyingConfig())


@dataclass
class PlainConfig:
    n_embd: int = WIDTH
    block_size: int = 32


class Plain(nn.Module):
    """No model of Transformers at all: a module with a dataclass for a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PlainConfig()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(32, WIDTH)
        self.h = nn.ModuleList(Block(Sdpa()) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def layers(self) -> list[nn.Module]:
        return list(self.h)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for layer in self.h:
            x = layer(x)
        return self.out(self.ln_f(x))


def make(kind: type[Any]) -> Any:
    """A random one, in which everything matters."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.3 * noise)
    return model
