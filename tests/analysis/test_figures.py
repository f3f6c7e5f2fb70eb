"""What a figure draws as one line is alike, and what differs is told apart, in its numbers too."""

import csv
import dataclasses
import io
import math
from xml.etree import ElementTree

import pytest

from configs import delta_grid
from deltapref_jax.analysis import figures, report
from deltapref_jax.analysis.page import ArmSummary, Ladder, Measured, Summary
from deltapref_jax.analysis.statistics import Estimate
from deltapref_jax.analysis.summary import _budget_words, _pair_judge
from deltapref_jax.config import DIMENSIONS, Arm, Judge, draws_pairs, ladder_of, objective_of

DELTAS = {"weak": 0.0, "fair": 10.0, "good": 20.0, "strong": 30.0, "elm": 25.0}


def arm_summary(e, arm, change):
    """An arm that kept its share of 100 pairs; its change is `change`, give or take 2 points."""
    nothing = dict.fromkeys((f.name for f in dataclasses.fields(ArmSummary)), None)
    measured = Measured(Estimate(change, change - 2, change + 2), 0.5, 0.5, 9.0)
    delta = DELTAS[arm.chosen] - DELTAS[arm.rejected]
    return ArmSummary(
        **nothing
        | {
            "arm": arm,
            "kind": objective_of(e, arm).kind,
            "seeds": len(arm.seeds),
            "draws": len(arm.draws),
            "balanced": False,
            "redrawn": draws_pairs(e, arm),
            "budget": _budget_words(e, arm),
            "pair_judge": _pair_judge(e, arm),
            "generator_delta": {"in": Estimate(delta, delta, delta)},
            "pairs": round(100 * arm.fraction),
            "waterfall": {"pool": 100},
            "changes": {"in": measured, "out": measured},
            "doubt": "",
        }
    )


def summary(e):
    """Arms of a config; the i-th changes accuracy by i tenths of a point."""
    s = Summary(e.name, e.question, ["in", "out"])
    s.arms = [arm_summary(e, arm, i / 10) for i, arm in enumerate(e.arms)]
    deltas = {a.name: a.delta for a in s.arms}
    for o in e.objectives:
        if rungs := ladder_of(e, o.name):
            s.ladders[o.name] = Ladder({a.name: deltas[a.name] for a in rungs}, {}, [], 0, 0)
    s.judges = list(e.judges)  # of which figures read the names
    return s


def rows_of(figure, domain="in"):
    return [r for r in csv.DictReader(io.StringIO(figure.csv)) if r["domain"] == domain]


def series(figure):
    """Panel and line → points, of one domain."""
    found = {}
    for r in rows_of(figure):
        found.setdefault((r["panel"], r["line"]), []).append(r)
    return found


def test_the_grids_selections_are_told_apart():
    """Five dimensions, two judges, two budgets; every arm has three draws and is one point."""
    e = delta_grid.get_config()
    s = summary(e)
    figure = report._selection(s)
    found = series(figure)
    gaps = [f"DPO, gap in {d.replace('_', ' ')}" for d in DIMENSIONS]
    twins = "DPO, gap in numerical precision, equal steps"
    assert set(found) == {
        *((gap, line) for gap in gaps for line in ("top, judge exact", "top, judge model")),
        *((panel, line) for panel in (*gaps, twins) for line in ("random", "all pairs")),
        ("DPO, gap in numerical precision", "matched, judge exact"),
        (twins, "top, judge exact"),
    }
    for (panel, line), points in found.items():
        shares = [float(p["pairs kept, percent of the pool"]) for p in points]
        assert shares == ([100.0] if line == "all pairs" else [6, 12, 30, 60]), (panel, line)
        # What tells lines apart is in the columns of their points, alike in all of them.
        for column in ("keep", "ranked by", "judge", "budget"):
            assert len({p[column] for p in points}) == 1 or line == "all pairs"
    changes = {a.name: a.changes["in"].estimate for a in s.arms}
    model = found["DPO, gap in factuality", "top, judge model"]
    assert [(p["arm"], p["ranked by"], p["judge"], p["draws"]) for p in model] == [
        (f"dpo-top-model-factuality-{f}", "factuality", "model", "3") for f in (6, 12, 30, 60)
    ]
    for p in model:
        numbers = [float(p[name]) for name in ("change in points", "low", "high")]
        assert numbers == list(changes[p["arm"]])
    (whole,) = found[twins, "all pairs"]
    assert (whole["arm"], whole["budget"]) == ("dpo-strong", "")
    steps = found[twins, "random"]
    assert [p["arm"] for p in steps] == [f"dpo-random-{f}-equal-steps" for f in (6, 12, 30, 60)]
    selected = {a.name for a in s.arms if a.arm.group == "selection"} | {"dpo-strong"}
    assert {r["arm"] for r in rows_of(figure)} == selected
    assert len(figure.parts) == 2
    assert all("top, judge model" in part for part in figure.parts)
    ElementTree.fromstring(figure.svg)


def test_objectives_generators_and_data_have_panels_of_their_own():
    e = delta_grid.get_config()
    top = Arm("a", chosen="strong", rejected="weak", keep="top", fraction=0.5, group="selection")
    whole = Arm("all-a", chosen="strong", rejected="weak")
    other = {"chosen": "good", "rejected": "fair"}
    wrong = {"stratum": "both_wrong"}
    e.arms = (
        *(top, dataclasses.replace(top, name="b", **other)),
        *(dataclasses.replace(top, name=n, objective=n) for n in ("kto",)),
        dataclasses.replace(top, name="c", **wrong),
        *(whole, dataclasses.replace(whole, name="all-b", **other)),
        dataclasses.replace(whole, name="all-c", group="control", **wrong),
        dataclasses.replace(whole, name="faster", learning_rate=1e-3),
    )
    found = {
        panel: {p["arm"] for p in points}
        for (panel, line), points in series(report._selection(summary(e))).items()
        if line == "all pairs"
    }
    gap = "gap in the sum of all dimensions"
    assert found == {
        f"DPO, strong over weak, {gap}": {"all-a"},
        f"DPO, good over fair, {gap}": {"all-b"},
        f"DPO, strong over weak, stratum both wrong, {gap}": {"all-c"},
    }


def test_more_lines_than_a_panel_shows_are_divided_by_judge():
    e = delta_grid.get_config()
    e.judges = tuple(Judge(name=n) for n in ("a", "b", "c", "d"))
    pair = Arm(chosen="strong", rejected="weak", fraction=0.5, group="selection")
    e.arms = (
        *(
            dataclasses.replace(pair, name=f"{keep}-{j.name}", keep=keep, judge=j.name)
            for keep in ("top", "bottom")
            for j in e.judges
        ),
        dataclasses.replace(pair, name="random", keep="random"),
    )
    gap = "DPO, gap in the sum of all dimensions"
    assert set(series(report._selection(summary(e)))) == {
        (f"{gap}, judge {j}", line)
        for j in "abcd"
        for line in (f"top, judge {j}", f"bottom, judge {j}", "random")
    }


def test_what_a_function_kept_is_counted():
    e = delta_grid.get_config()
    arm = Arm("own", "strong", "weak", keep="mine:best", group="selection")
    e.arms = (arm,)
    s = summary(e)
    s.arms[0].pairs = 25
    (point,) = rows_of(report._selection(s))
    assert float(point["pairs kept, percent of the pool"]) == 25.0
    assert (point["line"], point["ranked by"]) == ("mine:best, judge exact", "sum")


def test_a_ladder_tells_objectives_controls_and_rates_apart():
    e = delta_grid.get_config()
    e.objectives = (*e.objectives, dataclasses.replace(e.objectives[0], name="dpo-wide", beta=0.5))
    own = dataclasses.replace(e.arms[3], name="faster", learning_rate=1e-3)
    wide = dataclasses.replace(e.arms[3], name="wide", objective="dpo-wide")
    e.arms = (*e.arms, own, wide)
    s = summary(e)
    figure = report._ladder(s)
    found = {line: {p["arm"] for p in points} for (_, line), points in series(figure).items()}
    assert found == {
        **{o.upper(): {f"{o}-{g}" for g in delta_grid.RUNGS} for o in ("dpo", "dpo_norm", "kto")},
        "SFT": {"sft-strong"},
        "DPO, control": {"dpo-reversed"},
        "DPO, no rung, learning rate 0.001": {"faster"},
        "DPO-WIDE": {"wide"},
    }
    assert ">weak over strong<" in figure.svg and ">weak<" in figure.svg


def test_no_two_names_share_a_colour():
    wanted = {"dpo": "dpo", "wide": "dpo", "ipo": "ipo", "kto": "kto", "simpo": "simpo"}
    found = figures.colours(wanted)
    assert (found["dpo"], found["kto"]) == (figures.COLOURS["dpo"], figures.COLOURS["kto"])
    assert len(set(found.values())) == len(wanted)


def test_a_dimension_has_one_colour_in_all_panels():
    """The second judge rates one dimension, which the first judge rates too, as its last."""
    drawn = figures.degree_curves(
        {"a": {"x": [5.0, 1.0], "y": [4.0, math.nan]}, "b": {"y": [3.0, 2.0]}}
    )
    first, second = drawn.parts
    only_x, y = ("#440154", "#bddf26")
    assert only_x in first and y in first
    assert y in second and only_x not in second


@pytest.mark.parametrize(("count", "across", "down"), [(2, 2, 1), (6, 4, 2)])
def test_the_file_of_a_figure_holds_all_of_its_parts(count, across, down):
    part = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 30 20"><g/></svg>'
    whole = ElementTree.fromstring(figures.Drawn([part] * count, "").svg)
    assert whole.get("viewBox") == f"0 0 {30 * across} {20 * down}"
    places = [(inner.get("x"), inner.get("y")) for inner in whole]
    assert len(set(places)) == count
