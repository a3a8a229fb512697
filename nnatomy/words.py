"""The words that arguments take, as editors and type checkers know them.

At run time they are text: which function is called with a word that it does not know says so itself, and which ones it knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    #: What an attached module's output becomes: see `Traceable.attach`.
    How = Literal["replace", "error", "add", "read"]
    #: What a later head reads an earlier one's output as: queries, keys or values.
    ReadAs = Literal["Q", "K", "V"]
    #: Whose values are put into whose run: see `nnatomy.methods.activation_patching`.
    Mode = Literal["denoising", "noising"]
    #: What takes the place of what a head gives: see `nnatomy.methods.head_ablation`.
    Instead = Literal["zero", "mean"]
    #: Into what a stream is taken apart: see `nnatomy.methods.direct_logit_attribution`.
    By = Literal["layer", "component", "head"]
    #: How a direction is made of activations: see `nnatomy.methods.SteeringVector`.
    DirectionMethod = Literal["mean_difference", "logistic_probe", "pca"]
    #: All heads, one at a time: see `nnatomy.methods.activation_patching`.
    Each = Literal["each"]
else:
    How = ReadAs = Mode = Instead = By = DirectionMethod = Each = str
