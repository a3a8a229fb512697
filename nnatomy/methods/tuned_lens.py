"""The tuned lens: the logit lens with an affine translation trained for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from nnatomy.errors import InputError
from nnatomy.methods.activation_store import write_whole
from nnatomy.methods.arguments import method
from nnatomy.methods.arguments import model as check_model
from nnatomy.methods.prompts import plain
from nnatomy.paths import file_of, path_of, what_is_at
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.positions import positions_from_end

_FORMAT = "nnatomy tuned lens 1"


@dataclass(frozen=True)
class TunedLens:
    """For each layer but the last, a translation of its stream to that after the last layer: h + A h + b.

    Belrose et al. (2023), "Eliciting Latent Predictions from Transformers with the Tuned Lens", section 3. Give it to
    `logit_lens` or `lens_statistics` as `lens`. The last layer stays as it is, so that its row is the model's prediction.

    Attributes:
        weight: A, of each layer but the last; zero is the logit lens.
        bias: b.
        history: what training minimised, in nats: the divergence KL(model || lens) by step and layer.

    Example:
        >>> from nnatomy import StandardizedTransformer
        >>> from nnatomy.methods import TunedLens, logit_lens
        >>> model = StandardizedTransformer("demo:llama")
        >>> lens = TunedLens.train(model, ["The capital of France is Paris.", "Japan is in Asia."], steps=20)
        >>> bool((lens.history[-1] < lens.history[0]).all())
        True
        >>> logit_lens(model, "The capital of France is", lens=lens).shape[:2]
        torch.Size([1, 8])
    """

    weight: Float[Tensor, "translator hidden hidden"]
    bias: Float[Tensor, "translator hidden"]
    history: Float[Tensor, "step translator"] | None = None

    @classmethod
    def identity(cls, model: StandardizedTransformer) -> TunedLens:
        """The untrained lens of a model: the logit lens."""
        count, width = model.num_layers - 1, model.hidden_size
        return cls(torch.zeros(count, width, width), torch.zeros(count, width))

    def __call__(self, hidden: Float[Tensor, "*rows layer hidden"]) -> Float[Tensor, "*rows layer hidden"]:
        """The streams after all layers, translated.

        Raises:
            InputError: if the lens is of another number of layers or width.
        """
        self._check(*hidden.shape[-2:])
        weight, bias = self.weight.to(hidden), self.bias.to(hidden)
        early = hidden[..., :-1, :]
        moved = early + torch.einsum("...li,loi->...lo", early, weight) + bias
        return torch.cat([moved, hidden[..., -1:, :]], dim=-2)

    @classmethod
    @method
    def train(
        cls,
        model: StandardizedTransformer,
        texts: Sequence[Any],
        *,
        steps: int = 500,
        batch_size: int = 8,
        optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
        start: TunedLens | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> TunedLens:
        """Train the translations of all layers; the model stays as it is.

        At each step and for each layer, the mean over all tokens of the batch of KL(model's own distribution || the lens's) is
        minimised (section 3 of the paper). The learning rate falls to zero in a straight line.

        Args:
            texts: prompts as `model.trace` takes, such as the model was trained on. They should be many: a layer has hidden^2
                parameters.
            steps: how many batches.
            batch_size: how many texts in each. The texts are taken in random order, over and over.
            optimizer: of the parameters; Adam with a learning rate of 0.001 by default.
            start: a lens to go on from; the identity by default.
            seed: of the order.
            progress: show it.

        Raises:
            InputError: if there are no texts or steps, or `start` is another model's.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise InputError("There are no texts to train the lens on.")
        if steps < 1:
            raise InputError(f"steps={steps}: take one at least. TunedLens.identity(model) is the untrained lens.")
        start = start or cls.identity(model)
        start._check(model.num_layers, model.hidden_size)
        parameters = [start.weight.to(model.device, copy=True), start.bias.to(model.device, copy=True)]
        optimise = optimizer(parameters) if optimizer else Adam(parameters, lr=1e-3)
        falling = LambdaLR(optimise, lambda step: 1 - step / steps)
        history = torch.zeros(steps, model.num_layers - 1)
        batches = _batches(texts, batch_size, seed)
        for step in tqdm(range(steps), desc="Tuned lens", disable=not progress):
            history[step], gradients = _gradients(model, next(batches), *parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimise.step()
            falling.step()
        weight, bias = (parameter.detach().cpu() for parameter in parameters)
        return cls(weight, bias, history)

    def plot(self) -> Any:
        """Curves (a plotly Figure) of `history`, one a layer.

        Raises:
            InputError: if the lens has not been trained.
        """
        from nnatomy.plots import curves

        if self.history is None:
            raise InputError("This lens has no history to plot: it has not been trained.")
        ys = {f"layer {i}": one.tolist() for i, one in enumerate(self.history.T)}
        steps = list(range(len(self.history)))
        return curves(
            steps,
            ys,
            title="Tuned lens, KL to the model's own prediction in training",
            x_title="step",
            y_title="KL (nats)",
        )

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file."""
        tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        if self.history is not None:
            tensors["history"] = self.history.contiguous()
        write_whole(path_of(path, "a file to write"), save(tensors, {"format": _FORMAT}))

    @classmethod
    def load(cls, path: str | Path, model: StandardizedTransformer | None = None) -> TunedLens:
        """Read what `save` wrote.

        Args:
            model: what it is for, if that is to be checked.

        Raises:
            InputError: if it is no tuned lens, or its number of layers or width is not the model's.
        """
        if model is not None:
            check_model("model", model)
        path = file_of(path, "a file that TunedLens.save wrote")
        try:
            with safe_open(path, "pt") as file:
                of_lens = (file.metadata() or {}).get("format") == _FORMAT
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            of_lens = False
        if not of_lens:
            raise InputError(f"{path} holds no tuned lens: it has to be written by TunedLens.save.{what_is_at(path)}")
        lens = cls(**tensors)
        if model is not None:
            lens._check(model.num_layers, model.hidden_size)
        return lens

    def _check(self, layers: int, width: int) -> None:
        mine = (len(self.bias) + 1, self.bias.shape[-1])
        if mine != (layers, width):
            raise InputError(
                f"This tuned lens is for a model of {mine[0]} layers and width {mine[1]}; this one has {layers} layers and "
                f"width {width}. Train one for it: TunedLens.train(model, texts)."
            )


def _batches(texts: list[Any], size: int, seed: int) -> Iterator[list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(texts), generator=generator).tolist()
        now, waiting = waiting[:size], waiting[size:]
        yield [texts[i] for i in now]


def _gradients(
    model: StandardizedTransformer,
    texts: list[Any],
    weight: Float[Tensor, "translator hidden hidden"],
    bias: Float[Tensor, "translator hidden"],
) -> tuple[Float[Tensor, " translator"], list[Tensor]]:
    """Each layer's mean divergence, and the gradients of both parameters; one layer's logits at a time."""
    inputs = model.prepare(plain(texts))
    where = positions_from_end(inputs, "all")
    rows = torch.cat([torch.full_like(one, i) for i, one in enumerate(where)])
    with torch.no_grad():
        with model.trace(**inputs, use_cache=False):
            stream = [h[rows, torch.cat(where)].to(model.device) for h in model.layers_output[:]]
        target = model.project_on_vocab(stream[-1]).float().log_softmax(-1)
    losses, gradients = torch.zeros(len(bias)), [torch.zeros_like(weight), torch.zeros_like(bias)]
    for layer, hidden in enumerate(stream[:-1]):
        with torch.enable_grad():
            a, b = (one[layer].clone().requires_grad_() for one in (weight, bias))
            moved = hidden + (hidden.to(a) @ a.T + b).to(hidden)
            log_probs = model.project_on_vocab(moved).float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(log_probs, target, log_target=True, reduction="batchmean")
            gradients[0][layer], gradients[1][layer] = torch.autograd.grad(loss, [a, b])
        losses[layer] = loss.item()
    return losses, gradients
