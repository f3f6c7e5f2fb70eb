"""Traces to pairs: which trace of which generator, which of the two is chosen, and what was dropped on the way.

The rungs of a ladder share prompts and rejected traces: a prompt counts only if *every* generator of the ladder has
enough usable traces for it, and none of them wrote the rejected trace once more, so rungs differ in the author of the
chosen trace and in nothing else.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deltapref_jax.records import digest

Row = dict[str, Any]
Counts = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pairs are made; the fields of `config.Arm` that matter here."""

    chosen: str
    rejected: str
    ladder: Mapping[str, int]  # generator to usable traces that a prompt must have
    finishes: tuple[str, ...]
    direction: str  # "generator" or "judge"
    stratum: str


def _usable(traces: Sequence[Row], finishes: Sequence[str]) -> dict[str, list[Row]]:
    """Finished, non-empty traces of one generator by prompt, in order of their sample index."""
    by_prompt: dict[str, list[Row]] = {}
    for trace in sorted(traces, key=lambda t: t["sample"]):
        if trace["finish"] in finishes and trace["text"].strip():
            by_prompt.setdefault(trace["prompt_id"], []).append(trace)
    return by_prompt


STRATA = {  # verified correctness of (chosen, rejected)
    "any": lambda c, r: True,
    "chosen_right": lambda c, r: c is True,
    "both_right": lambda c, r: c is True and r is True,
    "both_wrong": lambda c, r: c is False and r is False,
    "right_wrong": lambda c, r: c is True and r is False,
}


def build(
    prompt_ids: Sequence[str],
    traces: Mapping[str, Sequence[Row]],
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    rules: Rules,
) -> tuple[list[Row], Counts]:
    """Pairs as rows of `records.PAIR`, in the order of `prompt_ids`, and the waterfall of counts.

    Args:
      prompt_ids: the training prompts.
      traces: generator to its TRACE rows; all of the ladder.
      correct: trace id to verdict.
      ratings: trace id to ratings by the arm's judge, in its order of dimensions; empty where nobody judged.
      rules: see `Rules`. With direction "judge" the higher sum of ratings is chosen, equal sums are dropped. Of two
        samples of one generator the first is rejected where the direction is "generator": they are draws of one
        distribution, so the sampling seed directs them, and the rejected trace is that of the other rungs.

    Returns:
      rows, and {"prompts", "dropped_unfinished", "dropped_identical", "dropped_tie", "dropped_stratum", "pool"}; the
      first minus the dropped ones is the pool.
    """
    usable = {name: _usable(rows, rules.finishes) for name, rows in traces.items()}
    counts = dict.fromkeys(
        ("dropped_unfinished", "dropped_identical", "dropped_tie", "dropped_stratum"), 0
    )
    pairs: list[Row] = []
    for prompt in prompt_ids:
        if any(len(usable[name].get(prompt, ())) < need for name, need in rules.ladder.items()):
            counts["dropped_unfinished"] += 1
            continue
        rejected = usable[rules.rejected][prompt][0]
        rungs = {
            name: usable[name][prompt][int(name == rules.rejected)]
            for name, need in rules.ladder.items()
            if name != rules.rejected or need > 1
        }
        if any(trace["text"].strip() == rejected["text"].strip() for trace in rungs.values()):
            counts["dropped_identical"] += 1
            continue
        chosen = rungs[rules.chosen]
        if rules.direction == "judge":
            gap = sum(ratings[chosen["trace_id"]]) - sum(ratings[rejected["trace_id"]])
            if gap == 0:
                counts["dropped_tie"] += 1
                continue
            if gap < 0:
                chosen, rejected = rejected, chosen
        if not STRATA[rules.stratum](
            correct.get(chosen["trace_id"]), correct.get(rejected["trace_id"])
        ):
            counts["dropped_stratum"] += 1
            continue
        pairs.append(_pair(prompt, chosen, rejected, correct, ratings))
    return pairs, {"prompts": len(prompt_ids), **counts, "pool": len(pairs)}


def _pair(
    prompt: str,
    chosen: Row,
    rejected: Row,
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
) -> Row:
    def rated(trace: Row) -> list[float] | None:
        return list(ratings[trace["trace_id"]]) if trace["trace_id"] in ratings else None

    return {
        "pair_id": digest(chosen["trace_id"], rejected["trace_id"]),
        "prompt_id": prompt,
        "chosen_id": chosen["trace_id"],
        "rejected_id": rejected["trace_id"],
        "chosen_model": chosen["generator"],
        "rejected_model": rejected["generator"],
        "chosen_rating": rated(chosen),
        "rejected_rating": rated(rejected),
        "chosen_correct": correct.get(chosen["trace_id"]),
        "rejected_correct": correct.get(rejected["trace_id"]),
    }
