"""TRL's numbers: losses on stored log-probabilities, and two training runs of 20 steps replayed by the real engine."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import Objective
from deltapref_jax.models import weights
from deltapref_jax.models.spec import spec_from_hf
from deltapref_jax.scoring.logprobs import scorer
from deltapref_jax.scoring.packing import capacity, pack
from deltapref_jax.training import objectives
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.data import Group, Row, pack_step
from deltapref_jax.training.loop import Run, train
from deltapref_jax.training.state import Optimizer

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
LOSSES = json.loads((GOLDEN / "losses.json").read_text())
ROWS, LENGTH = 16, 32


def ratios():
    found = {}
    for side in ("chosen", "rejected"):
        values = LOSSES["inputs"][side]
        found[side] = np.array(values["policy_logps"], np.float64) - np.array(values["ref_logps"], np.float64)
    return found["chosen"], found["rejected"]


@pytest.mark.parametrize("name", ["sigmoid|beta=0.1", "sigmoid_norm|beta=5"])
def test_dpo_losses_and_gradients(name):
    case = LOSSES["dpo"][name]
    c, r = ratios()
    n = [np.array(LOSSES["inputs"][side]["length"], np.float64) for side in ("chosen", "rejected")]
    beta = case["params"]["beta"]
    with jax.enable_x64(True):
        def loss(c, r):
            return objectives.dpo(c, r, beta) if name.startswith("sigmoid|") else objectives.dpo_norm(c, r, *n, beta)

        got = loss(jnp.asarray(c), jnp.asarray(r))
        gradient = jax.grad(lambda c, r: loss(c, r).mean(), argnums=(0, 1))(jnp.asarray(c), jnp.asarray(r))
        np.testing.assert_allclose(got.mean(), case["loss_mean_f64"], rtol=1e-6)
        if "losses_f64" in case:
            np.testing.assert_allclose(got, case["losses_f64"], rtol=1e-6, atol=1e-12)
        for side, g in zip(("chosen", "rejected"), gradient, strict=True):
            np.testing.assert_allclose(g, case[f"grad_{side}_first_f64"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", list(LOSSES["kto"]))
def test_kto_losses(name):
    case = LOSSES["kto"][name]
    x = np.concatenate(ratios())
    parameters = case["params"]
    with jax.enable_x64(True):
        z0 = objectives.kto_baseline(jnp.asarray(x[case["kl_rows"]]).mean())
        np.testing.assert_allclose(z0, case["kl_f64"], rtol=1e-6, atol=1e-12)
        got = objectives.kto(jnp.asarray(x[case["rows"]]), jnp.asarray(case["labels"], float), z0,
                             parameters.get("beta", 0.1), parameters.get("dw", 1.0), parameters.get("uw", 1.0))
        np.testing.assert_allclose(got.mean(), case["loss_mean_f64"], rtol=1e-6)


def test_losses_are_finite_far_out():
    far = jnp.array([1000.0, -1000.0, 0.0])
    for losses in (objectives.dpo(far, -far, 1.0), objectives.dpo_norm(far, -far, 1.0 + 0 * far, 1.0 + 0 * far, 10.0),
                   objectives.kto(far, jnp.array([1.0, 0.0, 1.0]), 0.0, 1.0)):
        assert np.isfinite(losses).all()
    gradient = jax.grad(lambda c: objectives.dpo(c, -c, 1.0).sum())(far)
    np.testing.assert_allclose(gradient, [0.0, -2.0, -1.0])


@pytest.fixture(scope="module")
def model():
    folder = GOLDEN / "train" / "tied"
    spec, read, names = weights._read_folder(folder)
    assert spec == spec_from_hf(json.loads((folder / "config.json").read_text()))
    return spec, weights.assemble(spec, read, False, str(folder), names)


def rows_of(model, mesh, ids, attention, completion):
    """Rows with the initial model's log-probabilities as reference."""
    rows = []
    for row, seen, target in zip(ids, attention, completion, strict=True):
        n, start = sum(seen), target.index(1)
        assert target[start:n] == [1] * (n - start)
        rows.append(Row(row[:start], row[start:n]))
    run = scorer(model[0], "float32", capacity(ROWS, LENGTH), mesh)
    sums = np.zeros(len(rows), np.float32)
    for micro in pack([row.sample() for row in rows], [[i] for i in range(len(rows))], ROWS, LENGTH):
        sums[micro.order] = np.asarray(run(model[1], micro.batch)[0])[: len(micro.order)]
    return [row._replace(reference=s) for row, s in zip(rows, sums, strict=True)]


def step_data(model, mesh, kind, batch):
    rows = rows_of(model, mesh, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    if kind == "dpo":
        return pack_step([Group(pair) for pair in zip(rows[:8], rows[8:], strict=True)], kind, ROWS, LENGTH)
    partners = rows_of(model, mesh, batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
    return pack_step([Group((row,), label, partner) for row, label, partner
                      in zip(rows, map(float, batch["label"]), partners, strict=True)], kind, ROWS, LENGTH)


@pytest.mark.parametrize("name", ["dpo_sigmoid_tied", "kto_tied"])
def test_training_replays(name, model, one_device, tmp_path):
    golden = json.loads((GOLDEN / "train" / f"{name}.json").read_text())
    kind = name.split("_")[0]
    data = [step_data(model, one_device, kind, batch) for batch in golden["unique_batches"]]
    run = Run(Objective(name=kind, kind=kind, beta=0.1, learning_rate=1e-3), 20, ROWS, LENGTH, warmup=0.2,
              optimizer=Optimizer(1.0, 0.1), checkpoint_every=100)
    train(model[0], model[1], lambda step: data[golden["microbatch_order"][step]], run, one_device, tmp_path,
          guard=True)
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row, want in zip(rows, golden["steps"], strict=True):
        compared = [k for k in want if k.startswith(("rewards/", "logps/")) or k in ("loss", "grad_norm", "kl")]
        assert len(compared) >= 7
        for key in compared:
            if key == "loss":
                np.testing.assert_allclose(row[key], want[key], rtol=1e-5, err_msg=f"{key} at step {row['step']}")
            else:  # sums of log-probabilities are near -70, where float32 steps by 8e-6
                np.testing.assert_allclose(row[key], want[key], rtol=5e-7, atol=6e-6 if "log" not in key else 2e-5,
                                           err_msg=f"{key} at step {row['step']}")


def test_initial_token_logprobs(model, one_device):
    golden = json.loads((GOLDEN / "train" / "dpo_sigmoid_tied.json").read_text())
    batch = golden["unique_batches"][0]
    rows = rows_of(model, one_device, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
    want = [sum(row) for row in golden["initial_token_logps_first_microbatch"]]
    np.testing.assert_allclose([row.reference for row in rows], want, rtol=5e-7)
    assert isinstance(model[1], nnx.State)
