"""Traces to pairs: which two traces meet, which of them is chosen, and what is dropped and why.

All arms of a generator sweep share prompts and rejected traces. A prompt counts only if *every*
generator of the sweep has enough usable traces for it, and none of them repeats the rejected trace.
Arms of one sweep therefore differ in the generator of the chosen trace and in nothing else.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from deltapref_jax.records import Pair, Trace, digest

UNFINISHED, IDENTICAL, TIE, STRATUM = _DROPS = (
    "dropped_unfinished",
    "dropped_identical",
    "dropped_tie",
    "dropped_stratum",
)
STRATA = {  # verified correctness of (chosen, rejected)
    "any": lambda c, r: True,
    "chosen_right": lambda c, r: c is True,
    "both_right": lambda c, r: c is True and r is True,
    "both_wrong": lambda c, r: c is False and r is False,
    "right_wrong": lambda c, r: c is True and r is False,
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pairs are made; the fields of `config.Arm` that matter here."""

    chosen: str
    rejected: str
    min_traces: Mapping[str, int]  # generator of the sweep to usable traces that a prompt must have
    finishes: tuple[str, ...]  # of usable traces
    label_by: str  # "generator" or "judge"
    stratum: str  # one of STRATA


def build(
    prompt_ids: Sequence[str],
    traces: Mapping[str, Sequence[Trace]],
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    rules: Rules,
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs in the order of `prompt_ids`, and how many prompts were dropped at every step.

    Args:
      prompt_ids: the training prompts.
      traces: generator to its traces; all generators of the sweep.
      correct: trace id to verdict.
      ratings: trace id to ratings by the arm's judge, in its order of dimensions; empty where
        nobody judged.
      rules: see `Rules`. With `label_by` "judge" the trace with the higher sum of ratings is
        chosen, and equal sums are dropped. With "generator", and one generator on both sides, its
        first sample is rejected: the samples are draws of one distribution, so the sampling seed
        labels them, and the rejected trace is that of the other arms.

    Returns:
      pairs, and {"prompts", "dropped_unfinished", "dropped_identical", "dropped_tie",
      "dropped_stratum", "pool"}; the first minus the dropped ones is the pool.
    """
    usable = {name: _usable(of_generator, rules.finishes) for name, of_generator in traces.items()}
    pairs, drops = [], Counter[str]()
    for prompt in prompt_ids:
        samples = {name: usable[name].get(prompt, []) for name in rules.min_traces}
        pair = _pair(samples, correct, ratings, rules)
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            drops[pair] += 1
    dropped = {reason: drops[reason] for reason in _DROPS}
    return pairs, {"prompts": len(prompt_ids), **dropped, "pool": len(pairs)}


def _usable(traces: Sequence[Trace], finishes: Sequence[str]) -> dict[str, list[Trace]]:
    """Finished, non-empty traces of one generator by prompt, in order of their sample index."""
    by_prompt: dict[str, list[Trace]] = {}
    for trace in sorted(traces, key=lambda t: t.sample):
        if trace.finish in finishes and trace.text.strip():
            by_prompt.setdefault(trace.prompt_id, []).append(trace)
    return by_prompt


def _pair(
    samples: Mapping[str, Sequence[Trace]],
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    rules: Rules,
) -> Pair | str:
    """The pair of one prompt from its usable traces by generator, or the reason to drop it."""
    if any(len(samples[name]) < need for name, need in rules.min_traces.items()):
        return UNFINISHED
    rejected = samples[rules.rejected][0]
    # The trace that each arm of the sweep would choose: a first sample, but the second one of the
    # generator that wrote the rejected trace.
    candidates = {
        name: samples[name][int(name == rules.rejected)]
        for name, need in rules.min_traces.items()
        if name != rules.rejected or need > 1
    }
    # Every arm of the sweep drops the prompt, so that all arms keep the same prompts.
    if any(trace.text.strip() == rejected.text.strip() for trace in candidates.values()):
        return IDENTICAL
    chosen = candidates[rules.chosen]
    if rules.label_by == "judge":
        gap = sum(ratings[chosen.trace_id]) - sum(ratings[rejected.trace_id])
        if gap == 0:
            return TIE
        if gap < 0:
            chosen, rejected = rejected, chosen
    pair = Pair(
        pair_id=digest(chosen.trace_id, rejected.trace_id),
        prompt_id=chosen.prompt_id,
        chosen_id=chosen.trace_id,
        rejected_id=rejected.trace_id,
        chosen_model=chosen.generator,
        rejected_model=rejected.generator,
        chosen_rating=_rating(ratings, chosen),
        rejected_rating=_rating(ratings, rejected),
        chosen_correct=correct.get(chosen.trace_id),
        rejected_correct=correct.get(rejected.trace_id),
    )
    return pair if STRATA[rules.stratum](pair.chosen_correct, pair.rejected_correct) else STRATUM


def _rating(ratings: Mapping[str, Sequence[float]], trace: Trace) -> list[float] | None:
    return list(ratings[trace.trace_id]) if trace.trace_id in ratings else None
