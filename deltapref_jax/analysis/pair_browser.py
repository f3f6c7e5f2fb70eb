"""Pairs for the page's browser: texts, verdicts, and every judge's ratings with its evidence.

The page holds a sample, for which the arms take turns, capped by number and by size; it says how
many of how many it holds. Text is data to the page: it stands in JSON that no text can leave, and
the script shows it as text alone.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltapref_jax.analysis.study import Study, columns
from deltapref_jax.analysis.summary import plain
from deltapref_jax.records import Pair, Prompt, from_table

PAIRS = 240  # most pairs of a page
SIZE = 1_500_000  # most characters of their JSON


@dataclass
class Evidence:
    """One judge's rating of a trace in one dimension."""

    rating: float
    spread: float  # standard deviation over the labels
    mass: float  # probability on the labels before renormalising
    labels: list[int]  # percent on each of the labels 1 to 5


@dataclass
class ShownTrace:
    """A trace, with its verdict and its ratings."""

    text: str
    model: str  # generator
    correct: bool | None
    tokens: int
    ratings: dict[str, dict[str, Evidence]]  # judge → dimension


@dataclass
class ShownPair:
    """A pair of two traces; the script reads these names."""

    arms: list[str]  # all that train on it
    question: str
    answer: str
    stratum: str  # such as "right / wrong", "" where a verdict is missing
    gaps: dict[str, float]  # judge → mean rating of chosen minus rejected
    chosen: ShownTrace
    rejected: ShownTrace


@dataclass
class Browser:
    """What the page's browser shows."""

    judges: list[str]
    pairs: list[ShownPair] = field(default_factory=list)
    total: int = 0  # different pairs of all arms
    arms: list[str] = field(default_factory=list)


def browser(
    study: Study, names: Mapping[str, str], pairs: int = PAIRS, size: int = SIZE
) -> Browser:
    """A sample of the pairs of all arms.

    Args:
      study: tables.
      names: what an arm is shown as, where that is not its name.
      pairs: most pairs to show.
      size: most characters of their JSON; the first pair that would go beyond ends the sample.
    """
    found = Browser(list(study.rated), arms=[names.get(arm, arm) for arm in study.pairs])
    tables = {arm: study.pairs_of(arm) for arm in study.pairs}
    found.total = len(set().union(*(columns(t, "pair_id")[0] for t in tables.values())))
    sampled = _sample(tables, pairs)
    if not sampled:
        return found
    ids = pa.array(list(sampled))
    arms_of: dict[str, list[str]] = {pair: [] for pair in sampled}
    for arm, table in tables.items():
        held = table["pair_id"].filter(pc.is_in(table["pair_id"], ids)).to_pylist()
        for pair in dict.fromkeys(held):
            arms_of[pair].append(names.get(arm, arm))
    traces = {t for p in sampled.values() for t in (p.chosen_id, p.rejected_id)}
    evidence = _evidence(study, traces)
    text, tokens = study.trace_column("text"), study.trace_column("tokens")
    prompts = {p.prompt_id: p for p in from_table(Prompt, study.prompts)}

    def side(trace: str, model: str) -> ShownTrace:
        row = study.row_of[trace]
        correct = None if math.isnan(study.correct[row]) else bool(study.correct[row])
        return ShownTrace(text[row], model, correct, int(tokens[row]), evidence.get(trace, {}))

    left = size
    for pair, p in sampled.items():
        chosen, rejected = side(p.chosen_id, p.chosen_model), side(p.rejected_id, p.rejected_model)
        rows = study.row_of[p.chosen_id], study.row_of[p.rejected_id]
        gaps = {j: float(r.mean[rows[0]] - r.mean[rows[1]]) for j, r in study.rated.items()}
        verdicts = [
            "" if t.correct is None else "right" if t.correct else "wrong"
            for t in (chosen, rejected)
        ]
        shown = ShownPair(
            arms_of[pair],
            prompts[p.prompt_id].question,
            prompts[p.prompt_id].answer,
            " / ".join(verdicts) if all(verdicts) else "",
            {j: round(gap, 2) for j, gap in gaps.items() if not math.isnan(gap)},
            chosen,
            rejected,
        )
        left -= len(json.dumps(plain(shown)))
        if left < 0:
            break
        found.pairs.append(shown)
    return found


def _sample(tables: dict[str, pa.Table], pairs: int) -> dict[str, Pair]:
    """Different pairs by id, drawn at random, the arms taking turns."""
    ids = {arm: columns(t, "pair_id")[0] for arm, t in tables.items()}
    orders = {
        arm: np.random.default_rng(i).permutation(len(of_arm))[:pairs]
        for i, (arm, of_arm) in enumerate(ids.items())
    }
    drawn: dict[str, tuple[str, int]] = {}
    for turn in range(pairs):
        for arm, order in orders.items():
            if turn < len(order) and len(drawn) < pairs:
                drawn.setdefault(ids[arm][order[turn]], (arm, order[turn]))
    return {
        pair: from_table(Pair, tables[arm].slice(row, 1))[0] for pair, (arm, row) in drawn.items()
    }


def _evidence(study: Study, traces: set[str]) -> dict[str, dict[str, dict[str, Evidence]]]:
    """Trace → judge → dimension → what the judge's labels say, for the traces that are shown."""
    wanted = pa.array(sorted(traces))
    found: dict[str, dict[str, dict[str, Evidence]]] = {}
    for judge, tables in study.ratings.items():
        for table in tables.values():
            rows = table.filter(pc.is_in(table["trace_id"], wanted)).to_pylist()
            for r in rows:
                labels = [round(100 * share) for share in r["distribution"]]
                of_judge = found.setdefault(r["trace_id"], {}).setdefault(judge, {})
                of_judge[r["dimension"]] = Evidence(
                    round(r["rating"], 2), round(r["spread"], 2), round(r["mass"], 3), labels
                )
    return found


def script_json(found: Browser) -> str:
    """The browser's data for a `<script type="application/json">`, which no text can end."""
    text = json.dumps(plain(found))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
