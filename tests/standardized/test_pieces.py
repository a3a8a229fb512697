"""Layers that work in pieces with longer prompts than those of the validation: no name gives the first piece for the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from odd_models import LAYERS, WIDTH, Attention, Block, Odd
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel

from nnatomy import StandardizedTransformer
from nnatomy.errors import NotInThisModelError

LONG, PIECE = 12, 8
IDS = torch.arange(3, 3 + LONG)[None]
SHORT = IDS[:, :PIECE]


class ByChunks(Block):
    """Its MLP goes through long sequences in two calls."""

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        x = x + self.look(self.n1(x), own_mask)
        return x + torch.cat([self.think(self.n2(piece)) for piece in x.split(PIECE, 1)], 1)


class ByPrompts(Block):
    """Its MLP goes through the prompts of a long batch one by one."""

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        x = x + self.look(self.n1(x), own_mask)
        size = 1 if x.shape[1] > PIECE else len(x)
        return x + torch.cat([self.think(self.n2(piece)) for piece in x.split(size)])


class ByQueries(Attention):
    """It attends with a block of queries after the other."""

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        q = self.q(x).unflatten(-1, (3, -1)).transpose(1, 2)
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        given = []
        for piece, mask in zip(q.split(PIECE, 2), later.split(PIECE), strict=True):
            scores = piece @ k.mT * q.shape[-1] ** -0.5
            given.append(scores.masked_fill(mask, -1e9).softmax(-1) @ v)
        return self.o(torch.cat(given, 2).transpose(1, 2).flatten(-2))


class ByKeys(Attention):
    """It attends to a block of keys after the other, as kernels do."""

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        q = self.q(x).unflatten(-1, (3, -1)).transpose(1, 2)
        k, w = self.k(x)[:, None], self.v(x)[:, None]
        later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        parts, weights = [], []
        for key, held, mask in zip(k.split(PIECE, 2), w.split(PIECE, 2), later.split(PIECE, 1), strict=True):
            scores = (q @ key.mT * q.shape[-1] ** -0.5).masked_fill(mask, -1e9)
            parts.append(scores.softmax(-1) @ held)
            weights.append(scores.logsumexp(-1))
        if len(parts) == 1:
            return self.o(parts[0].transpose(1, 2).flatten(-2))
        share = torch.stack(weights).softmax(0)[..., None]
        return self.o((share * torch.stack(parts)).sum(0).transpose(1, 2).flatten(-2))


class Twice(Block):
    """Its MLP is called a second time, on all positions, where there are many."""

    def forward(self, x: Tensor, own_mask: Tensor | None = None) -> Any:
        x = x + self.look(self.n1(x), own_mask)
        for _ in range(1 + (x.shape[1] > PIECE)):
            x = x + self.think(self.n2(x))
        return x


class Again(Odd):
    def build(self) -> None:
        self.tower = nn.ModuleList(Twice() for _ in range(LAYERS))


class Chunked(Odd):
    def build(self) -> None:
        self.tower = nn.ModuleList(ByChunks() for _ in range(LAYERS))


class PromptByPrompt(Odd):
    def build(self) -> None:
        self.tower = nn.ModuleList(ByPrompts() for _ in range(LAYERS))


class QueryBlocks(Odd):
    def build(self) -> None:
        self.tower = nn.ModuleList(Block(ByQueries()) for _ in range(LAYERS))


class KeyBlocks(Odd):
    def build(self) -> None:
        self.tower = nn.ModuleList(Block(ByKeys()) for _ in range(LAYERS))


class Segments(Odd):
    """All layers go through long sequences by segments, none of which sees another."""

    def run(self, x: Tensor, own_mask: Tensor | None) -> Tensor:
        masks = [None] * LONG if own_mask is None else own_mask.split(PIECE, 1)
        pieces = x.split(PIECE, 1)
        return torch.cat([super(Segments, self).run(one, mask) for one, mask in zip(pieces, masks)], 1)  # noqa: B905


class EmbedsByPieces(Odd):
    def embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        words = torch.cat([self.words(one) for one in ids.split(PIECE, 1)], 1)
        return words + self.places(torch.arange(ids.shape[1]) if positions is None else positions)


def bert() -> Any:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        is_decoder=True,
        initializer_range=0.5,
    )
    return BertLMHeadModel(config).eval()


def loaded(make: Callable[[], Any]) -> tuple[Any, StandardizedTransformer]:
    torch.manual_seed(0)
    hf = make().eval()
    return hf, StandardizedTransformer(hf)


ODD = [
    (Chunked, ("mlps_input", "mlps_output", "neurons"), "8 positions, where the layer was given 12"),
    (QueryBlocks, ("queries", "attention_scores", "attention_probabilities", "values_weighted", "heads_output"),
     "8 positions, where the layer was given 12"),
    (KeyBlocks, ("keys", "values", "attention_scores", "attention_probabilities", "values_weighted"),
     "8 keys' positions, where the layer was given 12"),
    (KeyBlocks, ("heads_output",), "what 8 keys' positions add, where the layer was given 12"),
    (Segments, ("layers_input", "layers_output", "attentions_output", "attention_probabilities", "layers_mid"),
     "8 positions, where the layer was given 12"),
]  # fmt: skip
CASES = [(make, name, found) for make, names, found in ODD for name in names]


@pytest.mark.parametrize(("make", "name", "found"), CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES])
def test_a_piece_is_refused_and_the_whole_is_not(make: type[Odd], name: str, found: str) -> None:
    hf, model = loaded(make)
    with torch.no_grad(), model.trace(SHORT):
        value = getattr(model, name)[1]
    assert PIECE in value.shape
    text = rf"^{name}\[1\]: in this pass the model computes it in pieces: what comes first has {found}; the rest comes later"
    with pytest.raises(NotInThisModelError, match=text):
        with torch.no_grad(), model.trace(IDS):
            getattr(model, name)[1]
    with pytest.raises(NotInThisModelError, match=text):
        with torch.no_grad(), model.trace(IDS):
            getattr(model, name)[1] = value
    with pytest.raises(NotInThisModelError, match="in pieces"):  # a slice does not stop there
        with torch.no_grad(), model.trace(IDS):
            getattr(model, name)[:2]
    with pytest.raises(NotInThisModelError, match="in pieces"):
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(IDS):
                getattr(model, name)[1]
            with tracer.invoke(IDS):
                pass
    del hf


def test_what_is_whole_is_there_beside_pieces() -> None:
    """Against a hook; and each piece by the module's own name."""
    hf, model = loaded(Chunked)
    seen: list[Tensor] = []
    handles = [
        hf.tower[1].look.register_forward_hook(lambda _, __, output: seen.append(output)),
        hf.tower[1].think.register_forward_hook(lambda _, __, output: seen.append(output)),
    ]
    with torch.no_grad():
        hf(IDS)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), model.trace(IDS):
        whole = model.attentions_output[1]
        pieces = [model.tower[1].think.calls[k].output for k in range(2)]
    assert len(seen) == 3
    assert all(map(torch.equal, [whole, *pieces], seen))
    assert [one.shape for one in pieces] == [(1, 8, WIDTH), (1, 4, WIDTH)]


def test_embeddings_in_pieces() -> None:
    _, model = loaded(EmbedsByPieces)
    with torch.no_grad(), model.trace(SHORT):
        assert torch.equal(model.token_embeddings, model.hf_model.words(SHORT))
    with pytest.raises(
        NotInThisModelError, match="^token_embeddings: in this pass .* has 8 positions, where .* given 12;"
    ):
        with torch.no_grad(), model.trace(IDS):
            model.token_embeddings
    with pytest.raises(NotInThisModelError, match="^token_embeddings: in this pass"):
        with torch.no_grad(), model.trace(IDS):
            model.token_embeddings = torch.zeros(1, PIECE, WIDTH)


def test_prompts_one_by_one() -> None:
    _, model = loaded(PromptByPrompt)
    with pytest.raises(NotInThisModelError, match=r"mlps_output\[0\].* has 1 prompts, where the layer was given 2;"):
        with torch.no_grad(), model.trace(IDS.repeat(2, 1)):
            model.mlps_output[0]


def test_chunked_feed_forward_of_transformers() -> None:
    hf, model = loaded(bert)
    with torch.no_grad(), model.trace(IDS):
        whole = model.neurons[1]
    for layer in hf.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    with pytest.raises(
        NotInThisModelError,
        match=r"neurons\[1\]: in this pass the model computes it in pieces: what comes first has 4 positions, where the layer was "
        r"given 12; the rest comes later\. Have it work in one piece \(chunk_size_feed_forward=0, or whatever sets the size of its "
        r"chunks, blocks or segments\), give a prompt no longer than one, or read each call by the module's own name: "
        r"model\.path\.to\.module\.calls\[k\]\.output\.$",
    ):
        with torch.no_grad(), model.trace(IDS):
            model.neurons[1]
    with torch.no_grad(), model.trace(IDS):
        first, rest = (model.bert.encoder.layer[1].intermediate.calls[k].output for k in (0, 2))
    assert torch.allclose(torch.cat([first, rest], 1), whole[:, [0, 1, 2, 3, 8, 9, 10, 11]], atol=1e-4)


def test_each_step_of_a_generation_has_its_own_length() -> None:
    """Prefill by chunks, and one token at a time: no piece is seen where there is none."""
    model = StandardizedTransformer(build("llama"))
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    for chunk, expected in (({}, [12, 1]), ({"prefill_chunk_size": 5}, [5, 5, 2, 1])):
        lengths = []
        with torch.no_grad(), model.generate(IDS, **how, **chunk) as tracer:
            for _ in tracer.iter[:]:
                lengths.append(model.mlps_output[1].shape[1])
        assert lengths == expected


def test_a_second_call_is_refused_when_the_pass_comes_to_it() -> None:
    _, model = loaded(Again)
    with torch.no_grad(), model.trace(SHORT):
        model.mlps_output[1]
        model.logits
    text = (
        r"^mlps_output\[1\]: in this pass its module, a Mlp, is called 2 times, and none of these calls is the layer's: read each "
        r"by the module's own name, model\.path\.to\.module\.calls\[k\]\.output\.$"
    )
    with pytest.raises(NotInThisModelError, match=text), torch.no_grad(), model.trace(IDS):
        model.mlps_output[1]
        model.logits
    with pytest.raises(NotInThisModelError, match=text), torch.no_grad(), model.trace(IDS):
        model.mlps_output[1] = 0 * model.mlps_output[1]
        model.layers_output[2]
    with pytest.raises(NotInThisModelError, match=text), torch.no_grad(), model.trace(IDS) as tracer:
        model.mlps_output[1]
        tracer.result
    with pytest.raises(NotInThisModelError, match=text), torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(IDS):
            model.mlps_output[1]
        with tracer.invoke(IDS):
            model.layers_output[2]
    with pytest.raises(NotInThisModelError, match=text):
        with torch.no_grad():
            model.edit(lambda: model.mlps_output[1])(IDS)
    how = {
        "max_new_tokens": 2,
        "min_new_tokens": 2,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": False,
    }
    with pytest.raises(NotInThisModelError, match=text):
        with torch.no_grad(), model.generate(IDS, **how) as tracer:
            for _ in tracer.iter[:]:
                model.mlps_output[1]
