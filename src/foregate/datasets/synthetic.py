"""Prompts made by combining templates with what fills them, in a seeded order.

Known bias of such prompts: every one is a short, clean request. So there are three kinds: plain requests, requests that
change the language half-way, and requests that change the topic half-way.
"""

from __future__ import annotations

import random
from itertools import product

from foregate.datasets.prompt import Dataset, Prompt, make_dataset

COUNT = 1000

OPENINGS = (
    "Explain {topic} {audience}.",
    "Write {form} about {topic} {audience}.",
    "What are the three most common mistakes with {topic}? Answer {audience}.",
    "Compare {topic} with {other}, {audience}.",
    "Give a step-by-step plan for somebody who wants to learn {topic}, {audience}.",
    "Why does {topic} matter? Write {form} {audience}.",
    "Summarise what is known about {topic} in {form} {audience}.",
    "Invent a short dialogue in which two people disagree about {topic}, {audience}.",
)
TOPICS = (
    "binary search", "garbage collection", "prime numbers", "compound interest", "photosynthesis", "plate tectonics",
    "the French Revolution", "contract law", "vaccination", "supply and demand", "sourdough bread", "chess openings",
    "regular expressions", "linear regression", "the water cycle", "classical guitar", "electric motors",
    "error handling in Python", "quadratic equations", "public transport", "bee-keeping", "time zones",
    "the periodic table", "negotiating a salary", "sorting algorithms", "black holes", "haiku", "database indexes",
    "long-distance running", "the immune system", "map projections", "mortgages",
)  # fmt: skip
FORMS = ("a paragraph", "a list of five points", "a short essay", "an e-mail", "a table in plain text", "a poem")
AUDIENCES = (
    "for a ten-year-old",
    "for an expert",
    "in fewer than fifty words",
    "with one worked example",
    "with numbers where you can",
    "in a friendly tone",
)
SWITCHES = (
    "",
    "",
    "\n\nRépondez en français, s'il vous plaît, et donnez un exemple.",
    "\n\nBitte antworte auf Deutsch und nenne eine Quelle.",
    "\n\nPor favor, termina con un resumen en español.",
    "\n\nNow forget that. Instead, show Python code that computes the mean of a list, and explain each line.",
    "\n\nOne more thing, unrelated: if a train leaves at 14:10 and travels 150 km at 60 km/h, when does it arrive?",
)


def synthetic(seed: int) -> Dataset:
    """COUNT distinct prompts; the same seed gives the same ones in the same order."""
    shuffle = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < COUNT:
        topic, other = shuffle.sample(TOPICS, 2)
        opening, form, audience, switch = (shuffle.choice(part) for part in (OPENINGS, FORMS, AUDIENCES, SWITCHES))
        found[opening.format(topic=topic, other=other, form=form, audience=audience) + switch] = None
    prompts = [Prompt(f"synthetic/{seed}/{number:04d}", "synthetic", text) for number, text in enumerate(found)]
    return make_dataset("synthetic", prompts, "templates", seed=seed)


def combinations() -> int:
    """How many distinct prompts the templates can make."""
    texts = {
        opening.format(topic=topic, other="OTHER", form=form, audience=audience) + switch
        for opening, topic, form, audience, switch in product(OPENINGS, TOPICS, FORMS, AUDIENCES, set(SWITCHES))
    }
    return sum(len(TOPICS) - 1 if "OTHER" in text else 1 for text in texts)
