"""Traces to pairs: which two traces meet, which of them is chosen, and what is dropped and why.

All arms of a generator sweep share prompts and rejected traces. A prompt counts only if *every*
generator of the sweep has enough usable traces for it, and none of them repeats the rejected trace.
Arms of one sweep therefore differ in the generator of the chosen trace and in nothing else. An arm
whose sides are another arm's exchanged has that arm's pairs, each turned around.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from deltapref_jax.config import ADDED
from deltapref_jax.pairs.select import DECIMALS
from deltapref_jax.records import Pair, Trace, digest

UNFINISHED, SAMPLE, UNSHARED, IDENTICAL, TIE, STRATUM = _DROPS = (
    "dropped_unfinished",
    "dropped_sample",
    "dropped_unshared",
    "dropped_identical",
    "dropped_tie",
    "dropped_stratum",
)
TIED = "tied_samples"
Candidates = list[tuple[float, Trace]]  # with their ranks, 0 or the smallest first
STRATA = {  # verified correctness of (chosen, rejected)
    "any": lambda c, r: True,
    "chosen_right": lambda c, r: c is True,
    "both_right": lambda c, r: c is True and r is True,
    "both_wrong": lambda c, r: c is False and r is False,
    "right_wrong": lambda c, r: c is True and r is False,
    "wrong_right": lambda c, r: c is False and r is True,
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pairs are made; the fields of `config.Arm` that matter here."""

    chosen: str
    rejected: str
    min_traces: Mapping[str, int]  # generator of the sweep to usable traces that a prompt must have
    finishes: tuple[str, ...]  # of usable traces
    label_by: str  # "generator", "judge" or "coin"
    stratum: str  # one of STRATA
    coin: tuple[int, int] = (0, 0)  # seed and draw of "coin", and of samples that are equal
    # Of config.SAMPLES: which sample is chosen, and which rejected.
    samples: tuple[str, str] = dataclasses.field(default=("first", "first"), metadata=ADDED)
    # Strata in each of which a prompt must have a pair.
    shared_strata: tuple[str, ...] = dataclasses.field(default=(), metadata=ADDED)
    # Traces meet as for the arm whose sides these are exchanged, and their pairs are turned around.
    exchanged: bool = dataclasses.field(default=False, metadata=ADDED)


def build(
    prompt_ids: Sequence[str],
    traces: Mapping[str, Sequence[Trace]],
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    rules: Rules,
    dimension: int | None = None,
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs in the order of `prompt_ids`, and how many prompts were dropped at every step.

    Args:
      prompt_ids: the training prompts.
      traces: generator to its traces; all generators of the sweep.
      correct: trace id to verdict.
      ratings: trace id to ratings by the arm's judge, in its order of dimensions; empty where
        nobody judged.
      rules: see `Rules`. With `label_by` "judge" the trace with the higher sum of ratings is
        chosen, and equal sums are dropped. With "coin" half of all pairs are turned around, by a
        digest of the pair and `coin`. With "generator", and one generator on both sides, its
        first sample is rejected: the samples are draws of one distribution, so the sampling seed
        labels them, and the rejected trace is that of the other arms. With `shared_strata` a prompt
        must have a pair in each of them, and its pair is the first one of its stratum, samples of
        the rejected generator in the outer loop.
      dimension: index of the rating that the best and the worst sample have; None: their sum.

    Returns:
      pairs, and counts: "prompts", what was dropped ("dropped_unfinished"; "dropped_sample": no
      sample is right, or wrong; "dropped_unshared": a stratum has no pair; "dropped_identical",
      "dropped_tie", "dropped_stratum"), the "pool", which is the first minus the dropped ones, and
      "tied_samples": traces of the pool that were drawn from equal ones.
    """
    usable = {name: _usable(of_generator, rules.finishes) for name, of_generator in traces.items()}
    pairs, drops, tied = [], Counter[str](), 0
    # Which prompts are dropped depends on which side is rejected.
    meeting = rules
    if rules.exchanged:
        meeting = dataclasses.replace(
            rules, chosen=rules.rejected, rejected=rules.chosen, samples=rules.samples[::-1]
        )
    for prompt in prompt_ids:
        samples = {name: usable[name].get(prompt, []) for name in rules.min_traces}
        candidates = [
            _candidates(samples[name], which, correct, ratings, dimension, rules.coin)
            for name, which in zip((meeting.chosen, meeting.rejected), meeting.samples, strict=True)
        ]
        met = _meeting(samples, candidates, correct, meeting)
        if isinstance(met, str):
            drops[met] += 1
            continue
        pair = _pair(*(met[::-1] if rules.exchanged else met), correct, ratings, rules)
        if isinstance(pair, str):
            drops[pair] += 1
        else:
            pairs.append(pair)
            tied += sum(_is_tied(trace, side) for trace, side in zip(met, candidates, strict=True))
    dropped = {reason: drops[reason] for reason in _DROPS}
    return pairs, {"prompts": len(prompt_ids), **dropped, "pool": len(pairs), TIED: tied}


def _usable(traces: Sequence[Trace], finishes: Sequence[str]) -> dict[str, list[Trace]]:
    """Finished, non-empty traces of one generator by prompt, in order of their sample index."""
    by_prompt: dict[str, list[Trace]] = {}
    for trace in sorted(traces, key=lambda t: t.sample):
        if trace.finish in finishes and trace.text.strip():
            by_prompt.setdefault(trace.prompt_id, []).append(trace)
    return by_prompt


def _candidates(
    traces: Sequence[Trace],
    which: str,
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    dimension: int | None,
    coin: tuple[int, int],
) -> Candidates:
    """The traces that `which` allows, with their ranks, best first; a draw orders equal ranks."""
    if which == "first":
        return [(float(i), trace) for i, trace in enumerate(traces)]
    if which in ("right", "wrong"):
        ranked = [(0.0, t) for t in traces if correct.get(t.trace_id) is (which == "right")]
    else:
        sign = -1.0 if which == "best" else 1.0
        rated = [ratings[trace.trace_id] for trace in traces]
        values = [round(sum(r) if dimension is None else r[dimension], DECIMALS) for r in rated]
        ranked = [(sign * value, trace) for value, trace in zip(values, traces, strict=True)]
    return sorted(ranked, key=lambda each: (each[0], digest(coin, each[1].trace_id)))


def _is_tied(trace: Trace, candidates: Candidates) -> bool:
    """Whether the trace was drawn from several of its rank."""
    own = next(rank for rank, other in candidates if other is trace)
    return sum(rank == own for rank, _ in candidates) > 1


def _meeting(
    samples: Mapping[str, Sequence[Trace]],
    candidates: Sequence[Candidates],
    correct: Mapping[str, bool | None],
    rules: Rules,
) -> tuple[Trace, Trace] | str:
    """The traces of `rules.chosen` and `rules.rejected` that meet, or the reason why none do."""
    if any(len(samples[name]) < need for name, need in rules.min_traces.items()):
        return UNFINISHED
    chosen, rejected = ([trace for _, trace in side] for side in candidates)
    meetings = [(c, r) for r in rejected for c in chosen if c is not r]
    if rules.shared_strata:
        met = {s: _first_of(s, meetings, correct) for s in rules.shared_strata}
        own = met[rules.stratum]
        return UNSHARED if own is None or None in met.values() else own
    if not meetings:
        return SAMPLE
    first, other = meetings[0]
    met_by_arms = [first]
    if rules.samples == ("first", "first"):
        # The trace that each arm of the sweep would choose: a first sample, but the second one of
        # the generator that wrote the rejected trace. Every arm that rejects this trace drops the
        # prompt, so that all arms of the sweep keep the same prompts.
        met_by_arms = [
            samples[name][int(name == rules.rejected)]
            for name, need in rules.min_traces.items()
            if name != rules.rejected or need > 1
        ]
    if any(trace.text.strip() == other.text.strip() for trace in met_by_arms):
        return IDENTICAL
    return first, other


def _first_of(
    stratum: str,
    meetings: Sequence[tuple[Trace, Trace]],
    correct: Mapping[str, bool | None],
) -> tuple[Trace, Trace] | None:
    """The first meeting of a stratum whose two texts differ."""
    for chosen, rejected in meetings:
        verdicts = correct.get(chosen.trace_id), correct.get(rejected.trace_id)
        if STRATA[stratum](*verdicts) and chosen.text.strip() != rejected.text.strip():
            return chosen, rejected
    return None


def _pair(
    chosen: Trace,
    rejected: Trace,
    correct: Mapping[str, bool | None],
    ratings: Mapping[str, Sequence[float]],
    rules: Rules,
) -> Pair | str:
    """The pair of two traces, or the reason to drop it."""
    if rules.label_by == "judge":
        gap = sum(ratings[chosen.trace_id]) - sum(ratings[rejected.trace_id])
        if round(gap, DECIMALS) == 0:
            return TIE
        if gap < 0:
            chosen, rejected = rejected, chosen
    elif rules.label_by == "coin":
        # The last hexadecimal digit of a digest is a fair coin that no row order changes.
        face = digest(rules.coin, chosen.trace_id, rejected.trace_id)[-1]
        if int(face, 16) % 2:
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
