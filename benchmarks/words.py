"""Prompts of numbered words, and a tokenizer of them: nothing is fetched."""

from __future__ import annotations

import math
import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 512


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; pads on the left."""
    words = {"[PAD]": 0} | {f"w{i}": i for i in range(1, WORDS)}
    plain = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", padding_side="left")


def make_prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Of so many words each."""
    draw = random.Random(seed)
    return _of_lengths([draw.randint(shortest, longest) for _ in range(count)], draw)


def make_long_tailed(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """As texts found in the wild: the logarithm of the length is normal, half are of 24 words or fewer."""
    draw = random.Random(seed)
    lengths = [round(draw.lognormvariate(math.log(24), 0.8)) for _ in range(count)]
    return _of_lengths([min(max(length, shortest), longest) for length in lengths], draw)


def _of_lengths(lengths: list[int], draw: random.Random) -> list[str]:
    return [" ".join(f"w{draw.randint(1, WORDS - 1)}" for _ in range(length)) for length in lengths]
