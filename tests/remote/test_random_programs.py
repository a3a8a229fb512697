"""Random programs of reads, edits, skips, branches on values, gradients and generation, on a server in another process.

Each gives what it gives locally, bit for bit, or the same error; by points and by commands.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from remote_blocks import leaves
from remote_server import served
from torch import Tensor

from nnatomy import StandardizedTransformer
from nnatomy.errors import NnatomyError

PROMPTS = ["The capital of France is", "Hello there, my old friend", [1, 2, 3, 4, 5, 6, 7]]
#: In the order of a layer.
POINTS = (
    "layers_input", "queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output",
    "attentions_output", "attentions_contribution", "layers_mid", "mlps_input", "neurons", "mlps_output", "mlps_contribution",
    "layers_output",
)  # fmt: skip
PURE: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x * 1.5,
    lambda x: x.flip(-1),
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x.roll(1, 0),
    lambda x: x + x.std(),
    lambda x: torch.stack([x, -x]).sum(0) + x.abs(),
    lambda x: x.cumsum(-1) / x.shape[-1],
    lambda x: x.clamp(-1, 1).tanh(),
)


def change(x: Tensor, draw: random.Random) -> None:
    which = draw.randrange(4)
    if which == 0:
        x[..., -1] = 0
    elif which == 1:
        x.mul_(0.5)
    elif which == 2:
        x[x > 1] = 1.0
    else:
        x[:, draw.randrange(x.shape[1])] += 0.25


#: The gradients of three that are summed. Where one of them is assigned, autograd sums in an order that depends on how many
#: functions the thread has recorded before, locally too, so that the last bits do.
SUMMED = ("queries", "keys", "values")


def play(model: Any, seed: int) -> tuple[list[Tensor], str]:
    """What the program sees, and the error that it ends with."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    seen: list[Tensor] = []
    gradients = draw.random() < 0.4
    generates = not gradients and draw.random() < 0.3
    prompts = draw.choice([PROMPTS, PROMPTS[:1], PROMPTS[0]])
    opened = model.generate if generates else model.trace
    options = {"max_new_tokens": 3, "do_sample": draw.random() < 0.5} if generates else {}
    names = [name for name in POINTS if not (gradients and name in SUMMED)]
    try:
        with nullcontext() if gradients else torch.no_grad(), opened(prompts, **options) as tracer:
            for step in tracer.iter[:2] if generates else (0,):
                layer_seen: list[Any] = []
                for layer in range(model.num_layers):
                    if draw.random() < 0.08:
                        model.skip_layer(layer)
                        continue
                    for name in names:
                        if draw.random() > 0.12:
                            continue
                        point = getattr(model, name)
                        what = draw.random()
                        if what < 0.35:
                            layer_seen.append(point[layer])
                            seen.append(point[layer].clone())
                        elif what < 0.6:
                            point[layer] = draw.choice(PURE)(point[layer])
                        elif what < 0.8 and not gradients:
                            change(point[layer], draw)
                        elif what < 0.95:
                            value = point[layer].detach().sum()
                            if value > 0:
                                point[layer] = point[layer] * 0.9
                            seen.append(torch.tensor(value.item()))
                        else:
                            getattr(model, draw.choice(names))[draw.randrange(model.num_layers)]  # often too late
                logits = model.logits
                seen.append(logits)
                if gradients:
                    wanted = [one for one in layer_seen if one.requires_grad]
                    loss = logits[:, -1].logsumexp(-1).sum()
                    found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
                    seen.extend(torch.zeros(1) if one is None else one for one in found)
            if generates:
                seen.append(tracer.result)
    except NnatomyError as error:
        return [x for one in seen for x in leaves(one)], f"{type(error).__name__}: {error}"
    except (RuntimeError, ValueError) as error:
        return [x for one in seen for x in leaves(one)], type(error).__mro__[-3].__name__
    return [x for one in seen for x in leaves(one)], ""


@pytest.fixture(scope="module", params=["demo:llama", "demo:gpt2"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    torch.set_num_threads(1)
    with served(request.param) as server:
        remote: Any = StandardizedTransformer(request.param, server=server.address)
        yield StandardizedTransformer(request.param), remote
        remote.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_commands", [False, True], ids=["points", "commands"])
def test_programs(pair: tuple[Any, Any], by_commands: bool) -> None:
    local, remote = pair
    remote.by_commands = by_commands
    ended, compared = 0, 0
    for seed in range(25):
        wanted, error = play(local, seed)
        found, its = play(remote, seed)
        assert error == its, seed
        assert len(wanted) == len(found), seed
        for i, (mine, other) in enumerate(zip(wanted, found, strict=True)):
            assert mine.dtype == other.dtype, (seed, i)
            assert torch.equal(mine.nan_to_num(7), other.nan_to_num(7)), (seed, i)
            compared += 1
        ended += not error
    assert ended >= 8
    assert compared >= 80


@pytest.mark.parametrize("by_commands", [False, True], ids=["points", "commands"])
@pytest.mark.parametrize("name", SUMMED)
def test_gradients_that_are_summed_in_no_order(pair: tuple[Any, Any], name: str, by_commands: bool) -> None:
    def gradient(model: Any) -> Tensor:
        with model.trace(PROMPTS):
            hidden, point = model.layers_input[1], getattr(model, name)
            point[3] = 0.9 * point[3]
            (found,) = torch.autograd.grad(model.logits[:, -1].logsumexp(-1).sum(), [hidden])
        return leaves(found)[0]

    local, remote = pair
    remote.by_commands = by_commands
    torch.testing.assert_close(gradient(remote), gradient(local))
