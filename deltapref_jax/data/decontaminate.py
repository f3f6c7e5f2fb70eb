"""Training questions that overlap evaluation questions are found here, to be dropped and counted."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

NGRAM = 13
"""Words in a row that make an overlap (GPT-3, arXiv 2005.14165, appendix C)."""


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers; punctuation and spacing do not matter."""
    return tuple(re.findall(r"\w+", text.lower()))


def _ngrams(text: tuple[str, ...]) -> set[tuple[str, ...]]:
    return {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    return words(json.loads(row["messages"])[-1]["content"])


def overlapping(
    training: Iterable[Mapping[str, Any]], evaluation: Iterable[Mapping[str, Any]]
) -> dict[str, str]:
    """Ids of training prompts that overlap, with the reason: "exact" (same words) or "13-gram" (13 words in a row).

    Both arguments are rows of `records.PROMPT`. Questions of fewer than 13 words can only overlap exactly.
    """
    exact: set[tuple[str, ...]] = set()
    shared: set[tuple[str, ...]] = set()
    for row in evaluation:
        question = _question(row)
        exact.add(question)
        shared |= _ngrams(question)
    found = {}
    for row in training:
        question = _question(row)
        if question in exact:
            found[row["prompt_id"]] = "exact"
        elif not shared.isdisjoint(_ngrams(question)):
            found[row["prompt_id"]] = "13-gram"
    return found
