"""Paired effects against closed forms, and their error rates in simulated studies."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import noise
from deltapref_jax.analysis.components import Component, Kind, Noise, measured_by
from deltapref_jax.analysis.statistics import Answers, Estimate
from tests.analysis.null_studies import (
    LADDERS,
    ONE_BORROWS,
    THREE,
    TWO,
    coverage,
    false_positives,
    false_positives_of_draws,
    power,
    rate,
    shared_draws,
    simulated_effects,
)
from tests.analysis.test_statistics import draws, results
from tests.marks import mostly

Z95 = NormalDist().inv_cdf(0.975)


def found(before, **arms):
    """Effects of arms, each a list of [questions, samples] with one entry per seed."""
    after = {
        name: {fx.Run(0, seed): results(right) for seed, right in enumerate(runs)}
        for name, runs in arms.items()
    }
    return fx.effects(results(before), after, "in")


def test_changes_are_paired():
    before, after = draws(seed=1), draws(p=0.6, seed=2)
    effects = found(before, arm=[after], none=[before])
    gaps = (after - before).mean(axis=1)
    change = effects.change("arm")
    assert change.estimate.value == pytest.approx(100 * gaps.mean())
    # With the factor n / (n - 1), the variance of a bootstrap is that of a mean.
    assert change.draws.std() == pytest.approx(100 * gaps.std(ddof=1) / math.sqrt(200), rel=0.05)
    assert effects.contrast("arm", "arm").estimate == Estimate(0.0, 0.0, 0.0)
    with pytest.raises(
        ValueError, match="Arm 'x' and the student answered different questions of suite 's'"
    ):
        found(before, x=[after[:-1]])


@pytest.mark.parametrize(
    "gains, losses, low, high",
    [
        # Mid-p Poisson limits: of 0, (0, 2.996); of 1, (0.050, 4.932); of 5, (1.832, 11.082).
        (0, 0, -1.498, 1.498),
        (1, 0, 0.5 - 1.571, 0.5 + 1.966),
        (5, 0, 2.5 - 2.180, 2.5 + 3.041),
    ],
)
def test_few_changed_questions_have_an_exact_interval(gains, losses, low, high):
    before = np.zeros((200, 1), int)
    before[:losses] = 1
    after = np.zeros((200, 1), int)
    after[-gains or 200 :] = 1
    change = found(before, arm=[after]).change("arm")
    assert change.estimate.value == pytest.approx(100 * (gains - losses) / 200)
    assert (change.estimate.low, change.estimate.high) == pytest.approx((low, high), abs=0.002)
    # As in the mid-p sign test, five gains without a loss are the fewest that show something.
    assert (change.p < 0.05) == (gains == 5)
    assert change.bound >= abs(change.estimate.high)


def test_rare_events_of_unequal_size_have_the_limits_of_the_largest():
    # Of equal sizes these are mid-p limits of a Poisson mean, in the unit of the size.
    assert fx._rare_limits(np.full(5, 2.0), 2.0) == pytest.approx((2 * 1.832, 2 * 11.082), abs=0.01)
    assert fx._rare_limits(np.zeros(0), 5.0) == pytest.approx((0.0, 5 * 2.996), abs=0.01)
    # One loss in a suite of 10 questions and six gains in one of 300, which count half each.
    before, after = np.zeros(310), np.zeros(310)
    before[0] = 1.0
    after[10:16] = 1.0

    def answers(right):
        return {
            suite: Answers(np.arange(len(part)), part, np.ones(len(part), int))
            for suite, part in (("few", right[:10]), ("many", right[10:]))
        }

    e = fx.effects(
        answers(before), {"a": {fx.Run(0, 0): answers(after)}}, "in", read=lambda a, _: a
    )
    change = e.change("a").estimate
    assert change.value == pytest.approx(1.0 - 5.0)
    # The loss may be 24.7 points, and a gain of one such question 15 were not seen.
    assert change.low < change.value - 19.6 and change.high > change.value + 14.0
    # A suite of 10 questions without a change tells little beside 15 changes among 300.
    after[10:40], before[0] = 1.0, 0.0
    e = fx.effects(
        answers(before), {"a": {fx.Run(0, 0): answers(after)}}, "in", read=lambda a, _: a
    )
    assert e.few_differ({"a": 1.0})
    assert e.change("a").estimate.low < 0


def changed(suites):
    """The change of an arm, from suites of answers after training that were all wrong before."""

    def answers(suites):
        return {
            f"s{i}": Answers(np.arange(len(part)), np.asarray(part, float), np.ones(len(part), int))
            for i, part in enumerate(suites)
        }

    before, after = answers([np.zeros(len(part)) for part in suites]), answers(suites)
    return fx.effects(before, {"a": {fx.Run(0, 0): after}}, "in", read=lambda a, _: a)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_questions_that_all_change_alike_have_the_rule_of_three(share):
    e = changed([np.full(30, share)])
    change = e.change("a")
    value, low, high = change.estimate
    # At most 2.996 of 30 such questions are otherwise, by 100 points.
    assert (value, low, high) == pytest.approx(
        (100 * share, 100 * share - 9.99, min(100.0, 100 * share + 9.99)), abs=0.01
    )
    assert fx.max_t({"a": change})["a"] < 0.001
    # One otherwise has the limits of one event: (0.050, 4.932) of 30.
    most = changed([np.r_[np.full(29, share), share - 0.5]]).change("a").estimate
    assert most.low == pytest.approx(most.value - 50 * 3.932 / 30, abs=0.01)
    # Where few changed at all, what is known is that these did.
    assert changed([np.full(5, share)]).change("a").p > 0.02


def test_suites_of_one_question_are_resampled_together():
    """Of 60 questions 24 are won, whether they are one suite or 60."""
    alone = changed([[i < 24] for i in range(60)]).change("a").estimate
    together = changed([[i < 24 for i in range(60)]]).change("a").estimate
    assert tuple(alone) == pytest.approx(tuple(together))
    assert alone.value == pytest.approx(40) and alone.high - alone.low > 20
    # One beside larger suites is half of their mean, and may be otherwise.
    one = changed([[1], np.arange(300) < 100]).change("a").estimate
    assert one.low < -90 and one.high == 100.0
    assert fx._strata((300, 20, 1)) == [300, 21] and fx._strata((300, 1, 1)) == [300, 2]


def test_the_component_of_seeds_is_what_the_interaction_leaves():
    rng = np.random.default_rng(0)
    runs, questions = 400, 60
    main = rng.normal(0, 2.0, (runs, 1))
    # In points, each question adds its share of the mean, as `effects` lays them out.
    gaps = (main + rng.normal(0, 30, (runs, questions))) / questions
    seeds = measured_by(gaps, [fx.Run(0, i) for i in range(runs)], [questions]).seed
    assert seeds.freedom == runs - 1
    assert seeds.rest == pytest.approx(30**2 / questions, rel=0.05)
    assert seeds.variance == pytest.approx(4.0, rel=0.25)


def test_draws_are_compared_under_the_seeds_that_they_share():
    rng = np.random.default_rng(1)
    keys = [fx.Run(draw, seed) for draw in range(300) for seed in range(300)]
    by_draw, by_seed = rng.normal(0, 3.0, 300), rng.normal(0, 2.0, 300)
    runs = np.array([[by_draw[k.draw] + by_seed[k.seed]] for k in keys]) / 2 + np.zeros((90_000, 2))
    noise = measured_by(runs, keys, [2])
    assert noise.seed.variance == pytest.approx(4.0, rel=0.2)
    assert noise.draw.variance == pytest.approx(9.0, rel=0.2)
    # The same seeds under other draws are no further seeds.
    assert (noise.seed.freedom, noise.draw.freedom) == (299, 299)


def test_a_seed_under_several_draws_is_one_seed():
    before = draws(300, 2, 0.5, 3)
    several = {f"a{i}": [draws(300, 2, 0.5, 9 * i + j) for j in range(4)] for i in range(6)}
    tables = {
        name: {fx.Run(0, seed): results(right) for seed, right in enumerate(runs)}
        for name, runs in several.items()
    }
    one, drawn_top = results(draws(300, 2, 0.5, 99)), {"top": Kind(draw="random pairs")}
    alone = fx.effects(results(before), tables | {"top": {fx.Run(0, 0): one}}, "in", drawn_top)
    drawn = {fx.Run(draw, 0): results(draws(300, 2, 0.5, 99 + draw)) for draw in range(3)}
    e = fx.effects(results(before), tables | {"top": drawn}, "in", drawn_top)
    assert e.shares[-1].tolist() == [1.0, pytest.approx(1 / 3)]
    assert alone.shares[-1].tolist() == [1.0, 1.0]
    assert e.noise[-1].seed == alone.noise[-1].seed and e.noise[-1].draw.freedom == 2


def test_arms_of_a_kind_measure_its_noise_together_and_others_borrow():
    rng = np.random.default_rng(4)
    before = draws(300, 2, 0.5, 3)

    def run(sd):
        return results((rng.random(before.shape) < 0.5 + rng.normal(0, sd) / 100).astype(int))

    after = {
        f"{kind}{i}": {fx.Run(draw, 0): run(sd) for draw in range(3)}
        for kind, sd in (("top", 1.0), ("random", 20.0))
        for i in range(5)
    }
    after |= {"same": {fx.Run(0, 0): run(0.0)}, "coin": {fx.Run(0, 0): run(0.0)}}
    after |= {f"kto{i}": {fx.Run(0, s): run(20.0) for s in range(3)} for i in range(4)}
    after |= {f"dpo{i}": {fx.Run(0, s): run(1.0) for s in range(3)} for i in range(4)}
    kinds = {
        name: Kind(
            "kto" if name.startswith("kto") else "dpo",
            name.rstrip("0123456789") if name.startswith(("top", "random", "coin")) else "",
        )
        for name in after
    }
    e = fx.effects(results(before), after, "in", kinds)
    noise = dict(zip(e.names, e.noise, strict=True))
    assert noise["top0"].draw.freedom == noise["random0"].draw.freedom == 10
    assert noise["random0"].draw.variance > 20 * max(noise["top0"].draw.variance, 1.0)
    # What no draw moves has none of its noise, and a kind that nobody measured has that of all.
    assert noise["same"].draw is None and e.shares[e.names.index("same")].tolist() == [1.0, 0.0]
    assert noise["coin"].draw.freedom == 20
    assert noise["coin"].draw.mean_square == pytest.approx(
        (noise["top0"].draw.mean_square + noise["random0"].draw.mean_square) / 2
    )
    assert noise["kto0"].seed.variance > 20 * max(noise["dpo0"].seed.variance, 1.0)
    assert noise["same"].seed == noise["dpo0"].seed and noise["kto0"].seed.freedom == 8
    # Of the draws' 10 degrees of freedom, and of the seeds' 8.
    assert 8 <= e.freedom({"random0": 1.0, "random1": -1.0}) <= 11


def test_arms_may_be_measured_by_the_runs_of_others():
    before = results(draws(seed=1))
    runs = {fx.Run(0, i): results(draws(p=0.5, seed=i + 2)) for i in range(3)}
    arms = {"a": runs, "b": dict(list(runs.items())[:2])}
    own = fx.effects(before, arms, "in")
    parts = fx.effects(before, arms | {"part": runs}, "in", measuring=arms)
    assert own.noise == parts.noise[:2] and own.noise[0].seed.freedom == 3
    part = parts.of_kind(["part"], without="a")
    assert part.noise[0] == fx.effects(before, {"b": arms["b"]}, "in").noise[0]
    assert part.names == ("part",) and parts.of_kind(["a"], without="b").noise[0].seed.freedom == 2
    # What another kind measured is lent to an arm, and to no comparison of its own runs.
    unlike = fx.effects(before, arms, "in", {"a": Kind("kto"), "b": Kind("dpo")})
    assert unlike.of_kind(["a"]).noise == unlike.noise[:1] and unlike.noise[0].seed.freedom == 2
    assert unlike.of_kind(["a"], without="a").noise == ((None, None),)


def test_no_interval_is_wider_than_accuracies_are():
    before = draws(60, 1, 0.5, 1)
    far = [np.zeros((60, 1), int), np.ones((60, 1), int)]
    e = found(before, a=[draws(60, 1, 0.05, 2)], b=[draws(60, 1, 0.9, 3)], far=far)
    of_change, of_contrast = e.change("far").estimate, e.contrast("a", "b").estimate
    assert (of_change.low, of_change.high) == (-100.0, 100.0)
    assert of_contrast.low == -100.0 and e.contrast("a", "b").bound <= 100.0
    # Differences of changes are up to 200 between students, whose accuracies before differ.
    both = fx.joint({"one": e, "two": e})
    assert both.contrast("one/far", "two/far").estimate.high == 200.0
    slope = e.slope({"a": 0.0, "b": 10.0, "far": 20.0})
    assert slope.estimate.high == pytest.approx(5.0)  # 100 points at 20, 0 at 0


def test_arms_of_one_seed_borrow_the_noise_of_seeds():
    rng = np.random.default_rng(2)
    before = draws(300, 2, 0.5, 3)

    def run(shift):
        return (rng.random(before.shape) < 0.5 + shift / 100).astype(int)

    arms = {f"a{i}": [run(s) for s in rng.normal(0, 6, 4)] for i in range(6)}
    alone = found(before, one=[run(0)])
    assert alone.noise == ((None, None),) and not alone.by_run.any()
    borrowed = found(before, one=[run(0)], **arms)
    seed = borrowed.noise[0].seed
    assert seed.freedom == 18 and seed.variance > 0
    assert borrowed.by_run[0].var() == pytest.approx(seed.variance, rel=0.1)
    # An arm of four seeds has a quarter of the variance.
    assert borrowed.by_run[1].var() == pytest.approx(borrowed.by_run[0].var() / 4, rel=0.2)


def test_intervals_are_those_of_students_t():
    """Without noise of questions, the change is known up to seeds, which few runs have measured."""
    normal = np.random.default_rng(0).standard_normal((1, fx.DRAWS))
    component = Component(mean_square=4.0, rest=0.0, freedom=3)
    effects = fx.Effects(
        ("a",),
        np.linspace(0.1, 0.3, 50)[None],
        np.zeros((1, fx.DRAWS)),
        2.0 * normal,
        np.array([[1.0, 0.0]]),
        (Noise(component, None),),
        np.random.default_rng(1).random(fx.DRAWS),
        (50,),
    )
    estimate = effects.change("a").estimate
    assert estimate.value == pytest.approx(10)
    # t(0.975) with 3 degrees of freedom is 3.182.
    assert (estimate.high - estimate.low) / 2 == pytest.approx(2 * 3.182, rel=0.1)


def test_a_component_of_0_leaves_its_degrees_of_freedom():
    """Seeds that agree by chance are measured to differ little, and not unmeasured."""
    rng = np.random.default_rng(0)
    by_question = 0.1 * rng.standard_normal((1, fx.DRAWS))
    effects = fx.Effects(
        names=("arm",),
        gaps=rng.standard_normal((1, 50)),
        by_question=by_question,
        by_run=np.zeros_like(by_question),
        shares=np.array([[1.0, 0.0]]),
        noise=(Noise(Component(mean_square=1.0, rest=2.0, freedom=3), None),),
        chance=rng.random(fx.DRAWS),
        sizes=(50,),
    )
    estimate = effects.change("arm").estimate
    # Student's t with 3 degrees of freedom is beyond 3.18 in 5%.
    assert estimate.high - estimate.low == pytest.approx(2 * 3.18 * by_question.std(), rel=0.1)


def test_another_arm_moves_no_interval_of_an_arm():
    before, after = draws(seed=1), draws(p=0.6, seed=2)
    two = [[after, draws(p=0.6, seed=4)], [draws(p=0.5, seed=3)] * 2]
    alone = found(before, a=two[0])
    with_another = found(before, other=two[1][:1], a=two[0])
    assert tuple(alone.change("a").estimate) == pytest.approx(
        tuple(with_another.change("a").estimate), rel=1e-12
    )


def test_combinations_have_the_joint_draws():
    before = draws(seed=1)
    arms = {f"a{i}": [draws(p=0.4 + i / 20, seed=i + 2)] for i in range(4)}
    effects = found(before, **arms)
    x = {"a0": 0.0, "a1": 10.0, "a2": 20.0, "a3": 40.0}
    centred = np.array(list(x.values())) - 17.5
    weights = centred / (centred @ centred)
    slope = effects.slope(x)
    values = [effects.change(name).estimate.value for name in x]
    assert slope.estimate.value == pytest.approx(np.polyfit(list(x.values()), values, 1)[0])
    joint = sum(w * effects.change(name).draws for w, name in zip(weights, x, strict=True))
    assert slope.draws == pytest.approx(joint)
    assert effects.slope({"a0": 0.0, "a1": 1.0}) is None
    assert effects.slope(dict.fromkeys(x, 5.0)) is None


def test_max_t_adjusts_for_what_is_independent_and_not_for_copies():
    rng = np.random.default_rng(0)

    def effect(deviations):
        p = 2 * np.mean(deviations > 2.4)
        return fx.Effect(Estimate(2.4, 0, 0), float(p), 9.0, 2.4 + deviations, 100)

    one = rng.standard_normal(4000)
    copies = fx.max_t({i: effect(one) for i in range(10)})
    assert copies[0] == pytest.approx(effect(one).p, abs=0.006)
    apart = fx.max_t({i: effect(rng.standard_normal(4000)) for i in range(10)})
    p = 2 * (1 - NormalDist().cdf(2.4))
    assert apart[0] == pytest.approx(1 - (1 - p) ** 10, rel=0.25)
    assert fx.max_t({}) == {}


def test_a_large_effect_is_shown_in_a_table_of_hundreds():
    """The p value of one effect has a floor of 2 in 4001, which 400 effects would raise to 0.2."""
    rng = np.random.default_rng(0)

    def effect(value):
        draws = value + rng.standard_normal(fx.DRAWS)
        p = 2 * (1 + min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0)))
        return fx.Effect(Estimate(value, 0, 0), min(1.0, p / (1 + fx.DRAWS)), 9.0, draws, 100)

    adjusted = fx.max_t({0: effect(8.0)} | {i: effect(0.0) for i in range(1, 400)})
    assert adjusted[0] < 0.001
    assert min(p for i, p in adjusted.items() if i) > 0.05


@pytest.mark.parametrize(
    ("freedom", "noncentrality"),
    # By `scipy.stats.nct`: what puts 80% beyond t(0.975).
    [(1, 16.334), (2, 5.653), (3, 4.256), (10, 3.110), (1e6, 2.802)],
)
def test_a_detectable_effect_is_of_the_noncentral_t_distribution(freedom, noncentrality):
    assert noise.detectable(1.7, freedom) == pytest.approx(1.7 * noncentrality, rel=1e-3)
    # Farther limits, as of many comparisons, take a larger effect.
    farther = 3.0 + NormalDist().inv_cdf(0.8)
    assert noise.detectable(1.0, 1e6, 3.0) == pytest.approx(farther, rel=0.01)
    assert noise.detectable(0.0, freedom) == 0


def test_the_plan_takes_the_model_nearest_to_the_student():
    student, near, far = draws(300, 2, 0.5, 5), draws(300, 2, 0.5, 5), draws(300, 2, 0.5, 6)
    near[:40] = 1 - near[:40]
    size = noise.planned(results(student), {"near": results(near), "far": results(far)}, "in")
    gaps = (near - student).mean(axis=1)
    z = Z95 + NormalDist().inv_cdf(0.8)
    assert size == pytest.approx(100 * z * gaps.std(ddof=1) / math.sqrt(300), rel=0.07)
    # Without another model, or with copies of the student, answers are taken as independent.
    within = np.mean(student.mean(axis=1) * (1 - student.mean(axis=1)))
    alone = pytest.approx(noise.detectable(100 * math.sqrt(2 * within / 300), 299))
    assert noise.planned(results(student), {}, "in") == alone
    assert noise.planned(results(student), {"copy": results(student)}, "in") == alone
    assert noise.planned(results(np.zeros((50, 1), int)), {}, "in") > 0


STUDIES = 150


@pytest.fixture
def simulation():
    with shared_draws():
        yield


SEEDS = {"one borrows": ONE_BORROWS, "two": TWO, "three": THREE}


def cells(cases, *kept):
    """Each domain and SD of the seed with each number of seeds; all but `kept` are exhaustive."""
    product = [(domain, sd, seeds) for domain, sd in cases for seeds in SEEDS]
    marked = mostly(pytest.mark.exhaustive, product, *map(product.index, kept))
    return pytest.mark.parametrize(("domain", "sd", "seeds"), marked)


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
@cells(
    [("in", 0.0), ("out", 1.0), ("in", 2.0), ("unequal", 1.0)],
    ("in", 0.0, "three"),
    ("out", 1.0, "one borrows"),
    ("in", 2.0, "two"),
    ("unequal", 1.0, "three"),
)
def test_false_positives_are_as_promised(domain, sd, seeds):
    for found in false_positives(domain, SEEDS[seeds], sd, STUDIES):
        assert found.rate - 2 * found.error <= 7
        assert found.rate + 2 * found.error >= 3


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("domain", mostly(pytest.mark.exhaustive, ["in", "unequal"], 1))
def test_unlike_draws_have_false_positives_as_promised(domain):
    """Many top arms with little noise of draws, a few random ones with much, and some without."""
    for name, found in false_positives_of_draws(domain, 1.0, 100).items():
        assert found.rate - 2 * found.error <= 7, name
        assert found.rate + 2 * found.error >= 3, name


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
def test_few_changes_in_unequal_suites_have_intervals_that_cover(share):
    """Gains and losses are as likely, in suites of 300 and 10 questions that count the same."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        suites = {f"s{n}": (rng.random(n) < 0.5, rng.random(n) < share) for n in (300, 10)}
        before, after = (
            {s: Answers(np.arange(len(r)), 1.0 * r, np.ones(len(r), int)) for s, r in right.items()}
            for right in (
                {s: r for s, (r, _) in suites.items()},
                {s: r ^ turned for s, (r, turned) in suites.items()},
            )
        )
        e = fx.effects(before, {"a": {fx.Run(0, 0): after}}, "in", read=lambda a, _: a)
        change = e.change("a").estimate
        covered.append([change.low <= 0 <= change.high])
    found = rate(covered)
    assert found.rate + 2 * found.error >= 95


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
@cells(
    [("in", 1.0), ("out", 2.0), ("unequal", 1.0)],
    ("out", 2.0, "two"),
    ("unequal", 1.0, "one borrows"),
)
def test_intervals_contain_the_truth(domain, sd, seeds):
    found = coverage(domain, SEEDS[seeds], sd, STUDIES)
    assert found.rate + 2 * found.error >= 92
    assert found.rate - 2 * found.error <= 98


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
@pytest.mark.parametrize(
    ("seeds", "sd"),
    [((1,) * 6 + (2,), 1.0), ((1,) * 6 + (3,), 3.0), ((3,) * 2, 3.0), ((3,) * 14, 1.0)],
)
def test_an_effect_of_the_detectable_size_is_shown_with_the_promised_power(seeds, sd):
    _, shown = power("in", seeds, sd, 200)
    assert shown.rate == pytest.approx(80, abs=3 * shown.error + 3)


@pytest.mark.slow
@pytest.mark.usefixtures("simulation")
def test_a_null_page_claims_something_in_one_study_of_twenty():
    claimed, arms = [], []
    for e in simulated_effects("out", ONE_BORROWS, 1.0, 2 * STUDIES):
        claims = {"slope": e.slope(LADDERS[0]), "contrast": e.contrast("a5", "a4")}
        claimed.append([min(fx.max_t(claims).values()) < 0.05])
        arms.append([min(fx.max_t({name: e.change(name) for name in e.names}).values()) < 0.05])
    for found in map(rate, (claimed, arms)):
        assert found.rate - 2 * found.error <= 6
