"""An arm from its tables: the first loss in closed form, refusals, counts of what is dropped."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from deltapref_jax.config import OBJECTIVE_KINDS, ConfigError, Lora, Objective, Training
from deltapref_jax.models.weights import load
from deltapref_jax.records import LogProb, Pair, digest
from deltapref_jax.stages.train import Policy
from tests.marks import mostly

LOCAL_ROWS = 8


def pairs(bench):
    rows = []
    for q in bench.questions:
        chosen, rejected = (digest(q.prompt_id, name) for name in ("strong", "weak"))
        unknown = [None] * 4
        pair_id = digest(chosen, rejected)
        rows.append(Pair(pair_id, q.prompt_id, chosen, rejected, "strong", "weak", *unknown))
    return bench.given(Pair, rows)


@pytest.fixture
def traces(bench, worked):
    return {"strong": bench.traces("strong", worked[0]), "weak": bench.traces("weak", worked[1])}


def scored(bench, traces, **shape):
    return {name: bench.score(bench.tokens(table), **shape) for name, table in traces.items()}


def arm(bench, traces, kind="dpo", seed=0, scores=None, reference=None, **training):
    shape = {"pairs_per_step": 6, "steps": 2, "rows": LOCAL_ROWS, "row_length": 160, "warmup": 0.0}
    with_reference = OBJECTIVE_KINDS[kind].reference
    return Policy(
        label=("train", kind, str(seed)),
        pairs=pairs(bench),
        sequences={name: bench.tokens(table) for name, table in traces.items()},
        logprobs=(scores or scored(bench, traces)) if with_reference else {},
        student_weights=bench.weights,
        reference_weights=reference or bench.weights,
        objective=Objective(name=kind, kind=kind, learning_rate=1e-3),
        training=Training(**shape | training),
        seed=seed,
        student=bench.model,
        mesh=bench.mesh,
    )


def metrics(bench, node):
    bench.make(node)
    lines = (bench.workspace.path(node) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def matched(bench, table):
    """The student's log-probabilities of the traces as they are."""
    return [row for row in bench.rows(LogProb, bench.score(bench.tokens(table))) if row.matched]


@pytest.mark.parametrize(
    ("kind", "loss"),
    mostly(
        pytest.mark.slow,
        [
            ("dpo", math.log(2)),
            ("dpo_norm", math.log(2)),
            ("ipo", 25),
            ("kto", 0.5),
            ("apo_zero_unpaired", 0.5),
        ],
        *(0, 3),
    ),
)
def test_the_first_loss_is_that_of_the_reference_itself(bench, traces, tiny, kind, loss):
    node = arm(bench, traces, kind)
    rows = metrics(bench, node)
    assert [r["step"] for r in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-4 if loss < 1 else 1e-2)
    assert rows[1]["loss"] < rows[0]["loss"]
    stats = bench.stats(node)
    groups = 12 if OBJECTIVE_KINDS[kind].unit == "example" else 6
    assert (stats["pairs"], stats["groups"], stats["steps"], stats["dropped_long"]) == (
        6,
        groups,
        2,
        0,
    )
    assert stats["epochs"] == 2 * stats["batch"] / groups
    policy = load(str(bench.workspace.path(node) / "policy"))
    assert policy.spec == tiny.spec
    before, after = (nnx.to_pure_dict(model.state) for model in (tiny, policy))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("kind", "loss"), mostly(pytest.mark.slow, [("dpo", math.log(2)), ("kto", 0.5)], 1)
)
def test_adapters_start_at_their_base_and_are_exported_merged_and_alone(
    bench, traces, tiny, kind, loss
):
    node = arm(bench, traces, kind, lora=Lora(4, 2.0, ("o_proj", "up_proj")), moments="bfloat16")
    rows = metrics(bench, node)
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert rows[1]["loss"] < rows[0]["loss"]
    folder = bench.workspace.path(node)
    before, after = (
        nnx.to_pure_dict(model.state)["blocks"] for model in (tiny, load(str(folder / "policy")))
    )
    assert {name for name in before if (before[name] != after[name]).any()} == {"o", "up"}
    alone = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(alone) == 2 * 2 * tiny.spec.layers
    a, b = (
        alone[f"base_model.model.model.layers.0.mlp.up_proj.lora_{side}.weight"] for side in "AB"
    )
    np.testing.assert_allclose(after["up"][0], before["up"][0] + 0.5 * (b @ a).T, atol=1e-6)
    files = bench.workspace.manifest(node).files
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "policy/model.safetensors",
    } <= {*files}


def test_sft_starts_at_the_token_mean_of_the_chosen(bench, traces):
    chosen = matched(bench, traces["strong"])
    want = -sum(r.logprob for r in chosen) / sum(r.tokens for r in chosen)
    rows = metrics(bench, arm(bench, traces, "sft"))
    assert rows[0]["loss"] == pytest.approx(want, rel=1e-5)
    assert rows[0]["num_tokens"] > sum(r.tokens for r in chosen)


def test_simpo_starts_at_its_equation_without_a_table(bench, traces):
    means = {
        name: [r.logprob / r.tokens for r in matched(bench, table)]
        for name, table in traces.items()
    }
    node = arm(bench, traces, "simpo")
    assert not [name for name in node.inputs() if name.startswith("logprobs/")]
    first = metrics(bench, node)[0]
    want = np.logaddexp(0, 0.5 - 0.1 * (np.array(means["strong"]) - np.array(means["weak"]))).mean()
    assert first["loss"] == pytest.approx(want, rel=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0.1 * np.mean(means["strong"]), rel=1e-5)


def test_first_log_probabilities_are_those_of_the_tables(bench, traces):
    sums = {name: [r.logprob for r in matched(bench, t)] for name, t in traces.items()}
    for kind in ("dpo", "kto"):
        first = metrics(bench, arm(bench, traces, kind))[0]
        assert first["logps/chosen"] == pytest.approx(np.mean(sums["strong"]), rel=1e-5)
        assert first["logps/rejected"] == pytest.approx(np.mean(sums["weak"]), rel=1e-5)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)


def test_the_same_arm_is_the_same_bytes_and_another_seed_is_not(bench, traces):
    def weights(node):
        return (
            bench.workspace.path(bench.make(node)) / "policy" / "model.safetensors"
        ).read_bytes()

    node, other = (arm(bench, traces, seed=s, pairs_per_step=2) for s in (0, 1))
    once = weights(node)
    (bench.workspace.path(node)).rmtree()
    assert weights(node) == once
    assert weights(other) != once


def test_a_table_by_other_weights_than_the_reference_is_refused(bench, traces):
    scores = scored(bench, traces)
    with pytest.raises(ConfigError) as error:
        bench.make(arm(bench, traces, scores=scores, reference="f" * 16))
    assert str(error.value) == (
        f"The table {bench.workspace.path(scores['strong'])} was made by the weights "
        f"{bench.weights} and the reference has the weights {'f' * 16}; name the model that made "
        "it in config.reference.path, or leave config.table empty to have it computed."
    )


def forged(bench, traces, change, weights=None):
    """Tables that claim the student's weights, or others, with changed rows."""
    return {
        name: bench.given(
            LogProb,
            [change(row) for row in bench.rows(LogProb, table)],
            weights=weights or bench.weights,
        )
        for name, table in scored(bench, traces).items()
    }


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_policy_that_differs_from_its_reference_is_refused(bench, traces, kind):
    scores = forged(
        bench, traces, lambda row: row._replace(logprob=row.logprob - 0.05 * row.matched)
    )
    with pytest.raises(
        ConfigError,
        match=r"^Before training the policy's log-probabilities differ from its "
        r"reference's in 12 of \d\d rows, by up to 0\.05\d* nats over \d+ tokens "
        r"\(noise allowed there: 0\.0\d+; traces, worst first: \w+, .*\); likely "
        r"reasons: the table was made by other weights, .*\. Score again with this "
        r"student as the reference\.$",
    ):
        bench.make(arm(bench, traces, kind, scores=scores))


def test_a_reference_of_its_own_is_not_guarded(bench, traces):
    scores = forged(
        bench, traces, lambda row: row._replace(logprob=row.logprob - 0.05), weights="e" * 16
    )
    rows = metrics(bench, arm(bench, traces, scores=scores, reference="e" * 16))
    assert rows[0]["rewards/chosen"] == pytest.approx(0.1 * 0.05, rel=1e-2)


@pytest.fixture
def uneven(bench, worked):
    """The last two questions have a chosen trace of hundreds of tokens."""
    long = ["so " * 210, "so " * 210]
    return {
        "strong": bench.traces("strong", [*worked[0][:4], *long]),
        "weak": bench.traces("weak", worked[1]),
    }


@pytest.mark.parametrize(
    ("kind", "groups", "dropped"), [("dpo", 4, 2), ("sft", 4, 2), ("kto", 10, 2)]
)
def test_what_is_too_long_is_dropped_and_counted(bench, uneven, kind, groups, dropped):
    scores = scored(bench, uneven, row_length=800)
    stats = bench.stats(arm(bench, uneven, kind, scores=scores, steps=1))
    assert (stats["groups"], stats["dropped_long"]) == (
        groups,
        dropped,
    )  # KTO has no pairs: the short half stays
    assert stats["dropped_mismatched"] == 0  # theirs went with them


def test_what_was_too_long_to_be_scored_is_counted_too(bench, uneven):
    stats = bench.stats(arm(bench, uneven, steps=1))
    assert (stats["pairs"], stats["groups"], stats["dropped_long"]) == (6, 4, 2)


def test_too_long_may_be_an_error(bench, uneven):
    with pytest.raises(
        ConfigError,
        match=r"^2 of 6 groups are longer than config\.training\.row_length \(160 "
        r"tokens\); raise it, or set over_length to 'drop'\.$",
    ):
        bench.make(arm(bench, uneven, "sft", over_length="error"))


def test_everything_too_long_is_one_sentence(bench, traces):
    with pytest.raises(
        ConfigError,
        match=r"^All 6 groups are longer than config\.training\.row_length \(9 tokens\); "
        r"raise it\.$",
    ):
        bench.make(arm(bench, traces, "sft", row_length=9))


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"budget": "epochs", "epochs": 2.0}, 6),
        ({"steps": 3}, 3),
        ({"budget": "epochs", "epochs": 0.1}, 1),
    ],
)
def test_the_budget(bench, traces, budget, steps):
    rows = metrics(bench, arm(bench, traces, "sft", pairs_per_step=2, **budget))
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    assert rows[-1]["epoch"] == pytest.approx(steps * 2 / 6, abs=1e-6)
