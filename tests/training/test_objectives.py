"""Losses against their equations, gradients against differences, a step against its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Objective, Training
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.packing import max_segments
from deltapref_jax.training import objectives, step
from deltapref_jax.training.data import Data, Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import summarise, train_step
from deltapref_jax.training.objectives import LOSSES, Hyper, Terms
from deltapref_jax.training.state import Optimizer, init_state

HYPER = Hyper(
    beta=0.3,
    label_smoothing=0.2,
    gamma=0.7,
    nll_weight=0.0,
    desirable_weight=1.3,
    undesirable_weight=0.6,
    z0=0.4,
    total=1.0,
    chosen_tokens=1.0,
)


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def expected(kind, t, h=HYPER):
    """The equations, with log σ(x) = -log(1 + e^-x), from the tables of the papers."""
    c, r, b, e = t.first, t.second, h.beta, h.label_smoothing
    n, m = np.maximum(t.first_tokens, 1), np.maximum(t.second_tokens, 1)
    d, mean = c - r, c / n - r / m
    weight = np.where(t.desirable > 0, h.desirable_weight, h.undesirable_weight)
    sign = np.where(t.desirable > 0, 1, -1)
    return {
        "dpo": softplus(-b * d),
        "dpo_norm": softplus(-b * mean),
        "hinge": np.maximum(0, 1 - b * d),
        "ipo": (mean - 1 / (2 * b)) ** 2,
        "robust": ((1 - e) * softplus(-b * d) - e * softplus(b * d)) / (1 - 2 * e),
        "cdpo": (1 - e) * softplus(-b * d) + e * softplus(b * d),
        "apo_zero": sigmoid(-b * c) + sigmoid(b * r),
        "apo_down": sigmoid(b * c) + sigmoid(-b * d),
        "simpo": softplus(-(b * mean - h.gamma)),
        "kto": weight * sigmoid(-sign * b * (c - h.z0)),
        "apo_zero_unpaired": weight * sigmoid(-sign * b * c),
        "sft": -c,
    }[kind]


def terms(scale, size=40):
    r = np.random.default_rng(3)
    return Terms(
        *r.normal(0, scale, (2, size)),
        *r.integers(0, 30, (2, size)).astype(float),
        r.integers(0, 2, size).astype(float),
    )


def test_every_kind_has_its_loss():
    assert LOSSES.keys() == OBJECTIVE_KINDS.keys()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_losses_are_their_equations(kind, scale):
    t = terms(scale)
    with jax.enable_x64(True):
        got = LOSSES[kind](Terms(*map(jnp.asarray, t)), HYPER)
        assert got.shape == (40,)
        np.testing.assert_allclose(got, expected(kind, t), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_differences(kind):
    t, h = terms(3.0), 1e-5
    with jax.enable_x64(True):
        got = jax.grad(
            lambda c, r: LOSSES[kind](t._replace(first=c, second=r), HYPER).sum(), (0, 1)
        )(jnp.asarray(t.first), jnp.asarray(t.second))
    for name, g in zip(("first", "second"), got, strict=True):
        up, down = (expected(kind, t._replace(**{name: getattr(t, name) + s})) for s in (h, -h))
        np.testing.assert_allclose(g, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_losses_and_gradients_are_right_far_out_in_float32(kind, beta):
    far = np.array([(c, r) for c in (-1000.0, 0.0, 1000.0) for r in (-1000.0, 0.0, 1000.0)] * 2)
    t = Terms(
        far[:, 0], far[:, 1], np.repeat([1.0, 500.0], 9), np.ones(18), np.repeat([1.0, 0.0], 9)
    )
    h = HYPER._replace(beta=beta, gamma=0.5)
    narrow = Terms(*(jnp.asarray(x, jnp.float32) for x in t))
    np.testing.assert_allclose(LOSSES[kind](narrow, h), expected(kind, t, h), rtol=2e-6, atol=1e-30)
    got = jax.grad(lambda c, r: LOSSES[kind](narrow._replace(first=c, second=r), h).sum(), (0, 1))(
        *narrow[:2]
    )
    with jax.enable_x64(True):
        wide = Terms(*map(jnp.asarray, t))
        want = jax.grad(
            lambda c, r: LOSSES[kind](wide._replace(first=c, second=r), h).sum(), (0, 1)
        )(*wide[:2])
    for g, w in zip(got, want, strict=True):
        assert np.isfinite(g).all()
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-30)


def test_saturated_gradients_in_closed_form():
    far = jnp.array([1000.0, -1000.0, 0.0])
    zero = jnp.zeros(3)
    for loss, want in (
        (lambda c: objectives.dpo(c, zero, 1.0), [0, -1, -0.5]),
        (lambda c: objectives.robust(c, zero, 1.0, 0.1), [-0.125, -1.125, -0.625]),
        (lambda c: objectives.cdpo(c, zero, 1.0, 0.1), [0.1, -0.9, -0.4]),
        (lambda c: objectives.hinge(c, zero, 1.0), [0, -1, -1]),
        (lambda c: objectives.apo_zero(c, zero, 1.0), [0, 0, -0.25]),
    ):
        np.testing.assert_allclose(
            jax.grad(lambda c, loss=loss: loss(c).sum())(far), want, rtol=1e-6, atol=1e-30
        )


def test_the_baseline_is_clamped_after_the_mean_and_has_no_gradient():
    shifts = jnp.array([3.0, -5.0, 1.0])
    assert objectives.kto_baseline(shifts.mean()) == 0.0  # clamped first it would be 4/3
    assert objectives.kto_baseline(-shifts.mean()) == pytest.approx(1 / 3)
    np.testing.assert_array_equal(jax.grad(lambda x: objectives.kto_baseline(-x.mean()))(shifts), 0)


def behind(row, prompt, reference=None):
    """The completion of `row` behind another prompt."""
    sequence = row.sequence._replace(prompt_ids=np.asarray(prompt))
    return ReferencedSequence(sequence, row.reference if reference is None else reference)


def groups(vocab, paired, count=8):
    r = np.random.default_rng(0)
    sequences = [
        TokenSequence(
            r.integers(0, vocab, 6), r.integers(0, vocab, r.integers(3, 24)), trace_id=f"t{i}"
        )
        for i in range(2 * count)
    ]
    rows = [ReferencedSequence(sequence, -40.0 - i) for i, sequence in enumerate(sequences)]
    if paired:
        return [Group((rows[i], rows[i + count])) for i in range(count)]
    return [
        Group((row,), float(i % 2), behind(row, rows[i - 1].sequence.prompt_ids, -50.0))
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("kind", ["ipo", "simpo"])
def test_the_nll_term_is_a_token_mean_over_the_step_and_all_numbers_are_arguments(
    tiny, one_device, kind
):
    step.programs.cache_clear()
    results, pairs = {}, groups(tiny.spec.vocab, True)
    for rows in (16, 2):
        programs = step.programs(
            tiny.spec, "float32", kind, Optimizer(), max_segments(rows, 64), one_device
        )
        batch = pack_step(pairs, kind, rows, 64)
        for weight in (0.0, 0.7):
            o = Objective(kind=kind, beta=0.2 + weight, nll_weight=weight, gamma=weight)
            state, sums, s = train_step(
                programs,
                init_state(tiny.state, Optimizer(), one_device),
                batch,
                o,
                1e-3,
                one_device,
            )
            results[rows, weight] = {k: float(v) for k, v in sums.items()}, state.params
            sums = results[rows, weight][0]
            logprobs = {
                t: float(v)
                for ts, vs in zip(batch.traces, s, strict=True)
                for t, v in zip(ts, np.asarray(vs), strict=False)
            }
            c, r = (
                np.array([logprobs[g.rows[i].sequence.trace_id] for g in pairs]) for i in (0, 1)
            )
            n, m = (
                np.array([len(g.rows[i].sequence.completion_ids) for g in pairs]) for i in (0, 1)
            )
            ref = [
                np.array([g.rows[i].reference for g in pairs]) * OBJECTIVE_KINDS[kind].reference
                for i in (0, 1)
            ]
            nll = -c.sum() / n.sum()
            t = Terms(c - ref[0], r - ref[1], n, m, np.ones(len(pairs)))
            want = (
                expected(kind, t, HYPER._replace(beta=o.beta, gamma=o.gamma)).mean() + weight * nll
            )
            np.testing.assert_allclose([sums["loss"], sums["nll_loss"]], [want, nll], rtol=1e-5)
        assert programs.gradient._cache_size() == 1
    for weight in (0.0, 0.7):  # One micro-batch and several give the same.
        assert results[16, weight][0] == pytest.approx(results[2, weight][0], rel=2e-4, abs=2e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            *(results[n, weight][1] for n in (16, 2)),
        )


def test_simpo_ignores_references_and_rewards_token_means(tiny, one_device):
    pairs = groups(tiny.spec.vocab, True)
    programs = step.programs(
        tiny.spec, "float32", "simpo", Optimizer(), max_segments(16, 64), one_device
    )
    plain = [Group(tuple(row._replace(reference=0.0) for row in g.rows)) for g in pairs]
    first, second = (
        train_step(
            programs,
            init_state(tiny.state, Optimizer(), one_device),
            pack_step(g, "simpo", 16, 64),
            Objective(kind="simpo", beta=2.0),
            1e-3,
            one_device,
        )
        for g in (pairs, plain)
    )
    assert {k: float(v) for k, v in first[1].items()} == {k: float(v) for k, v in second[1].items()}
    s = np.asarray(first[2][0])
    batch = pack_step(pairs, "simpo", 16, 64)
    tokens = {
        row.sequence.trace_id: len(row.sequence.completion_ids) for g in pairs for row in g.rows
    }
    means = {t: s[i] / tokens[t] for i, t in enumerate(batch.traces[0])}
    assert float(first[1]["rewards/chosen"]) == pytest.approx(
        2 * np.mean([means[g.rows[0].sequence.trace_id] for g in pairs]), rel=1e-5
    )


def data(examples, **changes):
    fraction = changes.pop("fraction", 1.0)
    return Data(
        examples,
        "kto",
        Training(**{"pairs_per_step": 4, "steps": 6, "rows": 4, "row_length": 64} | changes),
        0,
        fraction,
    )


def measured(batch):
    return [t for ts in batch.traces[len(batch.micros) :] for t in ts]


def test_the_baseline_may_run_on_a_share_of_the_step():
    examples = groups(50, False)
    whole, part = data(examples), data(examples, fraction=0.3)
    for at in range(4):
        members = {examples[i].rows[0].sequence.trace_id for i in whole.members(at)}
        assert set(measured(whole(at))) == members
        assert len(measured(part(at))) == 3  # of 8, rounded up
        assert set(measured(part(at))) < members
        assert measured(part(at)) == measured(data(examples, fraction=0.3)(at))
        assert part(at).tokens < whole(at).tokens
        assert len(part(at).micros) == len(whole(at).micros)
    kinds = {
        tuple(part.members(at).index(int(t[1:])) for t in sorted(measured(part(at))))
        for at in range(4)
    }
    assert len(kinds) > 1  # The share is not always of the same positions of the step.


def test_a_mismatched_row_that_is_too_long_is_dropped_alone_and_counted():
    examples = groups(50, False)
    long = [
        g._replace(mismatched=behind(g.mismatched, [1] * 60)) if i in (2, 5) else g
        for i, g in enumerate(examples)
    ]
    kept = data(long)
    assert (len(kept.groups), kept.dropped, kept.dropped_mismatched) == (16, 0, 2)
    assert {t for at in range(2) for t in measured(kept(at))} == {
        f"t{i}" for i in range(16) if i not in (2, 5)
    }
    with pytest.raises(
        ConfigError,
        match=r"^2 of 16 mismatched rows \(a completion behind another prompt, for KTO's "
        r"baseline\) are longer than config\.training\.row_length \(64 tokens\); "
        r"raise it, or set over_length to 'drop'\.$",
    ):
        data(long, over_length="error")
    with pytest.raises(
        ConfigError, match=r"^None of the 16 KTO examples has a mismatched row for the baseline; "
    ):
        data([g._replace(mismatched=None) for g in examples])


def test_a_step_without_a_mismatched_row_takes_others_of_the_data():
    examples = groups(50, False)
    first = data(examples).members(0)
    rest = data([g._replace(mismatched=None) if i in first else g for i, g in enumerate(examples)])
    assert len(measured(rest(0))) == 8
    assert set(measured(rest(0))).isdisjoint(f"t{i}" for i in first)


def test_one_row_and_one_prompt_are_refused():
    examples = groups(50, False)
    with pytest.raises(
        ConfigError,
        match=r"^A step of KTO would hold one example, and its baseline would be that "
        r"example's own log-ratio, .*; give at least two examples\.$",
    ):
        data(examples[:1])
    same = [g._replace(rows=(behind(g.rows[0], [7, 8]),)) for g in examples]
    with pytest.raises(
        ConfigError,
        match=r"^Step 1 of KTO \(6 of 6 steps\) would hold 8 examples of one prompt; .*: "
        r"raise config\.training\.pairs_per_step, or use more prompts\.$",
    ):
        data(same)
    # Every step holds all examples, so one other prompt is enough.
    assert data(same[:15] + examples[15:], pairs_per_step=8).batch == 16
    with pytest.raises(
        ConfigError,
        match=r"^Step \d of KTO \([34] of 6 steps\) would hold 8 examples of one prompt; ",
    ):
        data(same[:15] + examples[15:])
    assert (
        Data(same, "apo_zero_unpaired", Training(pairs_per_step=4, steps=6, row_length=64), 0).batch
        == 8
    )


@pytest.mark.parametrize("kind", [k for k, v in OBJECTIVE_KINDS.items() if v.unit == "pair"])
def test_a_coin_moves_the_two_traces_of_a_pair_against_each_other_or_not_at_all(kind):
    """All but APO-down, which lowers both; so a coin with it is refused."""
    t = terms(1.0)
    t = t._replace(second_tokens=t.first_tokens)

    def mean(c, r):
        ways = t._replace(first=c, second=r), t._replace(first=r, second=c)
        return sum(LOSSES[kind](way, HYPER).sum() for way in ways) / 2

    first, second = jax.grad(mean, (0, 1))(jnp.asarray(t.first), jnp.asarray(t.second))
    assert np.allclose(first + second, 0, atol=1e-6) == (kind != "apo_down")


@pytest.mark.parametrize("kind", [k for k, v in OBJECTIVE_KINDS.items() if v.unit == "example"])
@pytest.mark.parametrize("undesirable", [HYPER.desirable_weight, HYPER.undesirable_weight])
def test_a_coin_moves_no_example_where_both_labels_weigh_the_same(kind, undesirable):
    t, h = terms(1.0), HYPER._replace(undesirable_weight=undesirable)

    def mean(x):
        labels = jnp.ones_like(x), jnp.zeros_like(x)
        return sum(LOSSES[kind](t._replace(first=x, desirable=y), h).sum() for y in labels) / 2

    slope = jax.grad(mean)(jnp.asarray(t.first))
    assert np.allclose(slope, 0, atol=1e-6) == (undesirable == h.desirable_weight)


def test_a_one_sided_step_is_its_part_of_the_sum_and_has_no_numbers_for_the_other_side():
    x, label = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([1.0, 1.0, 0.0, 0.0])
    both = objectives.kto(x, label, 0.3, 0.5, 1.2, 0.7)
    parts = jnp.concatenate(
        [
            objectives.kto(x[:2], label[:2], 0.3, 0.5, 1.2, 0.7),
            objectives.kto(x[2:], label[2:], 0.3, 0.5, 1.2, 0.7),
        ]
    )
    np.testing.assert_array_equal(both, parts)
    sums = {
        "loss": 0.5,
        "kl": 0.0,
        "grad_norm": 1.0,
        "count/chosen": 0.0,
        "rewards/chosen": 0.0,
        "logps/chosen": 0.0,
        "count/rejected": 4.0,
        "rewards/rejected": 2.0,
        "logps/rejected": -80.0,
    }
    assert summarise("kto", sums) == {
        "loss": 0.5,
        "kl": 0.0,
        "grad_norm": 1.0,
        "rewards/rejected": 0.5,
        "logps/rejected": -20.0,
    }
    assert "kl" not in summarise("apo_zero_unpaired", sums)
