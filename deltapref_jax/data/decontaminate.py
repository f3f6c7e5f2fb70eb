"""Finds the training questions that overlap evaluation questions, to be dropped and counted."""

import re
from collections.abc import Iterable

from deltapref_jax.records import Prompt

NGRAM = 13
"""Consecutive words that make an overlap (GPT-3, arXiv 2005.14165, appendix C)."""


def words(text: str) -> tuple[str, ...]:
    """The words and numbers of a text in lower case, without punctuation and spacing."""
    return tuple(re.findall(r"\w+", text.lower()))


def _ngrams(text: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}


def overlapping(training: Iterable[Prompt], evaluation: Iterable[Prompt]) -> dict[str, str]:
    """Ids of the training prompts that overlap an evaluation prompt, with the reason.

    The reason is "exact" (the same words) or "13-gram" (13 consecutive words in common). Questions
    of fewer than 13 words can only overlap exactly.
    """
    exact: set[tuple[str, ...]] = set()
    shared: set[tuple[str, ...]] = set()
    for prompt in evaluation:
        question = words(prompt.question)
        exact.add(question)
        shared |= _ngrams(question)
    found = {}
    for prompt in training:
        question = words(prompt.question)
        if question in exact:
            found[prompt.prompt_id] = "exact"
        elif not shared.isdisjoint(_ngrams(question)):
            found[prompt.prompt_id] = "13-gram"
    return found
