"""What an arm is, in words: two arms that are trained differently never have the same."""

from collections.abc import Mapping, Sequence

from deltapref_jax.config import (
    KEEPS,
    RANKED,
    REFERENCE_MARGIN,
    UNJUDGED,
    Arm,
    Experiment,
    is_tuned,
    samples_of,
    training_of,
)

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


def training_words(e: Experiment, arms: Sequence[Arm], smallest: int | None) -> str:
    """The steps of some arms of a study: what the config gives, and how many have their own.

    Args:
      e: the config.
      arms: that the page has.
      smallest: fewest pairs of any of them; None where that is not known.
    """
    t, own = e.training, [a for a in arms if training_of(e.training, a) != e.training]
    size = f"{'up to ' * (smallest is not None and smallest < t.pairs_per_step)}{t.pairs_per_step}"
    if t.budget == "steps":
        usual = f"{t.steps} steps of {size} pairs, however many an arm keeps"
    else:
        epochs = f"{t.epochs:.10g} epoch{'s' * (t.epochs != 1)}"
        usual = f"{epochs} of an arm's pairs in steps of {size}"
    if not own:
        return usual
    return (
        f"{usual}, unless the table of arms under Training says otherwise ({len(own)} of "
        f"{len(arms)} arms have steps, epochs or pairs a step of their own)"
    )


def objective_words(e: Experiment, arms: Sequence[Arm], chosen: Mapping[str, str]) -> list[str]:
    """Every objective with its learning rate, as it was given or chosen, and its beta.

    Args:
      e: the config.
      arms: that the page has.
      chosen: objective → learning rate, of those that were chosen.
    """
    described = []
    for o in e.objectives:
        trained = [a for a in arms if a.objective == o.name]
        own = [a for a in trained if a.learning_rate]
        rate = f"learning rate {o.learning_rate:.10g}"
        if any(is_tuned(e, a) for a in trained) or (o.rates and not trained):
            tried = f"of the {len(o.rates)} that were tried"
            rate = (
                f"learning rate {chosen[o.name]}, chosen {tried}"
                if o.name in chosen
                else (f"learning rate chosen {tried}")
            )
        if own:
            rate += f", but in {len(own)} of its {len(trained)} arms their own"
        described.append(f"{o.name} ({rate}{f', beta {o.beta:.10g}' * (o.kind != 'sft')})")
    return described


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
