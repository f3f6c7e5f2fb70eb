"""TRL's numbers: losses on stored log-probabilities, and two training runs of 20 steps."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import Objective
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.stored import open_folder
from deltapref_jax.models.weights import assemble
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.logprobs import logprob_fn
from deltapref_jax.scoring.packing import max_segments, pack_sequences
from deltapref_jax.training import objectives
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.data import Group, ReferencedSequence, pack_step
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.objectives import LOSSES as LOSS
from deltapref_jax.training.objectives import Hyper, Terms
from deltapref_jax.training.state import Optimizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
LOSSES = json.loads((GOLDEN / "losses.json").read_text())
ROWS, LENGTH = 16, 32
BLANK = Hyper(
    beta=0.1,
    label_smoothing=0.0,
    gamma=0.0,
    nll_weight=0.0,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    z0=0.0,
    total=8.0,
    chosen_tokens=1.0,
)


KINDS = {"sigmoid": "dpo", "sigmoid_norm": "dpo_norm"}  # TRL's names where ours differ


def sides():
    """Per side: token log-ratios [8, 32], the mask of scored positions, lengths."""
    start = np.array(LOSSES["inputs"]["prompt_len"]) - 1
    for side in ("chosen", "rejected"):
        v = LOSSES["inputs"][side]
        n, at = np.array(v["length"]), np.arange(LENGTH)
        mask = (at >= start[:, None]) & (at < (start + n)[:, None])
        yield (
            np.array(v["policy_token_logps"], np.float64)
            - np.array(v["ref_token_logps"], np.float64),
            mask,
            n,
        )


def loss_of(kind, ratios, other, hyper, desirable=1.0):
    """Loss per pair of token log-ratios, as the training step sums them."""
    (x, mask, n), (_, other_mask, m) = ratios, other
    return LOSS[kind](
        Terms((x * mask).sum(-1), (other[0] * other_mask).sum(-1), n, m, desirable), hyper
    )


@pytest.mark.parametrize("name", list(LOSSES["dpo"]))
def test_paired_losses_and_gradients(name):
    case = LOSSES["dpo"][name]
    parameters, (trl,) = case["params"], case["params"]["loss_types"]
    hyper = BLANK._replace(
        beta=parameters["beta"], label_smoothing=parameters.get("label_smoothing", 0.0)
    )
    chosen, rejected = sides()
    with jax.enable_x64(True):

        def loss(c, r):
            return loss_of(KINDS.get(trl, trl), (c, *chosen[1:]), (r, *rejected[1:]), hyper)

        tokens = jnp.asarray(chosen[0]), jnp.asarray(rejected[0])
        losses = np.asarray(loss(*tokens))
        gradients = [
            np.asarray(g) for g in jax.grad(lambda c, r: loss(c, r).mean(), argnums=(0, 1))(*tokens)
        ]
    np.testing.assert_allclose(losses, case["losses_f64"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(losses.mean(), case["loss_mean_f64"], rtol=1e-6)
    for side, g, (x, mask, n) in zip(
        ("chosen", "rejected"), gradients, (chosen, rejected), strict=True
    ):
        rewards = hyper.beta * (x * mask).sum(-1)
        np.testing.assert_allclose(rewards, case[f"{side}_rewards_f64"], rtol=1e-6, atol=1e-12)
        first = mask.argmax(1)
        for place, at in (("first", first), ("last", first + n - 1)):
            np.testing.assert_allclose(
                g[np.arange(8), at], case[f"grad_{side}_{place}_f64"], rtol=1e-6, atol=1e-12
            )
        np.testing.assert_array_equal(g * ~mask, 0)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("cdpo|beta=0.1|eps=0.1|f64", "cdpo", 1e-6),
        ("cdpo|beta=0.1|eps=0.1|f32", "cdpo", 2e-6),
        ("open_instruct:dpo_norm|beta=5.0|f32", "dpo_norm", 2e-6),
    ],
)
def test_other_losses(name, kind, tolerance):
    case = LOSSES["other"][name]
    hyper = BLANK._replace(beta=5.0 if "norm" in name else 0.1, label_smoothing=0.1)
    chosen, rejected = sides()
    with jax.enable_x64(True):
        losses = np.asarray(loss_of(kind, chosen, rejected, hyper))
    np.testing.assert_allclose(losses, case["losses"], rtol=tolerance, atol=1e-12)
    np.testing.assert_allclose(losses.mean(), case["loss_mean"], rtol=tolerance)


@pytest.mark.parametrize("name", list(LOSSES["kto"]))
def test_kto_losses_and_gradients(name):
    case = LOSSES["kto"][name]
    tokens, mask, n = (np.concatenate(both) for both in zip(*sides(), strict=True))
    x, rows, label = (tokens * mask).sum(-1), case["rows"], np.array(case["labels"], np.float64)
    p = case["params"]
    with jax.enable_x64(True):
        z0 = float(objectives.kto_baseline(jnp.asarray(x[case["kl_rows"]]).mean()))
        np.testing.assert_allclose(z0, case["kl_f64"], rtol=1e-6, atol=1e-12)
        hyper = BLANK._replace(
            beta=p.get("beta", 0.1),
            z0=z0,
            desirable_weight=p.get("dw", 1.0),
            undesirable_weight=p.get("uw", 1.0),
        )

        def loss(t):
            own = t, mask[rows], n[rows]
            return loss_of("kto", own, own, hyper, label)

        losses = np.asarray(loss(jnp.asarray(tokens[rows])))
        gradient = np.asarray(jax.grad(lambda t: loss(t).mean())(jnp.asarray(tokens[rows])))
    np.testing.assert_allclose(losses, case["losses_weighted_f64"], rtol=1e-6)
    np.testing.assert_allclose(losses.mean(), case["loss_mean_f64"], rtol=1e-6)
    np.testing.assert_allclose(hyper.beta * x[rows], case["rewards_f64"], rtol=1e-6, atol=1e-12)
    first = mask[rows].argmax(1)
    for at in (first, first + n[rows] - 1):
        np.testing.assert_allclose(
            gradient[np.arange(len(rows)), at], case["grad_f64"], rtol=1e-6, atol=1e-12
        )


@pytest.fixture(scope="module")
def model():
    folder = GOLDEN / "train" / "tied"
    stored = open_folder(folder)
    assert stored.spec == spec_from_hf(json.loads((folder / "config.json").read_text()))
    return stored.spec, jax.tree.map(np.asarray, assemble(stored, str(folder))[1])


def rows_of(model, mesh, ids, attention, completion):
    """Rows with the initial model's log-probabilities as reference."""
    rows = []
    for row, seen, target in zip(ids, attention, completion, strict=True):
        n, start = sum(seen), target.index(1)
        assert target[start:n] == [1] * (n - start)
        rows.append(TokenSequence(row[:start], row[start:n]))
    run = logprob_fn(model[0], "float32", max_segments(ROWS, LENGTH), mesh)
    sums = np.zeros(len(rows), np.float32)
    for micro in pack_sequences(rows, ROWS, LENGTH, share=False):
        sums[micro.order] = np.asarray(run(model[1], micro.batch)[0])[: len(micro.order)]
    return [ReferencedSequence(row, s) for row, s in zip(rows, sums, strict=True)]


def step_data(model, mesh, kind, batch):
    rows = rows_of(
        model, mesh, batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    )
    if kind == "dpo":
        return pack_step(
            [Group(pair) for pair in zip(rows[:8], rows[8:], strict=True)], kind, ROWS, LENGTH
        )
    partners = rows_of(
        model, mesh, batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"]
    )
    return pack_step(
        [
            Group((row,), label, partner)
            for row, label, partner in zip(rows, map(float, batch["label"]), partners, strict=True)
        ],
        kind,
        ROWS,
        LENGTH,
    )


@pytest.mark.parametrize("name", ["dpo_sigmoid_tied", "kto_tied"])
def test_training_replays(name, model, one_device, tmp_path):
    golden = json.loads((GOLDEN / "train" / f"{name}.json").read_text())
    kind = name.split("_")[0]
    data = [step_data(model, one_device, kind, batch) for batch in golden["unique_batches"]]
    run = Run(
        Objective(name=kind, kind=kind, beta=0.1, learning_rate=1e-3),
        20,
        ROWS,
        LENGTH,
        warmup=0.2,
        optimizer=Optimizer(1.0, 0.1),
        checkpoint_every=100,
    )
    train(
        model[0],
        model[1],
        lambda step: data[golden["microbatch_order"][step]],
        run,
        one_device,
        tmp_path,
        guard=True,
    )
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row, want in zip(rows, golden["steps"], strict=True):
        compared = [
            k
            for k in want
            if k.startswith(("rewards/", "logps/")) or k in ("loss", "grad_norm", "kl")
        ]
        assert len(compared) >= 7
        for key in compared:
            if key == "loss":
                np.testing.assert_allclose(
                    row[key], want[key], rtol=1e-5, err_msg=f"{key} at step {row['step']}"
                )
            else:
                # Sums of log-probabilities are near -70, where float32 steps by 8e-6, and kl is a
                # mean of such sums.
                np.testing.assert_allclose(
                    row[key],
                    want[key],
                    rtol=5e-7,
                    atol=2e-5 if "log" in key or key == "kl" else 6e-6,
                    err_msg=f"{key} at step {row['step']}",
                )


def test_initial_token_logprobs(model, one_device):
    golden = json.loads((GOLDEN / "train" / "dpo_sigmoid_tied.json").read_text())
    batch = golden["unique_batches"][0]
    rows = rows_of(
        model, one_device, batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    )
    want = [sum(row) for row in golden["initial_token_logps_first_microbatch"]]
    np.testing.assert_allclose([row.reference for row in rows], want, rtol=5e-7)
    assert isinstance(model[1], nnx.State)
