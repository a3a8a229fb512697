"""Little stories of people, to be understood by reading: who lives where is new in each one."""

from __future__ import annotations

import random

from facts import COUNTRIES, Fact
from phrasings import Sentence

PEOPLE = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jonas",
    "Laura",
    "Martin",
)

INTRODUCTIONS = {"country": ("{p} is from {s}.", "{p} was born in {s}."), "capital": ("{p} lives in {s}.",)}

# {p} is the person, {a} the answer; each of them works after each introduction.
QUESTIONS = {
    "language": ("{p} speaks {a}.", "Q: Which language does {p} speak? A: {a}."),
    "currency": ("{p} pays with the {a}.", "Q: Which currency does {p} use? A: the {a}."),
    "continent": ("The continent of {p} is {a}.", "Q: Which continent is {p} in? A: {a}."),
}


def story(rng: random.Random, people: int, questions: int) -> list[Sentence]:
    """Make a story of ``people`` introductions and then ``questions`` questions about them, in sentences.

    A question's relation is ``person>X``; its prompt is the sentence's own, without the story before it. An
    introduction is a sentence too, with nothing to know (relation ``introduction``).
    """
    told: list[Sentence] = []
    homes = dict(zip(rng.sample(PEOPLE, people), rng.sample(COUNTRIES, people), strict=True))
    for person, home in homes.items():
        field = rng.choice(("country", "capital"))
        prompt = rng.choice(INTRODUCTIONS[field]).format(p=person, s="{s}").split(" {s}")[0]
        told.append(
            Sentence(
                Fact("introduction", person, getattr(home, field), 0), prompt, f" {getattr(home, field)}"
            )
        )
    for _ in range(questions):
        person, home = rng.choice(list(homes.items()))
        field = rng.choice(list(QUESTIONS))
        answer = getattr(home, field)
        prompt = rng.choice(QUESTIONS[field]).format(p=person, a="{a}").split(" {a}")[0]
        told.append(Sentence(Fact(f"person>{field}", person, answer, 2), prompt, f" {answer}"))
    return told


def told_question(rng: random.Random) -> Sentence:
    """Make a story of two people with one question, as one test whose prompt holds the whole story."""
    *before, last = story(rng, people=2, questions=1)
    return Sentence(last.fact, " ".join([s.text for s in before] + [last.prompt]), last.answer)
