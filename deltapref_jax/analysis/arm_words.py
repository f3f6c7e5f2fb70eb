"""What an arm is, in words: two arms that are trained differently never have the same."""

from collections.abc import Sequence

from deltapref_jax.config import KEEPS, RANKED, REFERENCE_MARGIN, UNJUDGED, Arm, samples_of

_RANKED_WORDS = {
    "top": "of the largest {}",
    "bottom": "of the smallest {}",
    "middle": "of middling {}",
    "matched": "with the lengths of those of the largest {} and the gaps of the pool",
}


def share_words(arms: Sequence[Arm]) -> str:
    """What selections keep of their pools, such as `6%, 12% of pairs` or `40 pairs`."""
    shares = [f"{100 * f:.10g}%" for f in sorted({a.fraction for a in arms if not a.pairs})]
    counts = [str(n) for n in sorted({a.pairs for a in arms if a.pairs})]
    texts = (", ".join(shares) + " of pairs") * bool(shares), f"{', '.join(counts)} pairs"
    return " and ".join(text for text, given in zip(texts, (shares, counts), strict=True) if given)


def measure_words(by: str, several: bool = False) -> str:
    """What pairs are ranked by: a gap in ratings, or the reference's margin."""
    if by == REFERENCE_MARGIN:
        return f"margin{'s' * several} of the reference"
    return f"gap{'s' * several} in {_rating_words(by)}"


def _rating_words(by: str) -> str:
    summed = by in ("sum", REFERENCE_MARGIN)  # a margin rates no single trace
    return "the sum of all dimensions" if summed else by.replace("_", " ")


def data_words(arm: Arm) -> list[str]:
    """Which pairs an arm selects from, where they are not all pairs as their generators made them.

    It leaves out the generators, and the judge that chooses samples.
    """
    found = []
    if arm.direction == "coin":
        found.append("sides drawn by a coin")
    elif arm.direction not in UNJUDGED:
        found.append(f"directed by judge {arm.direction}")
    if arm.stratum != "any":
        found.append(f"stratum {arm.stratum.replace('_', ' ')}")
    for side, which in zip(("chosen", "rejected"), samples_of(arm), strict=True):
        rated = f" in {_rating_words(arm.by)}" if which in ("best", "worst") else ""
        found += [f"the {which} {side} sample{rated}"] * (which != "first")
    return found


def step_words(arm: Arm) -> list[str]:
    """The pairs a step and the learning rate of an arm that has its own."""
    found = [f"{arm.pairs_per_step} pairs a step"] * bool(arm.pairs_per_step)
    return found + [f"learning rate {arm.learning_rate:.10g}"] * bool(arm.learning_rate)


def budget_words(arm: Arm) -> str:
    """The steps or epochs of an arm that has its own; "" elsewhere."""
    return f"{arm.steps} steps" if arm.steps else f"{arm.epochs:.10g} epochs" if arm.epochs else ""


def arm_words(arm: Arm, judge: str, balance: str = "") -> str:
    """Objective, pairs and budget of an arm.

    Args:
      arm: of the config.
      judge: whose ratings shape its pairs; "" if none do.
      balance: of its ladder, if it is a rung of a balanced one.
    """
    kept = "all pairs" if arm.keep == "all" else share_words([arm])
    if arm.keep == "random":
        kept += " at random"
    elif arm.keep in RANKED:
        kept += " " + _RANKED_WORDS[arm.keep].format(measure_words(arm.by, several=True))
    elif arm.keep not in KEEPS:
        limited = arm.pairs or arm.fraction < 1
        kept = f"{kept if limited else 'pairs'} kept by {arm.keep}"
    parts = [f"{arm.objective} on {arm.chosen} over {arm.rejected}", *data_words(arm), kept]
    if judge and judge != arm.direction:
        parts.append(f"judge {judge}")
    if balance:
        parts.append(f"balanced by {balance.replace('_', ' ')}")
    return ", ".join(text for text in [*parts, budget_words(arm), *step_words(arm)] if text)


def run_words(arm: Arm) -> str:
    """Seeds of training and draws of pairs."""
    runs = (("seeds", arm.seeds), ("draws", arm.draws))
    return ", ".join(f"{what} {' '.join(map(str, values))}" for what, values in runs)
