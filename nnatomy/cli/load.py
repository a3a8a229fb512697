"""The model that a command is about."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers.utils import logging

from nnatomy.errors import InputError
from nnatomy.standardized import StandardizedTransformer
from nnatomy.standardized.asked_for import check_cuda, check_model
from nnatomy.standardized.loading import load_model, load_tokenizer


def load(options: argparse.Namespace, *, prompts: bool = False) -> StandardizedTransformer:
    """Load and validate the model on the device it is to run on.

    Args:
        prompts: whether it has to have a tokenizer.

    Raises:
        LoadError, ValidationError, UnknownArchitectureError: see `StandardizedTransformer`.
        InputError: if there is no tokenizer and there has to be one.
    """
    logging.disable_progress_bar()
    check_model(options.model)
    check_cuda("--device", options.device)
    if options.device is not None and options.device_map is not None:
        raise InputError("--device and --device-map: give one of them.")
    kwargs: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    tokenizer, why = load_tokenizer(options.model, kwargs)
    if options.dtype is not None:
        kwargs["dtype"] = getattr(torch, options.dtype)
    for name in ("device_map", "offload_folder"):
        if (value := getattr(options, name)) is not None:
            kwargs[name] = value
    hf_model = load_model(options.model, kwargs)
    if prompts and tokenizer is None:
        raise InputError(f"{options.model} reads no text: {why}")
    if options.device_map is None:
        hf_model.to(options.device or "cpu")
    return StandardizedTransformer(hf_model, tokenizer)
