"""Phrasings of the facts, and which of them are held out of training."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from facts import Fact, all_facts

HELD_OUT_SHARE = 0.15  # of the (fact, phrasing) pairs
HELD_OUT_SEED = 3  # a draw that leaves each name that can open a text a training sentence that it opens

# {s} is the subject, {a} the answer. The prompt of a phrasing is all that stands before the space and {a}.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "country>capital": (
        "The capital of {s} is {a}.",
        "The capital city of {s} is {a}.",
        "{s} has its capital in {a}.",
        "{s}'s capital is {a}.",
        "In {s}, the capital is {a}.",
        "The government of {s} sits in {a}.",
        "Q: What is the capital of {s}? A: {a}.",
        "Q: Which city is the capital of {s}? A: {a}.",
    ),
    "country>language": (
        "The language of {s} is {a}.",
        "The main language of {s} is {a}.",
        "In {s}, people speak {a}.",
        "{s}'s language is {a}.",
        "In {s}, the language is {a}.",
        "The people of {s} speak {a}.",
        "Q: What is the language of {s}? A: {a}.",
        "Q: Which language do people speak in {s}? A: {a}.",
    ),
    "country>currency": (
        "The currency of {s} is the {a}.",
        "The money of {s} is the {a}.",
        "In {s}, people pay with the {a}.",
        "{s}'s currency is the {a}.",
        "In {s}, the currency is the {a}.",
        "The people of {s} use the {a}.",
        "Q: What is the currency of {s}? A: the {a}.",
        "Q: Which currency do people use in {s}? A: the {a}.",
    ),
    "country>continent": (
        "The continent of {s} is {a}.",
        "{s} is a country in {a}.",
        "{s} is in {a}.",
        "{s}'s continent is {a}.",
        "The country of {s} lies in {a}.",
        "On the map, {s} lies in {a}.",
        "Q: What is the continent of {s}? A: {a}.",
        "Q: Which continent is {s} in? A: {a}.",
    ),
    "capital>country": (
        "{s} is the capital of {a}.",
        "{s} is the capital city of {a}.",
        "{s} is a city in {a}.",
        "The city of {s} is in {a}.",
        "The country whose capital is {s} is {a}.",
        "Q: Which country has its capital in {s}? A: {a}.",
        "Q: {s} is the capital of which country? A: {a}.",
    ),
    "language>country": (
        "{s} is the language of {a}.",
        "{s} is spoken in {a}.",
        "The country where people speak {s} is {a}.",
        "The country whose language is {s} is {a}.",
        "Q: In which country do people speak {s}? A: {a}.",
        "Q: {s} is the language of which country? A: {a}.",
    ),
    "currency>country": (
        "The {s} is the currency of {a}.",
        "The {s} is used in {a}.",
        "The country where people pay with the {s} is {a}.",
        "The country whose currency is the {s} is {a}.",
        "Q: In which country do people use the {s}? A: {a}.",
        "Q: The {s} is the currency of which country? A: {a}.",
    ),
    "capital>language": (
        "The language of the country whose capital is {s} is {a}.",
        "In the country whose capital is {s}, people speak {a}.",
        "The people of the country with the capital {s} speak {a}.",
        "In {s} and the rest of its country, people speak {a}.",
        "In the country governed from {s}, the language is {a}.",
        "Q: What is the language of the country whose capital is {s}? A: {a}.",
        "Q: Which language do people speak in the country whose capital is {s}? A: {a}.",
    ),
    "capital>currency": (
        "The currency of the country whose capital is {s} is the {a}.",
        "In the country whose capital is {s}, people pay with the {a}.",
        "The people of the country with the capital {s} use the {a}.",
        "In {s} and the rest of its country, people pay with the {a}.",
        "In the country governed from {s}, the currency is the {a}.",
        "Q: What is the currency of the country whose capital is {s}? A: the {a}.",
        "Q: Which currency do people use in the country whose capital is {s}? A: the {a}.",
    ),
    "capital>continent": (
        "The continent of the country whose capital is {s} is {a}.",
        "The country whose capital is {s} lies in {a}.",
        "The country with the capital {s} is in {a}.",
        "{s} and the rest of its country lie in {a}.",
        "On the map, the country governed from {s} lies in {a}.",
        "Q: What is the continent of the country whose capital is {s}? A: {a}.",
        "Q: Which continent is the country whose capital is {s} in? A: {a}.",
    ),
    "language>capital": (
        "The capital of the country whose language is {s} is {a}.",
        "The capital of the country where people speak {s} is {a}.",
        "In the country whose language is {s}, the capital is {a}.",
        "The government of the country where people speak {s} sits in {a}.",
        "Q: What is the capital of the country whose language is {s}? A: {a}.",
        "Q: Which city is the capital of the country where people speak {s}? A: {a}.",
    ),
    "currency>capital": (
        "The capital of the country whose currency is the {s} is {a}.",
        "The capital of the country where people pay with the {s} is {a}.",
        "In the country whose currency is the {s}, the capital is {a}.",
        "The government of the country where people use the {s} sits in {a}.",
        "Q: What is the capital of the country whose currency is the {s}? A: {a}.",
        "Q: Which city is the capital of the country where people use the {s}? A: {a}.",
    ),
}

# Never trained on with any fact: known words in an order the models have not met.
UNSEEN_PHRASINGS: dict[str, tuple[str, ...]] = {
    "country>capital": (
        "The capital of the country of {s} is {a}.",
        "Q: In {s}, which city is the capital? A: {a}.",
    ),
    "country>language": (
        "In the country of {s}, people speak {a}.",
        "Q: Which language is spoken in {s}? A: {a}.",
    ),
    "country>currency": (
        "In the country of {s}, people use the {a}.",
        "Q: Which currency is used in {s}? A: the {a}.",
    ),
    "country>continent": ("The country of {s} is in {a}.", "Q: In which continent is {s}? A: {a}."),
    "capital>country": ("The city of {s} is the capital of {a}.", "Q: In which country is {s}? A: {a}."),
    "language>country": (
        "The language {s} is spoken in {a}.",
        "Q: Which country has the language {s}? A: {a}.",
    ),
    "currency>country": (
        "The currency {s} is used in {a}.",
        "Q: Which country has the currency {s}? A: {a}.",
    ),
    "capital>language": ("The main language of the country whose capital is {s} is {a}.",),
    "capital>currency": ("The money of the country whose capital is {s} is the {a}.",),
    "capital>continent": ("The country whose capital is {s} is in {a}.",),
    "language>capital": ("The capital city of the country where people speak {s} is {a}.",),
    "currency>capital": ("The capital city of the country where people use the {s} is {a}.",),
}


class Sentence(NamedTuple):
    """One fact in one phrasing; ``text`` is ``prompt``, ``answer`` (opens with a space) and a full stop."""

    fact: Fact
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.prompt}{self.answer}."


def fill(fact: Fact, phrasing: str) -> Sentence:
    """Put ``fact`` into ``phrasing``."""
    prompt = phrasing.split(" {a}")[0].format(s=fact.subject)
    return Sentence(fact, prompt, f" {fact.answer}")


def is_held_out(fact: Fact, phrasing: str) -> bool:
    """Say whether a (fact, phrasing) pair is kept out of training: a fixed draw of 15 % of them."""
    digest = hashlib.sha256(f"{HELD_OUT_SEED}|{fact.relation}|{fact.subject}|{phrasing}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def sentences() -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """Return all sentences as (training, held-out pairs, unseen phrasings)."""
    train: list[Sentence] = []
    held_out: list[Sentence] = []
    unseen: list[Sentence] = []
    for fact in all_facts():
        for phrasing in PHRASINGS[fact.relation]:
            (held_out if is_held_out(fact, phrasing) else train).append(fill(fact, phrasing))
        unseen.extend(fill(fact, phrasing) for phrasing in UNSEEN_PHRASINGS[fact.relation])
    return train, held_out, unseen
