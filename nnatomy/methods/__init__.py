"""Interpretability methods, as functions over any `StandardizedTransformer`."""

from nnatomy.methods.logit_lens import logit_lens as logit_lens
