"""Numbers to sentences: direction, size and interval, whatever they are."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from deltapref_jax.analysis.judges import USELESS_AUC, WANTED_AUC
from deltapref_jax.analysis.statistics import Estimate

DOMAIN_WORDS = {"in": "in domain", "out": "out of domain"}
_AGAINST = {
    "random": "as many pairs drawn at random",
    "matched": "as many pairs of the same lengths",
    "all": "all pairs of the pool",
}
_DETECTABLE = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)) / (
    2 * NormalDist().inv_cdf(0.975)
)


def words(name: object) -> str:
    """An identifier as words."""
    return str(name).replace("_", " ")


def points(values: Sequence[float], digits: int = 1) -> str:
    """`+3.2 [+1.0, +5.4]`."""
    value, low, high = (0.0 if abs(v) < 0.5 * 10**-digits else v for v in values)  # no "-0.0"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def detectable(values: Sequence[float]) -> float:
    """Effect that an interval of this width would have shown with 80% power."""
    return _DETECTABLE * (values[2] - values[1])


def outcome(values: Sequence[float], digits: int = 1, unit: str = "points") -> str:
    """An effect, or what was not detected and what would have been."""
    if Estimate(*values).clear:
        return f"{points(values, digits)} {unit}"
    return (
        f"no effect detected ({points(values, digits)}; an effect of {detectable(values):.{digits}f} {unit} would "
        "have been)"
    )


def _join(parts: Sequence[str]) -> str:
    return "; ".join(parts)


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def findings(s: Mapping[str, Any]) -> list[dict[str, str]]:
    """The page's headline as {"topic", "text"}, made from the numbers alone."""
    return [
        {"topic": topic, "text": text}
        for topic, text in (
            *_generator_delta(s),
            *_sample_delta(s),
            *_survival(s),
            *_controls(s),
            *_arms(s),
            *_instruments(s),
        )
    ]


def _generator_delta(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for objective in dict.fromkeys(t["objective"] for t in s["trends"]):
        trends = [t for t in s["trends"] if t["objective"] == objective]
        slopes = _join([f"{DOMAIN_WORDS[t['domain']]} {outcome(t['per_10'], 2)}" for t in trends])
        ends = _join([f"{DOMAIN_WORDS[t['domain']]} {outcome(t['ends'])}" for t in trends])
        found.append(
            (
                f"Generator delta, {objective.upper()}",
                f"per 10 points by which the chosen traces' author is better than the rejected traces' author, "
                f"the student's accuracy changed: {slopes}. The widest of {trends[0]['rungs']} rungs against the "
                f"narrowest ({trends[0]['high']} minus {trends[0]['low']}): {ends}.",
            )
        )
    return found


def _sample_delta(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One sentence per objective and judge; several fractions are averaged."""
    arms = {a["name"]: a for a in s["arms"]}
    found = []
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for c in s["contrasts"]:
        a = arms[c["a"]]
        groups.setdefault((a["objective"], a["rater"], a["by"]), []).append(c)
    for (objective, rater, by), contrasts in groups.items():
        fractions = sorted({arms[c["a"]]["fraction"] for c in contrasts})
        share = _listed([f"{100 * f:.0f}%" for f in fractions])
        clauses = []
        for kind in dict.fromkeys(c["kind"] for c in contrasts):
            of_kind = [c for c in contrasts if c["kind"] == kind]
            effects = []
            for d in s["domains"]:
                values = [c[d] for c in of_kind]
                effects.append(
                    f"{DOMAIN_WORDS[d]} "
                    + (outcome(values[0]) if len(values) == 1 else _several(values))
                )
            clauses.append(f"against {_AGAINST[kind]}: {_join(effects)}")
        found.append(
            (
                f"Sample delta, {objective.upper()}, judge {rater}",
                f"training on the {share} of pairs with the largest gap in {words(by)}, "
                f"{'. '.join(c if i == 0 else c[0].upper() + c[1:] for i, c in enumerate(clauses))}.",
            )
        )
    return found


def _several(values: Sequence[Sequence[float]]) -> str:
    clear = [v for v in values if Estimate(*v).clear]
    low, high = min(v[0] for v in values), max(v[0] for v in values)
    return f"{low:+.1f} to {high:+.1f} points over {len(values)} fractions, {len(clear)} of them with an interval off 0"


def _verdict(values: Sequence[float]) -> str:
    return (
        ("gain" if values[0] > 0 else "loss") if Estimate(*values).clear else "no effect detected"
    )


def _survival(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for c in s["survival"]:
        per = []
        for d in s["domains"]:
            a, b = c[d]["a"], c[d]["b"]
            same = _verdict(a) == _verdict(b)
            per.append(
                f"{DOMAIN_WORDS[d]} {'the same verdict' if same else 'another verdict'} ({c['first']}: "
                f"{_verdict(a)}, {points(a)}; {c['second']}: {_verdict(b)}, {points(b)}; difference "
                f"{points(c[d]['difference'])})"
            )
        found.append(
            (
                "Change of judge",
                f"{c['a']} and {c['b']} differ only in the judge that shaped their pairs, and "
                f"share {c['shared']:.0f}% of them: {_join(per)}.",
            )
        )
    return found


def _controls(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for a in s["arms"]:
        if a["kind"] == "sft":
            own = _join([f"{DOMAIN_WORDS[d]} {outcome(a[d]['change'])}" for d in s["domains"]])
            found.append(
                (
                    "Control, SFT",
                    f"imitating the chosen traces of {a['chosen']} alone, without the rejected "
                    f"ones, changed accuracy: {own}.",
                )
            )
    return found


def _arms(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not s["arms"]:
        return []
    parts = []
    for d in s["domains"]:
        up, down = (
            [a["name"] for a in s["arms"] if a[d]["p_holm"] < 0.05 and sign * a[d]["change"][0] > 0]
            for sign in (1, -1)
        )
        gained = f"{len(up)} gained ({_listed(up)})" if up else "none gained"
        lost = f"{len(down)} lost ({_listed(down)})" if down else "none lost"
        limit = (
            f"; one arm alone would have shown {s['detectable'][d]:.1f} points"
            if d in s["detectable"]
            else ""
        )
        parts.append(f"{DOMAIN_WORDS[d]} {gained} and {lost}{limit}")
    return [
        (
            f"All {len(s['arms'])} arms",
            f"against the student before training, after Holm's correction: {_join(parts)}.",
        )
    ]


def _instruments(s: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("Judges", text) for text in s["judge_sentences"] if "cannot carry" in text]
    falling = [a["name"] for a in s["arms"] if a["training"]["falling"]]
    if falling:
        found.append(
            (
                "Training",
                f"in {len(falling)} of {len(s['arms'])} arms the log-probabilities of chosen and "
                f"rejected traces fell together ({_listed(falling)}): these arms made both kinds of trace less "
                "likely.",
            )
        )
    return found


def judge_sentence(j: Mapping[str, Any], exact: bool) -> str:
    """What this judge may be used for; `exact` says whether the study has an exact judge to fall back on."""
    name = j["name"]
    if "auc" not in j:
        return f"Judge {name} was not measured against known corruption: the questions have no known truth for that."
    carried = " The exact judge carries it." if exact and j["kind"] != "exact" else ""
    if j["auc_mean"] < USELESS_AUC:
        return (
            f"Judge {name} cannot carry a conclusion: its AUC against known corruption is {j['auc_mean']:.2f} on "
            f"average, below {USELESS_AUC}.{carried}"
        )
    low = [
        f"{words(d)} ({a[0]:.2f})" for d, a in j["auc"].items() if USELESS_AUC <= a[0] < WANTED_AUC
    ]
    if j["useless"]:
        weak = f" It is weak, below {WANTED_AUC}, on {_listed(low)}." if low else ""
        return (
            f"Judge {name} cannot carry a conclusion on {_listed([words(d) for d in j['useless']])}: its AUC "
            f"against known corruption is below {USELESS_AUC} there.{carried}{weak}"
        )
    if low:
        return (
            f"Judge {name} is usable but weak, with an AUC below {WANTED_AUC}, on {_listed(low)}."
        )
    lowest = float(np.min([a[0] for a in j["auc"].values()]))
    return (
        f"Judge {name} tells corrupted solutions from clean ones in every dimension (lowest AUC {lowest:.2f}; "
        f"{WANTED_AUC} was wanted)."
    )
